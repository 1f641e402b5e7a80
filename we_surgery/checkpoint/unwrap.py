"""Finds the plain state dict in a trainer's checkpoint."""

from __future__ import annotations

import re
import shlex
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from we_surgery.checkpoint.foreign_forms import read_parametrized, read_public_code
from we_surgery.checkpoint.metadata import METADATA_KEY
from we_surgery.errors import InputError, listed, near_matches, quoted

WRAPPER_KEYS = ("state_dict", "model", "state_dict_ema", "model_ema", "ema")
"""Where trainers put the state dict; the first that is there is taken."""

_AVERAGES = ("state_dict_ema", "model_ema", "ema")
_TRAINED = tuple(name for name in WRAPPER_KEYS if name not in _AVERAGES)
# Lightning's weight averaging puts the average in the place of the trained weights, and these here.
_LIGHTNING_TRAINED = "current_model_state"
# mmengine's EMAHook does so too, and puts the trained weights where the name says EMA.
_MMENGINE_TRAINED = "ema_state_dict"

Weights = Literal["raw", "ema"]
"""Which weights of a training run: those the optimizer moves, or their running average."""

VERSIONS = "_metadata"
"""The attribute of a state dict in which torch keeps each module's version number."""

_COMPILED = "_orig_mod"
_PARALLEL = "module"
_DEEPEST = 3


@dataclass(frozen=True)
class _Averaged:
    """How a class keeps an averaged model in its state dict, beside counters and other copies."""

    of: str
    counters: frozenset[str]
    model: str
    others: tuple[str, ...] = ()


_MMENGINE = _Averaged("mmengine's averaged model", frozenset({"steps"}), _PARALLEL)
_AVERAGED_MODELS = (
    _Averaged("torch's AveragedModel", frozenset({"n_averaged"}), _PARALLEL),
    _MMENGINE,
    _Averaged(
        "ema_pytorch's EMA", frozenset({"initted", "step"}), "ema_model", others=("online_model",)
    ),
)


@dataclass(frozen=True)
class _Places:
    """The keys under which a trainer keeps trained weights and their average, the likeliest first.

    The note says what a user would not expect of them.
    """

    raw: tuple[str, ...]
    ema: tuple[str, ...]
    note: str = ""

    def is_average(self, name: str) -> bool:
        """Whether what lies under this key is a running average."""
        return name in self.ema or (name not in self.raw and speaks_of_average(name))


def unwrap(
    checkpoint: Mapping[str, Any], key: str | None = None, weights: Weights | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a checkpoint, with vanilla names, and notes of what was done for it.

    One in a form of :mod:`we_surgery.checkpoint.foreign_forms` comes as ours. A key is dotted for a
    mapping in a mapping; ``weights`` are found wherever the trainer put them.
    """
    if not isinstance(checkpoint, Mapping):
        raise InputError(
            f"the checkpoint is {type(checkpoint).__name__} and not a mapping",
            "Give a state dict, or a mapping that holds one; strip a module with `strip`.",
        )
    if key is not None and weights is not None:
        raise InputError(
            f"both the key {key!r} and the {weights} weights were asked for",
            "Give --key (`key=`), or one of --raw and --ema (`weights=`).",
        )
    state, notes = _chosen(checkpoint, weights) if key is None else _at(checkpoint, key)
    cleaned = _clean(state, notes)
    for read_as_ours in (read_public_code, read_parametrized):
        versions = getattr(cleaned, VERSIONS, None)
        ours = read_as_ours(cleaned, versions or ())
        if ours is None:
            continue
        cleaned = ours.state
        if versions is not None:
            left = {name: v for name, v in versions.items() if name not in ours.gone}
            cleaned = with_versions(cleaned, left)
        notes = [*notes, ours.note]
    return cleaned, notes


def _places(checkpoint: Mapping[str, Any]) -> _Places:
    """Where the trainer that wrote a checkpoint puts which weights."""
    if _as_state_dict(checkpoint.get(_LIGHTNING_TRAINED)) is not None:
        return _Places((_LIGHTNING_TRAINED,), _TRAINED)
    beside = checkpoint.get(_MMENGINE_TRAINED)
    if isinstance(beside, Mapping) and _averaged_in(beside) is _MMENGINE:
        return _Places(
            (_MMENGINE_TRAINED,),
            ("state_dict",),
            "the weights under 'state_dict' are the average, and those under 'ema_state_dict' the "
            "trained ones: mmengine's EMAHook exchanges the two when it saves",
        )
    others = (
        str(name)
        for name, value in checkpoint.items()
        if isinstance(value, Mapping | nn.Module) and speaks_of_average(str(name))
    )
    return _Places(_TRAINED, tuple(dict.fromkeys((*_AVERAGES, *others))))


def _at(checkpoint: Mapping[str, Any], key: str) -> tuple[Mapping[str, Any], list[str]]:
    value: Any = checkpoint
    rest = key
    while rest:
        names = list(map(str, value)) if isinstance(value, Mapping) else []
        # The longest name that fits: a key may hold dots of its own.
        parts = rest.split(".")
        fits = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        name = next((name for name in fits if name in names), None)
        if name is None:
            raise InputError(
                f"the checkpoint has no key {key!r}{near_matches(rest, names)}",
                _key_hint(checkpoint),
            )
        value = value[name]
        rest = rest[len(name) + 1 :]
    state = _as_state_dict(value)
    if state is None:
        raise InputError(
            f"what the checkpoint holds under {key!r} is {_described(value)} and not a state dict",
            _key_hint(checkpoint),
        )
    return state, [f"used {key!r}"]


def _chosen(
    checkpoint: Mapping[str, Any], weights: Weights | None
) -> tuple[Mapping[str, Any], list[str]]:
    places = _places(checkpoint)
    states = {
        str(name): state
        for name, value in checkpoint.items()
        if name != METADATA_KEY
        and (state := _as_state_dict(value, averages=weights != "raw")) is not None
    }
    allowed = [n for n in states if weights is None or places.is_average(n) == (weights == "ema")]
    usual = {None: WRAPPER_KEYS, "raw": places.raw, "ema": places.ema}[weights]
    chosen = next((name for name in usual if name in allowed), None)
    if chosen is None and weights != "ema" and _is_state_dict(checkpoint):
        return checkpoint, []
    if chosen is None and len(allowed) == 1:
        chosen = allowed[0]
    if chosen is None:
        raise _no_choice(checkpoint, allowed, weights)
    if weights is not None:
        return states[chosen], [f"used {chosen!r}"]
    notes = [f"used {chosen!r}", *([places.note] if places.note else [])]
    for name in states:
        if name != chosen:
            what = "EMA weights" if places.is_average(name) else "weights"
            notes.append(
                f"{what} under {name!r} were not used; choose them with --key {shlex.quote(name)} "
                f"(`key={name!r}`)"
            )
    dropped = [
        f"{name!r} ({type(value).__name__})"
        for name, value in checkpoint.items()
        if str(name) not in states and name != METADATA_KEY
    ]
    if dropped:
        notes.append(f"dropped {listed(dropped)}")
    return states[chosen], notes


def _no_choice(
    checkpoint: Mapping[str, Any], allowed: list[str], weights: Weights | None
) -> InputError:
    others = [str(name) for name, value in checkpoint.items() if _as_state_dict(value) is not None]
    if allowed:
        cause = f"several state dicts: {quoted(allowed)}"
    elif weights is not None and others:
        missing = "trained" if weights == "raw" else "EMA"
        cause = f"no {missing} weights, only those under {quoted(others)}"
    else:
        cause = f"no state dict, but {_described(checkpoint)}: {quoted(checkpoint)}"
    return InputError(f"the checkpoint holds {cause}", _key_hint(checkpoint))


def _as_state_dict(
    value: Any, depth: int = 0, *, averages: bool = True
) -> Mapping[str, Any] | None:
    """The state dict that ``value`` is or holds, at most a few mappings deep.

    Without ``averages`` one under the usual name of an average does not count.
    """
    if isinstance(value, nn.Module):
        return value.state_dict()
    if not isinstance(value, Mapping) or depth > _DEEPEST:
        return None
    for name in (*WRAPPER_KEYS, _PARALLEL):
        if name in value and (averages or name not in _AVERAGES):
            state = _as_state_dict(value[name], depth + 1, averages=averages)
            if state is not None:
                return state
    return value if _is_state_dict(value) else None


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    tensors = sum(isinstance(entry, Tensor) for entry in value.values())
    return tensors > 0 and 2 * tensors >= len(value) and all(isinstance(key, str) for key in value)


def _clean(state: Mapping[str, Any], notes: list[str]) -> dict[str, Tensor]:
    """The tensors of ``state`` under the names of the model inside its wrappers."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    others = [f"{k!r} ({type(value).__name__})" for k, value in state.items() if k not in tensors]
    if others:
        notes.append(f"dropped what is not a tensor: {listed(others)}")
    averaged = _averaged_in(tensors)
    wrappers = {_PARALLEL}
    if averaged is not None:
        wrappers.add(averaged.model)
        prefix = f"{averaged.model}."
        dropped = [key for key in tensors if not key.startswith(prefix)]
        notes.append(f"dropped {quoted(dropped)} of {averaged.of}")
        tensors = {key: value for key, value in tensors.items() if key.startswith(prefix)}
    versions: Mapping[str, Any] | None = getattr(state, VERSIONS, None)
    names, owners, removed = _without_wrappers(tensors, versions or {}, wrappers)
    if len(set(names.values())) < len(names):
        raise InputError(
            f"without the prefixes {quoted(removed)} two entries of the state dict have one name",
            "Save the state dict of the model inside its wrappers.",
        )
    if removed:
        notes.append(f"removed the prefix {quoted(removed)} from the names")
    cleaned = {names[key]: value for key, value in tensors.items()}
    if versions is None:
        return cleaned
    # The innermost owner of a name is the model itself; those around it are its wrappers.
    return with_versions(cleaned, {owners[key]: value for key, value in versions.items()})


def _without_wrappers(
    keys: Iterable[str], modules: Iterable[str], wrappers: set[str]
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """The names of tensors and modules without wrappers, and the removed prefixes."""
    names = {key: _without_compiled(key) for key in keys}
    owners = {key: _without_compiled(key) for key in modules}
    removed = [f"{_COMPILED}."] if names.keys() != set(names.values()) else []
    while (wrapper := _shared_beginning(names.values())) in wrappers:
        prefix = f"{wrapper}."
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
        # The wrapper itself is called "", and the model in it as the prefix says.
        owners = {key: f"{name}.".removeprefix(prefix)[:-1] for key, name in owners.items()}
        removed.append(prefix)
    return names, owners, list(dict.fromkeys(removed))


def _averaged_in(state: Mapping[str, Any]) -> _Averaged | None:
    """The class of averaged models whose state dict this is."""
    for averaged in _AVERAGED_MODELS:
        if averaged.counters <= state.keys():
            rest = {str(key).partition(".")[0] for key in state if key not in averaged.counters}
            if averaged.model in rest and rest <= {averaged.model, *averaged.others}:
                return averaged
    return None


def with_versions(state: Mapping[str, Tensor], versions: Mapping[str, Any]) -> dict[str, Tensor]:
    """A copy of a state dict that carries its modules' versions as torch's do.

    Without them some modules take a state dict for one of an older version of theirs.
    """
    ordered = OrderedDict(state)
    setattr(ordered, VERSIONS, OrderedDict(versions))
    return ordered


def _shared_beginning(names: Iterable[str]) -> str:
    """The part before the first dot that all names share, else an empty string."""
    beginnings = {before if dot else "" for before, dot, _ in (n.partition(".") for n in names)}
    return beginnings.pop() if len(beginnings) == 1 else ""


def _without_compiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def speaks_of_average(name: str) -> bool:
    """Whether a name speaks of a running average: ``ema``, ``net_ema``, ``EMAModel``."""
    words = re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return any(word.lower() == "ema" for word in words)


def _key_hint(checkpoint: Mapping[Any, Any]) -> str:
    keys: list[str] = []
    for name, value in checkpoint.items():
        if _as_state_dict(value) is not None:
            keys.append(str(name))
        elif isinstance(value, Mapping):
            inner = (part for part in value if _as_state_dict(value[part]) is not None)
            keys += [f"{name}.{part}" for part in inner]
    if not keys:
        return "Give a file that holds a model or its state dict."
    return f"Choose a state dict with --key (`key=`): {quoted(keys)}."


def _described(value: Any) -> str:
    if not isinstance(value, Mapping):
        return type(value).__name__
    tensors = sum(isinstance(entry, Tensor) for entry in value.values())
    return f"a mapping of {len(value)} entries, {tensors} of them tensors"
