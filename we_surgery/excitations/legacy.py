"""State dicts without records, of earlier versions.

Their tensors alone show the stages: a number such as an epsilon is a 0-d buffer, a choice such as
``gate: tanh`` is a key ``gate_tanh``, and a count is the length of a buffer. Such keys are called
marks here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from we_surgery.errors import InputError
from we_surgery.excitations.record import OLD_SCHEMA, RECORD_KEY, Record, make_record, to_tensor

LEGACY_NOTE = (
    "was saved before we_surgery wrote records: what was excited was read off the names of its "
    "tensors, which cannot show a stage whose tensors are lost; save it again to have a record"
)
"""The end of a warning about such a checkpoint."""

_PLACES = dict.fromkeys(("standardize", "weight_norm", "spectral_norm", "weight_align"), 0) | {
    "lwe": 10,
    "rescale": 15,
    "mwe": 20,
    "dynamic_sparse": 30,
    "shift_attention": 40,
}
_PLACE_OF_OTHERS = 25

_MARK = re.compile(
    r"(lwe\.fc[12]_excitation\.)*"  # of a stacked LWE, to any depth
    r"(transposed_groups|paused"
    r"|(standardize|mwe)\.(epsilon|undetached_max|rescale_off|curve_\w+)"
    r"|lwe\.(skip_on|skip_off|net_averaged|(attention|activation|gate|resize)_\w+)"
    r"|shift_attention\.hardened)"
)
_HARDENINGS = ("soft", "argmax", "round")

Tensors = Mapping[str, Tensor]


def has_marks(tensors: Tensors) -> bool:
    """Whether these tensors of an excitation have no record."""
    return any(map(_MARK.fullmatch, tensors))


def read_legacy(tensors: Tensors) -> tuple[Record, dict[str, Tensor]]:
    """The record that the marks stand for, and the other tensors."""
    by_stage: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        stage, _, rest = key.partition(".")
        if rest:
            by_stage.setdefault(stage, {})[rest] = value
    try:
        stages = [
            {name: _OPTIONS[name](by_stage[name]) if name in _OPTIONS else {}}
            for name in sorted(by_stage, key=lambda name: _PLACES.get(name, _PLACE_OF_OTHERS))
        ]
    except (KeyError, RuntimeError, ValueError, IndexError, StopIteration) as error:
        raise InputError(
            f"an excitation without a record cannot be read from {sorted(tensors)}: {error}",
            "The file is damaged or was edited; give the checkpoint that training saved.",
        ) from error
    groups, paused = tensors.get("transposed_groups"), tensors.get("paused")
    record = make_record(
        stages,
        transposed_groups=None if groups is None else groups.shape[0],
        paused="preserve" if paused is not None and paused.numel() > 0 else False,
        schema=OLD_SCHEMA,
    )
    return record, {key: value for key, value in tensors.items() if not _MARK.fullmatch(key)}


def upgraded(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors with records in the place of their marks."""
    record, state = read_legacy(tensors)
    state[RECORD_KEY] = to_tensor(record)
    for inner in ("lwe.fc1_excitation.", "lwe.fc2_excitation."):
        own = _below(tensors, inner)
        if own:
            state = {key: value for key, value in state.items() if not key.startswith(inner)}
            state |= {inner + key: value for key, value in upgraded(own).items()}
    return state


def upgrade_state(state: MutableMapping[str, Any], prefix: str) -> None:
    """:func:`upgraded` in place, for the excitation below ``prefix`` if it has marks."""
    own = _below(state, prefix)
    if has_marks(own):
        for key in own:
            del state[prefix + key]
        state.update({prefix + key: value for key, value in upgraded(own).items()})


def _below(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _of_standardize(stage: Tensors) -> dict[str, Any]:
    return {"epsilon": _number(stage["epsilon"])}


def _of_mwe(stage: Tensors) -> dict[str, Any]:
    learn = "epsilon" if "rho" in stage else "mix" if "mix" in stage else "none"
    return {
        # The start of a learned one is unknown, and not needed.
        "epsilon": 0.1 if learn == "epsilon" else _number(stage["epsilon"]),
        "detach_max": "undetached_max" not in stage,
        "curve": _choice(stage, "curve", "atanh"),
        "rescale": "rescale_off" not in stage,
        "learn": learn,
    }


def _of_lwe(stage: Tensors) -> dict[str, Any]:
    attention = _choice(stage, "attention", "se")
    options: dict[str, Any] = {
        "attention": attention,
        "skip": "skip_on" in stage or (attention == "bam" and "skip_off" not in stage),
        "gate": _choice(stage, "gate", "sigmoid"),
    }
    if attention == "triplet":
        return options
    options |= {"reduction": None, "activation": _choice(stage, "activation", "relu")}
    if attention == "global":
        resize = _choice(stage, "resize", "linear")
        return options | {"resize": resize, "averaged": "net_averaged" in stage}
    return options | {"inner": _inner(stage)}


def _inner(stage: Tensors) -> dict[str, Any] | None:
    """The stages that excite a stacked LWE's own layers, without standardization."""
    excitations = [_below(stage, f"{fc}_excitation.") for fc in ("fc1", "fc2")]
    if not excitations[0]:
        return None
    found: dict[str, Any] = {}
    for entry in read_legacy(excitations[0])[0]["stages"]:
        found |= entry
    del found["standardize"]
    lwe = found.get("lwe", {})
    if "reduction" in lwe:
        lwe["reduction"] = _reduction([own["lwe.fc1.weight"].shape for own in excitations])
    if "inner" in lwe and lwe["inner"] is None:
        del lwe["inner"]
    return found


def _reduction(shapes: Sequence[tuple[int, ...]]) -> int:
    """A reduction that gives layers of these ``(hidden, channels)``."""
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


def _choice(stage: Tensors, option: str, default: str) -> str:
    found = (key.removeprefix(f"{option}_") for key in stage if key.startswith(f"{option}_"))
    return next(found, default)


def _number(tensor: Tensor) -> float:
    """The value of a 0-d buffer, with as few digits as its dtype needs."""
    if tensor.ndim or tensor.is_meta:
        raise ValueError(f"a number is in a tensor of shape {tuple(tensor.shape)}")
    value = float(tensor)
    shortest = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    same = (one for one in shortest if torch.tensor(one, dtype=tensor.dtype).item() == value)
    return next(same, value)
