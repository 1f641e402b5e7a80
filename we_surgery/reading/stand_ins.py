"""Tensors without memory that stand for a model's own while it is recorded."""

from __future__ import annotations

import gc
import logging
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from we_surgery.errors import SurgeryError
from we_surgery.reading.recorder import Recorder
from we_surgery.reading.replay import Origin, Replay, empty_like

logger = logging.getLogger(__name__)


class Fakes:
    """Torch's fake tensors, made once for all recordings of a model.

    They say they are where the model's own tensors are, so a forward pass takes the path that it
    takes on the real device. Code of the model may keep some of them in places that outlive the
    recording: a ``functools.lru_cache``, a global, a class attribute. When this context is left,
    each fake tensor that is still held somewhere becomes, in place, the tensor it stands for.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self._parameters: dict[int, nn.Parameter] = {}
        self._origins: Any = WeakTensorKeyDictionary()
        self._recorders: list[tuple[Recorder, Origin]] = []

    def __enter__(self) -> Fakes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._made.clear()
        self._parameters.clear()
        try:
            self._replace_held()
        finally:
            self._recorders.clear()

    def __call__(self, tensor: Tensor) -> Tensor:
        """A stand-in of the same shape, strides and dtype, always the same one."""
        if id(tensor) not in self._made:
            # The tensor is kept with it, so that no other one gets its id.
            self._made[id(tensor)] = (tensor, self._make(tensor.detach()))
        return self._made[id(tensor)][1]

    def parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        """A stand-in that is a Parameter, always the same one."""
        made = self._parameters.get(id(parameter))
        if made is None:
            made = nn.Parameter(self(parameter), requires_grad=parameter.requires_grad)
            self._origins[made] = parameter
            self._parameters[id(parameter)] = made
        return made

    def watch(self, recorder: Recorder, origin: Origin) -> None:
        """Looks after what a recording makes, also if it fails half-way."""
        self._recorders.append((recorder, origin))

    def _make(self, tensor: Tensor) -> Tensor:
        made: Tensor
        if not tensor.is_meta:
            made = self.mode.from_tensor(tensor)
        else:
            # As if it were on the CPU: inputs and what the forward makes will be.
            with self.mode:
                made = empty_like(tensor, "cpu")
        self._origins[made] = tensor
        return made

    def _replace_held(self) -> None:
        if not self._is_held():
            return
        gc.collect(0)  # of the recordings, during which nothing was collected
        failed = [
            failure
            for recorder, origin in self._recorders
            for failure in _replace(recorder, Replay(recorder, origin))
        ]
        for fake, real in list(self._origins.items()):
            if isinstance(fake, FakeTensor):
                _become(fake, real.detach())
        # What only a graph held is gone with the tensor that had the graph.
        failures = [why for held, why in failed if isinstance(held(), FakeTensor)]
        if failures:
            raise SurgeryError(
                f"the model's forward keeps {failures[0]} outside of the model, and it cannot be "
                "computed again",
                "Restart Python: what was kept is a tensor without values. Then convert without "
                "`example_inputs`.",
            )

    def _is_held(self) -> bool:
        return bool(self._origins) or any(recorder.held() for recorder, _ in self._recorders)


def _replace(recorder: Recorder, replay: Replay) -> list[tuple[TensorWeakRef, str]]:
    """Replaces the fake tensors of a recording that are held; returns what could not be computed.

    The last are replaced first: what they keep for a backward pass goes with them.
    """
    failed = []
    for reference, node in recorder.held():
        fake: Tensor | None = reference()
        if not isinstance(fake, FakeTensor) or node.op != "call_function":
            continue  # the model's own tensors are not computed
        try:
            _become(fake, replay.value_of(fake, node))
        except Exception as error:
            why = f"the result of {node.target} ({type(error).__name__}: {error})"
            failed.append((reference, why))
        else:
            logger.info("%s outlived its recording and was computed", node.name)
        del fake
    return failed


def _become(fake: Tensor, value: Tensor) -> None:
    """Makes one tensor another one wherever it is held, as ``torch.utils.swap_tensors`` does.

    That function refuses tensors with weak references; what refers to a fake tensor weakly is
    the mode that made it, which is over.
    """
    if isinstance(fake, nn.Parameter):
        value = nn.Parameter(value, requires_grad=fake.requires_grad)
    fake.__class__, value.__class__ = value.__class__, fake.__class__
    fake.__dict__, value.__dict__ = value.__dict__, fake.__dict__
    torch._C._swap_tensor_impl(fake, value)
