"""Applying a plan to a model, and stripping it again."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery.errors import (
    AlreadyConvertedWarning,
    InputError,
    NothingToStripWarning,
    SurgeryError,
)
from we_surgery.grafting import Graft, Init, Start, build_grafts, graft, ungraft
from we_surgery.graphs import complete_copies, excited_weights, refuse_changed_graphs
from we_surgery.layers import change_since_conversion, excited_layers, raw_name
from we_surgery.options import resolve_options
from we_surgery.planning import Plan
from we_surgery.planning import plan as make_plan
from we_surgery.policy import Policy
from we_surgery.proof import StripReport, check_fold, check_outputs, run_in_eval
from we_surgery.reading import prove_excited
from we_surgery.rules import Rule

logger = logging.getLogger(__name__)

PLAN_ATTRIBUTE = "we_surgery_plan"
Progress = Callable[[int, int], None]


def convert(
    model: nn.Module,
    mode: str | None = None,
    *,
    config: str | Path | Mapping[str, Any] | Policy | None = None,
    rules: Sequence[Rule] = (),
    plan: Plan | None = None,
    init: Init = "paper",
    start: Start = "on",
    example_inputs: Any = None,
    inplace: bool = False,
) -> nn.Module:
    """Gives the conv and linear layers of ``model`` excited weights.

    Everything is checked before the first change; on any failure the model is exactly as it
    was. The new parameters are drawn from torch's global random generator, as any new layer's
    are, and live on their layer's device in its dtype. Convert before building the optimizer
    and before wrapping the model in DDP, FSDP or ``torch.compile``.

    Args:
        model: any model in eager mode, also one that is or holds a ``torch.fx.GraphModule``.
        mode: a name of :data:`we_surgery.MODES`; ``lwe`` by default.
        config: a YAML file or mapping as in ``configs/``.
        rules: exceptions; the last that matches a layer wins.
        plan: a plan made before, edited or not; instead of mode, config and rules.
        init: ``paper`` draws the excitations as any new layer, and the model computes something
            else than before until it is trained; ``preserve`` starts them so that it computes
            what it did, within rounding: for pretrained models.
        start: ``paused`` makes each excited weight the raw weight itself until
            :func:`we_surgery.resume` (thesis, section 3.4); ``init`` then says nothing.
        example_inputs: inputs of the model's forward, as for :func:`strip`. With them the
            model is read by recording a forward, and recorded again once converted, which
            proves that no operation reads a converted weight raw.
        inplace: change ``model`` itself instead of a deep copy.

    Returns:
        The converted model. Its classes stay subclasses of the vanilla ones. Converting a
        model that is converted already warns and changes nothing.

    Raises:
        InputError: the request does not fit together or does not fit the model.
        SurgeryError: a weight holds Inf or NaN, or the model cannot be copied.
    """
    refuse_wrappers(model)
    if is_converted(model):
        warnings.warn(
            "the model is converted already; nothing was changed. Strip it first to convert it "
            "in another way.",
            AlreadyConvertedWarning,
            stacklevel=2,
        )
        return model if inplace else copy_model(model)
    options = resolve_options(
        mode, {"config": config, "rules": rules, "plan": plan, "init": init, "start": start}
    )
    if plan is None:
        plan = make_plan(model, config=options["config"], example_inputs=example_inputs)
    target = model if inplace else copy_model(model)
    undo = graft(target, build_grafts(target, plan, init, start))
    if example_inputs is not None:
        try:
            ran_in_both = plan.rung == "recorded" and not plan.rung_reason
            prove_excited(target, example_inputs, ran_in_both=ran_in_both)
        except BaseException:
            undo()
            raise
    target.__dict__[PLAN_ATTRIBUTE] = plan.to_dict()
    logger.info("excited %d of %d weights", len(plan.excited), len(plan.decisions))
    return target


def strip(model: nn.Module, *, example_inputs: Any = None, inplace: bool = False) -> nn.Module:
    """The vanilla model with every excited weight folded in, proven equal.

    Each folded weight is compared bit for bit with the excited one and, where
    ``example_inputs`` are given, the outputs of both models in eval mode are compared.

    Args:
        model: a converted model.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of
            keyword arguments of the model's forward.
        inplace: change ``model`` itself instead of a deep copy; the raw Parameters stay the
            same objects, now with the folded values, and lose their gradients.

    Returns:
        A model of vanilla classes, with the vanilla keys in the vanilla order. Stripping a
        model without excited layers warns and changes nothing.

    Raises:
        SurgeryError: the proof failed; ``model`` is as it was.
        InputError: ``model`` is wrapped or sharded, or fails on the example inputs.
    """
    return strip_with_report(model, example_inputs=example_inputs, inplace=inplace)[0]


def strip_with_report(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    inplace: bool = False,
    progress: Progress | None = None,
) -> tuple[nn.Module, StripReport]:
    """:func:`strip`, and what it found.

    Args:
        model: as in :func:`strip`.
        example_inputs: as in :func:`strip`.
        inplace: as in :func:`strip`.
        progress: called with (layers done, layers in all).
    """
    refuse_wrappers(model)
    if not is_converted(model):
        warnings.warn(
            "the model has no excited layers; there is nothing to strip.",
            NothingToStripWarning,
            stacklevel=3,
        )
        left = sum(parameter.numel() for parameter in model.parameters())
        return (model if inplace else copy_model(model)), StripReport(0, 0, left)
    _refuse_changed_layers(model)
    before = None if example_inputs is None else run_in_eval(model, example_inputs)
    total = sum(parameter.numel() for parameter in model.parameters())
    folds = sum(1 for _ in excited_weights(model))
    target = model if inplace else copy_model(model)
    undo = _fold(target, model, progress)
    try:
        differences = (
            (None, None)
            if before is None
            else check_outputs(before, run_in_eval(target, example_inputs))
        )
    except BaseException:
        undo()
        raise
    target.__dict__.pop(PLAN_ATTRIBUTE, None)
    logger.info("folded %d excited weights", folds)
    left = sum(parameter.numel() for parameter in target.parameters())
    return target, StripReport(folds, total - left, left, *differences)


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        SurgeryError: the model holds something that cannot be copied.
    """
    try:
        # Parameters that are made in inference mode cannot be trained.
        with torch.inference_mode(False):
            memo: dict[int, Any] = {}
            copied = copy.deepcopy(model, memo)
            complete_copies(model, memo)
            return copied
    except Exception as error:
        raise SurgeryError(
            f"the model cannot be copied: {type(error).__name__}: {error}",
            "Pass `inplace=True` to change the model itself.",
        ) from error


def is_converted(model: nn.Module) -> bool:
    """Whether any weight of the model is excited."""
    return next(excited_weights(model), None) is not None


def refuse_wrappers(model: nn.Module) -> None:
    """Raises for what surgery must happen inside of: DDP, FSDP, compiled and scripted models.

    Raises:
        InputError: the model is wrapped or sharded.
    """
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "the model is TorchScript, whose layers cannot be changed",
            "Give the eager model it was scripted or traced from.",
        )
    if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
        raise InputError(
            f"the model is wrapped in {kind}",
            "Convert and strip the model inside (`model.module`), before wrapping it.",
        )
    if kind == "OptimizedModule":
        raise InputError(
            "the model is wrapped by torch.compile",
            "Convert and strip the model inside (`model._orig_mod`), before compiling it.",
        )
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise InputError(
            "the model is sharded (its parameters are DTensors)",
            "Convert before fully_shard; strip a full state dict with `strip_state_dict`.",
        )


def _refuse_changed_layers(model: nn.Module) -> None:
    """Raises if something was put on an excited layer, or on its raw weight, after `convert`."""
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


def _fold(target: nn.Module, excited: nn.Module, progress: Progress | None) -> Callable[[], None]:
    """Replaces each excited layer of ``target`` by its vanilla self; returns the undo.

    All folds are computed and compared with the excited weights of ``excited`` (``target``
    itself, or the model it is a copy of) before the first layer is changed.
    """
    weights = list(excited_weights(target))
    references = {(w.module, w.parameter): w for w in excited_weights(excited)}
    folded: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for index, weight in enumerate(weights):
        raw = weight.raw
        if id(raw) not in folded:
            folded[id(raw)] = (raw, weight.folded())
        with torch.no_grad():
            reference = references[weight.module, weight.parameter].excited()
        check_fold(weight.name, reference, folded[id(raw)][1])
        if progress is not None:
            progress(index + 1, len(weights))
    kept = [(raw, raw.data, raw.grad) for raw, _ in folded.values()]
    grafts = [Graft(w.module, w.parameter, w.excitation) for w in weights]

    def undo() -> None:
        for raw, data, gradient in kept:
            raw.data, raw.grad = data, gradient
        left = {(w.module, w.parameter) for w in excited_weights(target)}
        graft(target, [g for g in grafts if (g.module, g.parameter) not in left])

    try:
        for raw, value in folded.values():
            raw.data, raw.grad = value, None
        ungraft(target, [weight.owner for weight in weights])
    except BaseException:
        undo()
        raise
    return undo
