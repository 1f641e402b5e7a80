"""MWE's curves over the weights of a layer, each with its gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from we_surgery.analysis.results import Result
from we_surgery.errors import InputError, near_matches
from we_surgery.excitations.mwe import CURVES, MWE


@dataclass(frozen=True)
class CurvePoint:
    """A weight, what a curve makes of it, and its gain ``dW'/dW``."""

    curve: str
    weight: float
    excited: float
    gain: float


@dataclass(frozen=True)
class CurveDrawing(Result):
    """The result of :func:`~we_surgery.analysis.curve_drawing`.

    Attributes:
        epsilon: of MWE.
        relative: whether the curves see W / M_A, or W itself.
        points: those of each curve.
    """

    analysis = "curve"
    epsilon: float
    relative: bool
    points: list[CurvePoint]

    @property
    def records(self) -> Sequence[Any]:
        return self.points

    def summary(self) -> list[dict[str, Any]]:
        """For each curve its range and the least and the largest gain."""
        found = []
        for name in dict.fromkeys(point.curve for point in self.points):
            own = [point for point in self.points if point.curve == name]
            row: dict[str, Any] = {"curve": name}
            for what in ("excited", "gain"):
                values = [getattr(point, what) for point in own]
                row |= {f"least_{what}": min(values), f"largest_{what}": max(values)}
            found.append(row)
        return found


def curve_drawing(
    curves: Sequence[str] = tuple(CURVES),
    *,
    epsilon: float = 0.1,
    largest: float = 1.0,
    relative: bool = True,
    points: int = 101,
) -> CurveDrawing:
    """Excited weights and gains of MWE's curves (WE paper, Fig. 3b; thesis, section 3.3).

    The gain is ``dW'/dW`` with a constant maximum: what eq. 3 multiplies the gradient by.

    Args:
        curves: names as the option ``mwe.curve`` takes them.
        epsilon: of MWE.
        largest: the largest magnitude M in the layer.
        relative: whether the curves see W / M_A, as by default, or W itself (eq. 3.7 as printed),
            where atanh is left out.
        points: from -M to M.

    Raises:
        InputError: there is no such curve, an option is out of range, or nothing is left to draw.
    """
    for name in curves:
        if name not in CURVES:
            raise InputError(
                f"there is no curve {name!r}{near_matches(name, CURVES)}",
                f"Use some of: {', '.join(CURVES)}.",
            )
    if points < 2 or not largest > 0:
        raise InputError(
            f"{points} points up to {largest} cannot be drawn",
            "Give at least 2 points and a `largest` above 0.",
        )
    drawn = [name for name in curves if relative or name != "atanh"]
    if not drawn:
        raise InputError("atanh is not defined for all weights", "Leave `relative` at True.")
    found = []
    for name in drawn:
        try:
            curve = MWE(epsilon, curve=name, relative=relative)
        except ValueError as error:
            raise InputError(str(error), "Correct the option.") from error
        weight = torch.linspace(-largest, largest, points, dtype=torch.float64, requires_grad=True)
        excited = curve.excite(weight)
        (gains,) = torch.autograd.grad(excited.sum(), weight)
        rows = zip(weight.tolist(), excited.tolist(), gains.tolist(), strict=True)
        found += [CurvePoint(name, *row) for row in rows]
    return CurveDrawing(epsilon, relative, found)
