"""Folders of torch.distributed.checkpoint with metadata and pieces that nobody saved."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from sharded_files import write_dcp

import we_surgery as ws
from we_surgery.checkpoint import read
from we_surgery.errors import InputError


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
    with pytest.raises(InputError, match=r"is refused: it refers to .*(getattr|Path)"):
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
    "packed": (packed(saved(torch.zeros(6, 3, 3, 3))), "has a compressed record"),
    "legacy": (
        saved(torch.zeros(6, 3, 3, 3), _use_new_zipfile_serialization=False),
        "damaged or cut short zip",
    ),
    "memory": (saved(TakesMemory()), "called in a way"),
    "code": (saved([Path.touch]), "is refused: it refers to"),
    "no tensor": (saved({}), "is <class 'dict'>, but"),
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
        _ = read(folder).state_dict
