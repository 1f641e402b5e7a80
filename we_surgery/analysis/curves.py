"""MWE's curves over the weights of a layer, each with its gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from we_surgery.analysis.results import Result, Row
from we_surgery.errors import InputError, check_known
from we_surgery.excitations.mwe import CURVES, MWE


@dataclass(frozen=True, kw_only=True)
class CurveDrawing(Result):
    """The result of :func:`~we_surgery.analysis.curve_drawing`.

    Each row is a point of a curve: the ``weight``, what the curve makes of it (``excited``), and
    its ``gain``, ``dW'/dW``.

    Attributes:
        epsilon: of MWE.
        relative: whether the curves see W / M_A, or W itself.
    """

    analysis: str = "curve"
    epsilon: float
    relative: bool

    def summary(self) -> list[Row]:
        """For each curve its range and the least and the largest gain."""
        found = []
        for name in dict.fromkeys(row["curve"] for row in self.rows):
            own = [row for row in self.rows if row["curve"] == name]
            summary: Row = {"curve": name}
            for what in ("excited", "gain"):
                values = [row[what] for row in own]
                summary |= {f"least_{what}": min(values), f"largest_{what}": max(values)}
            found.append(summary)
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
        check_known("curve", name, CURVES)
    if points < 2 or not largest > 0:
        raise InputError(
            f"{points} points up to {largest} cannot be drawn",
            "Give at least 2 points and a `largest` above 0.",
        )
    drawn = [name for name in curves if relative or name != "atanh"]
    if not drawn:
        raise InputError("atanh is not defined for all weights", "Leave `relative` at True.")
    rows = []
    for name in drawn:
        try:
            curve = MWE(epsilon, curve=name, relative=relative)
        except ValueError as error:
            raise InputError(str(error), "Correct the option.") from error
        weight = torch.linspace(-largest, largest, points, dtype=torch.float64, requires_grad=True)
        excited = curve.excite(weight)
        (gains,) = torch.autograd.grad(excited.sum(), weight)
        columns = zip(weight.tolist(), excited.tolist(), gains.tolist(), strict=True)
        rows += [{"curve": name, "weight": w, "excited": e, "gain": g} for w, e, g in columns]
    return CurveDrawing(rows=rows, epsilon=epsilon, relative=relative)
