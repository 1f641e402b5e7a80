"""Applying a plan to a model, and stripping it again."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery.errors import (
    AlreadyConvertedWarning,
    InputError,
    NothingToStripWarning,
    SurgeryError,
    near_matches,
)
from we_surgery.excitations import Composition, build_excitation
from we_surgery.graphs import (
    complete_copies,
    excited_weights,
    held_by_graphs,
    hold,
    refuse_changed_graphs,
    refuse_ill_formed_graphs,
    release,
    update_graphs,
)
from we_surgery.layers import (
    change_since_conversion,
    excite,
    excited_layers,
    raw_name,
    restore,
)
from we_surgery.planning import Decision, Plan
from we_surgery.planning import plan as make_plan
from we_surgery.policy import Policy
from we_surgery.proof import (
    StripReport,
    check_fold,
    check_outputs,
    refuse_non_finite,
    run_in_eval,
)
from we_surgery.reading import LayerFacts, obstacle_of, prove_excited, read_tree
from we_surgery.rules import Rule

logger = logging.getLogger(__name__)

PLAN_ATTRIBUTE = "we_surgery_plan"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Graft:
    """One excitation and the parameter it goes to.

    Attributes:
        module: name of the owning module in the model.
        parameter: the parameter's name in it.
        excitation: shared by all grafts of one tied Parameter.
    """

    module: str
    parameter: str
    excitation: Composition


def convert(
    model: nn.Module,
    mode: str | None = None,
    *,
    config: str | Path | Mapping[str, Any] | Policy | None = None,
    rules: Sequence[Rule] = (),
    plan: Plan | None = None,
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
        mode: ``lwe`` (default), ``mwe``, ``we`` or ``lwe+mwe``.
        config: a YAML file or mapping as in ``configs/``.
        rules: exceptions; the last that matches a layer wins.
        plan: a plan made before, edited or not; instead of mode, config and rules.
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
    if plan is None:
        plan = make_plan(model, mode, config=config, rules=rules, example_inputs=example_inputs)
    elif mode is not None or config is not None or rules:
        raise InputError(
            "both a plan and a mode, config or rules were given",
            "Give the plan alone; edit its rows to change it.",
        )
    target = model if inplace else copy_model(model)
    graft(target, build_grafts(target, plan))
    if example_inputs is not None:
        try:
            prove_excited(target, example_inputs)
        except BaseException:
            _ungraft(target, target.modules())
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


def build_grafts(model: nn.Module, plan: Plan) -> list[Graft]:
    """The excitations a plan asks for, checked against the model, which is not changed.

    Raises:
        InputError: a row names no such layer, another shape or kind, an excitation that does
            not exist, a weight that cannot be excited, or another recipe than its tied layers;
            or the model's torch.fx graph is not well-formed.
        SurgeryError: a weight holds Inf or NaN.
    """
    refuse_ill_formed_graphs(model)
    facts = {(f.module, f.parameter): f for f in read_tree(model)}
    modules = dict(model.named_modules())
    by_parameter: dict[int, tuple[Decision, Composition]] = {}
    grafts: list[Graft] = []
    for decision in plan.excited:
        key = (decision.module, decision.parameter)
        fact = facts.get(key) or _bare_parameter(modules.get(decision.module), decision)
        _check_row(decision, fact, [f.name for f in facts.values()])
        if any((g.module, g.parameter) == (decision.module, decision.parameter) for g in grafts):
            raise InputError(
                f"the plan names layer {decision.layer!r} twice", "Keep one of its rows."
            )
        parameter = modules[decision.module]._parameters[decision.parameter]
        assert parameter is not None
        refuse_non_finite(decision.layer, parameter, "the weight")
        if id(parameter) in by_parameter:
            first, excitation = by_parameter[id(parameter)]
            if str(first.excitation) != str(decision.excitation):
                raise InputError(
                    f"the plan excites the tied layers {first.layer!r} and {decision.layer!r} "
                    "in different ways",
                    "Give tied layers the same `excitation`, or leave them all alone.",
                )
        else:
            with torch.inference_mode(False):
                excitation = build_excitation(
                    decision.excitation,
                    decision.layout,
                    device=parameter.device,
                    dtype=parameter.dtype,
                )
            by_parameter[id(parameter)] = (decision, excitation)
        grafts.append(Graft(decision.module, decision.parameter, excitation))
    _refuse_half_tied(facts.values(), {(g.module, g.parameter) for g in grafts})
    return grafts


def graft(model: nn.Module, grafts: Iterable[Graft]) -> None:
    """Attaches excitations in place; on any failure those attached so far come off again."""
    done: list[nn.Module] = []
    is_held = held_by_graphs(model)
    try:
        for item in grafts:
            module = model.get_submodule(item.module)
            item.excitation.train(module.training)
            if is_held(module, item.parameter):
                hold(module, item.parameter, item.excitation)
            else:
                excite(module, item.parameter, item.excitation, item.module or "(the model itself)")
            done.append(module)
        update_graphs(model)
    except BaseException:
        _ungraft(model, done)
        raise


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


def _ungraft(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Takes the excitations of these modules of ``model`` off; raw weights become the weights."""
    for module in list(modules):
        restore(module)
        release(module)
    update_graphs(model)


def _bare_parameter(owner: nn.Module | None, decision: Decision) -> LayerFacts | None:
    """Facts of a weight that no conv, linear or attention module owns, as the plan has it."""
    parameter = owner._parameters.get(decision.parameter) if owner is not None else None
    if owner is None or parameter is None:
        return None
    return LayerFacts(
        module=decision.module,
        parameter=decision.parameter,
        kind=decision.kind,
        type_name=decision.type_name,
        layout=replace(decision.layout, shape=tuple(parameter.shape)),
        obstacle=obstacle_of(owner, decision.parameter),
    )


def _check_row(decision: Decision, fact: LayerFacts | None, names: Sequence[str]) -> None:
    if fact is None:
        raise InputError(
            f"the plan names a layer {decision.layer!r} that the model has not"
            f"{near_matches(decision.layer, names)}",
            "Use a plan that was made for this model.",
        )
    if (fact.kind, fact.layout) != (decision.kind, decision.layout):
        raise InputError(
            f"the plan has layer {decision.layer!r} as {decision.kind} of shape {decision.shape} "
            f"and {decision.groups} groups, the model as {fact.kind} of shape "
            f"{fact.layout.shape} and {fact.layout.groups} groups",
            "Use a plan that was made for this model.",
        )
    if fact.obstacle is not None:
        raise InputError(
            f"the plan excites layer {decision.layer!r}, which {fact.obstacle}",
            'Give its row `"excitation": []`.',
        )


def _refuse_half_tied(facts: Iterable[LayerFacts], excited: set[tuple[str, str]]) -> None:
    for fact in facts:
        owners = [tuple(path.rpartition(".")[::2]) for path in fact.tied_modules]
        chosen = [owner for owner in owners if owner in excited]
        if chosen and len(chosen) < len(owners):
            left = next(owner for owner in owners if owner not in excited)
            raise InputError(
                f"the plan excites {'.'.join(chosen[0])!r} but not {'.'.join(left)!r}, "
                "which is the same Parameter",
                "Give tied layers the same `excitation`, or leave them all alone.",
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
        _ungraft(target, [weight.owner for weight in weights])
    except BaseException:
        undo()
        raise
    return undo
