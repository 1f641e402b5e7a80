"""Excitations applied one after the other, on a weight read as filters."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from we_surgery.errors import ExcitationError, InputError, NotStrippedWarning
from we_surgery.excitations.base import Affine, Excitation, autocast_off, in_full_precision
from we_surgery.excitations.cached import block_of
from we_surgery.excitations.compute.backends import EAGER, Backend, arithmetic
from we_surgery.excitations.compute.closed_form import excite_in_closed_form, excite_in_place
from we_surgery.excitations.compute.rerun import excite_and_rerun
from we_surgery.excitations.compute.terms import Terms, changes_nothing
from we_surgery.excitations.layout import WeightLayout, from_filters, to_filters
from we_surgery.excitations.legacy import upgrade_state
from we_surgery.excitations.lwe import LWE
from we_surgery.excitations.mwe import MWE
from we_surgery.excitations.paused import idle
from we_surgery.excitations.record import RECORD_KEY, Record, make_record, to_tensor
from we_surgery.excitations.rescale import Rescale
from we_surgery.excitations.standardize import Standardize


class Composition(Excitation):
    """The stages of an excited layer, in their fixed order: normalize, locate, amplify, mask.

    The papers compose in one order only (WE paper, Table 3: standardization, then the
    LWE gate, then MWE with its maximum taken over the gated weight), so each stage
    carries its place, and a place is taken at most once. A state dict says all this in words, in
    the composition's *record* (:mod:`we_surgery.excitations.record`).

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
    """Of length 1 in a pause and 0 after it, so that no average goes on over the end of one."""
    backend: Backend = "eager"
    """Which backend computes the closed form; the attached form sets it."""

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
        for stage in ordered:
            self.add_module(stage.name, stage)
        self._speak_for_stages()
        self.transposed_groups = transposed_groups
        # Not in a state dict, whose record says it.
        self.register_buffer("paused", None, persistent=False)

    @property
    def stages(self) -> tuple[Excitation, ...]:
        """The stages in the order they run."""
        return tuple(s for s in self.children() if isinstance(s, Excitation))

    @property
    def is_paused(self) -> bool:
        """Whether the excited weight is the raw weight until :meth:`resume`."""
        return self.paused is not None and self.paused.shape[0] > 0

    def set_paused(self, paused: bool, device: torch.device | str = "cpu") -> None:
        """Says that this is paused or is not, and changes nothing else."""
        if paused != self.is_paused:
            held = torch.zeros(1, dtype=torch.uint8, device=device)
            self.paused = held if paused else held[:0]

    @property
    def record(self) -> Record:
        return make_record(
            [{stage.name: stage.chosen_options()} for stage in self.stages],
            transposed_groups=self.transposed_groups,
            paused=self.is_paused,
        )

    def take_over_record(self, record: Record) -> None:
        for stage, said in zip(self.stages, record["stages"], strict=True):
            stage.take_over(said[stage.name])
        device = next((tensor.device for tensor in self.parameters()), "cpu")
        self.set_paused(record["paused"], device)

    def get_extra_state(self) -> Tensor:
        """The record as state dicts hold it."""
        return to_tensor(self.record)

    def set_extra_state(self, state: Tensor) -> None:
        """:meth:`adopt`, by the name that torch calls it by."""
        self.adopt(state)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._speak_for_stages()
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._speak_for_stages()
        if prefix + RECORD_KEY not in state_dict:
            upgrade_state(state_dict, prefix)
        try:
            nn.Module._load_from_state_dict(
                self,
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        except InputError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error.cause}. {error.cure}")

    def _speak_for_stages(self) -> None:
        for stage in self.stages:
            stage.is_part = True

    @torch.no_grad()
    def pause(self, weight: Tensor) -> None:
        """Makes this the identity until :meth:`resume`; for a new composition.

        All tensors that it will have then are there from now on.

        Args:
            weight: the raw weight, for its shape.
        """
        self.preserve(weight)
        self.set_paused(True, "cpu" if weight.is_meta else weight.device)

    @torch.no_grad()
    def resume(self, weight: Tensor) -> Tensor:
        """Ends the pause without a change of the excited weight.

        Args:
            weight: the raw weight as it is now.

        Returns:
            The raw weight to go on with; see :meth:`preserve`.
        """
        if not self.is_paused:
            return weight
        raw = self.preserve(weight)
        self.set_paused(False, weight.device)
        return raw

    def __prepare_scriptable__(self) -> Self:
        """What ``torch.jit.script`` asks each module for."""
        raise ExcitationError(
            "torch.jit.script does not support converted models",
            "Strip the model first (`we_surgery.strip(model)`) and script the result.",
        )

    def forward(self, weight: Tensor) -> Tensor:
        block = block_of(self, weight)
        return self.compute(weight) if block is None else block.excited(self, weight, self.compute)

    def compute(self, weight: Tensor) -> Tensor:
        """:meth:`forward`, also where it would return what was computed before."""
        warn_if_exported()
        if self.is_paused:
            return idle(weight, list(self.parameters()))
        # A trace that is to be saved cannot hold an autograd function.
        is_traced = torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
        terms = self._terms(weight)
        if is_traced or weight.numel() == 0 or (terms is not None and changes_nothing(terms)):
            return super().forward(weight)
        if terms is not None:
            return excite_in_closed_form(weight, terms, self.backend)
        if self.training and torch.is_grad_enabled():
            self._advance_stages(weight)
        return excite_and_rerun(self, weight)

    def closed_form(self, weight: Tensor) -> Terms | None:
        """What the closed form is given for this weight; None where something else computes."""
        if self.is_paused or weight.numel() == 0:
            return None
        terms = self._terms(weight)
        return None if terms is None or changes_nothing(terms) else terms

    def is_identity(self, weight: Tensor) -> bool:
        """Whether the excited weight is the raw weight itself."""
        if self.is_paused or weight.numel() == 0:
            return True
        terms = self._terms(weight)
        return terms is not None and changes_nothing(terms)

    @torch.no_grad()
    def excite_in_place(self, weight: Tensor) -> Tensor:
        """:meth:`forward` to the bit, for a weight that nobody needs afterwards.

        The closed form of a large weight then needs little memory beside the weight's own.

        Returns:
            ``weight``, overwritten; or another tensor where it is small or a stage has no closed
            form.
        """
        terms = self.closed_form(weight)
        if terms is None or arithmetic(self.backend, weight, terms) is not EAGER:
            return self(weight)  # type: ignore[no-any-return]
        return excite_in_place(weight, terms)

    @torch.no_grad()
    def _advance_stages(self, weight: Tensor) -> None:
        stages = self.stages
        places = [place for place, stage in enumerate(stages) if stage.advances]
        if not places or torch._C._are_functorch_transforms_active():
            return
        last = places[-1]
        with autocast_off(weight.device.type):
            filters = self._as_filters(in_full_precision(weight.detach()))
            for stage in stages[:last]:
                stage.advance(filters)
                filters = stage.excite(filters)
            stages[last].advance(filters)

    def _terms(self, weight: Tensor) -> Terms | None:
        """The stages as the closed form takes them; None where it does not know them."""
        found: dict[str, Any] = {}
        for stage in self._modules.values():
            # Exact types: a subclass may compute something else.
            if type(stage) is Standardize:
                if weight.numel() > self._out_channels(weight):
                    found["standardize_epsilon"] = stage.epsilon
            elif isinstance(stage, LWE) and stage.is_paper_form:
                fc1_weight, fc1_bias, fc2_weight, fc2_bias = stage.layer_tensors()
                found |= {"fc1_weight": fc1_weight, "fc1_bias": fc1_bias}
                found |= {"fc2_weight": fc2_weight, "fc2_bias": fc2_bias}
            elif type(stage) is Rescale and not stage.gain.requires_grad:
                found |= {"gain": stage.gain, "shift": stage.shift}
            elif isinstance(stage, MWE) and stage.is_paper_form:
                found |= {"mwe_epsilon": stage.epsilon, "detach_max": stage.detach_max}
            else:
                return None
        return Terms(**found, transposed_groups=self.transposed_groups)

    def _out_channels(self, weight: Tensor) -> int:
        if self.transposed_groups is None:
            return weight.shape[0]
        return weight.shape[1] * self.transposed_groups

    def excite(self, weight: Tensor) -> Tensor:
        """The excited weight stage by stage, in full precision.

        The reference that the closed form of :meth:`forward` is tested against, and what runs
        where a stage is of a class the closed form does not know.
        """
        filters = self._as_filters(weight)
        for stage in self.stages:
            filters = stage.excite(filters)
        return self._as_stored(filters, weight)

    def invert(self, excited: Tensor) -> Tensor:
        filters = self._as_filters(excited)
        for stage in reversed(self.stages):
            filters = stage.invert(filters)
        return self._as_stored(filters, excited)

    @torch.no_grad()
    def prepare(self, weight: Tensor) -> None:
        last = max((i for i, stage in enumerate(self.stages) if _prepares(stage)), default=-1)
        if last < 0 or weight.numel() == 0:
            return
        with autocast_off(weight.device.type):
            filters = self._as_filters(in_full_precision(weight))
            for stage in self.stages[: last + 1]:
                stage.prepare(filters)
                filters = stage.excite(filters)

    def share(self, parts: dict[Hashable, nn.Module]) -> None:
        for stage in self.stages:
            stage.share(parts)

    @torch.no_grad()
    def preserve(self, weight: Tensor) -> Tensor:
        """Starts the stages so that a pretrained weight stays what it is.

        Stages such as MWE are inverted. LWE starts as one multiplier for all kernels, by which
        the weight is divided. What standardization and its like take of each filter, a
        :class:`Rescale` stage gives back; it is added here.

        Args:
            weight: the pretrained weight, as the layer stores it.

        Returns:
            The raw weight whose excitation is ``weight`` up to rounding.

        Raises:
            NotImplementedError: a stage cannot be started so.
        """
        if weight.numel() == 0:
            return weight
        with autocast_off(weight.device.type):
            return self._preserve(weight)

    def _preserve(self, weight: Tensor) -> Tensor:
        others = [stage for stage in self.stages if stage.name != Rescale.name]
        filters = self._as_filters(in_full_precision(weight))
        for stage in reversed([s for s in others if s.order > Rescale.order]):
            filters = stage.start_inverse(filters)
        # Of the weight as it is stored, perhaps rounded.
        stored = self._as_stored(filters, weight).to(weight.dtype)
        fed = self._as_filters(in_full_precision(stored))
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
            # The weight may have been cast since.
            rescale.gain = rescale.gain.to(gain.dtype).copy_(gain)
            rescale.shift = rescale.shift.to(shift.dtype).copy_(shift)
        else:
            self._insert(Rescale(gain, shift))

    def _insert(self, stage: Excitation) -> None:
        stages = sorted((*self.stages, stage), key=lambda stage: stage.order)
        for other in stages:
            self._modules.pop(other.name, None)
        for other in stages:
            self.add_module(other.name, other)
        self._speak_for_stages()

    def _as_filters(self, weight: Tensor) -> Tensor:
        if self.transposed_groups is None:
            return weight
        return to_filters(weight, self.transposed_groups)

    def _as_stored(self, filters: Tensor, like: Tensor) -> Tensor:
        if self.transposed_groups is None:
            return filters
        stored = from_filters(filters, self.transposed_groups)
        # Regrouping loses the memory format, and a conv's result may depend on it.
        return torch.empty_like(like).copy_(stored)

    @classmethod
    def for_layout(
        cls, layout: WeightLayout, *, device: torch.device | None, dtype: torch.dtype | None
    ) -> Self:
        raise TypeError("a composition is built from its stages; see `build_excitation`")

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Self:
        raise TypeError("a composition is rebuilt from its stages; see `rebuild_excitation`")


def _prepares(stage: Excitation) -> bool:
    return type(stage).prepare is not Excitation.prepare


def warn_if_exported() -> None:
    """Warns where an excitation becomes part of an exported or traced graph."""
    if torch.compiler.is_dynamo_compiling():
        return  # it cannot warn; `torch.export` with strict=True comes this way
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
        warnings.warn(
            "the model that is exported or traced is converted, so its graph computes the excited "
            "weights from the raw ones at each run. To deploy it, strip it first: "
            "`we_surgery.strip(model)`.",
            NotStrippedWarning,
            stacklevel=2,
        )
