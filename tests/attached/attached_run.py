"""A run of a few steps to which excitation is attached, and what may differ afterwards."""

from __future__ import annotations

from typing import Any

import torch
from equal_forms import batches, loss_of, plain_step
from torch import Tensor, nn

OUTSIDE = "was changed outside"


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, **options)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def go_on(model: nn.Module, optimizer: Any) -> float:
    return plain_step(optimizer, model, batches(2)[1], 1)


def steps(model: nn.Module, optimizer: Any, count: int, *, zero: bool = True) -> None:
    for t in range(count):
        if zero:
            optimizer.zero_grad()
        loss_of(model, batches(count)[t]).backward()
        optimizer.step()
