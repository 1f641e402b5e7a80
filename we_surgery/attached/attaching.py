"""`attach`: excitation for a model that stays vanilla."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from we_surgery._util.scripted import own_parameters
from we_surgery.attached.building import Building, Trained, as_attached
from we_surgery.attached.excitation import AttachedExcitation
from we_surgery.attached.optimizers import supported_optimizers
from we_surgery.attached.registry import excitation_of
from we_surgery.attached.riding import drop_loaded_states, loaded_states
from we_surgery.attached.shards import is_sharded
from we_surgery.attached.weights import HALF, AttachedWeight
from we_surgery.attached.wrappers import inside_wrappers
from we_surgery.converted.options import ConvertOptions, resolve_options
from we_surgery.converted.sites import Init, Start
from we_surgery.converted.state import is_converted, refuse_wrappers
from we_surgery.errors import AttachmentError, InputError
from we_surgery.excitations import Backend
from we_surgery.excitations.compute.backends import check_backend
from we_surgery.planning.decide import plan as make_plan
from we_surgery.planning.plans import Plan
from we_surgery.planning.policy import Policy
from we_surgery.planning.rules import Rule

logger = logging.getLogger(__name__)

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

    Each excited weight of the model now holds ``W' = E(raw)``, in the same Parameter as before.
    Forward and backward passes are the vanilla model's. Each optimizer step pulls the gradient of
    W' back through E, updates the raw weight and the parameters of E, and computes W' again. This
    trains the same weights as :func:`we_surgery.convert`, bit for bit. There is nothing to strip:
    the model can be saved, exported and deployed after any step.

    Call it after the model has its device, dtype and final Parameters, and before an average
    (EMA) is made of its weights. ``optimizer.state_dict()`` contains the state of the excitation.
    Clipping by norm acts on the gradients of W', which differ in size from those of raw weights, so
    it trains differently than in the converted form; see ``clip_raw``.

    Args:
        model: any model; also inside DDP, ``DataParallel`` or ``torch.compile``.
        optimizer: its optimizer, or several of them (a list, or a mapping's values).
        mode: a name of :data:`we_surgery.MODES`; ``lwe`` by default.
        config: a YAML file or mapping as in ``configs/``, or the name of one there;
            without transplants.
        rules: exceptions; the last that matches a layer wins.
        plan: a plan made before, instead of mode, config and rules.
        init: as in :func:`we_surgery.convert`; ``preserve`` keeps the model's current weights.
        start: ``paused`` does not excite until ``excitation.resume()``; ``init`` then applies as in
            :func:`we_surgery.convert`.
        example_inputs: as in :func:`we_surgery.plan`.
        backend: what computes excitations that have a closed form. ``eager`` runs torch's
            operations. ``triton`` runs kernels on a GPU, with at most 7 launches for all layers
            together; eager computes what they do not support (float64, and MWE with
            ``detach_max=False``). ``auto`` uses the kernels on a GPU if they first agree with eager
            on three small layers, and eager otherwise.
        resume: True continues from the state that the optimizer has loaded, if any. False starts
            anew, also in a run that has made steps without excitation. A mapping is the result of
            ``excitation.state_dict()`` or the state dict of a converted model; its raw weights and
            excitations are loaded.
        state: where the state of the excitation is saved. ``optimizer``: in one entry of the
            optimizer's state dict (for a sharded model, as with ``parameter``). ``parameter``: in
            the states of the Parameters, as ``torch.distributed.checkpoint`` requires; attach
            before the state is loaded. ``separate``: not in the optimizer's state dict; save
            ``excitation.state_dict()`` yourself.
        clip_raw: maximum total norm of the gradients in each step, computed with those of raw
            weights instead of W', as ``clip_grad_norm_`` does for a converted model.

    Returns:
        The excitation, to resume, adopt, move, extend or detach it.

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
        as_attached(plan, [weight for weight, _ in found]),
        building,
        policy=policy,
        example_inputs=example_inputs,
        rides=state,
        clip_raw=clip_raw,
    )
    copies = _frozen_copies(root, plan, found)
    handle.add(found, saved)
    drop_loaded_states(optimizers)
    _tell_of_changed_originals(copies)
    return handle


def _frozen_copies(
    root: nn.Module, plan: Plan, found: Sequence[Trained]
) -> list[tuple[str, nn.Parameter, AttachedWeight]]:
    """Frozen layers that hold the values of an excited weight: momentum encoders, teachers."""
    originals: dict[Any, list[AttachedWeight]] = {}
    for weight, _ in found:
        originals.setdefault(_likeness(weight.parameter), []).append(weight)
    copies = []
    for row in plan.decisions:
        frozen = own_parameters(root.get_submodule(row.module)).get(row.parameter)
        if frozen is None or frozen.requires_grad or is_sharded(frozen):
            continue
        for weight in originals.get(_likeness(frozen), ()):
            if torch.equal(frozen, weight.parameter):
                copies.append((row.layer, frozen, weight))
                break
    return copies


def _tell_of_changed_originals(
    copies: Sequence[tuple[str, nn.Parameter, AttachedWeight]],
) -> None:
    left = [
        layer for layer, copied, weight in copies if not torch.allclose(copied, weight.parameter)
    ]
    if left:
        logger.warning(
            "%d frozen weights, such as %r, were copies of weights that excitation has changed; "
            "copy them again, as for a momentum encoder",
            len(left),
            left[0],
        )


def _likeness(parameter: nn.Parameter) -> tuple[Any, ...]:
    return parameter.shape, parameter.dtype, parameter.device, is_sharded(parameter)


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
                'anew, call `excitation.detach()` first, and attach with `init="preserve"` to '
                "keep the current weights.",
            )


def _policy_of(mode: str | None, options: ConvertOptions) -> Any:
    """The policy; None if a plan is given."""
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
    if not plan.excited:
        reasons = "".join(f": {row.layer!r} {row.reason}" for row in plan.decisions[:1])
        raise InputError(
            f"the plan excites none of the model's {len(plan.decisions)} weights{reasons}",
            "Print the result of `we_surgery.plan(model, ...)`, which has the reason of each, and "
            "change what it says.",
        )
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
    """The saved state to continue from; raises if there are steps but no state."""
    if isinstance(resume, Mapping):
        return resume
    saved = loaded_states(optimizers) if resume else None
    if resume and saved is None:
        _refuse_steps_behind(found)
    if saved is not None and any(own["raw"].dtype in HALF for own in saved["weights"].values()):
        raise AttachmentError(
            "the optimizer has cast the excitation's state to the model's half precision, as torch "
            'does when it loads a state saved with `state="parameter"`',
            "Attach first, and load the state then.",
        )
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
