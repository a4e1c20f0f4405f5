"""How a function of tensors reaches a device: at once, compiled, or as a CUDA graph; whatever the function does."""
