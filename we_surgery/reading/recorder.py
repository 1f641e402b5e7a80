"""Writes each aten operation of a running model into a torch.fx graph."""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from we_surgery._util.scripted import is_scripted
from we_surgery.excitations import Composition
from we_surgery.reading.graph import (
    DTYPE,
    EXCITATION,
    MODULE,
    NO_GRADIENT,
    SHAPE,
    after_replacement,
    after_write,
    written_arguments,
)

_FX_CONSTANTS = (
    fx.Node,
    int,
    float,
    bool,
    complex,
    str,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes each dispatched operation into an fx graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.calls: Counter[str] = Counter()
        self._training = torch.is_grad_enabled()
        self._names = {id(t): name for name, t in _named_tensors(model)}
        self._nodes: Any = WeakTensorKeyDictionary()
        self._places: Any = WeakTensorKeyDictionary()
        self._newest: dict[int, fx.Node] = {}
        self._order: dict[fx.Node, int] = {}
        self._writes: dict[int, fx.Node] = {}
        self._running: list[tuple[str, bool]] = [("", False)]
        self.constants: dict[str, Tensor] = {}

    def add_input(self, tensor: Tensor) -> None:
        self._label(tensor, self.graph.placeholder(f"input_{len(self._order)}"))

    def finish(self, model: nn.Module, outputs: Any) -> None:
        for _, tensor in _named_tensors(model):
            if id(tensor) in self._names:
                self._node_of(tensor)  # its data may have been replaced
        tensors = [t for t in tree_iter(outputs) if isinstance(t, Tensor)]
        self.graph.output(tuple(self._node_of(tensor) for tensor in tensors))

    def held(self) -> list[tuple[TensorWeakRef, fx.Node]]:
        """The tensors of the recording that somebody still holds, with their nodes, last first."""
        found = sorted(self._nodes.items(), key=lambda item: self._order.get(item[1], -1))
        return [(TensorWeakRef(tensor), node) for tensor, node in reversed(found)]

    def last_writes(self, tensor: Tensor) -> list[fx.Node]:
        """The operation that wrote last to the tensor's memory, if one did."""
        write = self._writes.get(_memory(tensor))
        return [] if write is None else [write]

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Keeps track of which module is running, by hooks on the (copied) model."""
        with contextlib.ExitStack() as stack:
            for name, module in model.named_modules():
                if is_scripted(module):
                    continue
                if isinstance(module, Composition):
                    module.forward = partial(self._excite, name)  # type: ignore[method-assign]
                    stack.callback(delattr, module, "forward")
                    continue
                enter, leave = self._hooks(name)
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(*_: Any) -> None:
            self.calls[name] += 1
            self._running.append((name, self._running[-1][1]))

        def leave(*_: Any) -> None:
            self._running.pop()

        return enter, leave

    def _excite(self, name: str, weight: Tensor) -> Tensor:
        """One operation instead of some forty: who reads its result matters, not how it is made."""
        self.calls[name] += 1
        self._running.append((name, True))
        try:
            return weight * 1
        finally:
            self._running.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # fake tensors are asked all the time
            return func(*args, **kwargs)
        node_args, node_kwargs = self._storable(args), self._storable(kwargs)
        result = func(*args, **kwargs)
        node = self._add(func, node_args, node_kwargs)
        if isinstance(result, Tensor):
            self._label(result, node)
        else:
            for index, item in enumerate(tree_iter(result)):
                if isinstance(item, Tensor):
                    self._label(item, self._add(operator.getitem, (node, index), {}))
        self._note_writes(func, args, kwargs, node)
        return result

    def _storable(self, value: Any) -> Any:
        """Arguments for fx: tensors as their nodes, unknown objects as text.

        Not by torch's pytree, which took a quarter of a recording's time.
        """
        if isinstance(value, Tensor):
            return self._node_of(value)
        if value is None or isinstance(value, _FX_CONSTANTS):
            return value
        if isinstance(value, tuple | list):
            items = [self._storable(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {key: self._storable(item) for key, item in value.items()}
        return str(value)

    def _add(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs)
        node.meta[MODULE], node.meta[EXCITATION] = self._running[-1]
        is_off = self._training and not torch.is_grad_enabled()
        node.meta[NO_GRADIENT] = is_off and not _in_autograd_function()
        return node

    def _label(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta[DTYPE] = tensor.dtype
        if not tensor.is_nested:
            node.meta[SHAPE] = tuple(tensor.shape)
        self._nodes[tensor] = node
        self._places[tensor] = place = _memory(tensor)
        self._newest[place] = node
        self._order[node] = len(self._order)

    def _node_of(self, tensor: Tensor) -> fx.Node:
        node: fx.Node | None = self._nodes.get(tensor)
        if node is None:
            name = self._names.get(id(tensor))
            if name is None:
                name = f"constant_{len(self.constants)}"
                self.constants[name] = tensor
            node = self.graph.create_node("get_attr", name)
            self._label(tensor, node)
        place = _memory(tensor)
        if place != self._places[tensor]:
            node = self._add(after_replacement, (node, self._newest.get(place)), {})
            self._label(tensor, node)
        write = self._writes.get(place)
        if write is not None and self._order.get(write, -1) > self._order[node]:
            node = self._add(after_write, (node, write), {})
            self._label(tensor, node)
        return node

    def _note_writes(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], node: fx.Node
    ) -> None:
        """Remembers what memory an in-place operation wrote, so that its aliases depend on it."""
        for tensor in tree_iter(written_arguments(func._schema, args, kwargs)):
            if isinstance(tensor, Tensor):
                self._order.setdefault(node, len(self._order))
                self._writes[_memory(tensor)] = node
                self._nodes[tensor] = node


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _in_autograd_function() -> bool:
    """Whether an ``autograd.Function`` is running, such as a checkpoint: it has a gradient.

    Unlike ``torch.no_grad``, it turns forward-mode gradients off too.
    """
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse and other tensors without one storage
        return -id(tensor)
