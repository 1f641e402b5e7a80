"""Applying a plan to a model."""

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
from we_surgery._util.scripted import own_parameters
from we_surgery._util.transaction import AllOrNothing
from we_surgery.converted.bypass import prove_excited
from we_surgery.converted.excite import excite
from we_surgery.converted.options import resolve_options
from we_surgery.converted.sites import Init, Start, build_sites
from we_surgery.converted.state import PLAN_ATTRIBUTE, is_converted, kept_plan, refuse_wrappers
from we_surgery.errors import AlreadyConvertedWarning, InputError, NothingToConvertWarning
from we_surgery.planning import transplant_rows
from we_surgery.planning.decide import plan as make_plan
from we_surgery.planning.plans import Plan
from we_surgery.planning.policy import Policy
from we_surgery.planning.rules import Rule

logger = logging.getLogger(__name__)


def convert(
    model: nn.Module,
    mode: str | None = None,
    *,
    config: str | Path | Mapping[str, Any] | Policy | None = None,
    rules: Sequence[Rule] | None = (),
    transplants: Sequence[Any] | None = (),
    plan: Plan | None = None,
    init: Init | None = None,
    start: Start = "on",
    example_inputs: Any = None,
    inplace: bool = False,
) -> nn.Module:
    """Adds weight excitation to the conv and linear layers of ``model``, after any transplants.

    Everything is checked before the first change; on any failure the model is unchanged. New
    parameters are drawn from torch's global random generator and have their layer's device and
    dtype. Convert before building the optimizer and before wrapping the model in DDP, FSDP or
    ``torch.compile``.

    Args:
        model: any model in eager mode, also one that is or holds a ``torch.fx.GraphModule``.
        mode: a name of :data:`we_surgery.MODES`; ``lwe`` by default.
        config: a YAML file or mapping as in ``configs/``, or the name of one there.
        rules: exceptions; the last that matches a layer wins.
        transplants: other methods of the papers, inserted first, such as ``["se"]`` or
            ``[{"max_dropout": {"rate": 0.3}}]``; see :mod:`we_surgery.transplants`.
        plan: a plan made before, edited or not; instead of mode, config, rules, transplants.
        init: ``paper`` (the default) initializes the excitations as new layers, which changes the
            model's outputs. ``preserve`` initializes them so that the outputs stay the same up to
            rounding; use it for pretrained models.
        start: ``paused`` uses the raw weights without excitation until :func:`we_surgery.resume`
            (thesis, section 3.4). At that point the outputs jump with ``init="paper"`` and stay the
            same with ``preserve``, which is then the default for each layer that supports it.
        example_inputs: inputs of the model's forward, as for :func:`strip`. With them the model is
        read by recording a forward pass. The converted model is recorded too, to check that no
        operation reads a raw weight.
        inplace: change ``model`` itself instead of a deep copy.

    Returns:
        The converted model. Its classes stay subclasses of the vanilla ones. Converting a converted
        model warns and changes nothing. If no weight is excited, a
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
    # Reads the model itself, also when a copy is changed.
    with AllOrNothing(model.modules()):
        if plan is None:
            plan = make_plan(model, config=options["config"], example_inputs=example_inputs)
            _warn_of_nothing(plan)
        target = model if inplace else copy_model(model)
        # Transplants first: excitation then finds their layers.
        plan = replace(plan, transplants=tuple(transplant_rows.attach(target, plan.transplants)))
        excite(target, build_sites(target, plan, init, start))
        if example_inputs is not None:
            ran_in_both = plan.read_by == "recorded" and not plan.read_by_reason
            prove_excited(target, example_inputs, ran_in_both=ran_in_both)
        target.__dict__[PLAN_ATTRIBUTE] = plan.after(kept_plan(target)).to_dict()
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


def _refuse_lazy(model: nn.Module) -> None:
    for name, module in model.named_modules():
        own = own_parameters(module).values()
        if any(isinstance(parameter, UninitializedParameter) for parameter in own):
            raise InputError(
                f"layer {name!r} is lazy and has no weight yet",
                "Run one forward pass of the model, then convert it.",
            )
