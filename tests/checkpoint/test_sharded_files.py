"""State dicts in several files: read without their code, stripped tensor by tensor."""

import contextlib
import io
import json
import mmap
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sharded_files import write_dcp, write_shards
from toys import EVERYTHING, ConvNet

import we_surgery as ws
from we_surgery.checkpoint import read, sharded
from we_surgery.errors import InputError, SurgeryError
from we_surgery.excitations import formulas

SOURCES = {
    "safetensors": lambda state, folder: write_shards(state, folder, 3),
    "bin": lambda state, folder: write_shards(state, folder, 3, "bin"),
    "folder": lambda state, folder: write_shards(state, folder, 3).parent,
    "dcp": lambda state, folder: write_dcp({"model": state, "epoch": 2}, folder),
}


@pytest.fixture
def converted():
    torch.manual_seed(0)
    return ws.convert(ConvNet(), config=EVERYTHING)


@pytest.fixture(params=SOURCES)
def source(request, converted, tmp_path):
    return SOURCES[request.param](converted.state_dict(), tmp_path / "source")


def assert_holds(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


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
    from we_surgery.checkpoint.streaming import SafetensorsWriter

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
    with pytest.raises(InputError, match=r"other things than shards: 'notes\.txt'"):
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
    "no json": (b"{", "no index of shards"),
    "no map": (b"{}", "no 'weight_map'"),
    "a path": (b'{"weight_map": {"a": "../model.safetensors"}}', "no file beside it"),
    "no name": (b'{"weight_map": {"a": 3}}', "no file beside it"),
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


# What follows is torch.distributed.checkpoint's own metadata.


class Runs:
    """Pickles as a call that makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["whole", "beside"])
def test_metadata_runs_no_code(place, protocol, converted, canary, tmp_path):
    folder = write_dcp({"model": converted.state_dict()}, tmp_path / "in")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data["x"] = Runs(canary)
    content = metadata if place == "beside" else Runs(canary)
    (folder / ".metadata").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(InputError, match=r"names what a file may not name: .*(getattr|Path)"):
        ws.strip_sharded(folder, tmp_path / "out")
    assert not canary.exists()


def edited(folder: Path, change) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def first_chunk(metadata):
    return metadata.state_dict_metadata["model.stem.raw_weight"].chunks[0]


def infos(metadata):
    return metadata.storage_data.values()


LIES = {
    "no place": lambda m: m.storage_data.clear(),
    "elsewhere": lambda m: [
        setattr(info, "relative_path", f"../in/{info.relative_path}") for info in infos(m)
    ],
    "absent": lambda m: [setattr(info, "relative_path", "x") for info in infos(m)],
    "beyond": lambda m: [setattr(info, "offset", 10**12) for info in infos(m)],
    "negative": lambda m: [setattr(info, "offset", -1) for info in infos(m)],
    "extensions": lambda m: [setattr(info, "transform_descriptors", ["z"]) for info in infos(m)],
    "shape": lambda m: setattr(first_chunk(m), "sizes", torch.Size([1, 3, 3, 3])),
    "huge": lambda m: setattr(
        m.state_dict_metadata["model.stem.raw_weight"], "size", torch.Size([2**40, 3, 3, 3])
    ),
    "kind": lambda m: setattr(m, "state_dict_metadata", {"a": m}),
    "nothing": lambda m: setattr(m, "state_dict_metadata", {}),
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lies_is_an_input_error(lie, converted, tmp_path):
    folder = write_dcp({"model": converted.state_dict()}, tmp_path / "in")
    edited(folder, LIES[lie])
    with pytest.raises(InputError) as caught:
        ws.strip_sharded(folder, tmp_path / "out")
    assert caught.value.cure
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def packed(piece: bytes) -> bytes:
    result = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(piece)) as archive,
        zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as writer,
    ):
        for record in archive.infolist():
            writer.writestr(record.filename, archive.read(record))
    return result.getvalue()


def saved(value: object, **options: bool) -> bytes:
    result = io.BytesIO()
    torch.save(value, result, **options)
    return result.getvalue()


class TakesMemory:
    def __reduce__(self):
        return bytearray, (1 << 40,)


TRAPS = {
    "packed": (packed(saved(torch.zeros(6, 3, 3, 3))), "has a packed record"),
    "legacy": (
        saved(torch.zeros(6, 3, 3, 3), _use_new_zipfile_serialization=False),
        "damaged or cut short zip",
    ),
    "memory": (saved(TakesMemory()), "called in a way"),
    "code": (saved([Path.touch]), "names what a file may not name"),
    "no tensor": (saved({}), "holds dict where"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_piece_is_read_as_carefully_as_a_file(trap, converted, tmp_path):
    folder = write_dcp({"model": converted.state_dict()}, tmp_path / "in")
    content, message = TRAPS[trap]

    def place(metadata):
        (info,) = (
            info
            for index, info in metadata.storage_data.items()
            if index.fqn == "model.stem.raw_weight"
        )
        info.relative_path, info.offset, info.length = "trap.distcp", 0, len(content)

    (folder / "trap.distcp").write_bytes(content)
    edited(folder, place)
    with pytest.raises(InputError, match=rf"trap\.distcp.*{message}"):
        ws.strip_sharded(folder, tmp_path / "out")


def test_metadata_cut_anywhere_is_an_input_error(converted, tmp_path):
    folder = write_dcp({"model": converted.state_dict()}, tmp_path / "in")
    content = (folder / ".metadata").read_bytes()
    for length in range(0, len(content), 97):
        (folder / ".metadata").write_bytes(content[:length])
        with pytest.raises(InputError):
            read(folder)


def test_pieces_that_overlap_do_not_pass_for_a_whole_tensor(tmp_path):
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    state = {"a": torch.ones(4, 2), "b": torch.ones(2, 2)}
    folder = write_dcp(state, tmp_path / "in")

    def overlap(metadata):
        described = metadata.state_dict_metadata["a"]
        described.chunks = [
            ChunkStorageMetadata(torch.Size([start, 0]), torch.Size([2, 2])) for start in (0, 1)
        ]
        (info,) = (v for k, v in metadata.storage_data.items() if k.fqn == "b")
        for start in (0, 1):
            metadata.storage_data[MetadataIndex("a", [start, 0])] = info

    edited(folder, overlap)
    with pytest.raises(InputError, match="do not fill"):
        read(folder)


def test_one_shard_is_open_at_a_time_and_each_tensor_is_read_by_itself(
    converted, tmp_path, monkeypatch
):
    """What bounds the memory; ``benchmarks/strip_large.py`` measures it."""
    state = converted.state_dict()
    shuffled = {name: state[name] for name in sorted(state, key=lambda name: name[::-1])}
    source = write_shards(shuffled, tmp_path / "in", 5)
    opened, open_file = [], sharded._open_file

    @contextlib.contextmanager
    def watch(file, kind):
        assert not opened
        opened.append(file)
        with open_file(file, kind) as result:
            yield result
        opened.clear()

    monkeypatch.setattr(sharded, "_open_file", watch)
    ws.strip_sharded(source, tmp_path / "out.safetensors")
    assert_holds(load_file(tmp_path / "out.safetensors"), ws.strip(converted).state_dict())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", SOURCES)
def test_weights_folded_in_their_own_memory_leave_the_files(name, converted, tmp_path, monkeypatch):
    """Also where torch was told to share what it maps with the file."""
    monkeypatch.setattr(formulas, "_BLOCK", 50)
    SOURCES[name](converted.state_dict(), tmp_path / "source")
    before = contents(tmp_path / "source")
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        ws.strip_sharded(tmp_path / "source", tmp_path / "out.safetensors")
    assert contents(tmp_path / "source") == before
    assert_holds(load_file(tmp_path / "out.safetensors"), ws.strip(converted).state_dict())


@pytest.mark.parametrize("ending", ["bin", "dcp"])
def test_tied_weights_in_one_memory_are_folded_each(ending, tmp_path, monkeypatch):
    monkeypatch.setattr(formulas, "_BLOCK", 50)
    torch.manual_seed(0)
    first, second = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)
    second.weight = first.weight
    tied = ws.convert(torch.nn.ModuleList([first, second]), config={"linear": "lwe+mwe"})
    state = tied.state_dict()
    assert state["0.raw_weight"].data_ptr() == state["1.raw_weight"].data_ptr()
    folder = tmp_path / "in"
    source = write_dcp(state, folder) if ending == "dcp" else write_shards(state, folder, 1, "bin")
    ws.strip_sharded(source, tmp_path / "out.safetensors")
    assert_holds(load_file(tmp_path / "out.safetensors"), ws.strip(tied).state_dict())


MEASURED = """
import sys
from pathlib import Path
import torch
import we_surgery as ws

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(1)
# Code of torch that the first fold and the first read load is no part of what a shard costs.
ws.strip_sharded(sys.argv[1], sys.argv[1] + ".small")
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
ws.strip_sharded(sys.argv[2], sys.argv[2] + ".out")
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="it measures on Linux")
@pytest.mark.parametrize("layout", ["safetensors", "bin", "dcp"])
def test_a_shard_of_one_tensor_takes_less_than_twice_its_size(layout, tmp_path):
    """81 MiB; ``benchmarks/strip_large.py`` measures more and larger ones."""
    for name, width in (("small", 64), ("large", 1536)):
        layer = ws.convert(torch.nn.Conv2d(width, width, 3), "lwe+mwe")
        state, folder = layer.state_dict(), tmp_path / name
        if layout == "dcp":
            write_dcp(state, folder)
        else:
            write_shards(state, folder, len(state), layout)
    largest = max(path.stat().st_size for path in (tmp_path / "large").iterdir())
    assert largest >= 81 * 2**20
    places = [str(tmp_path / name) for name in ("small", "large")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *places], capture_output=True, text=True, check=True
    )
    assert 81 * 2**20 <= int(done.stdout) < 1.5 * largest
