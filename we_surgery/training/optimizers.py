"""Optimizers that are kept when a model is converted or stripped during training."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from we_surgery.attached.optimizers import (
    SHARDED_OR_FLAT,
    group_for,
    start_early_state,
)
from we_surgery.attached.wrappers import with_wrapped
from we_surgery.converted.graphs import excited_weights
from we_surgery.errors import InputError
from we_surgery.training.param_groups import refuse_tensors_of_another_model
from we_surgery.training.vanilla_view import (
    ExcitationParameters,
    excitation_parameters,
    inside_wrappers,
)

logger = logging.getLogger(__name__)

_FIXED = SHARDED_OR_FLAT | {
    "LBFGS": "keeps one flat history over all of its parameters, whose size is fixed",
}


class StaleOptimizerWarning(UserWarning):
    """An optimizer holds tensors that are no longer parameters of its model."""


def add_to_optimizer(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Adds the excitations of a model converted in place to the optimizer that trains it.

    For a model that is converted in the middle of training. Each excitation joins the group of its
    layer's weight; its biases join the group with the same options and no weight decay, if there is
    one. No group is added, so learning-rate schedules keep working. Existing parameters keep their
    order, options and state. A second call changes nothing. Layers that the optimizer does not
    train are left out with their excitations.

    Convert with ``inplace=True``, so that the raw weights are the Parameters that the optimizer
    holds. Optimizer states saved before the conversion no longer fit. To resume, make the optimizer
    from the vanilla model, convert in place, call this, then load the state.

    Args:
        optimizer: any torch optimizer, or one wrapped as accelerate does.
        model: the converted model; also inside DDP or ``torch.compile``.

    Returns:
        The names of the parameters that were added.

    Raises:
        InputError: the optimizer holds none of the model's parameters, as after a conversion
            without ``inplace=True``, or cannot take new ones (LBFGS). It is unchanged.

    Warns:
        StaleOptimizerWarning: the model's parameters were replaced, and the optimizer still holds
            the old tensors.

    Example:
        >>> ws.convert(model, inplace=True)
        >>> added = ws.add_to_optimizer(optimizer, model)
    """
    model = inside_wrappers(model)
    groups = optimizer.param_groups
    refuse_tensors_of_another_model((p for group in groups for p in group["params"]), model)
    held = {id(tensor): group for group in groups for tensor in group["params"]}
    excitations = list(excitation_parameters(model, held))
    _warn_of_replaced_parameters(held.keys(), groups, model, excitations)
    joining = [
        (name, parameter, group_for(optimizer, held[id(excitation.raw)], parameter))
        for excitation in excitations
        if id(excitation.raw) in held
        for name, parameter in excitation.named
        if id(parameter) not in held
    ]
    if joining:
        _refuse_fixed(optimizer)
    homeless = [name for name, _, group in joining if group is None]
    if homeless:
        raise InputError(
            f"Muon trains only matrices, so no group of the optimizer can take {homeless[0]!r}",
            "Give the excitations' biases an optimizer of their own, such as AdamW.",
        )
    for name, parameter, group in joining:
        assert group is not None
        start_early_state(optimizer, parameter, group)
        group["params"].append(parameter)
        if "param_names" in group:
            group["param_names"].append(name)
    logger.info("added %d parameters to %s", len(joining), type(optimizer).__name__)
    return [name for name, _, _ in joining]


def remove_from_optimizer(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Takes the excitations of a converted model out of its optimizer, before an in-place strip.

    For a model that is stripped in the middle of training and goes on. The groups keep their order
    and options, so learning-rate schedules keep working. The optimizer state (momentum, squares) of
    the excited weights is dropped, since it belongs to the raw weights, whose gradients have
    another scale. States saved from now on fit an optimizer made from the vanilla model.

    Args:
        optimizer: any torch optimizer, or one wrapped as accelerate does.
        model: the model, still converted; also inside DDP or ``torch.compile``.

    Returns:
        The names of the parameters that were removed.

    Raises:
        InputError: the optimizer holds none of the model's parameters, or cannot remove any
        (LBFGS). It is unchanged.

    Example:
        >>> removed = ws.remove_from_optimizer(optimizer, model)
        >>> ws.strip(model, inplace=True)
    """
    model = inside_wrappers(model)
    groups = optimizer.param_groups
    refuse_tensors_of_another_model((p for group in groups for p in group["params"]), model)
    weights = list(excited_weights(model))
    leaving = {id(p) for weight in weights for p in weight.excitation.parameters()}
    changing = leaving | {id(weight.raw) for weight in weights}
    held = {id(tensor) for group in groups for tensor in group["params"]}
    if held & leaving:
        _refuse_fixed(optimizer)
    for layer in with_wrapped(optimizer):
        for parameter in [tensor for tensor in layer.state if id(tensor) in changing]:
            del layer.state[parameter]
    for group in groups:
        stays = [id(tensor) not in leaving for tensor in group["params"]]
        for key in ("params", "param_names"):
            if key in group:
                group[key][:] = itertools.compress(group[key], stays)
        for parameter in group["params"]:
            if id(parameter) in changing:
                start_early_state(optimizer, parameter, group)
    removed = [n for n, p in model.named_parameters() if id(p) in held & leaving]
    logger.info("removed %d parameters from %s", len(removed), type(optimizer).__name__)
    return removed


def _refuse_fixed(optimizer: Optimizer) -> None:
    for layer in with_wrapped(optimizer):
        name = type(layer).__name__
        if name in _FIXED:
            raise InputError(
                f"{name} {_FIXED[name]}, so no parameter can join or leave it",
                "Build the optimizer anew from the model's parameters after the surgery.",
            )


def _warn_of_replaced_parameters(
    held: Container[int],
    groups: Iterable[Mapping[str, Any]],
    model: nn.Module,
    excitations: Iterable[ExcitationParameters],
) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    new = {id(parameter) for e in excitations for _, parameter in e.named}
    strange = {t.shape for group in groups for t in group["params"] if id(t) not in own}
    replaced = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in held and id(parameter) not in new
        # Tensors of another model may rightly share the optimizer.
        if parameter.shape in strange
    ]
    if replaced:
        warnings.warn(
            f"the optimizer holds tensors that are not the model's, and lacks {len(replaced)} "
            f"parameters of their shapes, such as {replaced[0]!r}: these are not trained. Build "
            "the optimizer after whatever replaced them.",
            StaleOptimizerWarning,
            stacklevel=3,
        )
