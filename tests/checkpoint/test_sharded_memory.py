"""What stripping several files has in memory at a time, and whose memory it writes to."""

import contextlib
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sharded_files import SOURCES, assert_holds, write_dcp, write_shards

import we_surgery as ws
from we_surgery.checkpoint.shards import indexed
from we_surgery.excitations.compute import formulas


def test_one_shard_is_open_at_a_time_and_each_tensor_is_read_by_itself(
    converted, tmp_path, monkeypatch
):
    """What bounds the memory; ``benchmarks/strip_large.py`` measures it."""
    state = converted.state_dict()
    shuffled = {name: state[name] for name in sorted(state, key=lambda name: name[::-1])}
    source = write_shards(shuffled, tmp_path / "in", 5)
    opened, open_file = [], indexed._open_file

    @contextlib.contextmanager
    def watch(file, kind):
        assert not opened
        opened.append(file)
        with open_file(file, kind) as result:
            yield result
        opened.clear()

    monkeypatch.setattr(indexed, "_open_file", watch)
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


@pytest.mark.parametrize(
    "raw",
    [
        lambda: torch.randn(7 * 32 + 32).as_strided((32, 32), (7, 1)),
        lambda: torch.randn(32, 1).expand(32, 32),
        lambda: torch.randn(32, 32).t(),
        lambda: torch.randn(32, 40)[:, :32],
    ],
    ids=["overlapping", "expanded", "transposed", "a part"],
)
def test_a_weight_whose_values_share_memory_folds_as_from_one_file(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(formulas, "_BLOCK", 50)
    state = ws.convert(torch.nn.Sequential(torch.nn.Linear(32, 32)), "mwe").state_dict()
    state["0.raw_weight"] = raw()
    source = write_shards(state, tmp_path / "in", 1, "bin")
    ws.strip_sharded(source, tmp_path / "out.safetensors")
    assert_holds(load_file(tmp_path / "out.safetensors"), ws.strip_state_dict(state))


MEASURED = """
import sys
from pathlib import Path
import torch
import we_surgery as ws

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    # Code of torch that the first fold and the first read load is no part of what a shard costs.
    ws.strip_sharded(folder + "/small", folder + "/small.out")
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    ws.strip_sharded(folder + "/large", folder + "/large.out")
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="it measures on Linux")
def test_a_shard_of_one_tensor_takes_less_than_twice_its_size(tmp_path):
    """36 MiB; ``benchmarks/strip_large.py`` measures more and larger ones."""
    layouts = ("safetensors", "bin", "dcp")
    for name, width in (("small", 64), ("large", 1024)):
        state = ws.convert(torch.nn.Conv2d(width, width, 3), "lwe+mwe").state_dict()
        for layout in layouts:
            (tmp_path / layout).mkdir(exist_ok=True)
            if layout == "dcp":
                write_dcp(state, tmp_path / layout / name)
            else:
                write_shards(state, tmp_path / layout / name, len(state), layout)
    places = [str(tmp_path / layout) for layout in layouts]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *places], capture_output=True, text=True, check=True
    )
    for place, peak in zip(places, map(int, done.stdout.split()), strict=True):
        largest = max(path.stat().st_size for path in Path(place, "large").iterdir())
        assert largest >= 36 * 2**20
        assert 36 * 2**20 <= peak < 1.5 * largest, place
