"""Computing a tensor of a recorded forward once more, on the model's own tensors."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_iter

from we_surgery.reading.recorder import EXCITATION, MODULE, Recorder, after_write
from we_surgery.reading.running import fixed_seed


@dataclass(frozen=True)
class Origin:
    """What a recording was made of.

    Attributes:
        model: the model whose copy was run.
        example_inputs: what it was run on.
    """

    model: nn.Module
    example_inputs: Any


class Replay:
    """Computes tensors that a recording made, each operation at most once.

    Args:
        recorder: what recorded.
        origin: the real tensors.
    """

    def __init__(self, recorder: Recorder, origin: Origin) -> None:
        self._recorder = recorder
        self._model = origin.model
        self._tensors: dict[str, Tensor] = {}
        self._tensors |= dict(origin.model.named_parameters(remove_duplicate=False))
        self._tensors |= dict(origin.model.named_buffers(remove_duplicate=False))
        inputs = [t for t in tree_iter(origin.example_inputs) if isinstance(t, Tensor)]
        placeholders = [node for node in recorder.graph.nodes if node.op == "placeholder"]
        self._inputs: dict[fx.Node, Tensor] = dict(zip(placeholders, inputs, strict=False))

    def value_of(self, tensor: Tensor, node: fx.Node) -> Tensor:
        """The value that a tensor had at the end of the forward.

        Args:
            tensor: a stand-in that the recording made.
            node: its node.
        """
        needed = {node}
        pending = [node, *self._recorder.last_writes(tensor)]
        while pending:
            current = pending.pop()
            needed.add(current)
            pending += [n for n in current.all_input_nodes if n not in needed]
        leaves = [n for n in needed if n.op in ("get_attr", "placeholder")]
        if any(self._leaf(leaf).is_meta for leaf in leaves):  # there are no values
            return empty_like(tensor, "meta")
        values: dict[fx.Node, Any] = {}
        with torch.no_grad(), fixed_seed(self._model):
            for current in self._recorder.graph.nodes:
                if current in needed:
                    values[current] = self._compute(current, values)
        result = values[node]
        if not isinstance(result, Tensor):
            raise TypeError(f"{node.name} is a {type(result).__name__}")
        return result

    def _compute(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op in ("get_attr", "placeholder"):
            # The operations that follow may write into it.
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
        name, constants = str(node.target), self._recorder.constants
        return constants[name] if name in constants else self._tensors[name]


def empty_like(tensor: Tensor, device: str) -> Tensor:
    """A tensor of the same shape, strides and dtype on another device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
