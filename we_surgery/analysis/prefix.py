"""What a forward pass computes before it reaches the changed weights, computed once.

Zeroing a weight in ``layer3`` changes nothing of what ``conv1`` to ``layer2`` return. Any module
whose call has ended before the first call of a changed layer begins can therefore return what
it returned before, and a forward pass is left with its rest. This asks nothing of the model's
structure: skip connections and several branches are fine, since whatever lies between modules
is run as ever. What it does ask for (modules do what they do by their calls alone, and the same
each time) is checked, not trusted: see :meth:`Prefix.agrees`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Run = Callable[[], Tensor]


class Prefix:
    """The outputs of all module calls that end before given layers are first called.

    Attributes:
        calls: the modules, in the order they are called; each stands for all inside it.
    """

    def __init__(self, calls: list[tuple[nn.Module, Any]]) -> None:
        self.calls = [module for module, _ in calls]
        self._outputs = [output for _, output in calls]

    @classmethod
    def recorded(
        cls,
        model: nn.Module,
        layers: Collection[nn.Module],
        run: Run,
        after: Prefix | None = None,
    ) -> Prefix:
        """Runs the model once and keeps what is needed.

        Args:
            model: in the mode it is to be run in.
            layers: the modules whose weights will change.
            run: runs the model on the inputs that all later runs will have.
            after: a prefix of the same inputs, for layers that begin before these; the run then
                starts from there.
        """
        kept: list[tuple[nn.Module, Any]] = []
        begun: list[int] = []
        reached = False

        def begin(module: nn.Module, _: Any) -> None:
            nonlocal reached
            reached = reached or module in wanted
            begun.append(len(kept))

        def end(module: nn.Module, _: Any, output: Any) -> None:
            start = begun.pop()
            if not reached:
                # It stands for the calls inside it. A copy: what follows may write into it.
                kept[start:] = [(module, tree_map(_copied, output))]

        wanted = set(layers)
        with ExitStack() as stack:
            for module in model.modules():
                stack.callback(module.register_forward_pre_hook(begin).remove)
                stack.callback(module.register_forward_hook(end).remove)
            if after is None:
                run()
            else:
                after.run(run)
        return cls(kept)

    def run(self, run: Run) -> Tensor:
        """``run()`` with the recorded outputs in place of the calls they came from."""
        with self._standing_in(self._outputs):
            return run()

    def agrees(self, run: Run, expected: Tensor) -> bool:
        """Whether a run with the prefix gives ``expected``, bit for bit.

        Outputs that nothing reads any more are let go, which on a deep model are most of them.

        Args:
            run: as in :meth:`recorded`, with weights changed.
            expected: what the whole model returns with the same weights changed.
        """
        copies = [tree_map(_copied, output) for output in self._outputs]
        versions = [[leaf._version for leaf in _tensors(output)] for output in copies]
        watch = _Touched()
        with self._standing_in(copies), watch:
            found = run()
        if found.shape != expected.shape or not torch.equal(found, expected):
            return False
        watch.note(found)
        for index, (output, before) in enumerate(zip(copies, versions, strict=True)):
            leaves = _tensors(output)
            if not any(_memory(leaf) in watch.memories for leaf in leaves):
                self._outputs[index] = tree_map(_placeholder, self._outputs[index])
            elif [leaf._version for leaf in leaves] != before:
                self._outputs[index] = _Written(self._outputs[index])
        return True

    @contextmanager
    def _standing_in(self, outputs: list[Any]) -> Iterator[None]:
        position = 0

        def stand_in(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def give(*args: Any, **kwargs: Any) -> Any:
                nonlocal position
                if position < len(self.calls) and self.calls[position] is module:
                    output = outputs[position]
                    position += 1
                    return output.fresh() if isinstance(output, _Written) else output
                return forward(*args, **kwargs)

            return give

        with ExitStack() as stack:
            for module in dict.fromkeys(self.calls):
                own = module.__dict__.get("forward")
                if own is None:
                    stack.callback(module.__dict__.pop, "forward", None)
                else:
                    stack.callback(module.__dict__.__setitem__, "forward", own)
                module.__dict__["forward"] = stand_in(module, module.forward)
            yield


class _Written:
    """An output that the rest of the forward pass writes into."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def fresh(self) -> Any:
        return tree_map(_copied, self.output)


class _Touched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the memory of every tensor that an operation is given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memories: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note((args, kwargs))
        return func(*args, **(kwargs or {}))

    def note(self, values: Any) -> None:
        self.memories.update(_memory(leaf) for leaf in _tensors(values))


class Beginnings:
    """When each module's first call began, as shares of the whole run."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        self._times: dict[nn.Module, float] = {}

        def begin(module: nn.Module, _: Any) -> None:
            self._times.setdefault(module, time.perf_counter())

        with ExitStack() as stack:
            for module in model.modules():
                stack.callback(module.register_forward_pre_hook(begin).remove)
            start = time.perf_counter()
            self.output = run()
            self.seconds = time.perf_counter() - start
        self._times = {m: (t - start) / self.seconds for m, t in self._times.items()}

    def share(self, modules: Collection[nn.Module]) -> float:
        """What part of the run had passed when the first of them began; 0 if one never did."""
        return min((self._times.get(module, 0.0) for module in modules), default=0.0)


def _copied(leaf: Any) -> Any:
    # A placeholder has nothing to copy, and a copy would have its full size.
    if not isinstance(leaf, Tensor) or not any(leaf.stride()):
        return leaf
    return leaf.detach().clone(memory_format=torch.preserve_format)


def _placeholder(leaf: Any) -> Any:
    # One number for all. Not a number, so that a run that does read it cannot go unnoticed.
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    return torch.full((), float("nan"), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
