"""Tensors without memory that stand for a model's own while it is recorded."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


class StandIns(ABC):
    """Tensors without memory that stand for a model's own, made once for all recordings of it."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """A stand-in of the same shape, strides and dtype, always the same one."""
        if id(tensor) not in self._made:
            # The tensor is kept with it, so that no other one gets its id.
            self._made[id(tensor)] = (tensor, self._make(tensor.detach()))
        return self._made[id(tensor)][1]

    @abstractmethod
    def _make(self, tensor: Tensor) -> Tensor: ...

    @abstractmethod
    def active(self) -> AbstractContextManager[Any]:
        """The context a forward on them runs in."""

    def run(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result of one aten operation on stand-ins."""
        return operation(*args, **kwargs)


class Fakes(StandIns):
    """Torch's fake tensors: they say they are where the model's own are.

    Whatever a forward asks of a device, it takes the path that it takes on the real one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def active(self) -> AbstractContextManager[Any]:
        return self.mode

    def _make(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return self.mode.from_tensor(tensor)
        # As if it were on the CPU: inputs and what the forward makes will be.
        with self.mode:
            return _empty_like(tensor, "cpu")


class Metas(StandIns):
    """Tensors on the meta device, several times as fast as fake ones.

    A forward that mixes them with tensors of its own making fails, and a fused kernel of the
    real device may be another one here; for reading which weights go where, that is enough.
    """

    def active(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def run(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if operation is torch.ops.aten.native_batch_norm.default and args[0].is_meta:
            # Torch takes it apart in Python there: half of the time of recording a ResNet.
            features = args[0]
            statistics = features.new_empty(features.shape[1])
            return torch.empty_like(features), statistics, torch.empty_like(statistics)
        return super().run(operation, args, kwargs)

    def _make(self, tensor: Tensor) -> Tensor:
        return _empty_like(tensor, "meta")


def _empty_like(tensor: Tensor, device: str) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
