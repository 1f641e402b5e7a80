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
_IN_TREE = re.compile(r"((?:.*?\.)??)(parametrizations\.([^.]+)\.)(.+)")


@dataclass(frozen=True)
class ReadAsOurs:
    """A state dict under our names and in our shapes, and which of the modules are gone."""

    state: dict[str, Tensor]
    gone: set[str]
    note: str


def read_public_code(state: Mapping[str, Tensor], modules: Iterable[str]) -> ReadAsOurs | None:
    """The public code's LWE layers as ours; None where there are none."""
    owners = [key.removesuffix(".fc1.weight") for key in state if key.endswith(".fc1.weight")]
    parents = {key.rpartition(".")[0].rpartition(".")[0] for key in state} if owners else set()
    layers = [
        layer
        for layer in owners
        # With further layers, as in the code's later experiments, it is another method.
        if not {f"{layer}.fc1", f"{layer}.fc2"} & parents and _is_public_lwe(state, layer)
    ]
    if not layers:
        return None
    renamed: dict[str, str] = {}
    for layer in layers:
        kernel = tuple(state[f"{layer}.weight"].shape[2:])
        if len(set(kernel)) > 1:
            raise InputError(
                f"{layer!r} is an LWE layer of the paper's public code with a kernel of "
                f"{kernel}, which that code does not pool as it does a square one",
                "Save the weights it computes, from a forward pass of that model.",
            )
        renamed[f"{layer}.weight"] = f"{layer}.{raw_name('weight')}"
        renamed |= {f"{layer}.{entry}": f"{layer}.{EXCITATION}.lwe.{entry}" for entry in _GATE}
    lwe = LWE(1, device="meta").chosen_options() | {"reduction": None}
    stages = [{"standardize": {"epsilon": 1e-5}}, {"lwe": lwe}]
    record = to_tensor(make_record(stages, schema=OLD_SCHEMA))
    matrices = {f"{layer}.{entry}" for layer in layers for entry in _GATE if "weight" in entry}
    ours = {
        renamed.get(key, key): value.flatten(1) if key in matrices else value
        for key, value in state.items()
    }
    ours |= {f"{layer}.{EXCITATION}.{RECORD_KEY}": record for layer in layers}
    note = f"read as LWE layers of the WE paper's public code, standardized: {listed(layers)}"
    gone = {f"{layer}.{fc}" for layer in layers for fc in ("fc1", "fc2")}
    return ReadAsOurs(ours, gone, note)


def _is_public_lwe(state: Mapping[str, Tensor], layer: str) -> bool:
    keys = [f"{layer}.{entry}" for entry in ("weight", *_GATE)]
    if not all(key in state for key in keys):
        return False
    weight, fc1, bias1, fc2, bias2 = (state[key] for key in keys)
    if weight.ndim < 3 or fc1.ndim != weight.ndim:
        return False
    ones = (1,) * (weight.ndim - 2)
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
    trees: dict[tuple[str, str, str], dict[str, set[str]]] = {}
    for key in state:
        if found := _IN_TREE.fullmatch(key):
            owner, tree, parameter, rest = found.groups()
            number, _, entry = rest.partition(".")
            chain = trees.setdefault((owner, owner + tree, parameter), {})
            chain.setdefault(number, set()).add(entry)
    renamed: dict[str, str] = {}
    weights: dict[str, str] = {}
    records: dict[str, Tensor] = {}
    for (owner, prefix, parameter), chain in trees.items():
        if chain.pop("original", None) != {""}:
            continue
        said = _said(state, prefix, chain)
        if said is None:
            if any(map(_is_excitation, chain.values())):
                raise no_record([f"{prefix}original"])
            continue
        stages, record = said
        excitation = owner + excitation_name(parameter)
        weights[owner + parameter] = renamed[f"{prefix}original"] = owner + raw_name(parameter)
        records[f"{excitation}.{RECORD_KEY}"] = record
        renamed |= {old: f"{excitation}.{new}" for old, new in stages.items()}
    if not weights:
        return None
    note = f"read as excitations registered by torch.nn.utils.parametrize: {listed(weights)}"
    gone = {name for name in modules if "parametrizations" in name.split(".")}
    return ReadAsOurs(_in_vanilla_order(state, renamed, weights) | records, gone, note)


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


def _in_vanilla_order(
    state: Mapping[str, Tensor], renamed: Mapping[str, str], weights: Mapping[str, str]
) -> dict[str, Tensor]:
    """The entries renamed, and each layer's weight before its others, as vanilla layers have it."""
    ours = {renamed.get(key, key): value for key, value in state.items()}
    raw: dict[str, list[str]] = {}
    for key in weights.values():
        raw.setdefault(key.rpartition(".")[0], []).append(key)
    ordered: dict[str, Tensor] = {}
    for key, value in ours.items():
        ordered |= {weight: ours[weight] for weight in raw.pop(key.rpartition(".")[0], ())}
        ordered.setdefault(key, value)
    return ordered
