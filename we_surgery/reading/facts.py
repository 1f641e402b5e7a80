"""The facts that reading a model finds about each layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from we_surgery.excitations import WeightLayout

Form = Literal["converted", "attached"]
"""Excitation in the model's graph, or in the optimizer's step."""


@dataclass
class LayerFacts:
    """One weight of a conv, linear or attention layer.

    Attributes:
        module: the owning module's name in the model ("" for the model itself).
        parameter: the weight's name in that module, such as ``weight``.
        kind: ``conv1d`` ... ``conv_transpose3d``, ``linear``, ``linear_transpose`` (x @ W) or
            ``attention``.
        type_name: the module's class, qualified.
        layout: the weight's shape and the meaning of its axes.
        tied_modules: the distinct modules, by first name, that own the same Parameter.
        frozen: the Parameter does not require a gradient.
        standardizes_itself: the class's forward standardizes the weight.
        gate: the attention gate the layer sits in, or None.
        shift: how the layer's input channels are displaced, or None.
        followed_by_norm: each path from the layer meets a norm before anything that depends on the
            scale of the layer's output; None if unknown.
        norm_evidence: the evidence for ``followed_by_norm``, for the plan's reasons.
        obstacle: why the weight cannot be excited, or None.
        converted_obstacle: why only the optimizer's step can excite it, and not the model's graph;
            or None.
        readers: other modules than its own that feed it to an operation.
        reads: how often a forward pass reads it as a weight; None if not recorded.
        no_gradient: in train mode, forward passes read it only with gradients off.
        constant_input: it is applied only to constants, such as a table of positions.
    """

    module: str
    parameter: str
    kind: str
    type_name: str
    layout: WeightLayout
    tied_modules: tuple[str, ...] = ()
    frozen: bool = False
    standardizes_itself: bool = False
    gate: str | None = None
    shift: str | None = None
    followed_by_norm: bool | None = None
    norm_evidence: str = ""
    obstacle: str | None = None
    converted_obstacle: str | None = None
    readers: tuple[str, ...] = ()
    reads: int | None = None
    no_gradient: bool = False
    constant_input: bool = False

    def obstacle_for(self, form: Form) -> str | None:
        """Why the weight cannot be excited in this form, or None."""
        if self.obstacle is None and form == "converted":
            return self.converted_obstacle
        return self.obstacle

    @property
    def path(self) -> str:
        """The weight's qualified name."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    @property
    def name(self) -> str:
        """What patterns match and tables show: the module, with any parameter but ``weight``."""
        return layer_display_name(self.module, self.parameter)

    @property
    def has_single_channel_groups(self) -> bool:
        """Whether a filter sees one input channel: depthwise, or a conv on a grey image."""
        return self.layout.channels == 1 and self.kind.startswith("conv")


def layer_display_name(module: str, parameter: str) -> str:
    """``features.0`` for a ``weight``, ``encoder.in_proj_weight`` for any other parameter."""
    if parameter == "weight":
        return module
    return f"{module}.{parameter}" if module else parameter


@dataclass
class Reading:
    """The result of reading a model.

    Attributes:
        read_by: ``recorded`` (a forward pass), ``symbolic`` (traced without inputs) or ``listed``
            (only the module tree).
        read_by_reason: why a more precise reading was not possible, or which parts could not be
            read; or "".
        layers: the facts, in the order of ``model.named_modules()``.
    """

    read_by: str
    read_by_reason: str
    layers: list[LayerFacts] = field(default_factory=list)
