"""Tensors without memory that replace a model's own during a recording.

None outlives its recording: those that the model's code keeps are then computed for real.
"""

from __future__ import annotations

import gc
import logging
import operator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from we_surgery.errors import SurgeryError
from we_surgery.reading.graph import EXCITATION, MODULE, after_write
from we_surgery.reading.recorder import Recorder
from we_surgery.reading.running import fixed_seed

logger = logging.getLogger(__name__)


class Fakes:
    """Torch's fake tensors, made once for all recordings of a model.

    They report the device of the model's tensors, so a forward pass takes the same path. The
    model's code may keep some of them beyond the recording, in a ``functools.lru_cache``, a global
    or a class attribute. At the end of this context, each fake tensor that is still referenced
    becomes, in place, the real one.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self._parameters: dict[int, nn.Parameter] = {}
        self._origins: Any = WeakTensorKeyDictionary()
        self._replays: list[Replay] = []

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
            self._replays.clear()

    def __call__(self, tensor: Tensor) -> Tensor:
        """A stand-in of the same shape, strides and dtype, always the same one."""
        if id(tensor) not in self._made:
            # Keep the tensor too, or its id could be reused.
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

    def watch(self, replay: Replay) -> None:
        """Looks after what a recording makes, also if it fails half-way."""
        self._replays.append(replay)

    def _make(self, tensor: Tensor) -> Tensor:
        made: Tensor
        if not tensor.is_meta:
            made = self.mode.from_tensor(tensor)
        else:
            # As if it were on the CPU: inputs and what the forward makes will be.
            with self.mode:
                made = _empty_like(tensor, "cpu")
        self._origins[made] = tensor
        return made

    def _replace_held(self) -> None:
        if not self._is_held():
            return
        gc.collect(0)  # of the recordings, during which nothing was collected
        failed = [failure for replay in self._replays for failure in _replace(replay)]
        for fake, real in list(self._origins.items()):
            if isinstance(fake, FakeTensor):
                _become(fake, real.detach())
        # Tensors that only a graph held are freed with the tensor that had the graph.
        failures = [why for held, why in failed if isinstance(held(), FakeTensor)]
        if failures:
            raise SurgeryError(
                f"the model's forward keeps {failures[0]} outside of the model, and it cannot be "
                "computed again",
                "Restart Python, because the stored tensor has no values. Then convert without "
                "`example_inputs`.",
            )

    def _is_held(self) -> bool:
        return bool(self._origins) or any(replay.recorder.held() for replay in self._replays)


def _replace(replay: Replay) -> list[tuple[TensorWeakRef, str]]:
    """Replaces the referenced fake tensors of a recording; returns those it could not compute.

    The last come first, which frees what they keep for a backward pass.
    """
    failed = []
    for reference, node in replay.recorder.held():
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
    """Turns one tensor into another in place, as ``torch.utils.swap_tensors`` does.

    That function refuses tensors with weak references, such as the finished fake mode's.
    """
    if isinstance(fake, nn.Parameter):
        value = nn.Parameter(value, requires_grad=fake.requires_grad)
    fake.__class__, value.__class__ = value.__class__, fake.__class__
    fake.__dict__, value.__dict__ = value.__dict__, fake.__dict__
    torch._C._swap_tensor_impl(fake, value)


class Replay:
    """Computes tensors of a recording from the model's own tensors and inputs, each once."""

    def __init__(self, recorder: Recorder, model: nn.Module, example_inputs: Any) -> None:
        self.recorder = recorder
        self._model = model
        self._tensors: dict[str, Tensor] = {}
        self._tensors |= dict(model.named_parameters(remove_duplicate=False))
        self._tensors |= dict(model.named_buffers(remove_duplicate=False))
        inputs = [t for t in tree_iter(example_inputs) if isinstance(t, Tensor)]
        placeholders = [node for node in recorder.graph.nodes if node.op == "placeholder"]
        self._inputs: dict[fx.Node, Tensor] = dict(zip(placeholders, inputs, strict=False))

    def value_of(self, tensor: Tensor, node: fx.Node) -> Tensor:
        """The value that a stand-in had at the end of the forward; ``node`` made it."""
        needed = {node}
        pending = [node, *self.recorder.last_writes(tensor)]
        while pending:
            current = pending.pop()
            needed.add(current)
            pending += [n for n in current.all_input_nodes if n not in needed]
        leaves = [n for n in needed if n.op in ("get_attr", "placeholder")]
        if any(self._leaf(leaf).is_meta for leaf in leaves):  # there are no values
            return _empty_like(tensor, "meta")
        values: dict[fx.Node, Any] = {}
        with torch.no_grad(), fixed_seed(self._model):
            for current in self.recorder.graph.nodes:
                if current in needed:
                    values[current] = self._compute(current, values)
        result = values[node]
        if not isinstance(result, Tensor):
            raise TypeError(f"{node.name} is a {type(result).__name__}")
        return result

    def _compute(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op in ("get_attr", "placeholder"):
            # Later operations may write into it.
            return self._leaf(node).detach().clone()
        args: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.meta.get(EXCITATION) and node.target is not after_write:
            # Recorded as one operation that stands for all of the excitation's.
            return self._model.get_submodule(node.meta[MODULE])(args[0])
        if node.target is operator.getitem:
            results: list[Any] = list(tree_iter(args[0]))
            return results[node.args[1]]  # type: ignore[index]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _leaf(self, node: fx.Node) -> Tensor:
        if node in self._inputs:
            return self._inputs[node]
        name, constants = str(node.target), self.recorder.constants
        return constants[name] if name in constants else self._tensors[name]


def _empty_like(tensor: Tensor, device: str) -> Tensor:
    """A tensor of the same shape, strides and dtype on another device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
