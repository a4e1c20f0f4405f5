"""How a step of tensors is issued to a device: at once, compiled, or as a CUDA graph. Nothing here knows what it does."""
