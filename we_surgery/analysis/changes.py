"""Changes of a model's weights, and how far a run over them has come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from we_surgery.analysis.decimation import Cells
from we_surgery.analysis.kernels import MeasuredWeight
from we_surgery.analysis.progress_file import ProgressFile

logger = logging.getLogger(__name__)

BASELINE = ""
"""The name of no change."""


class Monitor(Protocol):
    """What wants to know how a long run gets on; see :func:`we_surgery.analysis.progress_bar`."""

    def start(self, evaluations: int | None, seconds: float | None) -> None:
        """Called before the first change: how much there is to do, and about how long it takes.

        Both are None where a loader does not say its length.
        """

    def advance(self, evaluations: int) -> None:
        """Called with the number of evaluations that were just done."""


@dataclass(frozen=True)
class Change:
    """Weights to set to zero together.

    Attributes:
        name: says which; unique in one run.
        weights: those that change.
        cells: makes the cells when they are needed; for many changes they would fill memory.
    """

    name: str
    weights: tuple[MeasuredWeight, ...]
    cells: Callable[[], Cells]


@dataclass
class Run:
    """All changes of one model, and what is known of them so far.

    Attributes:
        model: the model that is changed and changed back.
        changes: what to set to zero, one after the other.
        progress: the results, in a file if there is to be one.
        monitor: told how the run gets on.
        evaluations: as in :class:`~we_surgery.analysis.measuring.Measured`.
        resumed: as there.
        shared: as there.
    """

    model: nn.Module
    changes: Sequence[Change]
    progress: ProgressFile
    monitor: Monitor | None
    evaluations: int = 0
    resumed: int = 0
    shared: int = 0

    def todo(self, key: Callable[[Change], str]) -> list[Change]:
        """The changes whose key has no result yet."""
        return [change for change in self.changes if key(change) not in self.progress]

    def begin(self, evaluations: int | None, seconds: float | None) -> None:
        """Tells how much there is to do, and about how long it takes."""
        if seconds is not None:
            logger.info("%s evaluations, about %.0f s", evaluations, seconds)
        if self.monitor is not None:
            self.monitor.start(evaluations, seconds)

    def done(self, key: str, value: Any, shared: bool = False) -> None:
        """Takes down one result; ``shared`` if it started from a prefix computed before."""
        self.progress.add(key, value)
        self.evaluations += 1
        self.shared += shared
        if self.monitor is not None:
            self.monitor.advance(1)
