"""Weights set to zero for one measurement, and given back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from we_surgery.analysis.interrupts import HeldInterrupt

Value = TypeVar("Value")

Cells = Mapping[nn.Parameter, Tensor]
"""Which weights to set to zero: flat indices (int64, row-major) into each Parameter."""


def measured_without(cells: Cells, measure: Callable[[], Value]) -> Value:
    """What ``measure`` returns while some weights are zero.

    The weights are given back bit for bit, whatever ``measure`` raises and however often Ctrl-C
    is pressed: it ends ``measure``, and never the writing.

    Args:
        cells: the weights; they are written to in place, so that whoever holds the model sees
            them at zero.
        measure: called without arguments.
    """
    interrupt = HeldInterrupt()
    changed: list[tuple[nn.Parameter, tuple[Tensor, ...], Tensor]] = []
    interrupt.install()
    try:
        try:
            for parameter, flat in cells.items():
                index = torch.unravel_index(flat.to(parameter.device), parameter.shape)
                changed.append((parameter, index, parameter.detach()[index].clone()))
            for parameter, index, _ in changed:
                _write(parameter, index, torch.zeros((), dtype=parameter.dtype))
            interrupt.let_through()
            return measure()
        finally:
            interrupt.hold()
    finally:
        try:
            _give_back(changed)
        finally:
            interrupt.remove()


def _give_back(changed: list[tuple[nn.Parameter, tuple[Tensor, ...], Tensor]]) -> None:
    """Writes all values back that can be, and only then says what could not."""
    failure: Exception | None = None
    for parameter, index, values in changed:
        try:
            _write(parameter, index, values)
        except Exception as error:
            failure = error
    if failure is not None:
        raise failure


def _write(parameter: nn.Parameter, index: tuple[Tensor, ...], values: Tensor) -> None:
    # What is measured may have moved the model.
    index = tuple(part.to(parameter.device) for part in index)
    with torch.no_grad():
        parameter[index] = values.to(parameter)
