"""Checkpoints of ``torch.nn.utils.parametrize`` with our excitations, read as ours.

Torch keeps a parametrized weight as ``X.parametrizations.weight.original``, and what computes it
under ``X.parametrizations.weight.0``, ``.1`` and so on, in the order they are applied. Each may be
a :class:`~we_surgery.excitations.Composition` or one of its stages by itself, and has a record
that says which. In checkpoints without records a composition is known by its keys, and a
:class:`~we_surgery.excitations.Standardize`, :class:`~we_surgery.excitations.LWE` or
:class:`~we_surgery.excitations.MWE` by itself by its keys and its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from we_surgery.checkpoint.key_index import KeyIndex
from we_surgery.checkpoint.wording import listed
from we_surgery.errors import InputError
from we_surgery.excitations import EXCITATIONS, Rescale, check_stage
from we_surgery.excitations.names import excitation_name, raw_name
from we_surgery.excitations.record import (
    RECORD_KEY,
    is_record,
    make_record,
    read_record,
    stage_names,
    to_tensor,
)

_TREE = "parametrizations"
_IN_TREE = re.compile(rf"(?:^|(?<=\.)){_TREE}(?:\.[^.]+|$)")
_ORIGINAL = re.compile(r"(?:(.+)\.)?parametrizations\.([^.]+)\.original")
_LWE = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
_EPSILON = {"epsilon"}
_MWE = {"epsilon", "undetached_max"}

Entries = dict[str, Tensor]


def read_as_ours(
    state: Mapping[str, Tensor], modules: Iterable[str] = ()
) -> tuple[dict[str, str], dict[str, Tensor], str]:
    """The excited weights of torch's parametrizations under our names.

    Args:
        state: tensors without wrappers' prefixes; it is not changed. Weights that carry other
            parametrizations are left as they are.
        modules: names of the model's modules.

    Returns:
        As :func:`we_surgery.checkpoint.public_code.read_as_ours`.

    Raises:
        InputError: it cannot be told which excitation a weight has, or their order is none of
            ours.
    """
    renamed: dict[str, str] = {}
    excitations: dict[str, str] = {}
    weights: list[str] = []
    records: Entries = {}
    index = KeyIndex(state)
    for key in state:
        found = _ORIGINAL.fullmatch(key)
        prefix = key.removesuffix("original")
        chain = {} if found is None else _chain(index, prefix)
        stages, record = _said(state, prefix, chain) or (_stages(prefix, chain), None)
        if found is None or stages is None:
            continue
        owner = f"{found[1]}." if found[1] else ""
        excitation = owner + excitation_name(found[2])
        renamed[key] = owner + raw_name(found[2])
        if record is not None:
            records[f"{excitation}.{RECORD_KEY}"] = record
        renamed |= {old: f"{excitation}.{new}" for old, new in stages.items()}
        excitations |= dict.fromkeys((f"{owner}{_TREE}", f"{owner}{_TREE}.{found[2]}"), excitation)
        weights.append(owner + found[2])
    if not weights:
        return {}, dict(state), ""
    note = f"read as excitations registered by torch.nn.utils.parametrize: {listed(weights)}"
    moved = {name: new for name in modules if (new := _moved(name, excitations)) is not None}
    return moved, _in_vanilla_order(state, renamed) | records, note


def _moved(module: str, excitations: Mapping[str, str]) -> str | None:
    """The excitation that a module in torch's tree of parametrizations is a part of."""
    heads = (module[: found.end()] for found in _IN_TREE.finditer(module))
    return next((excitations[head] for head in heads if head in excitations), None)


def _chain(index: KeyIndex, prefix: str) -> dict[str, set[str]]:
    """The keys of each parametrization of a weight, by its number."""
    chain: dict[str, set[str]] = {}
    for key in index.beginning_with(prefix):
        if key != f"{prefix}original":
            number, _, rest = key.removeprefix(prefix).partition(".")
            chain.setdefault(number, set()).add(rest)
    return chain


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
    )
    return names, to_tensor(record)


def _stages(prefix: str, chain: Mapping[str, set[str]]) -> dict[str, str] | None:
    """The names in the old form, as :func:`_said`; None for other parametrizations."""
    names: dict[str, str] = {}
    order: list[str] = []
    for number, keys in chain.items():
        is_composition = {key.partition(".")[0] for key in keys} <= EXCITATIONS.keys()
        if not is_composition and not _is_stage(keys):
            return None
        stage = "" if is_composition else _stage(keys, order, list(chain.values()), prefix)
        order += sorted({key.partition(".")[0] for key in keys}) if is_composition else [stage]
        names |= {f"{prefix}{number}.{key}": f"{stage}.{key}" if stage else key for key in keys}
    if not chain:
        return None
    _refuse_other_order(prefix, chain, order, is_whole=len(chain) == 1)
    return names


def _refuse_other_order(
    prefix: str, chain: Mapping[str, set[str]], order: list[str], *, is_whole: bool
) -> None:
    places = [Rescale.order if n == Rescale.name else check_stage(n).order for n in order]
    is_ours = is_whole or places == sorted(set(places))
    if [*chain] != [str(number) for number in range(len(chain))] or not is_ours:
        raise InputError(
            f"the parametrizations of {prefix.removesuffix('.')!r} are no composition of ours: "
            f"{' after '.join(reversed(order))}",
            "Register one `Composition`, or save the weights it computes.",
        )


def _is_stage(keys: set[str]) -> bool:
    return keys in (_LWE, _EPSILON, _MWE)


def _stage(keys: set[str], before: list[str], chain: list[set[str]], prefix: str) -> str:
    """The name of an excitation that stands by itself in a chain."""
    if keys == _LWE:
        return "lwe"
    if keys == _MWE or before:
        return "mwe"
    if len(chain) > 1:
        return "standardize"
    raise InputError(
        f"the parametrization of {prefix.removesuffix('.')!r} may be a Standardize or an MWE: the "
        "state dict holds an epsilon and nothing else",
        "Register a `Composition` of it, whose keys name the stage, and save again; or save the "
        "weights it computes.",
    )


def _in_vanilla_order(state: Mapping[str, Tensor], renamed: Mapping[str, str]) -> Entries:
    """The entries renamed, and each layer's weight before its others, as vanilla layers have it."""
    ours = {renamed.get(key, key): value for key, value in state.items()}
    weights: dict[str, list[str]] = {}
    for key in filter(_ORIGINAL.fullmatch, renamed):
        weights.setdefault(renamed[key].rpartition(".")[0], []).append(renamed[key])
    ordered: Entries = {}
    for key, value in ours.items():
        for weight in weights.pop(key.rpartition(".")[0], ()):
            ordered[weight] = ours[weight]
        ordered.setdefault(key, value)
    return ordered
