"""Published numbers, with their sources. Errors are fractions."""

from typing import NamedTuple

STEPS = 64_000  # of the CIFAR-10 protocol, section 4.2


class Published(NamedTuple):
    """One net's published final errors.

    Args:
        block, depth: the net.
        train_error: None where it was not published.
        test_error: None where it was not published.
        source: where each number comes from.
    """

    block: str
    depth: int
    train_error: float | None
    test_error: float | None
    source: str


_TABLE_6 = "He et al. 2015, arXiv:1512.03385, Table 6; training error digitised from Fig. 6"
_FIG_6 = "He et al. 2015, arXiv:1512.03385, digitised from Fig. 6"

# Training error: the mean over steps 49k to 64k of the curves drawn. Plain-110 is not drawn: the text says "higher
# than 60 %" error. ResNet-110's test error is the mean of five runs (6.61 +- 0.16).
CIFAR10 = (
    Published("plain", 20, 0.0134, 0.0968, _FIG_6),
    Published("plain", 32, 0.0152, 0.1012, _FIG_6),
    Published("plain", 44, 0.0289, 0.1148, _FIG_6),
    Published("plain", 56, 0.0584, 0.1326, _FIG_6),
    Published("residual", 20, 0.007, 0.0875, _TABLE_6),
    Published("residual", 32, 0.0030, 0.0751, _TABLE_6),
    Published("residual", 44, 0.0019, 0.0717, _TABLE_6),
    Published("residual", 56, 0.0011, 0.0697, _TABLE_6),
    Published("residual", 110, 0.0004, 0.0661, _TABLE_6),
    Published("preact", 110, None, 0.0637, "He et al. 2016, arXiv:1603.05027, Table 2"),
)
