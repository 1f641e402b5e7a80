"""Several excitations in sequence, on a weight read as filters."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from we_surgery.errors import ExcitationError, NotStrippedWarning
from we_surgery.excitations.base import (
    Affine,
    Excitation,
    autocast_off,
    in_full_precision,
)
from we_surgery.excitations.cached import block_of
from we_surgery.excitations.compute.closed_form import excite_in_closed_form, excite_in_place
from we_surgery.excitations.compute.inputs import NO_STAGES, ClosedFormInputs, changes_nothing
from we_surgery.excitations.compute.rerun import excite_and_rerun
from we_surgery.excitations.layout import from_filters, to_filters
from we_surgery.excitations.record import Paused, PausedInit, Record, to_tensor
from we_surgery.excitations.standardize import Rescale


class Composition(Excitation):
    """The stages of an excited layer, in their fixed order: normalize, locate, amplify, mask.

    The papers compose in one order (WE paper, Table 3: standardization, then LWE, then MWE with
    the maximum of the located weight), so each stage has a place, and each place holds one stage.
    A state dict stores stages and options as text, the *record*
    (:mod:`we_surgery.excitations.record`).

    Args:
        stages: at least one excitation; at most one of each ``order``.
        transposed_groups: groups of a transposed conv, whose ``[C, O/g, *K]`` weight is
            regrouped into filters before the first stage and back after the last;
            None for every other layer.

    Raises:
        ValueError: no stage, or two stages of one name or place.
    """

    name: ClassVar[str] = "composition"
    order: ClassVar[int] = 0
    transposed_groups: int | None
    paused: Tensor | None
    """Not empty during a pause: its size tells an average of the model that the pause ended."""
    sets_in: PausedInit = "preserve"
    """How the pause ends: ``preserve`` keeps the weight of that moment."""

    def __init__(self, stages: Iterable[Excitation], transposed_groups: int | None = None) -> None:
        super().__init__()
        ordered = sorted(stages, key=lambda stage: stage.order)
        if not ordered:
            raise ValueError("a composition needs at least one stage")
        names = ", ".join(stage.name for stage in ordered)
        if len({stage.name for stage in ordered}) < len(ordered):
            raise ValueError(f"a composition takes each stage once, not {names}")
        if len({stage.order for stage in ordered}) < len(ordered):
            raise ValueError(f"two of {names} take the same place; a composition takes one of them")
        self._add(ordered)
        self.transposed_groups = transposed_groups
        # The record stores it.
        self.register_buffer("paused", None, persistent=False)

    @property
    def stages(self) -> tuple[Excitation, ...]:
        """The stages in the order they run."""
        return tuple(s for s in self.children() if isinstance(s, Excitation))

    @property
    def is_paused(self) -> bool:
        """Whether the excited weight is the raw weight until :meth:`resume`."""
        paused = self.paused  # once: a step asks this of each weight
        return paused is not None and paused.shape[0] > 0

    def set_paused(self, paused: Paused, device: torch.device | str = "cpu") -> None:
        """Begins a pause that will end as given, or ends one."""
        if paused:
            self.sets_in = paused
        if bool(paused) != self.is_paused:
            held = torch.zeros(1, dtype=torch.uint8, device=device)
            self.paused = held if paused else held[:0]

    @property
    def record(self) -> Record:
        paused = self.sets_in if self.is_paused else False
        return super().record | {"transposed_groups": self.transposed_groups, "paused": paused}

    def adopt(self, saved: Tensor) -> Record:
        record = super().adopt(saved)
        device = next((tensor.device for tensor in self.parameters()), "cpu")
        self.set_paused(record["paused"], device)
        return record

    def get_extra_state(self) -> Tensor:
        """The record, for torch.distributed.checkpoint, which asks for it by this name."""
        return to_tensor(self.record)

    @torch.no_grad()
    def pause(self, weight: Tensor, sets_in: PausedInit = "preserve") -> None:
        """Makes this the identity until :meth:`resume`, with the tensors that it will have then.

        Raises:
            NotImplementedError: it resumes by ``preserve``, and a stage cannot.
        """
        if sets_in == "preserve":
            self.preserve(weight)
        self.set_paused(sets_in, "cpu" if weight.is_meta else weight.device)

    @torch.no_grad()
    def resume(self, weight: Tensor) -> Tensor:
        """Ends the pause and returns the new raw weight.

        With ``preserve``, its excitation is the present weight.
        """
        if not self.is_paused:
            return weight
        if self.sets_in == "preserve":
            weight = self.preserve(weight)
        else:
            self.prepare(weight)
        self.set_paused(False, weight.device)
        return weight

    def __prepare_scriptable__(self) -> Self:
        """Called by ``torch.jit.script``."""
        raise ExcitationError(
            "torch.jit.script does not support converted models",
            "Strip the model first (`we_surgery.strip(model)`) and script the result.",
        )

    def forward(self, weight: Tensor) -> Tensor:
        block = block_of(self, weight)
        return self.compute(weight) if block is None else block.excited(self, weight, self.compute)

    def compute(self, weight: Tensor) -> Tensor:
        """:meth:`forward` without :func:`~we_surgery.cached`."""
        warn_if_exported()
        if self.is_paused:
            return _idle(weight, list(self.parameters()))
        # A saved trace cannot hold an autograd function.
        is_traced = torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
        inputs = self._inputs(weight)
        if is_traced or weight.numel() == 0 or (inputs is not None and changes_nothing(inputs)):
            return super().forward(weight)
        if inputs is not None:
            return excite_in_closed_form(weight, inputs)
        is_transformed = torch._C._are_functorch_transforms_active()
        if self.training and torch.is_grad_enabled() and not is_transformed:
            self._feed(weight, "advance")
        return excite_and_rerun(self, weight)

    def closed_form(self, weight: Tensor) -> ClosedFormInputs | None:
        """The closed form's inputs for this weight; None if autograd computes it.

        Without stages if the excited weight is the raw weight.
        """
        if self.is_paused or weight.numel() == 0:
            return NO_STAGES
        return self._inputs(weight)

    @torch.no_grad()
    def excite_in_place(self, weight: Tensor) -> Tensor:
        """:meth:`forward` to the bit; may overwrite a large weight."""
        inputs = self.closed_form(weight)
        if inputs is None or changes_nothing(inputs):
            return self(weight)  # type: ignore[no-any-return]
        return excite_in_place(weight, inputs)

    @torch.no_grad()
    def _feed(self, weight: Tensor, method: str) -> None:
        """Calls a method of each stage with the stage's input, up to the last that defines it."""
        base = getattr(Excitation, method)
        last = [stage for stage in self.stages if getattr(type(stage), method) is not base][-1:]
        if not last or weight.numel() == 0:
            return
        with autocast_off(weight.device.type):
            filters = to_filters(in_full_precision(weight.detach()), self.transposed_groups)
            for stage in self.stages:
                getattr(stage, method)(filters)
                if stage is last[0]:
                    return
                filters = stage.excite(filters)

    def _inputs(self, weight: Tensor) -> ClosedFormInputs | None:
        """The stages as inputs of the closed form; None if it does not know one."""
        found: dict[str, Any] = {}
        for stage in self._modules.values():
            own = stage.closed_form_fields() if isinstance(stage, Excitation) else None
            if own is None:
                return None
            found |= own
        if weight.numel() <= self._out_channels(weight):
            # Filters of a single value are not standardized.
            found.pop("standardize_epsilon", None)
        return ClosedFormInputs(**found, transposed_groups=self.transposed_groups)

    def _out_channels(self, weight: Tensor) -> int:
        if self.transposed_groups is None:
            return weight.shape[0]
        return weight.shape[1] * self.transposed_groups

    def excite(self, weight: Tensor) -> Tensor:
        filters = to_filters(weight, self.transposed_groups)
        for stage in self.stages:
            filters = stage.excite(filters)
        return self._as_stored(filters, weight)

    def invert(self, excited: Tensor) -> Tensor:
        filters = to_filters(excited, self.transposed_groups)
        for stage in reversed(self.stages):
            filters = stage.invert(filters)
        return self._as_stored(filters, excited)

    def prepare(self, weight: Tensor) -> None:
        self._feed(weight, "prepare")

    def share(self, parts: dict[Hashable, nn.Module]) -> None:
        for stage in self.stages:
            stage.share(parts)

    @torch.no_grad()
    def preserve(self, weight: Tensor) -> Tensor:
        """Initializes the stages so that a pretrained weight stays the same.

        Stages such as MWE are inverted. LWE starts with one multiplier for all kernels, and the
        weight is divided by it. A :class:`Rescale` stage, added here, restores the mean and scale
        that standardization removes from each filter.

        Args:
            weight: the pretrained weight, as the layer stores it.

        Returns:
            The raw weight whose excitation is ``weight`` up to rounding.

        Raises:
            NotImplementedError: a stage cannot start this way.
        """
        if weight.numel() == 0:
            return weight
        with autocast_off(weight.device.type):
            return self._preserve(weight)

    def _preserve(self, weight: Tensor) -> Tensor:
        others = [stage for stage in self.stages if stage.name != Rescale.name]
        filters = to_filters(in_full_precision(weight), self.transposed_groups)
        for stage in reversed([s for s in others if s.order > Rescale.order]):
            filters = stage.start_inverse(filters)
        # The stages will see the stored weight, which may be rounded.
        stored = self._as_stored(filters, weight).to(weight.dtype)
        fed = to_filters(in_full_precision(stored), self.transposed_groups)
        undone = Affine()
        for stage in (s for s in others if s.order < Rescale.order):
            gain, shift = stage.start_affine(fed)
            fed = stage.excite(fed)
            undone = Affine(undone.gain * gain, undone.shift + undone.gain * shift)
        if not isinstance(undone.gain, Tensor):
            return self._as_stored(filters * undone.gain, weight).to(weight.dtype)
        self._rescale_by(undone, fed)
        return stored

    def _rescale_by(self, undone: Affine, filters: Tensor) -> None:
        gain, shift = (filters.new_zeros(filters.shape[0]) + values for values in undone)
        rescale = self._modules.get(Rescale.name)
        if isinstance(rescale, Rescale):
            # The weight may have another dtype since.
            rescale.gain = rescale.gain.to(gain.dtype).copy_(gain)
            rescale.shift = rescale.shift.to(shift.dtype).copy_(shift)
        else:
            stages = (*self.stages, Rescale(gain, shift))
            self._add(sorted(stages, key=lambda stage: stage.order))

    def _add(self, ordered: Iterable[Excitation]) -> None:
        for stage in ordered:
            self._modules.pop(stage.name, None)
            self.add_module(stage.name, stage)
            stage.is_part = True

    def extra_repr(self) -> str:
        return "" if self.transposed_groups is None else super().extra_repr()

    def _as_stored(self, filters: Tensor, like: Tensor) -> Tensor:
        if self.transposed_groups is None:
            return filters
        # Regrouping loses the memory format, which can change a conv's result.
        return torch.empty_like(like).copy_(from_filters(filters, self.transposed_groups))


def warn_if_exported() -> None:
    """Warns when an excitation becomes part of an exported or traced graph."""
    if torch.compiler.is_dynamo_compiling():
        return  # it cannot warn; `torch.export(strict=True)` gets here
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
        warnings.warn(
            "the model that is exported or traced is converted, so its graph computes the excited "
            "weights from the raw ones at each run. To deploy it, strip it first: "
            "`we_surgery.strip(model)`.",
            NotStrippedWarning,
            stacklevel=2,
        )


def _idle(weight: Tensor, parameters: list[Tensor]) -> Tensor:
    """``weight``, with a graph that gives the parameters a zero gradient, as DDP needs."""
    is_traced = torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    if is_traced or torch._C._are_functorch_transforms_active() or not torch.is_grad_enabled():
        return weight
    excited: Tensor = _Idle.apply(weight, *parameters)
    return excited


class _Idle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        zeros = (
            torch.zeros_like(parameter) if needed else None
            for parameter, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        )
        return gradient, *zeros
