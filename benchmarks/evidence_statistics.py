"""The statistics of the protocol, over differences of pairs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_RESAMPLES = 9_999
_PERMUTATIONS = 99_999


@dataclass(frozen=True)
class Comparison:
    """An arm against another one.

    Attributes:
        p: of the sign-flip permutation, not corrected.
        deviation: of the differences.
    """

    pairs: int
    mean: float
    low: float
    high: float
    p: float
    deviation: float

    def detectable(self, level: float) -> float:
        """The difference that as many pairs see with a probability of 80 %, at p = ``level``."""
        quantiles = stats.norm.ppf([1 - level / 2, 0.8]).sum()
        return float(quantiles * self.deviation / self.pairs**0.5)

    def verdict(self, adjusted: float) -> str:
        """``gain``, ``loss`` or ``no difference seen``."""
        if adjusted < 1 - CONFIDENCE and (self.low > 0 or self.high < 0):
            return "gain" if self.low > 0 else "loss"
        return "no difference seen"


def compare(differences: Sequence[float]) -> Comparison:
    """BCa interval and sign-flip test of the mean of at least two differences."""
    values = np.asarray(differences, dtype=float)
    low, high = interval(values)
    return Comparison(
        len(values), float(values.mean()), low, high, sign_flip(values), float(values.std(ddof=1))
    )


def interval(values: np.ndarray) -> tuple[float, float]:
    """BCa bootstrap interval of the mean."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=_RESAMPLES,
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=np.random.default_rng(0),
        ).confidence_interval
    return float(found.low), float(found.high)


def sign_flip(values: np.ndarray) -> float:
    """Two-sided p of the mean, exact for few pairs."""
    found = stats.permutation_test(
        (values,),
        np.mean,
        vectorized=True,
        permutation_type="samples",
        n_resamples=_PERMUTATIONS,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p values of a family."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for place, name in enumerate(sorted(values, key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - place) * values[name]))
        adjusted[name] = highest
    return adjusted
