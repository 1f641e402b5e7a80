"""Passes over a ``torch.fx.GraphModule``: excite its weights, and strip them again.

Both are ``torch.fx.passes.infra.pass_base.PassBase`` and work on the graph module itself, so they
stand in a ``PassManager`` between any others::

    PassManager([ExcitePass("lwe"), my_pass])(graph_module)
    ...  # train
    StripPass(example_inputs=x)(graph_module)

Layers that the graph calls as modules are excited as :func:`we_surgery.convert` does it. Weights
that its own calls read (``F.conv2d``, ``F.linear``, their aten operations) get a node:
``get_attr raw_weight -> call_module excitation -> F.conv2d``. :func:`we_surgery.convert`,
:func:`we_surgery.strip` and :func:`we_surgery.plan` do the same to a graph module.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from we_surgery.converted.convert import convert
from we_surgery.converted.options import ConvertOptions, resolve_options
from we_surgery.converted.state import is_converted
from we_surgery.converted.strip import strip
from we_surgery.planning.decide import plan as make_plan


class ExcitePass(PassBase):
    """Excites the conv and linear weights of a graph module, in place.

    ``call`` does not change a graph module that is already excited or in which the plan excites
    nothing, and reports it as not modified. If it raises, the graph module is unchanged.

    Args:
        mode: as in :func:`we_surgery.convert`.
        **options: those of :func:`we_surgery.convert`: ``config``, ``rules``, ``plan``,
            ``transplants``, ``init``, ``start``, ``example_inputs``. In
            rules, a weight that a call reads has the name of its module or, if the parameter is not
            called ``weight``, its own name.

    Raises:
        InputError: the arguments do not fit together.
    """

    def __init__(self, mode: str | None = None, **options: Unpack[ConvertOptions]) -> None:
        self.options = resolve_options(mode, options)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if is_converted(graph_module):
            return PassResult(graph_module, False)
        options = self.options.copy()
        policy = options.pop("config", None)
        plan = options["plan"] = options.get("plan") or make_plan(
            graph_module, config=policy, example_inputs=options.get("example_inputs")
        )
        if plan.changes:
            convert(graph_module, **options, inplace=True)
        return PassResult(graph_module, plan.changes)


class StripPass(PassBase):
    """Folds the excited weights of a graph module, in place, and removes their nodes.

    Each folded weight is compared bit for bit with the excited one. The graph, the state dict's
    keys and their order are then those before :class:`ExcitePass`. If ``call`` raises, the graph
    module is unchanged.

    Args:
        example_inputs: with them, the outputs before and after are compared as well.
    """

    def __init__(self, *, example_inputs: Any = None) -> None:
        self.example_inputs = example_inputs

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if not is_converted(graph_module):
            return PassResult(graph_module, False)
        strip(graph_module, example_inputs=self.example_inputs, inplace=True)
        return PassResult(graph_module, True)
