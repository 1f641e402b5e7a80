"""Vanilla weights into a converted model, also where only some of the names fit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from we_surgery.checkpoint.excited_entry import find_excited, is_excited_state_dict
from we_surgery.checkpoint.unwrap import unwrap
from we_surgery.converted.graphs import ExcitedWeight, excited_weights
from we_surgery.converted.sites import Init, no_identity
from we_surgery.errors import InputError, quoted


class LoadedKeys(NamedTuple):
    """What :func:`load_vanilla` did, by vanilla names; the first two are those of torch.

    Attributes:
        missing_keys: of the model, and not in the state dict.
        unexpected_keys: of the state dict, and not in the model.
        mismatched_keys: in both, in different shapes.
        loaded_keys: in both, and loaded.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_keys: list[str]
    loaded_keys: list[str]


def load_vanilla(
    model: nn.Module, checkpoint: Mapping[str, Any], *, init: Init = "preserve"
) -> LoadedKeys:
    """Loads the matching entries of a vanilla checkpoint into a converted model.

    Some loaders (Ultralytics, detectron2) load only the keys that a checkpoint shares with
    ``model.state_dict()``. They miss excited weights, which are called ``raw_weight`` there. This
    function uses the vanilla names. Entries that do not fit are not loaded.

    Args:
        model: a converted model; changed in place.
        checkpoint: a vanilla state dict, or what a trainer saved around one.
        init: ``preserve`` starts the excitations so that each excited weight is the loaded one,
            up to rounding, which may add a ``rescale`` stage; ``paper`` makes the raw weight the
            loaded one and keeps the excitations, as ``model.load_state_dict`` does. Of a paused
            excitation the loaded weight is both.

    Returns:
        Which keys were loaded, missing, unexpected, and of another shape.

    Raises:
        InputError: the model is not converted, or the checkpoint is of a converted model; none of
            its entries fits; or an excitation cannot start by ``preserve``. Nothing is changed.

    Example:
        >>> model = ws.convert(make_model(num_classes=3), "lwe")
        >>> found = ws.load_vanilla(model, torch.load("pretrained.pt", weights_only=True))
        >>> found.mismatched_keys  # the classifier of the other task
        ['fc.weight', 'fc.bias']
    """
    state, _ = unwrap(checkpoint)
    if is_excited_state_dict(state):
        raise InputError(
            "the checkpoint is of a converted model",
            "Load it with `model.load_state_dict`, which checks what was excited.",
        )
    own: dict[str, Any] = model.state_dict(keep_vars=True)
    entries = list(find_excited(own))
    if not entries:
        raise InputError(
            "the model is not converted",
            "Load the checkpoint with `model.load_state_dict`; with excitation attached, then call "
            "`excitation.adopt()`.",
        )
    raw_keys = {entry.vanilla_key: entry.raw_key for entry in entries}
    vanilla = {raw: name for name, raw in raw_keys.items()}
    excitations = {e.excitation_prefix + key for e in entries for key in e.excitation}
    names = {vanilla.get(key, key): key for key in own if key not in excitations}
    both = [name for name in names if name in state]
    fitting = [name for name in both if _fits(own[names[name]], state[name])]
    if not fitting:
        raise InputError(
            f"the checkpoint has none of the model's {len(names)} entries: it has {quoted(state)}, "
            f"and the model {quoted(names)}",
            "Give the checkpoint of this architecture, or rename its entries first.",
        )
    given = {id(own[raw_keys[name]]): state[name] for name in fitting if name in raw_keys}
    loaded = [weight for weight in excited_weights(model) if id(weight.raw) in given]
    if init == "preserve":
        for weight in loaded:  # on copies first: one that cannot leaves the model as it is
            _preserve(copy.deepcopy(weight.excitation), given[id(weight.raw)], weight)
    own.update({names[name]: state[name] for name in fitting})  # keeps its modules' versions
    model.load_state_dict(own)
    with torch.no_grad():
        for weight in loaded:
            if init == "paper":
                weight.excitation.prepare(weight.raw)
            else:
                weight.raw.copy_(_preserve(weight.excitation, weight.raw, weight))
    return LoadedKeys(
        [name for name in names if name not in state],
        [name for name in state if name not in names],
        [name for name in both if name not in fitting],
        fitting,
    )


def _fits(own: Any, value: Tensor) -> bool:
    return isinstance(own, Tensor) and own.shape == value.shape


@torch.no_grad()
def _preserve(excitation: Any, value: Tensor, weight: ExcitedWeight) -> Tensor:
    if excitation.is_paused:
        return value
    try:
        return excitation.preserve(value.to(weight.raw))  # type: ignore[no-any-return]
    except NotImplementedError as error:
        raise no_identity(weight.name, error) from error
