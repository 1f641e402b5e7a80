"""Applying a plan to a model, and stripping it again."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from we_surgery._util.copies import copy_model
from we_surgery._util.scripted import is_scripted, own_parameters
from we_surgery._util.transaction import AllOrNothing
from we_surgery.converted.bypass import prove_excited
from we_surgery.converted.fold_in_place import fold_layer_by_layer
from we_surgery.converted.graphs import excited_weights
from we_surgery.converted.operations import OPERATIONS
from we_surgery.converted.operations import Progress as Progress
from we_surgery.converted.options import resolve_options
from we_surgery.converted.proof import StripReport, check_outputs, run_in_eval
from we_surgery.converted.sites import Init, Start
from we_surgery.errors import (
    AlreadyConvertedWarning,
    InputError,
    NothingToConvertWarning,
    NothingToStripWarning,
    near_matches,
)
from we_surgery.planning import transplant_rows
from we_surgery.planning.decide import plan as make_plan
from we_surgery.planning.plans import Plan
from we_surgery.planning.policy import Policy
from we_surgery.planning.rules import Rule
from we_surgery.planning.transplant_rows import TransplantDecision
from we_surgery.transplants import Transplant
from we_surgery.transplants.shift import ShiftTransplant

logger = logging.getLogger(__name__)

PLAN_ATTRIBUTE = "we_surgery_plan"

DEPLOY_FORMS: dict[str, tuple[Transplant, ...]] = {"dense": (), "shift": (ShiftTransplant(),)}
"""What is put into a folded model, by the name of its form."""


def convert(
    model: nn.Module,
    mode: str | None = None,
    *,
    config: str | Path | Mapping[str, Any] | Policy | None = None,
    rules: Sequence[Rule] | None = (),
    transplants: Sequence[Any] | None = (),
    plan: Plan | None = None,
    init: Init = "paper",
    start: Start = "on",
    example_inputs: Any = None,
    inplace: bool = False,
) -> nn.Module:
    """Gives the conv and linear layers of ``model`` excited weights, after any transplants.

    Everything is checked before the first change; on any failure the model is exactly as it
    was. The new parameters are drawn from torch's global random generator, as any new layer's
    are, and live on their layer's device in its dtype. Convert before building the optimizer
    and before wrapping the model in DDP, FSDP or ``torch.compile``.

    Args:
        model: any model in eager mode, also one that is or holds a ``torch.fx.GraphModule``.
        mode: a name of :data:`we_surgery.MODES`; ``lwe`` by default.
        config: a YAML file or mapping as in ``configs/``, or the name of one there.
        rules: exceptions; the last that matches a layer wins.
        transplants: other methods of the papers that are put in first, such as ``["se"]`` or
            ``[{"max_dropout": {"rate": 0.3}}]``; see :mod:`we_surgery.transplants`.
        plan: a plan made before, edited or not; instead of mode, config, rules, transplants.
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
        model that is converted already warns and changes nothing. Where no weight is excited, a
        :class:`NothingToConvertWarning` says so.

    Raises:
        InputError: the request does not fit together or does not fit the model.
        SurgeryError: a weight holds Inf or NaN, the model cannot be copied or does not run on
            ``example_inputs``, or the proof by a second recording failed.
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
    if example_inputs is not None:
        _refuse_lazy(model)
    options = resolve_options(
        mode,
        {
            "config": config,
            "rules": rules,
            "transplants": transplants,
            "plan": plan,
            "init": init,
            "start": start,
        },
    )
    # The model itself is read, with or without inputs, also where a copy is changed.
    with AllOrNothing(model.modules()):
        if plan is None:
            plan = make_plan(model, config=options["config"], example_inputs=example_inputs)
            _warn_of_nothing(plan)
        target = model if inplace else copy_model(model)
        for operation in OPERATIONS:
            plan = operation.attach(target, plan, init, start)
        if example_inputs is not None:
            ran_in_both = plan.read_by == "recorded" and not plan.read_by_reason
            prove_excited(target, example_inputs, ran_in_both=ran_in_both)
        target.__dict__[PLAN_ATTRIBUTE] = plan.after(_kept_plan(target)).to_dict()
    logger.info("excited %d of %d weights", len(plan.excited), len(plan.decisions))
    return target


def _warn_of_nothing(plan: Plan) -> None:
    if plan.changes or plan.mode == "none":
        return
    reasons = Counter(decision.reason for decision in plan.decisions).most_common(1)
    most = f", most of them for this reason: {reasons[0][0]}" if reasons else ""
    warnings.warn(
        f"none of the model's {len(plan.decisions)} weights is excited{most}. It trains as the "
        "vanilla model; `we_surgery.plan` gives the reason for each.",
        NothingToConvertWarning,
        stacklevel=3,
    )


def strip(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    deploy: str = "dense",
    inplace: bool = False,
    layer_by_layer: bool = False,
) -> nn.Module:
    """The vanilla model with every excited weight folded in, proven equal.

    Each folded weight is compared bit for bit with the excited one and, where
    ``example_inputs`` are given, the outputs of both models in eval mode are compared.

    Args:
        model: a converted model.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of
            keyword arguments of the model's forward.
        deploy: ``dense`` for vanilla layers; ``shift`` for a shift and a 1x1 conv, modules of
            :mod:`we_surgery.transplants.shift`, in the place of each conv with one weight a
            kernel at places that its filters share.
        inplace: change ``model`` itself instead of a deep copy; the raw Parameters stay the
            same objects, now with the folded values, and lose their gradients. All folds are
            held until all are proven, so that a failure leaves the model as it was: at its
            peak it takes the memory of a second set of the excited weights, and of computing
            the largest.
        layer_by_layer: with ``inplace``, take the memory of one or two weights instead. All
            folds are proven first all the same, one after the other, and then computed again; a
            failure after that, such as Ctrl-C, leaves a model that computes what it did, of
            which some layers are vanilla already. Not with ``example_inputs``, which prove a
            strip that can still be taken back.

    Returns:
        A model of vanilla classes, with the vanilla keys in the vanilla order. Stripping a
        model without excited layers warns and changes nothing.

    Raises:
        SurgeryError: the proof failed; ``model`` is as it was.
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
    """:func:`strip`, and what it found.

    Args:
        model: as in :func:`strip`.
        example_inputs: as in :func:`strip`.
        deploy: as in :func:`strip`.
        inplace: as in :func:`strip`.
        layer_by_layer: as in :func:`strip`.
        progress: called with (layers done, layers in all).
    """
    refuse_wrappers(model)
    if deploy not in DEPLOY_FORMS:
        raise InputError(
            f"there is no deploy form {deploy!r}{near_matches(str(deploy), DEPLOY_FORMS)}",
            f"Use one of: {', '.join(DEPLOY_FORMS)}.",
        )
    if layer_by_layer and example_inputs is not None:
        raise InputError(
            "a strip layer by layer cannot be taken back when its outputs turn out to differ",
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
    for operation in OPERATIONS:
        operation.refuse_changed(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    folds = sum(1 for _ in excited_weights(model))
    transplants = sum(1 for _ in transplant_rows.attached(model))
    target = model if inplace else copy_model(model)
    if layer_by_layer:
        fold_layer_by_layer(target, progress)
    with AllOrNothing(model.modules()):
        before = None if example_inputs is None else run_in_eval(model, example_inputs)
        for operation in reversed(OPERATIONS):
            operation.detach(target, model, progress)
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


def is_converted(model: nn.Module) -> bool:
    """Whether strip has something to take off the model."""
    return any(operation.attached(model) for operation in OPERATIONS)


def stored_plan(model: nn.Module) -> Plan | None:
    """The plan that was done to the model; of a stripped one, its transplants that stay."""
    stored = model.__dict__.get(PLAN_ATTRIBUTE)
    return None if stored is None else Plan.from_dict(stored, "the plan of the model")


def _kept_plan(model: nn.Module) -> Plan | None:
    """What the model's plan says of the transplants that are part of it after strip."""
    if not model.__dict__.get(PLAN_ATTRIBUTE, {}).get("transplants"):
        return None  # without a look at its layers, which builds their excitations to count them
    plan = stored_plan(model)
    return plan.kept if plan is not None and plan.kept.transplants else None


def _set_kept_plan(model: nn.Module, deployed: Sequence[TransplantDecision]) -> None:
    """Leaves of a stripped model's plan what is part of it, and nothing if nothing is."""
    plan = _kept_plan(model) or Plan("none", "", "", (), 0)
    model.__dict__.pop(PLAN_ATTRIBUTE, None)
    kept = replace(plan.kept, transplants=(*plan.kept.transplants, *deployed)).kept
    if kept.transplants:
        model.__dict__[PLAN_ATTRIBUTE] = kept.to_dict()


def _refuse_lazy(model: nn.Module) -> None:
    for name, module in model.named_modules():
        own = own_parameters(module).values()
        if any(isinstance(parameter, UninitializedParameter) for parameter in own):
            raise InputError(
                f"layer {name!r} is lazy and has no weight yet",
                "Run one forward pass of the model, then convert it.",
            )


def refuse_wrappers(model: nn.Module, *, sharded: bool = True) -> None:
    """Raises for what surgery must happen inside of: DDP, FSDP, compiled and scripted models.

    Args:
        model: the model.
        sharded: whether to refuse FSDP2 too.

    Raises:
        InputError: the model is wrapped or sharded.
    """
    kind = type(model).__name__
    if is_scripted(model):
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
    if sharded and any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise InputError(
            "the model is sharded (its parameters are DTensors)",
            "Convert before fully_shard; strip a full state dict with `strip_state_dict`.",
        )
