"""State dicts in several files: read without their code, stripped tensor by tensor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sharded_files import SOURCES, assert_holds, write_dcp, write_shards
from toys import ConvNet

import we_surgery as ws
from we_surgery.checkpoint import read
from we_surgery.errors import InputError, SurgeryError


@pytest.fixture(params=SOURCES)
def source(request, converted, tmp_path):
    return SOURCES[request.param](converted.state_dict(), tmp_path / "source")


def load_folder(folder: Path):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in tensors)
        found |= tensors
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    return found


def test_it_strips_to_a_folder_of_as_many_shards(source, converted, tmp_path):
    steps = []
    report = ws.strip_sharded(
        source, tmp_path / "out", progress=lambda *counts: steps.append(counts)
    )
    expected = ws.strip(converted).state_dict()
    assert_holds(load_folder(tmp_path / "out"), expected)
    assert (report.layers, report.tensors) == (4, len(expected))
    assert steps == [(step + 1, 2 * len(expected)) for step in range(2 * len(expected))]
    is_dcp = (tmp_path / "source" / ".metadata").exists()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (1 if is_dcp else 3)


def test_it_strips_to_one_file_in_the_vanilla_order(source, converted, tmp_path):
    ws.strip_sharded(source, tmp_path / "out.safetensors")
    assert_holds(load_file(tmp_path / "out.safetensors"), ws.strip(converted).state_dict())
    vanilla = ConvNet()
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        order = list(file.offset_keys())
    floats = [name for name, value in vanilla.state_dict().items() if value.is_floating_point()]
    # Counters of eight bytes stand first, so that all is aligned.
    assert order == ["norm.num_batches_tracked", *floats]
    vanilla.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)


def test_a_layers_tensors_may_lie_in_any_shards(converted, tmp_path):
    """The raw weight in one shard, its excitation in two others, before and after."""
    state = converted.state_dict()
    shuffled = sorted(state, key=lambda name: name[::-1])
    index = write_shards({name: state[name] for name in shuffled}, tmp_path / "in", 7)
    places = json.loads(index.read_text())["weight_map"]
    spread = [
        {file for name, file in places.items() if name.startswith(layer)}
        for layer in ("stem.", "grouped.", "head.")
    ]
    assert min(map(len, spread)) > 1
    ws.strip_sharded(index, tmp_path / "out")
    assert_holds(load_folder(tmp_path / "out"), ws.strip(converted).state_dict())


def test_the_models_own_loader_reads_it_whole(source, converted):
    contents = read(source)
    assert contents.kind in ("sharded", "dcp")
    assert_holds(contents.state_dict, converted.state_dict())


def test_a_checkpoint_of_the_public_code_in_shards_folds_as_in_one_file(tmp_path):
    from test_public_code import Net, PublicLWE

    state = Net(PublicLWE).state_dict()
    ws.strip_sharded(write_shards(state, tmp_path / "in", 3), tmp_path / "out.safetensors")
    assert_holds(load_file(tmp_path / "out.safetensors"), ws.strip_state_dict(state))


def test_the_wrapped_weights_and_their_average_are_found(converted, tmp_path):
    averaged = {
        name: value.clone() / 2 if name.endswith("raw_weight") else value
        for name, value in converted.state_dict().items()
    }
    folder = write_dcp({"model": converted.state_dict(), "ema": averaged}, tmp_path / "in")
    for options, expected in (
        ({}, converted.state_dict()),
        ({"weights": "ema"}, averaged),
        ({"key": "ema"}, averaged),
    ):
        ws.strip_sharded(folder, tmp_path / "out.safetensors", force=True, **options)
        assert_holds(load_file(tmp_path / "out.safetensors"), ws.strip_state_dict(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_cast_rounds_the_fold_once(dtype, converted, tmp_path):
    half = converted.to(torch.bfloat16)
    source = write_shards(half.state_dict(), tmp_path / "in", 2)
    ws.strip_sharded(source, tmp_path / "out.safetensors", dtype=dtype)
    expected = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in ws.strip(half.float()).state_dict().items()
    }
    assert_holds(load_file(tmp_path / "out.safetensors"), expected)


def test_nothing_is_left_where_a_shard_fails(converted, tmp_path):
    state = converted.state_dict()
    state["head.raw_weight"][0, 0] = float("nan")
    source = write_shards(state, tmp_path / "in", 3)
    for target in ("out", "out.safetensors"):
        with pytest.raises(SurgeryError, match="'head' holds 60 non-finite"):
            ws.strip_sharded(source, tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_the_disk_gives_back_is_compared(converted, tmp_path, monkeypatch):
    from we_surgery.checkpoint.shards.safetensors_file import SafetensorsWriter

    write = SafetensorsWriter.write

    def write_wrong(self, name, tensor):
        write(self, name, tensor)
        if name == "norm.bias":
            self._file.seek(self._start + self._spans[name][1] - 1)
            self._file.write(b"x")

    monkeypatch.setattr(SafetensorsWriter, "write", write_wrong)
    with pytest.raises(SurgeryError, match=r"'norm.bias' was written and is not bit-equal"):
        ws.strip_sharded(write_shards(converted.state_dict(), tmp_path / "in", 2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_a_folder_of_shards_is_replaced(converted, tmp_path):
    source = write_shards(converted.state_dict(), tmp_path / "in", 2)
    ws.strip_sharded(source, tmp_path / "out")
    with pytest.raises(InputError, match="exists already"):
        ws.strip_sharded(source, tmp_path / "out")
    ws.strip_sharded(source, tmp_path / "out", force=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"does not have: 'notes\.txt'"):
        ws.strip_sharded(source, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_single_file_is_sent_to_the_other_function(converted, tmp_path):
    torch.save(converted.state_dict(), tmp_path / "model.pt")
    with pytest.raises(InputError, match="is a single file") as caught:
        ws.strip_sharded(tmp_path / "model.pt", tmp_path / "out")
    assert "strip_state_dict" in caught.value.cure


def test_a_vanilla_one_has_nothing_to_strip(tmp_path):
    source = write_shards(ConvNet().state_dict(), tmp_path / "in", 2)
    with pytest.raises(SurgeryError, match="nothing to strip"):
        ws.strip_sharded(source, tmp_path / "out")


BROKEN_INDICES = {
    "no json": (b"{", "not an index of shards"),
    "no map": (b"{}", "no 'weight_map'"),
    "a path": (
        b'{"weight_map": {"a": "../model.safetensors"}}',
        "not the name of a file",
    ),
    "no name": (b'{"weight_map": {"a": 3}}', "not the name of a file"),
    "missing": (b'{"weight_map": {"a": "b.safetensors"}}', "which is missing"),
    "elsewhere": (b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "does not"),
}


@pytest.mark.parametrize("broken", BROKEN_INDICES)
def test_a_broken_index_is_an_input_error(broken, converted, tmp_path):
    content, cause = BROKEN_INDICES[broken]
    index = write_shards(converted.state_dict(), tmp_path / "in", 2)
    index.write_bytes(content)
    with pytest.raises(InputError, match=cause):
        ws.strip_sharded(index, tmp_path / "out")


def test_a_cut_shard_is_an_input_error(converted, tmp_path):
    for ending in ("safetensors", "bin"):
        index = write_shards(converted.state_dict(), tmp_path / ending, 2, ending)
        shard = next(iter(sorted(index.parent.glob(f"*.{ending}"))))
        shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(InputError, match=shard.name):
            ws.strip_sharded(index, tmp_path / "out")


def test_a_folder_of_other_things_says_what_it_holds(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"'config\.json'"):
        read(tmp_path)


UNUSUAL = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "without values": lambda: torch.empty(3, device="meta"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_tensors_are_kept_in_a_file_of_torch_and_refused_by_safetensors(
    name, converted, tmp_path
):
    from we_surgery.jobs.convert import Source
    from we_surgery.jobs.inspect import inspect_file
    from we_surgery.jobs.strip import StripOptions, strip_files

    state = converted.state_dict() | {"extra": UNUSUAL[name]()}
    torch.save(state, tmp_path / "one.bin")
    sources = [tmp_path / "one.bin", write_shards(state, tmp_path / "in", 2, "bin")]
    for number, source in enumerate(map(str, sources)):
        assert len(inspect_file(Source(source)).layers) == 4
        (done,) = strip_files([Source(source)], StripOptions(output=tmp_path / f"{number}.pt"))
        assert done.tensors == len(ConvNet().state_dict()) + 1
        with pytest.raises(InputError, match=r"safetensors cannot hold .*'extra'"):
            strip_files([Source(source)], StripOptions(output=tmp_path / "out.safetensors"))


def test_a_lazily_conjugated_tensor_is_written_conjugated(converted, tmp_path):
    lazy = torch.polar(torch.ones(4), torch.arange(4.0)).conj()
    state = converted.state_dict() | {"turn": lazy}
    source = write_shards(state, tmp_path / "in", 1, "bin")
    ws.strip_sharded(source, tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["turn"], lazy)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_tensors_that_the_index_does_not_list_are_named(ending, converted, tmp_path):
    state = converted.state_dict()
    index = write_shards(state, tmp_path / "in", 2, ending)
    content = json.loads(index.read_text())
    for name in state:
        if name.startswith("head.excitation."):
            del content["weight_map"][name]
    index.write_text(json.dumps(content))
    notes = read(index).notes
    assert any("left out 'head.excitation." in note and "does not list" in note for note in notes)
    with pytest.raises(InputError, match=r"nothing says how 'head\.raw_weight' were excited"):
        ws.strip_sharded(index, tmp_path / "out.safetensors")
