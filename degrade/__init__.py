"""degrade: an experiment tool for the degradation problem of deep plain nets (He et al. 2015).

import degrade
epochs = degrade.load("results")  # a pandas DataFrame, a row an epoch
"""

from degrade.store import load

__version__ = "0.1.0"
__all__ = ["load"]
