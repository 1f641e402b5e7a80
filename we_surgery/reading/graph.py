"""The graph that every reading builds: a torch.fx graph with the modules its nodes belong to.

Recorded graphs hold aten operations; traced ones hold calls of modules, functions and methods.
``aten._softmax``, ``nn.Softmax``, ``F.softmax`` and ``x.softmax`` are all ``softmax`` here, so one
pass per fact suffices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_iter

from we_surgery.reading.kinds import WEIGHTED, is_norm, normalizes_each_channel

# Keys of ``node.meta``.
MODULE = "module"
"""The innermost module that was running; "" for the graph's root."""
EXCITATION = "excitation"
"""Whether an excitation was running."""
SHAPE = "shape"
"""The result's shape; absent where the result is not a tensor, and in traced graphs."""
DTYPE = "dtype"
"""The result's dtype; absent like the shape."""
NO_GRADIENT = "no_gradient"
"""Whether the model had turned gradients off, as ``torch.no_grad`` does."""

# Operations that only change a tensor's form.
_VIEWS = frozenset(
    """
    view unsafeview reshape expand unsqueeze squeeze slice split splitwithsizes unsafesplit unbind
    select narrow alias detach clone contiguous liftfresh chunk tensorsplit viewas expandas
    reshapeas typeas t mt transpose permute numpyt movedim moveaxis swapaxes swapdims flatten
    unflatten getitem afterwrite to tocopy type float half bfloat16 double identity rearrange data
    """.split()
)
# These use only the shape of their tensor argument.
_NEW_TENSORS = frozenset(
    """
    zeroslike oneslike emptylike fulllike randlike randnlike newzeros newones newempty newfull
    newemptystrided newtensor
    """.split()
)
# These use only the shape or dtype of their second tensor.
_LIKE_ANOTHER = frozenset(["viewas", "expandas", "reshapeas", "typeas", "to", "type"])
_ABOUT_A_TENSOR = frozenset(
    "shape size dim ndim device dtype numel stride isfloatingpoint iscontiguous".split()
)
_EACH_CHANNEL_NORMS = ("batchnorm", "instancenorm")
_NORMS = (*_EACH_CHANNEL_NORMS, "layernorm", "groupnorm", "rmsnorm")
_LAYERS = frozenset("linear mm addmm bmm baddbmm matmul mv nativemultiheadattention".split())
_RECURRENT = frozenset("lstm gru rnntanh rnnrelu lstmcell grucell mkldnnrnnlayer".split())


def after_write(value: Any, write: Any) -> Any:
    """The value of a tensor once another tensor over its memory has been written to."""
    return value


def after_replacement(value: Any, data: Any) -> Any:
    """The value of a tensor whose ``data`` was set to another tensor."""
    return data


def operation_name(node: fx.Node) -> str:
    """``aten.convolution`` for an aten operation, whatever its overload; "" for any other node."""
    if node.op != "call_function" or not hasattr(node.target, "overloadpacket"):
        return ""
    return str(node.target.overloadpacket)


def called_name(node: fx.Node) -> str:
    """The name of a called function or method: ``avgpool2d`` for ``F.avg_pool2d``; or "".

    ``x.shape``, a call of ``getattr`` in traced graphs, is ``shape``.
    """
    is_getattr: Callable[..., Any] = getattr
    if node.op == "call_method":
        name = str(node.target)
    elif node.op != "call_function":
        return ""
    elif node.target is is_getattr:
        name = str(node.args[1])
    else:
        name = operation_name(node) or getattr(node.target, "__name__", "")
    return _plain(name.removeprefix("aten."))


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def is_view(node: fx.Node) -> bool:
    """Whether a call only presents its first argument in another form."""
    return called_name(node) in _VIEWS


def makes_new(node: fx.Node) -> bool:
    """Whether the node makes a tensor in the shape of its argument, whatever that holds."""
    return called_name(node) in _NEW_TENSORS


def sources(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values the node's result depends on."""
    name = called_name(node)
    if name in _NEW_TENSORS or name in _ABOUT_A_TENSOR:
        return []
    read = node.all_input_nodes
    return read[:1] if name in _LIKE_ANOTHER else read


def written_by(node: fx.Node) -> list[fx.Node]:
    """The tensors that the node writes to."""
    if node.target is after_replacement:
        return node.all_input_nodes[:1]
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.all_input_nodes[:1] if _writes(node) else []
    written = written_arguments(schema, node.args, node.kwargs)
    return [found for found in tree_iter(written) if isinstance(found, fx.Node)]


def written_arguments(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an aten operation writes to."""
    if not schema.is_mutable:
        return []
    return [
        args[index] if index < len(args) else kwargs.get(argument.name)
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _writes(node: fx.Node) -> bool:
    name = operation_name(node) or str(getattr(node.target, "__name__", node.target))
    return node.op in ("call_function", "call_method") and name.endswith("_")


def join(name: str, path: str) -> str:
    """A submodule's qualified name: ``a`` and ``b.c`` give ``a.b.c``; either may be empty."""
    return f"{name}.{path}" if name and path else name or path


@dataclass(frozen=True)
class ModelGraph:
    """A graph of a model, or of one of its submodules.

    Attributes:
        graph: its ``get_attr`` nodes name parameters, buffers and ``constants``.
        modules: the modules by their names from the graph's root on, which is "".
        prefix: the root's name in the model.
        constants: other tensors, by their names in the graph.
        unseen: modules that could not be traced and are single nodes.
        is_partial: the graph ends before the forward pass does.
        training: whether a recorded graph ran in train mode; None if traced.
        calls: how often each module was called, in a recorded graph.
    """

    graph: fx.Graph
    modules: Mapping[str, nn.Module]
    prefix: str = ""
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    unseen: frozenset[str] = frozenset()
    is_partial: bool = False
    training: bool | None = None
    calls: Mapping[str, int] = field(default_factory=Counter)

    @property
    def is_recorded(self) -> bool:
        return self.training is not None

    @cached_property
    def fed(self) -> set[fx.Node]:
        """The nodes whose values depend on the graph's input."""
        fed: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "placeholder" or any(source in fed for source in sources(node)):
                fed.add(node)
        return fed

    @cached_property
    def live(self) -> set[fx.Node]:
        """The nodes whose values reach the output or a tensor that is written to.

        In a graph without outputs (the model returns a custom object): all nodes that are used.
        """
        nodes = list(self.graph.nodes)
        outputs = [node for node in nodes if node.op == "output"]
        if not any(node.all_input_nodes for node in outputs):
            return {node for node in nodes if node.users}
        live = {node for node in nodes if _writes(node)}.union(outputs)
        for node in reversed(nodes):
            if node in live:
                live.update(sources(node))
        return live

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """When each node runs."""
        return {node: index for index, node in enumerate(self.graph.nodes)}

    def operation(self, node: fx.Node) -> str:
        """What the node does, in lower case and without underscores; "" for what does nothing."""
        if node.op == "call_module":
            return _plain(type(self.module_of(node)).__name__)
        return called_name(node)

    def fed_sources(self, node: fx.Node) -> list[fx.Node]:
        """Its sources that depend on the graph's input."""
        return [source for source in sources(node) if source in self.fed]

    def consumers(self, node: fx.Node) -> list[fx.Node]:
        """The live nodes that use the node's values."""
        return [user for user in node.users if user in self.live and node in sources(user)]

    def is_view(self, node: fx.Node) -> bool:
        """Whether the node, which may call a module, only presents its argument in another form."""
        return self.operation(node) in _VIEWS

    def runner(self, node: fx.Node) -> str:
        """The innermost module that runs the node, by its name from the graph's root on."""
        return str(node.target) if node.op == "call_module" else str(node.meta.get(MODULE, ""))

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The innermost module that runs the node."""
        return self.modules.get(self.runner(node))

    def value(self, name: str) -> Any:
        """The parameter, buffer, constant or module that a node refers to by this name."""
        constant = self.constants.get(name)
        return attrgetter(name)(self.modules[""]) if constant is None else constant

    def full_name(self, name: str) -> str:
        """A module's or tensor's name in the model."""
        return join(self.prefix, name)

    def is_unseen(self, node: fx.Node) -> bool:
        """Whether what the node does with its arguments is not in the graph."""
        if node.op == "output":
            return bool(self.prefix) or self.is_partial
        return node.op == "call_module" and str(node.target) in self.unseen

    def is_norm(self, node: fx.Node, before: fx.Node) -> bool:
        """Whether the node normalizes, or is part of a norm module that ``before`` is not in."""
        if any(norm in called_name(node) for norm in _NORMS):
            return True
        return self._is_in_norm(node) and self.runner(node) != self.runner(before)

    def normalizes_each_channel(self, node: fx.Node) -> bool:
        """Whether a norm takes each channel by itself, as batch norm does."""
        if self._is_in_norm(node):
            return normalizes_each_channel(self.modules[self.runner(node)])
        return any(norm in called_name(node) for norm in _EACH_CHANNEL_NORMS)

    def layers_in(self, node: fx.Node) -> float:
        """How many layers the node puts its data through; a recurrent one has no end."""
        name = self.operation(node)
        if node.op == "call_module":
            module = self.module_of(node)
            inside = () if module is None else tuple(module.modules())
            if any(isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in inside):
                return float("inf")
            return sum(isinstance(m, WEIGHTED) for m in inside)
        if name in _RECURRENT:
            return float("inf")
        is_layer = name in _LAYERS or name.startswith("conv")
        return int(is_layer and any(source not in self.fed for source in sources(node)))

    def describe(self, node: fx.Node) -> str:
        """The node in words for the reasons of a plan."""
        if node.op == "output":
            return "the model's output"
        if node.op == "call_module" or self._is_in_norm(node):
            return repr(self.full_name(self.runner(node)))
        return operation_name(node) or str(getattr(node.target, "__name__", node.target))

    def _is_in_norm(self, node: fx.Node) -> bool:
        owner = self.module_of(node)
        return owner is not None and is_norm(owner)
