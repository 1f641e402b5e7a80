"""`attach`: excitation for a model that stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from we_surgery.attached.building import Building, Trained, with_gathered
from we_surgery.attached.excitation import AttachedExcitation
from we_surgery.attached.optimizers import supported_optimizers
from we_surgery.attached.registry import excitation_of
from we_surgery.attached.riding import drop_loaded_states, loaded_states
from we_surgery.attached.wrappers import inside_wrappers
from we_surgery.converted.options import ConvertOptions, resolve_options
from we_surgery.converted.sites import Init, Start
from we_surgery.converted.state import is_converted, refuse_wrappers
from we_surgery.errors import InputError
from we_surgery.excitations import Backend
from we_surgery.excitations.compute.backends import check_backend
from we_surgery.planning.decide import plan as make_plan
from we_surgery.planning.plans import Plan
from we_surgery.planning.policy import Policy
from we_surgery.planning.rules import Rule

Rides = Literal["optimizer", "parameter", "separate"]


def attach(
    model: nn.Module,
    optimizer: Any,
    mode: str | None = None,
    *,
    config: str | Path | Mapping[str, Any] | Policy | None = None,
    rules: Sequence[Rule] | None = (),
    plan: Plan | None = None,
    init: Init | None = None,
    start: Start = "on",
    example_inputs: Any = None,
    backend: Backend = "auto",
    resume: bool | Mapping[str, Any] = True,
    state: Rides = "optimizer",
    clip_raw: float | None = None,
) -> AttachedExcitation:
    """Excites a model's weights in the step of its optimizer. The model stays vanilla.

    From here on each excited weight of the model holds ``W' = E(raw)``, as the ordinary Parameter
    it always was. Forward and backward passes are the vanilla model's own. In each optimizer step
    its gradient is pulled back through E, the optimizer moves the raw weight and the parameters
    of E, and W' is computed anew. That is the training of :func:`we_surgery.convert`, bit for bit,
    and there is nothing to strip: the model can be saved, exported and deployed at any step.

    Call it after the model has its device, dtype and final Parameters, and before an average
    (EMA) is made of its weights. The state of the excitation rides in ``optimizer.state_dict()``.
    Clipping by norm acts on the gradients of W', which are of another size than those of raw
    weights: it is another training than with the converted form.

    Args:
        model: any model; also inside DDP, ``DataParallel`` or ``torch.compile``.
        optimizer: its optimizer, or several of them (a list, or a mapping's values).
        mode: a name of :data:`we_surgery.MODES`; ``lwe`` by default.
        config: a YAML file or mapping as in ``configs/``, or the name of one there;
            without transplants.
        rules: exceptions; the last that matches a layer wins.
        plan: a plan made before, instead of mode, config and rules.
        init: as in :func:`we_surgery.convert`; with ``preserve`` the model's weights stay what
            they are.
        start: ``paused`` leaves each weight as it is until ``excitation.resume()``; as in
            :func:`we_surgery.convert`, ``init`` says how excitation sets in then.
        example_inputs: as in :func:`we_surgery.plan`.
        backend: what computes E where it has a closed form. ``eager`` is torch's operations one
            by one. ``triton`` has kernels, at most 7 launches for all layers together; they run on
            a GPU, and eager computes what they do not: float64 and MWE with ``detach_max=False``.
            ``auto`` takes the kernels on a GPU if they agree with eager on three small layers that
            are tried first, and eager everywhere else.
        resume: True continues with the state that the optimizer has loaded, where there is one;
            False starts anew, also on a run that has made steps without excitation. A mapping is
            a state that ``excitation.state_dict()`` returned, or the state dict of a converted
            model: both go on from its raw weights and excitations.
        state: where the optimizer's state dict carries the state of the excitation. ``optimizer``:
            in an entry of its own; for a sharded model as with ``parameter``. ``parameter``: in
            the states of the Parameters, as ``torch.distributed.checkpoint`` needs it; attach
            before the state is loaded. ``separate``: not at all; save ``excitation.state_dict()``
            yourself.
        clip_raw: clips the gradients in each step as ``clip_grad_norm_`` does for a converted
            model: the total norm, in which those of raw weights stand for those of W', becomes at
            most this.

    Returns:
        The handle.

    Raises:
        InputError: the options do not fit together or do not fit the model, or the optimizer is
            not supported. Nothing was changed.
        SurgeryError: a weight holds Inf or NaN.
        AttachmentError: the loaded state is of another excitation.

    Example:
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> excitation = ws.attach(model, optimizer, mode="lwe")
    """
    _check_options(backend, state, clip_raw)
    root = inside_wrappers(model)
    optimizers = supported_optimizers(optimizer)
    _refuse_model(root)
    policy = _policy_of(
        mode, {"config": config, "rules": rules, "plan": plan, "init": init, "start": start}
    )
    building = Building(root, optimizers, init, start, backend)
    if plan is None:
        readable = building.readable_model()
        plan = make_plan(readable, config=policy, example_inputs=example_inputs, form="attached")
    found = _trained_weights(building, plan)
    saved = _state_to_continue(found, optimizers, resume)
    handle = AttachedExcitation(
        root,
        with_gathered(plan, [weight for weight, _ in found]),
        building,
        policy=policy,
        example_inputs=example_inputs,
        rides=state,
        clip_raw=clip_raw,
    )
    handle.add(found, saved)
    drop_loaded_states(optimizers)
    return handle


def _check_options(backend: str, state: str, clip_raw: float | None) -> None:
    check_backend(backend)
    if clip_raw is not None and not clip_raw > 0:
        raise InputError(
            f"`clip_raw` must be above 0, got {clip_raw}", "Leave it out to disable clipping."
        )
    if state not in get_args(Rides):
        raise InputError(
            f"`state` must be 'optimizer', 'parameter' or 'separate', got {state!r}",
            "Leave it out to save the state in the optimizer's state dict.",
        )


def _refuse_model(root: nn.Module) -> None:
    if is_converted(root):
        raise InputError(
            "the model is converted: its layers compute their excited weights themselves",
            "Strip it first, or train the converted model as it is.",
        )
    refuse_wrappers(root, sharded=False)
    for name, parameter in root.named_parameters():
        if excitation_of(parameter) is not None:
            raise InputError(
                f"{name!r} is excited by an excitation that was attached before",
                "To go on with another optimizer, call `excitation.move_to(optimizer)`. To begin "
                "anew, call `excitation.detach()` first.",
            )


def _policy_of(mode: str | None, options: ConvertOptions) -> Any:
    """What decides over layers; None where a plan has decided."""
    resolved = resolve_options(mode, options)
    policy, plan = resolved.get("config"), resolved.get("plan")
    decided: Any = plan or policy
    if decided.transplants:
        raise InputError(
            "transplants change the model's layers, which attach does not do",
            "Convert with the transplants and without excitation first, then attach.",
        )
    return policy


def _trained_weights(building: Building, plan: Plan) -> list[Trained]:
    found = building.weights_of(plan)
    if not found:
        raise InputError(
            f"the optimizer holds none of the {len(plan.excited)} weights that the plan excites",
            "Make the optimizer from this model's Parameters, or use a plan that excites weights "
            "it holds.",
        )
    return found


def _state_to_continue(
    found: Sequence[Trained], optimizers: Sequence[Any], resume: bool | Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """The state of a run with excitation; raises where its steps are there and it is not."""
    if isinstance(resume, Mapping):
        return resume
    saved = loaded_states(optimizers) if resume else None
    if resume and saved is None:
        _refuse_steps_behind(found)
    return saved


def _refuse_steps_behind(found: Sequence[Trained]) -> None:
    for weight, optimizer in found:
        kept = optimizer.state.get(weight.parameter)
        if kept and kept.get("step", 1) != 0:  # Adagrad's state is made with the optimizer
            raise InputError(
                "the optimizer has made steps already, and holds no state of an excitation: "
                "weights that are excited already would be excited twice",
                "To continue a run with excitation, load the optimizer state that it saved. To "
                "begin excitation on a vanilla run, pass `resume=False`.",
            )
