"""Folds a converted model's weights and removes what is only for training."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from we_surgery._util.copies import copy_model
from we_surgery._util.progress import Progress
from we_surgery._util.transaction import AllOrNothing
from we_surgery.converted.excite import change_since_conversion, restore
from we_surgery.converted.graphs import ExcitedWeight, excited_weights, refuse_changed_graphs
from we_surgery.converted.layer import excited_layers
from we_surgery.converted.proof import (
    StripReport,
    check_fold,
    check_outputs,
    not_deterministic,
    refuse_non_finite,
    run_in_eval,
)
from we_surgery.converted.state import PLAN_ATTRIBUTE, is_converted, kept_plan, refuse_wrappers
from we_surgery.errors import InputError, NothingToStripWarning, SurgeryError, check_known
from we_surgery.excitations.names import raw_name
from we_surgery.planning import transplant_rows
from we_surgery.planning.plans import Plan
from we_surgery.planning.transplant_rows import TransplantDecision
from we_surgery.transplants import Transplant
from we_surgery.transplants.shift import ShiftTransplant

logger = logging.getLogger(__name__)


DEPLOY_FORMS: dict[str, tuple[Transplant, ...]] = {"dense": (), "shift": (ShiftTransplant(),)}
"""What is put into a folded model, by the name of its form."""

_HASHED_AT_A_TIME = 2**19
"""Values whose bytes are gathered at a time."""


def strip(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    deploy: str = "dense",
    inplace: bool = False,
    layer_by_layer: bool = False,
) -> nn.Module:
    """Folds all excited weights and returns the vanilla model.

    Each folded weight is compared bit for bit with the excited one. With ``example_inputs``, the
    outputs of both models in eval mode are compared too.

    Args:
        model: a converted model.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of
            keyword arguments of the model's forward.
        deploy: ``dense`` gives vanilla layers. ``shift`` gives a shift and a 1x1 conv, modules of
            :mod:`we_surgery.transplants.shift`, for each conv with one weight per kernel at
            positions that its filters share.
        inplace: change ``model`` itself instead of a deep copy; the raw Parameters stay the
            same objects, now with the folded values, and lose their gradients. The folds are kept
            apart until all are checked, so a failure leaves the model unchanged. This needs memory
            for a second set of the excited weights.
        layer_by_layer: with ``inplace``, use the memory of one or two weights only. All folds are
            checked first, and then computed again. A failure after that, such as Ctrl-C, leaves a
            model with the same outputs in which some layers are already vanilla. Not with
            ``example_inputs``, whose check must be able to undo the strip.

    Returns:
        A model of vanilla classes, with the vanilla keys in the vanilla order. Stripping a
        model without excited layers warns and changes nothing.

    Raises:
        SurgeryError: a check failed; ``model`` is unchanged.
        InputError: ``model`` is wrapped or sharded, or fails on the example inputs.
    """
    return strip_with_report(
        model,
        example_inputs=example_inputs,
        deploy=deploy,
        inplace=inplace,
        layer_by_layer=layer_by_layer,
    )[0]


def strip_with_report(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    deploy: str = "dense",
    inplace: bool = False,
    layer_by_layer: bool = False,
    progress: Progress | None = None,
) -> tuple[nn.Module, StripReport]:
    """:func:`strip` with a report; ``progress`` is called with (layers done, layers in all)."""
    refuse_wrappers(model)
    check_known("deploy form", deploy, DEPLOY_FORMS)
    if layer_by_layer and example_inputs is not None:
        raise InputError(
            "a strip layer by layer cannot be rolled back if output verification fails",
            "Leave out the example inputs, each weight is compared in any case; or leave out "
            "`layer_by_layer`.",
        )
    if not is_converted(model):
        warnings.warn(
            "the model is not converted; there is nothing to strip.",
            NothingToStripWarning,
            stacklevel=3,
        )
        left = sum(parameter.numel() for parameter in model.parameters())
        target = model if inplace else copy_model(model)
        _set_kept_plan(target, ())
        return target, StripReport(0, 0, left)
    _refuse_changed(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    folds = sum(1 for _ in excited_weights(model))
    transplants = sum(1 for _ in transplant_rows.attached(model))
    target = model if inplace else copy_model(model)
    if layer_by_layer:
        _fold_layer_by_layer(target, progress)
    with AllOrNothing(model.modules()):
        before = None if example_inputs is None else run_in_eval(model, example_inputs)
        _fold(target, model, progress)
        transplant_rows.detach(target)
        deployed = transplant_rows.decide(target, DEPLOY_FORMS[deploy])
        absolute, relative = (
            (None, None)
            if before is None
            else check_outputs(before, run_in_eval(target, example_inputs))
        )
        _set_kept_plan(target, deployed)
    logger.info("folded %d excited weights", folds)
    if transplants:
        logger.info("took out %d transplants", transplants)
    left = sum(parameter.numel() for parameter in target.parameters())
    return target, StripReport(
        folds,
        total - left,
        left,
        absolute,
        relative,
        transplants,
        deployed=sum(row.attach for row in deployed),
    )


def _set_kept_plan(model: nn.Module, deployed: Sequence[TransplantDecision]) -> None:
    """Reduces a stripped model's plan to the transplants that stay."""
    plan = kept_plan(model) or Plan("none", "", "", (), 0)
    model.__dict__.pop(PLAN_ATTRIBUTE, None)
    kept = replace(plan.kept, transplants=(*plan.kept.transplants, *deployed)).kept
    if kept.transplants:
        model.__dict__[PLAN_ATTRIBUTE] = kept.to_dict()


def _refuse_changed(model: nn.Module) -> None:
    """Raises if something was put on the model after its conversion that strip cannot undo."""
    for name, layer in excited_layers(model):
        change = change_since_conversion(layer)
        if change is not None:
            raise SurgeryError(
                f"layer {name!r} was changed after its conversion: {change}",
                "Remove the pruning mask, parametrization or wrapper that was put on it.",
            )
    refuse_changed_graphs(model)
    weights = list(excited_weights(model))
    raw_weights = {id(weight.raw): weight.module for weight in weights}
    own = {(weight.owner, raw_name(weight.parameter)) for weight in weights}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, attribute = name.rpartition(".")
        if id(parameter) in raw_weights and (model.get_submodule(owner), attribute) not in own:
            raise SurgeryError(
                f"{name!r} was tied to the raw weight of {raw_weights[id(parameter)]!r} after "
                "its conversion",
                "Tie layers before converting, so that the plan can decide for all of them.",
            )


def _fold(model: nn.Module, reference: nn.Module, progress: Progress | None) -> None:
    """Folds all weights of a converted model: ``reference`` or a copy of it."""
    # Computes and compares all folds with the reference's excited weights before the first change.
    weights = list(excited_weights(model))
    references = {(w.module, w.parameter): w for w in excited_weights(reference)}
    folded: dict[int, Tensor] = {}
    for index, weight in enumerate(weights):
        raw = weight.raw
        if id(raw) not in folded:
            folded[id(raw)] = weight.folded()
        with torch.no_grad():
            excited = references[weight.module, weight.parameter].excited()
        check_fold(weight.name, excited, folded[id(raw)])
        if progress is not None:
            progress(index + 1, len(weights))
    _put_in_place(model, weights, folded)


def _put_in_place(
    model: nn.Module, weights: Sequence[ExcitedWeight], folded: Mapping[int, Tensor]
) -> None:
    """Makes folded values the weights, and takes the excitations off."""
    for weight in _one_of_each_raw(weights):
        raw = weight.raw
        raw.data, raw.grad = folded[id(raw)], None
    restore(model, [weight.owner for weight in weights])


def _fold_layer_by_layer(model: nn.Module, progress: Progress | None = None) -> None:
    """Folds each weight into its raw one's memory before it computes the next.

    Checksums prove all folds before the first change, so only one weight is held at a time. A
    failure after that, such as Ctrl-C, leaves a model with the same outputs and some vanilla
    layers; a second call continues.
    """
    weights = list(excited_weights(model))
    checksums: dict[int, bytes] = {}
    for index, weight in enumerate(weights):
        if not weight.raw.is_meta:
            if id(weight.raw) not in checksums:
                folded = weight.folded()
                refuse_non_finite(weight.name, folded, "the folded weight")
                checksums[id(weight.raw)] = _checksum(folded)
                del folded
            with torch.no_grad():
                if _checksum(weight.excited()) != checksums[id(weight.raw)]:
                    raise not_deterministic(weight.name)
        if progress is not None:
            progress(index + 1, len(weights))
    graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    for linked in _linked(weights):
        folds = {id(w.raw): w.folded() for w in _one_of_each_raw(linked)}
        with AllOrNothing([*(weight.owner for weight in linked), *graphs]):
            _put_in_place(model, linked, folds)


def _linked(weights: Iterable[ExcitedWeight]) -> Iterator[list[ExcitedWeight]]:
    """The weights in parts that share neither an owner nor a raw Parameter with another part."""
    part_of: dict[int, list[ExcitedWeight]] = {}
    for weight in weights:
        touched = {id(p): p for key in _keys(weight) if (p := part_of.get(key)) is not None}
        part = [*chain(*touched.values()), weight]
        part_of |= {key: part for member in part for key in _keys(member)}
    yield from {id(part): part for part in part_of.values()}.values()


def _keys(weight: ExcitedWeight) -> tuple[int, int]:
    return id(weight.owner), id(weight.raw)


def _one_of_each_raw(weights: Iterable[ExcitedWeight]) -> Iterable[ExcitedWeight]:
    return {id(weight.raw): weight for weight in reversed(list(weights))}.values()


def _checksum(weight: Tensor) -> bytes:
    """A checksum of all bits and the dtype, computed in parts."""
    found = hashlib.sha256(str(weight.dtype).encode())
    rows = max(_HASHED_AT_A_TIME // max(weight[:1].numel(), 1), 1)
    for part in torch.split(weight.detach(), rows):
        found.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.digest()
