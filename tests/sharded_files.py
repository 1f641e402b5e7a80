"""State dicts in several files, as the libraries write them."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor


def write_shards(
    state: Mapping[str, Tensor], folder: Path, shards: int, ending: str = "safetensors"
) -> Path:
    """An index and shards under transformers' names; layers are cut in two on the way."""
    folder.mkdir()
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = list(state)
    size = math.ceil(len(names) / shards)
    places = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05}-of-{shards:05}.{ending}"
        part = {name: state[name] for name in names[number * size : (number + 1) * size]}
        places |= dict.fromkeys(part, file)
        if ending == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    return index


def write_dcp(checkpoint: Mapping[str, object], folder: Path) -> Path:
    """What ``torch.distributed.checkpoint.save`` writes in one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch 2.8's own use
        dcp.save(dict(checkpoint), checkpoint_id=folder)
    return folder


SOURCES = {
    "safetensors": lambda state, folder: write_shards(state, folder, 3),
    "bin": lambda state, folder: write_shards(state, folder, 3, "bin"),
    "folder": lambda state, folder: write_shards(state, folder, 3).parent,
    "dcp": lambda state, folder: write_dcp({"model": state, "epoch": 2}, folder),
}
"""The same state dict in each layout, by what writes it into a folder."""


def assert_holds(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
