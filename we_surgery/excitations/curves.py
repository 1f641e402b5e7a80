"""The curves that MWE can bend weights by."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def novel(x: Tensor) -> Tensor:
    """``0.5 x / ln(1 + exp(-0.3 x))`` (thesis, eq. 3.7): slope 0.72 at 0, 0.90 at 1.

    Not odd: a positive weight is amplified more than a negative one.
    """
    return 0.5 * x / F.softplus(-0.3 * x)


def novel_log10(x: Tensor) -> Tensor:
    """The same with the logarithm to base 10, as in the thesis' code: slope 1.66 at 0."""
    return novel(x) * math.log(10)


CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "atanh": torch.atanh,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "swish": F.silu,
    "softsign": F.softsign,
    "softplus": F.softplus,
    "shifted_softplus": lambda x: F.softplus(x) - math.log(2),
    "lecun_tanh": lambda x: 1.7159 * torch.tanh(2 / 3 * x),
    "star_relu": lambda x: 0.8944 * F.relu(x) ** 2 - 0.4472,
    "novel": novel,
    "novel_log10": novel_log10,
}
"""By the names that the option ``curve`` takes. All but the first are of the thesis, section
3.3.1, which found none of them satisfactory, and its eq. 3.7."""
