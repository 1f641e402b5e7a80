"""Checkpoints in two other forms, read as ours.

**The WE paper's public code** has an LWE conv's weight under its vanilla name and the two layers
of the multiplier beside it, as 1x1 convs: ``X.weight`` ``[O, I, *K]``, ``X.fc1.weight``
``[h, I, 1, 1]``, ``X.fc1.bias``, ``X.fc2.weight`` ``[I, h, 1, 1]`` and ``X.fc2.bias``. It always
standardizes the weight first, with 1e-5 added to each standard deviation. Its MWE layers leave no
trace.

**torch.nn.utils.parametrize** has a weight as ``X.parametrizations.weight.original``, and its
parametrizations as ``X.parametrizations.weight.0``, ``.1`` and so on, in the order in which they
are applied. Each may be one of our compositions or single stages, with a record that says which.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from we_surgery.checkpoint.excited_entry import no_record
from we_surgery.errors import InputError, listed
from we_surgery.excitations import EXCITATIONS, LWE, Rescale, check_stage
from we_surgery.excitations.names import EXCITATION, excitation_name, raw_name
from we_surgery.excitations.record import (
    OLD_SCHEMA,
    RECORD_KEY,
    is_record,
    make_record,
    read_record,
    stage_names,
    to_tensor,
)

_GATE = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")

_TREE = "parametrizations"
_IN_TREE = re.compile(rf"(?:^|(?<=\.)){_TREE}(?:\.[^.]+|$)")
_ORIGINAL = re.compile(r"(?:(.+)\.)?parametrizations\.([^.]+)\.original")


@dataclass(frozen=True)
class ReadAsOurs:
    """A state dict under our names and in our shapes, and the new names of modules."""

    state: dict[str, Tensor]
    modules: dict[str, str]
    note: str


def read_public_code(state: Mapping[str, Tensor], modules: Iterable[str]) -> ReadAsOurs | None:
    """The public code's LWE layers as ours; None where there are none."""
    index = _KeyIndex(state)
    owners = [k.removesuffix(".fc1.weight") for k in state if k.endswith(".fc1.weight")]
    layers = [layer for layer in owners if _is_public_lwe(state, layer, index)]
    if not layers:
        return None
    renamed: dict[str, str] = {}
    for layer in layers:
        weight = state[f"{layer}.weight"]
        if len(set(weight.shape[2:])) > 1:
            raise InputError(
                f"{layer!r} is an LWE layer of the paper's public code with a kernel of "
                f"{tuple(weight.shape[2:])}, which that code does not pool as it does a square one",
                "Save the weights it computes, from a forward pass of that model.",
            )
        renamed[f"{layer}.weight"] = f"{layer}.{raw_name('weight')}"
        for entry in _GATE:
            renamed[f"{layer}.{entry}"] = f"{layer}.{EXCITATION}.lwe.{entry}"
    lwe = LWE(1, device="meta").chosen_options() | {"reduction": None}
    stages = [{"standardize": {"epsilon": 1e-5}}, {"lwe": lwe}]
    record = to_tensor(make_record(stages, schema=OLD_SCHEMA))
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        if key not in renamed:
            ours[key] = value
            continue
        entry = renamed[key].partition(f".{EXCITATION}.lwe.")[2]
        ours[renamed[key]] = value.flatten(1) if entry.endswith("weight") else value
        if not entry:
            ours[key.removesuffix("weight") + f"{EXCITATION}.{RECORD_KEY}"] = record
    moved = {f"{x}.{fc}": f"{x}.{EXCITATION}.lwe.{fc}" for x in layers for fc in ("fc1", "fc2")}
    note = f"read as LWE layers of the WE paper's public code, standardized: {listed(layers)}"
    return ReadAsOurs(ours, {name: moved[name] for name in modules if name in moved}, note)


def _is_public_lwe(state: Mapping[str, Tensor], layer: str, index: _KeyIndex) -> bool:
    if f"{layer}.weight" not in state:
        return False
    beside = {key for fc in ("fc1", "fc2") for key in index.beginning_with(f"{layer}.{fc}.")}
    # With further layers, as in the code's later experiments, it is another method.
    if beside != {f"{layer}.{entry}" for entry in _GATE}:
        return False
    weight = state[f"{layer}.weight"]
    fc1, bias1, fc2, bias2 = (state[f"{layer}.{entry}"] for entry in _GATE)
    ones = (1,) * (weight.ndim - 2)
    if weight.ndim < 3 or fc1.ndim != weight.ndim:
        return False
    hidden, channels = fc1.shape[0], weight.shape[1]
    return (
        fc1.shape == (hidden, channels, *ones)
        and fc2.shape == (channels, hidden, *ones)
        and bias1.shape == (hidden,)
        and bias2.shape == (channels,)
    )


def read_parametrized(state: Mapping[str, Tensor], modules: Iterable[str]) -> ReadAsOurs | None:
    """The excited weights of torch's parametrizations as ours; None if there are none.

    Weights with other parametrizations do not change.
    """
    renamed: dict[str, str] = {}
    excitations: dict[str, str] = {}
    weights: list[str] = []
    records: dict[str, Tensor] = {}
    index = _KeyIndex(state)
    for key in state:
        found = _ORIGINAL.fullmatch(key)
        if found is None:
            continue
        prefix = key.removesuffix("original")
        chain = _chain(index, prefix)
        said = _said(state, prefix, chain)
        if said is None:
            if any(map(_is_excitation, chain.values())):
                raise no_record([key])
            continue
        stages, record = said
        owner = f"{found[1]}." if found[1] else ""
        excitation = owner + excitation_name(found[2])
        renamed[key] = owner + raw_name(found[2])
        records[f"{excitation}.{RECORD_KEY}"] = record
        renamed |= {old: f"{excitation}.{new}" for old, new in stages.items()}
        excitations |= dict.fromkeys((f"{owner}{_TREE}", f"{owner}{_TREE}.{found[2]}"), excitation)
        weights.append(owner + found[2])
    if not weights:
        return None
    note = f"read as excitations registered by torch.nn.utils.parametrize: {listed(weights)}"
    moved = {name: new for name in modules if (new := _moved(name, excitations)) is not None}
    return ReadAsOurs(_in_vanilla_order(state, renamed) | records, moved, note)


def _moved(module: str, excitations: Mapping[str, str]) -> str | None:
    """The excitation that a module in torch's tree of parametrizations is a part of."""
    heads = (module[: found.end()] for found in _IN_TREE.finditer(module))
    return next((excitations[head] for head in heads if head in excitations), None)


def _chain(index: _KeyIndex, prefix: str) -> dict[str, set[str]]:
    """The keys of each parametrization of a weight, by its number."""
    chain: dict[str, set[str]] = {}
    for key in index.beginning_with(prefix):
        if key != f"{prefix}original":
            number, _, rest = key.removeprefix(prefix).partition(".")
            chain.setdefault(number, set()).add(rest)
    return chain


def _is_excitation(keys: set[str]) -> bool:
    """Whether a parametrization has the keys of a composition or of an LWE."""
    return keys == set(_GATE) or {key.partition(".")[0] for key in keys} <= EXCITATIONS.keys()


def _said(
    state: Mapping[str, Tensor], prefix: str, chain: Mapping[str, set[str]]
) -> tuple[dict[str, str], Tensor] | None:
    """Our names by the state dict's keys, and the record of all, where each has its own."""
    if not chain or not all(RECORD_KEY in keys for keys in chain.values()):
        return None
    names: dict[str, str] = {}
    known = {*EXCITATIONS, Rescale.name, RECORD_KEY}
    if len(chain) == 1 and {key.partition(".")[0] for key in chain.get("0", "?")} <= known:
        return {f"{prefix}0.{key}": key for key in chain["0"]}, state[f"{prefix}0.{RECORD_KEY}"]
    found = [read_record(state[f"{prefix}{number}.{RECORD_KEY}"]) for number in chain]
    for (number, keys), own in zip(chain.items(), found, strict=True):
        stages = stage_names(own)
        is_composition = {key.partition(".")[0] for key in keys if not is_record(key)} <= {*stages}
        inner = "" if is_composition else f"{stages[0]}."
        names |= {f"{prefix}{number}.{key}": inner + key for key in keys}
        names[f"{prefix}{number}.{RECORD_KEY}"] = RECORD_KEY
    order = [name for own in found for name in stage_names(own)]
    _refuse_other_order(prefix, chain, order, is_whole=len(found) == 1)
    record = make_record(
        [stage for own in found for stage in own["stages"]],
        transposed_groups=found[0]["transposed_groups"],
        paused=found[0]["paused"],
        schema=found[0]["schema"],
    )
    return names, to_tensor(record)


def _refuse_other_order(
    prefix: str, chain: Mapping[str, set[str]], order: list[str], *, is_whole: bool
) -> None:
    places = [Rescale.order if n == Rescale.name else check_stage(n).order for n in order]
    is_ours = is_whole or places == sorted(set(places))
    if [*chain] != [str(number) for number in range(len(chain))] or not is_ours:
        raise InputError(
            f"the parametrizations of {prefix.removesuffix('.')!r} are not a composition of ours: "
            f"{' after '.join(reversed(order))}",
            "Register one `Composition`, or save the weights it computes.",
        )


def _in_vanilla_order(state: Mapping[str, Tensor], renamed: Mapping[str, str]) -> dict[str, Tensor]:
    """The entries renamed, and each layer's weight before its others, as vanilla layers have it."""
    ours = {renamed.get(key, key): value for key, value in state.items()}
    weights: dict[str, list[str]] = {}
    for key in filter(_ORIGINAL.fullmatch, renamed):
        weights.setdefault(renamed[key].rpartition(".")[0], []).append(renamed[key])
    ordered: dict[str, Tensor] = {}
    for key, value in ours.items():
        for weight in weights.pop(key.rpartition(".")[0], ()):
            ordered[weight] = ours[weight]
        ordered.setdefault(key, value)
    return ordered


class _KeyIndex:
    """Finds a state dict's keys by what they begin with, without a look at all of them."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._place = {key: place for place, key in enumerate(keys)}
        self._sorted = sorted(self._place)

    def beginning_with(self, prefix: str) -> list[str]:
        """The keys that begin with ``prefix``, in their own order."""
        first = last = bisect_left(self._sorted, prefix)
        while last < len(self._sorted) and self._sorted[last].startswith(prefix):
            last += 1
        return sorted(self._sorted[first:last], key=self._place.__getitem__)
