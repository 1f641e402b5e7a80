"""What a written file holds: keys, ties, memory formats, metadata."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_writing import STATE, WRITERS, names
from torch import nn

import we_surgery as ws
from we_surgery.checkpoint import (
    Architecture,
    Metadata,
    read,
)
from we_surgery.checkpoint import write as write_file
from we_surgery.errors import InputError

METADATA = Metadata(
    plan={"schema": 1, "layers": []},
    architecture=Architecture("timm:test_vit", {"num_classes": 3}),
)


def test_a_bare_state_dict_is_just_that(tmp_path):
    write_file(STATE, tmp_path / "out.pt", "state_dict")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(found) == list(STATE)


def test_a_state_dict_describes_itself_under_weights_only(tmp_path):
    write_file(STATE, tmp_path / "out.pt", "state_dict", metadata=METADATA)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(found) == ["we_surgery", "state_dict"]
    assert found["we_surgery"]["schema"] == 2
    assert found["we_surgery"]["we_surgery"] == ws.__version__
    contents = read(tmp_path / "out.pt")
    assert contents.metadata == METADATA
    assert contents.notes == []


def test_a_safetensors_header_describes_the_file(tmp_path):
    write_file(STATE, tmp_path / "out.safetensors", "safetensors", metadata=METADATA)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        header = file.metadata()
    assert header["format"] == "pt"
    assert json.loads(header["we_surgery"]) == METADATA.to_dict()
    assert read(tmp_path / "out.safetensors").metadata == METADATA
    write_file(STATE, tmp_path / "bare.safetensors", "safetensors")
    assert read(tmp_path / "bare.safetensors").metadata is None


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for name, write in WRITERS.items():
        for copy in "ab":
            torch.manual_seed(0)
            write(tmp_path / f"{name}.{copy}")
        first, second = ((tmp_path / f"{name}.{copy}").read_bytes() for copy in "ab")
        assert first == second, name


def test_tied_and_strided_tensors_are_whole_in_safetensors(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    state = {
        "tied.a": whole,
        "tied.b": whole,
        "slice": whole[1:3, 2:],
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "empty": torch.ones(0),
        "scalar": torch.tensor(3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "grad": nn.Parameter(torch.ones(3)),
    }
    write_file(state, tmp_path / "out.safetensors", "safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_state_dict_keeps_ties_and_memory_formats(tmp_path):
    tied = torch.ones(3)
    strided = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    write_file({"a": tied, "b": tied, "c": strided}, tmp_path / "out.pt", "state_dict")
    found = read(tmp_path / "out.pt").state_dict
    assert found["a"].data_ptr() == found["b"].data_ptr()
    assert found["c"].stride() == strided.stride()


def test_what_safetensors_cannot_hold_is_named(tmp_path):
    with pytest.raises(InputError, match="'sparse'"):
        write_file(
            {"sparse": torch.ones(2, 2).to_sparse()}, tmp_path / "out.safetensors", "safetensors"
        )
    assert names(tmp_path) == []


def test_an_object_among_the_tensors_is_named(tmp_path):
    with pytest.raises(InputError, match=r"'0\._extra_state' is of type dict") as caught:
        write_file({"0._extra_state": {"scale": 2}}, tmp_path / "out.safetensors", "safetensors")
    assert caught.value.cause.startswith("safetensors holds only tensors")
    assert "--to state_dict, or --to module" in caught.value.cure
    assert names(tmp_path) == []


def test_conjugate_and_negative_views_are_written_as_they_are(tmp_path):
    turning = torch.polar(torch.ones(4), torch.arange(4.0))
    state = {"conjugate": turning.conj(), "negative": turning.conj().imag}
    assert state["conjugate"].is_conj()
    assert state["negative"].is_neg()
    write_file(state, tmp_path / "out.safetensors", "safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_newer_schema_says_which_version_wrote_it():
    data = METADATA.to_dict() | {"schema": 99, "we_surgery": "9.0"}
    with pytest.raises(InputError, match=r"we_surgery 9\.0 \(schema 99\)"):
        Metadata.from_dict(data)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"schema": "1"},
        {"schema": 1, "plan": 3},
        {"schema": 1, "architecture": 3},
        {"schema": 1, "architecture": {"name": "nonsense"}},
        {"schema": 1, "architecture": {"name": "timm:test_vit", "arguments": {3: 4}}},
    ],
)
def test_damaged_metadata_is_an_input_error(data):
    with pytest.raises(InputError):
        Metadata.from_dict(data)


def test_a_damaged_header_is_an_input_error():
    with pytest.raises(InputError, match="cannot be read"):
        Metadata.from_json("{")
    with pytest.raises(InputError, match="cannot be read"):
        Metadata.from_json("[" * 100_000)
