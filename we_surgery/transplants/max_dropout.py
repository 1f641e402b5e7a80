"""MaxDropout: drops the largest activations instead of random ones (Santos et al., ICPR 2020).

It replaces dropout layers, or follows layers without dropout, "in each hidden layer".

In training, the authors' code computes ``u = (x - min x) / (max x - min x)`` over the whole tensor,
batch included, and ``y = 0 where u > 1 - rate, else x``, without rescaling or randomness.

The rate is not the share of dropped values: of rectified normal features at rate 0.3 it drops
0.07 % in a batch of one and 0.012 % in a batch of 128, because the largest value decides. It
differs between DDP ranks. The paper's text describes another method (a random rate per layer, and
a tensor normalized by its Euclidean norm). The authors' models make the layer anew in each forward
pass, so it also drops at test time, and their published figures may include this: ``always_on``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import handle_torch_function, has_torch_function_unary

from we_surgery.errors import InputError
from we_surgery.excitations.base import in_full_precision
from we_surgery.excitations.functions import check_flag
from we_surgery.transplants.base import Site, Transplant, qualified_name

_FUNCTIONS: dict[Any, str] = {
    F.dropout: "torch.nn.functional.dropout",
    F.dropout1d: "torch.nn.functional.dropout1d",
    F.dropout2d: "torch.nn.functional.dropout2d",
    F.dropout3d: "torch.nn.functional.dropout3d",
    torch.ops.aten.dropout.default: "torch.ops.aten.dropout.default",
}
_FUNCTIONS_BY_NAME = {name: function for function, name in _FUNCTIONS.items()}
_AUTHORS_RATE = 0.3
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus, nn.Softsign, nn.Tanh, nn.Hardtanh, nn.Sigmoid),
)
_OWN_ARGUMENTS = ("rate", "always_on", "instead_of")


def drop_largest(x: Tensor, rate: float) -> Tensor:
    """``x`` with the elements zeroed that exceed ``1 - rate`` of the way from min to max.

    Args:
        x: activations of any shape.
        rate: from 0 (nothing) to 1 (all but the smallest).

    Returns:
        A tensor of the same shape and dtype. What is kept passes its gradient, what is dropped
        none. A constant tensor is kept.
    """
    if x.numel() == 0:
        return x
    with torch.no_grad():
        values = in_full_precision(x)
        smallest, largest = torch.aminmax(values)
        # A constant tensor gives NaN here, which exceeds nothing.
        dropped = (values - smallest) / (largest - smallest) > 1 - rate
    return x.masked_fill(dropped, 0)


class MaxDropout(nn.Module):
    """Drops the largest activations in training; with ``always_on`` in eval mode too."""

    def __init__(self, rate: float = 0.3, always_on: bool = False) -> None:
        super().__init__()
        _check_rate(rate)
        self.rate = rate
        self.always_on = always_on

    def forward(self, x: Tensor) -> Tensor:
        return drop_largest(x, self.rate) if self.training or self.always_on else x

    def extra_repr(self) -> str:
        return f"rate={self.rate}, always_on={self.always_on}"


@dataclass(frozen=True)
class DropBehind:
    """A forward hook that drops the largest outputs of the module it is registered on."""

    rate: float
    always_on: bool

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        is_on = isinstance(output, Tensor) and (module.training or self.always_on)
        return drop_largest(output, self.rate) if is_on else output


class SwappedDropout(MaxDropout, _DropoutNd):
    """The class that a dropout layer gets in place; its attributes are kept.

    ``instead_of`` is the name of the vanilla class in ``torch.nn``.
    """

    instead_of: str


def _is_plain(module: nn.Module) -> bool:
    """Whether it can be swapped: a dropout of torch, and none of a subclass."""
    return type(module) in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def max_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    rate: float,
    always_on: bool = False,
    instead_of: str,
) -> Tensor:
    """What a call of a dropout function in a graph becomes: the same arguments, and ours."""
    if has_torch_function_unary(x):  # as in F.dropout: a tracer keeps the call whole
        return handle_torch_function(
            max_dropout,
            (x,),
            x,
            p,
            training,
            inplace,
            rate=rate,
            always_on=always_on,
            instead_of=instead_of,
        )
    return drop_largest(x, rate) if training or always_on else x


@dataclass(frozen=True)
class MaxDropoutTransplant(Transplant):
    """MaxDropout instead of dropout layers, and of ``F.dropout`` calls in graphs.

    Attributes:
        rate: the threshold; by default each dropout's probability, or 0.3 without a dropout.
        insert: follow other layers instead, as a hook on their outputs: each activation layer, or
            the modules that ``match`` names, such as the stages ``layer?`` of the authors'
            ResNet18. A layer that is called several times drops in each call.
        always_on: drop in eval mode too. Strip then keeps it, because removing it would change the
            model's outputs.
    """

    name: ClassVar[str] = "max_dropout"
    summary: ClassVar[str] = "drops the largest activations in the place of dropout's random ones"
    source: ClassVar[str] = "Santos et al., ICPR 2020; code cfsantos/MaxDropout-torch"
    published: ClassVar[tuple[str, ...]] = (
        "test error, CIFAR-10/100: ResNet18 4.72/22.46 -> 4.66/21.93; with cutout 3.99/21.96 -> "
        "3.76/21.82",
        "WRN-28-10 4.00/19.25, with dropout 3.89/18.89, with MaxDropout 3.84/18.81",
    )
    deploys_to: ClassVar[str] = "the dropout layers it replaced, or nothing where none were"

    rate: float | None = None
    always_on: bool = False
    insert: bool = False

    def __post_init__(self) -> None:
        if self.rate is not None:
            _check_rate(self.rate)
        check_flag("always_on", self.always_on)
        check_flag("insert", self.insert)

    @property
    def stays(self) -> bool:
        return self.always_on

    def sites(self, model: nn.Module) -> list[Site]:
        if self.insert:
            return list(self._hidden_sites(model))
        found = []
        for name, module in model.named_modules():
            if isinstance(module, _DropoutNd):
                found.append(self._site(name, module))
            if isinstance(module, fx.GraphModule):
                found += [self._node_site(name, node) for node in _dropout_nodes(module)]
        return found

    def _hidden_sites(self, model: nn.Module) -> Iterator[Site]:
        for name, module in model.named_modules():
            is_named = self.match != type(self).match
            if name and (is_named or isinstance(module, _ACTIVATIONS)):
                type_name = qualified_name(type(module))
                has_hook = bool(_drops_behind(module))
                reason = "has MaxDropout behind it" if has_hook else "its outputs are dropped"
                yield Site(name, type_name, reason, fits=not has_hook)

    def _site(self, name: str, module: _DropoutNd) -> Site:
        type_name = qualified_name(type(module))
        if isinstance(module, SwappedDropout):
            return Site(name, type_name, "is MaxDropout already", fits=False)
        if not _is_plain(module):
            return Site(name, type_name, "is not a plain dropout", fits=False)
        return Site(name, type_name, *self._verdict(module.p))

    def _node_site(self, name: str, node: fx.Node) -> Site:
        type_name = _FUNCTIONS[node.target]
        arguments = _arguments(node)
        place = f"{name}@{node.name}"
        if not isinstance(arguments["p"], float | int):
            return Site(place, type_name, "its probability is computed", fits=False)
        if arguments["training"] is False:
            return Site(place, type_name, "the graph was traced in eval mode", fits=False)
        return Site(place, type_name, *self._verdict(arguments["p"]))

    def _verdict(self, p: float) -> tuple[str, bool]:
        if self.rate is not None:
            return f"dropout of {p:g}", True
        return f"dropout of {p:g}, which is the rate" if p else "its probability is 0", p > 0

    def attach(self, model: nn.Module, place: str) -> None:
        graph_module, at, node_name = place.partition("@")
        if at:
            self._attach_to_node(model.get_submodule(graph_module), node_name)
            return
        module = model.get_submodule(place)
        if self.insert:
            authors = _AUTHORS_RATE if self.rate is None else self.rate
            module.register_forward_hook(DropBehind(authors, self.always_on))
            return
        if not _is_plain(module):
            raise InputError(
                f"{place!r} is not a dropout layer but {qualified_name(type(module))}",
                'Give its row in the plan `"attach": false`.',
            )
        kind = type(module).__name__
        module.__class__ = SwappedDropout
        assert isinstance(module, SwappedDropout)
        module.rate = module.p if self.rate is None else self.rate
        module.always_on = self.always_on
        module.instead_of = kind

    def _attach_to_node(self, module: nn.Module, name: str) -> None:
        graph_module = module if isinstance(module, fx.GraphModule) else None
        nodes = {} if graph_module is None else {n.name: n for n in _dropout_nodes(graph_module)}
        if graph_module is None or name not in nodes:
            raise InputError(
                f"there is no dropout node {name!r} in the graph",
                "Use a plan that was made for this graph.",
            )
        node = nodes[name]
        arguments = _arguments(node)
        rate = arguments["p"] if self.rate is None else self.rate
        own = dict(
            zip(_OWN_ARGUMENTS, (rate, self.always_on, _FUNCTIONS[node.target]), strict=True)
        )
        node.target, node.kwargs = max_dropout, {**node.kwargs, **own}
        graph_module.recompile()

    @classmethod
    def attached(cls, model: nn.Module) -> Iterator[str]:
        for name, module in model.named_modules():
            is_swapped = isinstance(module, SwappedDropout) and not module.always_on
            behind = _drops_behind(module).values()
            if is_swapped or any(not hook.always_on for hook in behind):
                yield name
            if isinstance(module, fx.GraphModule):
                yield from (f"{name}@{node.name}" for node in _swapped_nodes(module))

    @classmethod
    def detach(cls, model: nn.Module, place: str) -> None:
        name, at, node_name = place.partition("@")
        module = model.get_submodule(name)
        behind = [key for key, hook in _drops_behind(module).items() if not hook.always_on]
        if not at and behind:
            for key in behind:
                del module._forward_hooks[key]
            return
        if not at:
            assert isinstance(module, SwappedDropout)
            module.__class__ = getattr(nn, module.instead_of)
            for name in _OWN_ARGUMENTS:
                delattr(module, name)
            return
        assert isinstance(module, fx.GraphModule)
        node = next(node for node in _swapped_nodes(module) if node.name == node_name)
        kwargs = {key: value for key, value in node.kwargs.items() if key not in _OWN_ARGUMENTS}
        node.target = _FUNCTIONS_BY_NAME[str(node.kwargs["instead_of"])]
        node.kwargs = kwargs
        module.recompile()


def _drops_behind(module: nn.Module) -> dict[int, DropBehind]:
    """The hooks of :class:`DropBehind` by their keys."""
    hooks = module._forward_hooks.items()
    return {key: hook for key, hook in hooks if isinstance(hook, DropBehind)}


def _dropout_nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in _FUNCTIONS:
            yield node


def _swapped_nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    for node in module.graph.nodes:
        is_ours = node.op == "call_function" and node.target is max_dropout
        if is_ours and not node.kwargs.get("always_on", False):
            yield node


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The call's ``p`` and ``training``, positional or by keyword."""
    given = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False))
    return {"p": 0.5, "training": True, **given, **node.kwargs}


def _check_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"the rate must be from 0 to 1, not {rate!r}")
