"""Checkpoints of the WE paper's public code, read as ours.

That code keeps an LWE conv's weight under its vanilla name and the two layers of the gate beside
it, as 1x1 convs: ``X.weight`` ``[O, I, *K]``, ``X.fc1.weight`` ``[h, I, 1, 1]``, ``X.fc1.bias``,
``X.fc2.weight`` ``[I, h, 1, 1]`` and ``X.fc2.bias``. It always standardizes the weight first, with
1e-5 added to each standard deviation. Its MWE layers leave no trace in a state dict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from we_surgery.checkpoint.key_index import KeyIndex
from we_surgery.checkpoint.wording import listed
from we_surgery.errors import InputError
from we_surgery.excitations import LWE
from we_surgery.excitations.names import EXCITATION, raw_name
from we_surgery.excitations.record import RECORD_KEY, make_record, to_tensor

_GATE = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def read_as_ours(
    state: Mapping[str, Tensor], modules: Iterable[str] = ()
) -> tuple[dict[str, str], dict[str, Tensor], str]:
    """The entries of the public code's LWE layers under the names and in the shapes of ours.

    Args:
        state: tensors without wrappers' prefixes; it is not changed.
        modules: names of the model's modules.

    Returns:
        The new names of those of them that have one, the state dict, and a sentence
        on what was found, empty where nothing was; the state dict is then as it was.

    Raises:
        InputError: a kernel is not square; the public code gates such a weight otherwise.
    """
    index = KeyIndex(state)
    layers = [layer for layer in _owners(state) if _is_public_lwe(state, layer, index)]
    if not layers:
        return {}, dict(state), ""
    renamed: dict[str, str] = {}
    for layer in layers:
        weight = state[f"{layer}.weight"]
        if len(set(weight.shape[2:])) > 1:
            raise InputError(
                f"{layer!r} is an LWE layer of the paper's public code with a kernel of "
                f"{tuple(weight.shape[2:])}, which that code does not pool as it does a square one",
                "Save the weights it computes, from a forward of that model.",
            )
        renamed[f"{layer}.weight"] = f"{layer}.{raw_name('weight')}"
        for entry in _GATE:
            renamed[f"{layer}.{entry}"] = f"{layer}.{EXCITATION}.lwe.{entry}"
    lwe = LWE(1, device="meta").chosen_options() | {"reduction": None}
    record = to_tensor(make_record([{"standardize": {"epsilon": 1e-5}}, {"lwe": lwe}]))
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
    return {name: moved[name] for name in modules if name in moved}, ours, note


def _owners(state: Mapping[str, Tensor]) -> list[str]:
    ending = ".fc1.weight"
    return [key.removesuffix(ending) for key in state if key.endswith(ending)]


def _is_public_lwe(state: Mapping[str, Tensor], layer: str, index: KeyIndex) -> bool:
    if f"{layer}.weight" not in state:
        return False
    beside = {key for fc in ("fc1", "fc2") for key in index.beginning_with(f"{layer}.{fc}.")}
    # A gate of further layers of its own, as of the code's later experiments, is another method.
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
