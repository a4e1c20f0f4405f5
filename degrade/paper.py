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
        best_on_test: the test error is of the epoch that was best on the test set, and so too low to compare with.
    """

    block: str
    depth: int
    train_error: float | None
    test_error: float | None
    source: str
    best_on_test: bool = False


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

_TABLE_2 = "He et al. 2015, arXiv:1512.03385, Table 2: top-1, 10 crops of each validation image"

# On ImageNet; training error is drawn in Fig. 4 and nowhere given.
IMAGENET = (
    Published("plain", 18, None, 0.2794, _TABLE_2),
    Published("plain", 34, None, 0.2854, _TABLE_2),
    Published("residual", 18, None, 0.2788, _TABLE_2),
    Published("residual", 34, None, 0.2503, _TABLE_2),
)

_MARTYN = "github.com/a-martyn/resnet: training error on augmented images, in eval mode"
_WOOYEOL = "github.com/wooyeolBaek/deep-residual-learning"
_NABLA = "github.com/nabla0001/resnet: mean of 5 seeds"
_AKAMASTER = "github.com/akamaster/pytorch_resnet_cifar10: best on test, 200 epochs"

# Public reproductions on CIFAR-10, final errors as their own logs have them; `source` names the repository, then
# what differs. Standard deviations of nabla0001's five seeds: 0.13, 0.22 (plain); 0.22, 0.27, 0.20 points (residual).
REPRODUCTIONS = (
    Published("plain", 20, 0.0074, 0.0969, _MARTYN),
    Published("plain", 32, 0.0079, 0.1004, _MARTYN),
    Published("plain", 44, 0.0276, 0.1156, _MARTYN),
    Published("plain", 56, 0.0333, 0.1307, _MARTYN),
    Published("residual", 20, 0.0040, 0.0804, _MARTYN),
    Published("residual", 32, 0.0012, 0.0779, _MARTYN),
    Published("residual", 44, 0.0005, 0.0751, _MARTYN),
    Published("residual", 56, 0.0004, 0.0746, _MARTYN),
    Published("plain", 20, 0.0121, 0.0974, _WOOYEOL),
    Published("plain", 32, 0.0154, 0.1041, _WOOYEOL),
    Published("plain", 44, 0.0279, 0.1173, _WOOYEOL),
    Published("plain", 56, 0.0436, 0.1186, _WOOYEOL),
    Published("residual", 20, 0.0113, 0.0918, _WOOYEOL),
    Published("residual", 32, 0.0043, 0.0868, _WOOYEOL),
    Published("residual", 44, 0.0024, 0.0813, _WOOYEOL),
    Published("residual", 56, 0.0011, 0.0710, _WOOYEOL),
    Published("residual", 110, 0.0005, 0.0695, _WOOYEOL),
    Published("plain", 20, None, 0.0978, _NABLA),
    Published("plain", 56, None, 0.1295, _NABLA),
    Published("residual", 20, None, 0.0851, _NABLA),
    Published("residual", 56, None, 0.0740, _NABLA),
    Published("residual", 110, None, 0.0714, _NABLA),
    Published("residual", 20, None, 0.0827, _AKAMASTER, best_on_test=True),
    Published("residual", 32, None, 0.0737, _AKAMASTER, best_on_test=True),
    Published("residual", 44, None, 0.0690, _AKAMASTER, best_on_test=True),
    Published("residual", 56, None, 0.0661, _AKAMASTER, best_on_test=True),
    Published("residual", 110, None, 0.0632, _AKAMASTER, best_on_test=True),
)


def spread(block: str, depth: int) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """The lowest and the highest final error of a net on CIFAR-10, of the paper's and the public reproductions'.

    Returns:
        Of training and of test error, as fractions; None where nobody has published one. What is the best on test is
        left out.
    """
    nets = [p for p in (*CIFAR10, *REPRODUCTIONS) if (p.block, p.depth) == (block, depth) and not p.best_on_test]
    errors = ([p.train_error for p in nets], [p.test_error for p in nets])
    train, test = ([error for error in measure if error is not None] for measure in errors)
    return (min(train), max(train)) if train else None, (min(test), max(test)) if test else None
