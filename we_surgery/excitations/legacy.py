"""State dicts and modules of the time before records, read as if they had one.

There, a stage was known by its tensors alone: a number such as an epsilon was a 0-d buffer, a
choice such as ``gate: tanh`` the presence of a key ``gate_tanh``, and a count the length of a
buffer. A stage whose buffer was lost could not be told from one that had never been there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery.errors import InputError
from we_surgery.excitations.record import RECORD_KEY, Record, make_record, to_tensor

_PLACES = {
    "standardize": 0,
    "weight_norm": 0,
    "spectral_norm": 0,
    "weight_align": 0,
    "lwe": 10,
    "rescale": 15,
    "mwe": 20,
    "dynamic_sparse": 30,
    "shift_attention": 40,
}
LEGACY_NOTE = (
    "was saved before we_surgery wrote records: what was excited was read off the names of its "
    "tensors, which cannot show a stage whose tensors are lost; save it again to have a record"
)
"""The end of a sentence on a checkpoint in the old form."""

_INNER = ("fc1_excitation", "fc2_excitation")
_HARDENINGS = ("soft", "argmax", "round")

Tensors = Mapping[str, Tensor]


def has_marks(tensors: Tensors) -> bool:
    """Whether the tensors of an excitation are in the old form, and hold its buffers."""
    return any(_is_mark(key) for key in tensors)


def read_legacy(tensors: Tensors) -> tuple[Record, dict[str, Tensor]]:
    """The record of an excitation in the old form, and the tensors that are left of it.

    Args:
        tensors: by their names in the excitation.

    Raises:
        InputError: a stage is not known, or a mark is not what was written there.
    """
    by_stage: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        stage, _, rest = key.partition(".")
        if rest:
            by_stage.setdefault(stage, {})[rest] = value
    try:
        stages = [
            {name: _OPTIONS[name](by_stage[name]) if name in _OPTIONS else {}}
            for name in sorted(by_stage, key=lambda name: _PLACES.get(name, 25))
        ]
    except (KeyError, RuntimeError, ValueError, IndexError, StopIteration) as error:
        raise InputError(
            f"an excitation without a record cannot be read from {sorted(tensors)}: {error}",
            "The file is damaged or was edited; give the checkpoint that training saved.",
        ) from error
    groups = tensors.get("transposed_groups")
    paused = tensors.get("paused")
    record = make_record(
        stages,
        transposed_groups=None if groups is None else groups.shape[0],
        paused=paused is not None and paused.numel() > 0,
    )
    left = {key: value for key, value in tensors.items() if not _is_mark(key)}
    return record, left


def upgraded(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of an excitation in the old form, with a record for their marks.

    Raises:
        InputError: as :func:`read_legacy`.
    """
    state: dict[str, Tensor] = dict(tensors)
    for inner in _INNER:
        upgrade_state(state, f"lwe.{inner}.")
    record, _ = read_legacy(tensors)
    left = {key: value for key, value in state.items() if not _is_mark(key)}
    return {RECORD_KEY: to_tensor(record), **left}


def upgrade_state(state: MutableMapping[str, Any], prefix: str) -> None:
    """Puts records in the place of the marks of the excitation below ``prefix``, if it has any."""
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not has_marks(own):
        return
    record, left = read_legacy(own)
    for key in own.keys() - left.keys():
        del state[prefix + key]
    state[prefix + RECORD_KEY] = to_tensor(record)
    for inner in _INNER:
        upgrade_state(state, f"{prefix}lwe.{inner}.")


def upgrade_attributes(excitation: nn.Module, name: str, attributes: dict[str, Any]) -> None:
    """Gives an unpickled stage or composition the attributes that stand for old buffers.

    Args:
        excitation: the module, its state set.
        name: its name as a stage, or ``composition``.
        attributes: its ``__dict__``.
    """
    buffers = attributes["_buffers"]
    if name == "composition" and "is_transposed" in attributes:
        groups = buffers.pop("transposed_groups", None)
        del attributes["is_transposed"]
        attributes["_non_persistent_buffers_set"].add("paused")
        attributes["transposed_groups"] = None if groups is None else groups.shape[0]
    elif name in _OPTIONS and _NEW[name] not in attributes:
        for option, value in _OPTIONS[name](_tensors(excitation)).items():
            attributes.setdefault(option, value)
        for key in [key for key in buffers if _is_mark(f"{name}.{key}")]:
            del buffers[key]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _is_mark(key: str) -> bool:
    """Whether a key stands for an option, at whatever depth of a stacked excitation."""
    *owners, last = key.split(".")
    if last in ("transposed_groups", "paused"):
        return not owners or owners[-1] in _INNER
    return bool(owners) and (
        owners[-1] in ("standardize", "mwe", "lwe", "shift_attention") and last in _MARKS
    )


def _of_standardize(stage: Tensors) -> dict[str, Any]:
    return {"epsilon": _number(stage["epsilon"])}


def _of_mwe(stage: Tensors) -> dict[str, Any]:
    learn = "epsilon" if "rho" in stage else "mix" if "mix" in stage else "none"
    # What a learned one started from is not known, and not needed.
    epsilon = 0.1 if learn == "epsilon" else _number(stage["epsilon"])
    return {
        "epsilon": epsilon,
        "detach_max": "undetached_max" not in stage,
        "curve": _choice(stage, "curve", _CURVES, "atanh"),
        "rescale": "rescale_off" not in stage,
        "learn": learn,
    }


def _of_lwe(stage: Tensors) -> dict[str, Any]:
    attention = _choice(stage, "attention", _ATTENTIONS, "se")
    options: dict[str, Any] = {
        "attention": attention,
        "skip": "skip_on" in stage or (attention == "bam" and "skip_off" not in stage),
        "gate": _choice(stage, "gate", _ACTIVATIONS, "sigmoid"),
    }
    if attention != "triplet":
        options |= {
            "reduction": None,
            "activation": _choice(stage, "activation", _ACTIVATIONS, "relu"),
        }
    if attention == "global":
        resize = _choice(stage, "resize", ("area", "linear"), "linear")
        options |= {"resize": resize, "averaged": "net_averaged" in stage}
    elif attention != "triplet":
        options["inner"] = _inner(stage)
    return options


def _inner(stage: Tensors) -> dict[str, Any] | None:
    """The stages that excite the weights of a stacked LWE's own layers, but the standardization."""
    prefix = f"{_INNER[0]}."
    own = {k.removeprefix(prefix): v for k, v in stage.items() if k.startswith(prefix)}
    if not own:
        return None
    found: dict[str, Any] = {}
    for entry in read_legacy(own)[0]["stages"]:
        for name, options in entry.items():
            found[name] = dict(options)
            if options.get("reduction", 0) is None:
                own_fc1 = f"{name}.fc1.weight"
                found[name]["reduction"] = _reduction(
                    [tuple(stage[f"{inner}.{own_fc1}"].shape) for inner in _INNER]
                )
            if found[name].get("inner", 0) is None:
                del found[name]["inner"]
    found.pop("standardize")
    return found


def _reduction(shapes: Sequence[tuple[int, ...]]) -> int:
    """One that gives layers of these ``(hidden, channels)``."""
    candidates = (16, *range(1, max(channels for _, channels in shapes) + 1))
    fit = (r for r in candidates if all(max(c // r, 1) == hidden for hidden, c in shapes))
    reduction: int = next(fit)
    return reduction


def _of_shift_attention(stage: Tensors) -> dict[str, Any]:
    return {
        "shared": stage["attention"].shape[0] == 1,
        "hardening": _HARDENINGS[stage["hardened"].shape[0]],
    }


_OPTIONS: dict[str, Callable[[Tensors], dict[str, Any]]] = {
    "standardize": _of_standardize,
    "mwe": _of_mwe,
    "lwe": _of_lwe,
    "shift_attention": _of_shift_attention,
}
_NEW = {
    "standardize": "epsilon",
    "mwe": "epsilon",
    "lwe": "reduction",
    "shift_attention": "hardening",
}
"""An attribute that stages of the old form have not."""
_ACTIVATIONS = ("relu", "leaky_relu", "swish", "gelu", "sigmoid", "tanh", "none")
_ATTENTIONS = ("se", "cbam", "bam", "triplet", "global")
_CURVES = (
    *("atanh", "sigmoid", "tanh", "relu", "gelu", "leaky_relu", "swish", "softsign", "softplus"),
    *("shifted_softplus", "lecun_tanh", "star_relu", "novel", "novel_log10"),
)
_MARKS = {
    *("epsilon", "undetached_max", "rescale_off", "skip_on", "skip_off", "net_averaged"),
    *("resize_area", "hardened"),
    *(f"attention_{name}" for name in _ATTENTIONS),
    *(f"{option}_{name}" for option in ("activation", "gate") for name in _ACTIVATIONS),
    *(f"curve_{name}" for name in _CURVES),
}


def _choice(stage: Tensors, option: str, choices: Collection[str], default: str) -> str:
    return next((value for value in choices if f"{option}_{value}" in stage), default)


def _number(tensor: Tensor) -> float:
    """The value of a 0-d buffer, in the digits that its dtype has."""
    if tensor.ndim or tensor.is_meta:
        raise ValueError(f"a number is in a tensor of shape {tuple(tensor.shape)}")
    value = float(tensor)
    shortest = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    same = (one for one in shortest if torch.tensor(one, dtype=tensor.dtype).item() == value)
    return next(same, value)
