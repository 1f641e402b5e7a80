"""State dicts of many or of long keys: what is done for each is done once."""

import time

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import we_surgery as ws
from we_surgery.checkpoint import find_excited
from we_surgery.checkpoint.unwrap import VERSIONS, unwrap, with_versions

COPIES = 6000
MOST_SECONDS = 15
LONG = ".".join("a" * (1 << 16))


def repeated(state):
    """A state dict with many times the modules of another."""
    tensors = {f"b.{i}.{key}": value for i in range(COPIES) for key, value in state.items()}
    versions = getattr(state, VERSIONS, {})
    many = {f"b.{i}.{k}".rstrip("."): v for i in range(COPIES) for k, v in versions.items()}
    return with_versions(tensors, many)


def parametrized():
    layer = nn.Conv2d(2, 2, 1)
    excitation = ws.convert(nn.Sequential(nn.Conv2d(2, 2, 1)), "lwe")[0].excitation
    parametrize.register_parametrization(layer, "weight", excitation, unsafe=True)
    return layer.state_dict()


def experts():
    layers = {"fc1": nn.Linear(2, 2), "fc2": nn.Linear(2, 2), "gate": nn.Linear(2, 2)}
    return nn.ModuleDict(layers).state_dict()


STATES = {
    "ours": lambda: ws.convert(nn.Sequential(nn.Conv2d(2, 2, 1)), "lwe").state_dict(),
    "parametrized": parametrized,
    "gates that are none": experts,
}


@pytest.mark.parametrize("kind", STATES)
def test_reading_many_keys_takes_no_longer_for_each(kind):
    state = STATES[kind]()
    many = repeated(state)
    started = time.process_time()
    read, _ = unwrap(many)
    stripped = ws.strip_state_dict({**many}) if kind == "ours" else read
    found = sum(1 for _ in find_excited(read))
    assert time.process_time() - started < MOST_SECONDS
    assert found == (0 if kind == "gates that are none" else COPIES)
    alone, _ = unwrap(state)
    assert set(getattr(read, VERSIONS)) == {
        f"b.{i}.{k}".rstrip(".") for i in range(COPIES) for k in getattr(alone, VERSIONS)
    }
    assert len(stripped) == COPIES * len(ws.strip_state_dict(alone) if kind == "ours" else alone)


@pytest.mark.parametrize(
    "key", [f"{LONG}.weight", f"{LONG}.fc1.weight", "excitation." * 12_000 + "x", "fc1." * 30_000]
)
def test_a_long_key_is_read_at_once(key):
    state = {key: torch.ones(2, 2), "x.raw_weight": torch.ones(2), "x.weight": torch.ones(2)}
    started = time.process_time()
    read, _ = unwrap(state)
    assert list(find_excited(read)) == []
    assert time.process_time() - started < MOST_SECONDS
