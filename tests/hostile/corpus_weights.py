"""State dicts, safetensors and their metadata that cannot be what they say."""

from __future__ import annotations

import copy
import functools
import json
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from corpus_pickles import STATE, Calls, Maker, saved, written
from torch import Tensor, nn
from toys import EVERYTHING, ConvNet

import we_surgery as ws


@functools.cache
def converted_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(ws.convert(ConvNet(), config=EVERYTHING).state_dict())


def changed(**values: Any) -> Maker:
    """A converted state dict with other values; None takes an entry away."""

    def make(folder: Path) -> Path:
        state = {**converted_state(), **{key.replace("__", "."): v for key, v in values.items()}}
        return saved({k: v for k, v in state.items() if v is not None})(folder)

    return make


def filled(key: str, value: float) -> Maker:
    def make(folder: Path) -> Path:
        state = copy.deepcopy(converted_state())
        state[key].flatten()[0:1].fill_(value)
        assert not torch.equal(state[key], converted_state()[key])
        return saved(state)(folder)

    return make


def reworded(old: str, new: str) -> Maker:
    """A converted state dict whose first record says something else."""

    def make(folder: Path) -> Path:
        text = bytes(converted_state()["stem.excitation._extra_state"].tolist()).decode()
        assert old in text
        record = torch.tensor(list(text.replace(old, new, 1).encode()), dtype=torch.uint8)
        return changed(stem__excitation___extra_state=record)(folder)

    return make


def rebuilt(size: Any, stride: Any, offset: Any = 0, dtype: torch.dtype = torch.float32) -> Calls:
    """A tensor over six values, as the file says."""
    storage = torch.ones(6, dtype=dtype)._typed_storage()
    return Calls(
        torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict()
    )


def nested(depth: int, inner: Any, key: str = "state_dict") -> Any:
    for _ in range(depth):
        inner = {key: inner}
    return inner


def laughs(levels: int = 60) -> list[Any]:
    """2**levels entries when it is written out, and as many objects as levels in memory."""
    value: list[Any] = ["lol"]
    for _ in range(levels):
        value = [value, value]
    return value


def itself() -> dict[str, Any]:
    state: dict[str, Any] = {}
    state["state_dict"] = state
    return state


def sparse(indices: list[list[int]]) -> Calls:
    data = (torch.tensor(indices), torch.ones(len(indices[0])), torch.Size([3, 3]), False)
    return Calls(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, data)


SHAPES: dict[str, Any] = {
    "more values than stored": rebuilt((7,), (1,)),
    "2**40 values": rebuilt((1 << 40,), (1,)),
    "2**40 values by repetition": rebuilt((1 << 40,), (0,)),
    "2**62 by 2**62": rebuilt((1 << 62, 1 << 62), (0, 0)),
    "beyond 64 bits": rebuilt((1 << 70,), (0,)),
    "a negative size": rebuilt((-1,), (1,)),
    "a negative stride": rebuilt((2,), (-1,)),
    "a negative offset": rebuilt((2,), (1,), -1),
    "an offset beyond the end": rebuilt((2,), (1,), 5),
    "a huge offset": rebuilt((2,), (1,), 1 << 62),
    "a fraction": rebuilt((2.5,), (1,)),
    "text": rebuilt(("2",), (1,)),
    "a number for a shape": rebuilt(2, 1),
    "no shape": rebuilt(None, None),
    "fewer strides than sizes": rebuilt((2, 3), (1,)),
    "nested sizes": rebuilt(((2,), 3), (3, 1)),
    "a sparse index outside": sparse([[0, 9], [0, 0]]),
    "a negative sparse index": sparse([[0, -1], [0, 0]]),
    "a layout that is none": Calls(torch._utils._rebuild_sparse_tensor, 3, ()),
    "no storage": Calls(torch._utils._rebuild_tensor_v2, None, 0, (2,), (1,), False, OrderedDict()),
    "a tensor for a storage": Calls(
        torch._utils._rebuild_tensor_v2, torch.ones(2), 0, (2,), (1,), False, OrderedDict()
    ),
    "a tensor of a class": Calls(
        torch._tensor._rebuild_from_type_v2, torch._utils._rebuild_parameter, nn.Parameter, (), {}
    ),
    "too few arguments": Calls(torch._utils._rebuild_tensor_v2),
}

EXCITED: dict[str, Maker] = {
    "a weight that is not a number": filled("stem.raw_weight", float("nan")),
    "an infinite weight": filled("stem.raw_weight", float("inf")),
    "a gate that is not a number": filled("stem.excitation.lwe.fc1.weight", float("nan")),
    "an epsilon that is not a number": reworded('"epsilon": 0.1', '"epsilon": NaN'),
    "an infinite epsilon": reworded('"epsilon": 1e-05', '"epsilon": Infinity'),
    "an epsilon of text": reworded('"epsilon": 0.1', '"epsilon": "0.1"'),
    "no record": changed(stem__excitation___extra_state=None),
    "a record of noise": filled("stem.excitation._extra_state", 255),
    "an empty record": changed(stem__excitation___extra_state=torch.ones(0)),
    "a record without memory": changed(stem__excitation___extra_state=torch.ones(9, device="meta")),
    "a huge record": changed(stem__excitation___extra_state=torch.ones(1).expand(2**40)),
    "a deep record": reworded('"inner": null', f'"inner": {"[" * 20000 + "]" * 20000}'),
    "a recursive excitation": reworded(
        '"inner": null', '"inner": ' + '{"lwe": {"inner": ' * 900 + "null" + "}}" * 900
    ),
    "a record without stages": reworded('"stages"', '"steps"'),
    "stages of another order": reworded('"standardize"', '"mwe"'),
    "groups beyond 64 bits": reworded('"transposed_groups": null', f'"transposed_groups": {2**70}'),
    "a record of tomorrow": reworded('"schema": 2', '"schema": 3'),
    "half of a gate": changed(stem__excitation__lwe__fc1__weight=None),
    "a gate without its biases": changed(
        stem__excitation__lwe__fc1__bias=None, stem__excitation__lwe__fc2__bias=None
    ),
    "a gate of another width": changed(stem__excitation__lwe__fc2__weight=torch.ones(4, 1)),
    "a gate without values": changed(stem__excitation__lwe__fc1__weight=torch.ones(0, 3)),
    "a gate with another rank": changed(stem__excitation__lwe__fc1__weight=torch.ones(1, 3, 1)),
    "a gate of integers": changed(stem__excitation__lwe__fc1__weight=torch.ones(1, 3).long()),
    "an epsilon of two values": changed(stem__excitation__mwe__epsilon=torch.ones(2)),
    "an unknown stage": changed(stem__excitation__quantum__weight=torch.ones(2)),
    "an unknown part": changed(stem__excitation__lwe__fc9__weight=torch.ones(2)),
    "a stage without parts": changed(stem__excitation__lwe=torch.ones(2)),
    "an empty name": changed(**{"stem__excitation__": torch.ones(2)}),
    "an excited weight and the same vanilla": changed(stem__weight=torch.ones(8, 3, 3, 3)),
    "a raw weight of no dimension": changed(stem__raw_weight=torch.tensor(1.0)),
    "a raw weight of another shape": changed(stem__raw_weight=torch.ones(8, 5, 3, 3)),
    "a raw weight of integers": changed(stem__raw_weight=torch.ones(8, 3, 3, 3).long()),
    "a raw weight of truth values": changed(stem__raw_weight=torch.ones(8, 3, 3, 3).bool()),
    "a raw weight without memory": changed(stem__raw_weight=torch.ones(8, 3, 3, 3, device="meta")),
    "a sparse raw weight": changed(stem__raw_weight=torch.ones(8, 27).to_sparse()),
    "a repeated raw weight": changed(stem__raw_weight=torch.ones(1).expand(1 << 14, 3, 300, 300)),
}

STRUCTURES: dict[str, Any] = {
    "nothing": {},
    "a list": [STATE],
    "a tuple": (STATE,),
    "a number": 3,
    "text": "state_dict",
    "None": None,
    "a set": {1, 2},
    "a tensor": torch.ones(3),
    "a parameter": nn.Parameter(torch.ones(3)),
    "keys that are numbers": {0: torch.ones(2), 1: torch.ones(2)},
    "a key that is a number": {**STATE, 3: torch.ones(2)},
    "a key that is None": {**STATE, None: torch.ones(2)},
    "a key that is a tuple": {**STATE, ("a", "b"): torch.ones(2)},
    "a key that is true": {**STATE, True: torch.ones(2)},
    "keys in a wrapper that are numbers": {"state_dict": {0: torch.ones(2)}},
    "an empty wrapper": {"state_dict": {}},
    "a wrapper of None": {"state_dict": None, "epoch": 3},
    "itself": itself(),
    "80 wrappers": nested(80, STATE),
    "two names that become one": {"a.weight": torch.ones(2), "a._orig_mod.weight": torch.ones(2)},
    "one entry under two wrappers": {
        "module.weight": torch.ones(2),
        "module._orig_mod.weight": torch.zeros(2),
    },
    "several state dicts": {"a": STATE, "b": dict(STATE)},
    "no tensors": {"a": 1, "b": "x"},
    "two to the sixtieth": laughs(),
    "two to the sixtieth in a wrapper": {"a": laughs(), "b": laughs()},
    "a key of a megabyte": {"a" * (1 << 20): 1},
    "a key with a new line": {"a\nerror: b": 1},
    "a key that clears the screen": {"\x1b[2J\x1b[H": 1},
    "a class": nn.Linear,
    "a dtype": torch.float32,
}

ARCHITECTURES: dict[str, Any] = {
    "code": {"name": "os:system", "arguments": {"command": "touch canary"}},
    "code of a package": {"name": "timm.models:load_checkpoint", "arguments": {}},
    "torch's own": {"name": "torch.hub:load", "arguments": {"repo": "x/y"}},
    "builtins": {"name": "builtins:exec", "arguments": {}},
    "our own": {"name": "we_surgery:load", "arguments": {"path": "other.pt", "trust": True}},
    "a hub": {"name": "timm:hf-hub:owner/model", "arguments": {}},
    "a folder": {"name": "timm:local-dir:/tmp", "arguments": {}},
    "a path": {"name": "torchvision:../../evil", "arguments": {}},
    "nothing": {"name": "", "arguments": {}},
    "no such model": {"name": "timm:resnet51", "arguments": {}},
    "text": "timm:resnet18",
    "a list": ["timm:resnet18"],
    "two to the sixtieth": laughs(),
    "a name of two to the sixtieth": {"name": laughs(), "arguments": {}},
    "arguments in a list": {"name": "timm:resnet18", "arguments": [1]},
    "arguments that are numbers": {"name": "timm:resnet18", "arguments": {1: 2}},
    "an unknown argument": {"name": "timm:resnet18", "arguments": {"evil": True}},
    "arguments of two to the sixtieth": {
        "name": "timm:resnet18",
        "arguments": {"num_classes": laughs()},
    },
    "a negative width": {"name": "torchvision:resnet18", "arguments": {"num_classes": -1}},
    "text for a number": {"name": "torchvision:resnet18", "arguments": {"num_classes": "1"}},
    "weights that decide on layers": {
        "name": "torchvision:fcn_resnet50",
        "arguments": {"weights": "DEFAULT"},
    },
    "another model": {"name": "torchvision:resnet18", "arguments": {}},
}

METADATA: dict[str, Any] = {
    "a newer schema": {"schema": 99, "we_surgery": "9.9"},
    "a schema of a million digits": {"schema": 10 ** (10**4), "we_surgery": "9"},
    "an older schema": {"schema": 0},
    "no schema": {},
    "text": "schema 1",
    "None": None,
    "a list": [1],
    "two to the sixtieth": laughs(),
    "a schema of two to the sixtieth": {"schema": laughs()},
    "a version of two to the sixtieth": {"schema": 99, "we_surgery": laughs()},
    "a true schema": {"schema": True},
    "a schema that is not a number": {"schema": float("nan")},
    "a plan that is a list": {"schema": 1, "plan": [1]},
    "a plan that is text": {"schema": 1, "plan": "lwe"},
}


def described(architecture: Any) -> Maker:
    data = {"schema": 1, "we_surgery": "0", "plan": None, "architecture": architecture}
    return saved({"we_surgery": data, "state_dict": STATE})


def safetensors(
    header: Any, body: bytes = bytes(24), length: int | None = None, pad: bytes = b""
) -> Maker:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return written(struct.pack("<Q", size % (1 << 64)) + text + pad + body)


def entry(shape: Any = (6,), offsets: Any = (0, 24), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LYING: dict[str, Maker] = {
    "overlapping offsets": safetensors({"a": entry(), "b": entry()}),
    "half overlapping": safetensors({"a": entry((4,), (0, 16)), "b": entry((4,), (8, 24))}),
    "a hole": safetensors({"a": entry((2,), (0, 8)), "b": entry((2,), (16, 24))}),
    "offsets the wrong way": safetensors({"a": entry((6,), (24, 0))}),
    "offsets beyond the end": safetensors({"a": entry((12,), (0, 48))}),
    "huge offsets": safetensors({"a": entry((6,), (1 << 62, (1 << 62) + 24))}),
    "negative offsets": safetensors({"a": entry((6,), (-24, 0))}),
    "fractions for offsets": safetensors({"a": entry((6,), (0.0, 24.0))}),
    "one offset": safetensors({"a": entry((6,), (0,))}),
    "no offsets": safetensors({"a": {"dtype": "F32", "shape": [6]}}),
    "bytes left over": safetensors({"a": entry((2,), (0, 8))}),
    "more values than bytes": safetensors({"a": entry((7,))}),
    "fewer values than bytes": safetensors({"a": entry((5,))}),
    "2**40 values": safetensors({"a": entry((1 << 40,))}),
    "2**64 values": safetensors({"a": entry((1 << 32, 1 << 32))}),
    "a product that overflows to 24 bytes": safetensors({"a": entry((1 << 62, 1 << 62, 6))}),
    "a negative size": safetensors({"a": entry((-6,))}),
    "two negative sizes": safetensors({"a": entry((-2, -3))}),
    "a fraction": safetensors({"a": entry((6.0,))}),
    "text for a shape": safetensors({"a": entry("6")}),
    "no shape": safetensors({"a": entry(None)}),
    "an unknown dtype": safetensors({"a": entry(dtype="F33")}),
    "a dtype of objects": safetensors({"a": entry(dtype="O")}),
    "no dtype": safetensors({"a": entry(dtype=None)}),
    "an entry that is a list": safetensors({"a": [1, 2]}),
    "an entry that is None": safetensors({"a": None}),
    "a header that is a list": safetensors([1, 2]),
    "an empty header": safetensors({}, b""),
    "only metadata": safetensors({"__metadata__": {"format": "pt"}}, b""),
    "metadata that is a list": safetensors({"__metadata__": [1], "a": entry()}),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}, "a": entry()}),
    "a header that is no JSON": safetensors(b"{not json}"),
    "a header that is no text": safetensors(b'{"\xff\xfe":1}'),
    "a header of nested lists": safetensors(b'{"a":' + b"[" * 50_000),
    "a header without its end": safetensors(b'{"a":'),
    "a header twice": safetensors(json.dumps({"a": entry()}).encode() * 2),
    "a header longer than the file": safetensors({"a": entry()}, length=10_000),
    "a header of 2**63": safetensors({"a": entry()}, length=1 << 63),
    "a header of 2**64-1": safetensors({"a": entry()}, length=-1),
    "a header of no length": safetensors({"a": entry()}, length=0),
    "a header of one byte": safetensors({"a": entry()}, length=1),
    "a header one byte short": safetensors(
        {"a": entry()}, length=len(json.dumps({"a": entry()})) - 1
    ),
    "a header one byte long": safetensors(
        {"a": entry()}, length=len(json.dumps({"a": entry()})) + 1
    ),
}


def in_header(data: Any) -> Maker:
    text = data if isinstance(data, str) else json.dumps(data)
    return safetensors({"__metadata__": {"we_surgery": text}, "a": entry()})


HEADERS: dict[str, Maker] = {
    "a newer schema": in_header({"schema": 99, "we_surgery": "9.9"}),
    "nothing": in_header(""),
    "no JSON": in_header("{"),
    "nested lists": in_header("[" * 50_000),
    "a number of many digits": in_header('{"schema": ' + "9" * 10_000 + "}"),
    "an infinite schema": in_header('{"schema": Infinity}'),
    "a plan that is text": in_header({"schema": 1, "plan": "lwe"}),
}


def sound_state(folder: Path) -> Path:
    return saved(dict(ConvNet().state_dict()))(folder)


def cases() -> dict[str, Maker]:
    def in_metadata(data: Any) -> Maker:
        return saved({"we_surgery": data, "state_dict": STATE})

    return {
        **{f"shape: {key}": saved({"weight": value}) for key, value in SHAPES.items()},
        **{f"checkpoint: {key}": saved(value) for key, value in STRUCTURES.items()},
        **{f"metadata: {key}": in_metadata(value) for key, value in METADATA.items()},
        **{f"safetensors: {key}": make for key, make in LYING.items()},
        **{f"header: {key}": make for key, make in HEADERS.items()},
    }
