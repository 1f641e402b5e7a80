"""Tensors in files, read one by one: a safetensors file, shards with an index, or a DCP folder.

May import: ``metadata`` and ``safe_pickle`` of this room, and the rooms below. To add a
layout, write a :class:`~we_surgery.checkpoint.shards.files.TensorFiles` and name it in
:func:`open_files`.
"""

from __future__ import annotations

from pathlib import Path

from we_surgery.checkpoint.safe_pickle.recognize import FileKind, recognize
from we_surgery.checkpoint.shards.dcp import DistributedCheckpoint
from we_surgery.checkpoint.shards.files import TensorFiles
from we_surgery.checkpoint.shards.indexed import INDEX_ENDING, IndexedShards, SafetensorsFile
from we_surgery.errors import InputError, quoted

# The files of weights in a folder, in the order in which transformers and accelerate look for them.
_IN_FOLDERS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def open_files(path: Path) -> TensorFiles | FileKind:
    """The tensors that a path means; for a file of torch.save only its kind."""
    if _is_folder(path):
        return DistributedCheckpoint(path)
    if path.name.endswith(INDEX_ENDING):
        return IndexedShards(path)
    kind = recognize(path)
    return SafetensorsFile(path) if kind is FileKind.SAFETENSORS else kind


def resolve(path: Path) -> Path:
    """A file as it is; of a folder the weights in it, or itself if it is one checkpoint."""
    if not _is_folder(path) or (path / ".metadata").is_file():
        return path
    usual = [path / name for name in _IN_FOLDERS if (path / name).is_file()]
    indices = list(path.glob(f"*{INDEX_ENDING}"))
    found = next(iter(usual or (indices if len(indices) == 1 else [])), None)
    if found is None:
        if (path / "saved_model.pb").is_file():
            raise InputError(
                f"{path} is a TensorFlow SavedModel",
                "Put its weights into a PyTorch model, and save that model's state dict.",
            )
        names = sorted(file.name for file in path.iterdir())
        raise InputError(
            f"{path} is a folder without weights under a usual name: it holds {quoted(names)}",
            "Give a file in it, or a folder of torch.distributed.checkpoint, transformers or "
            "accelerate.",
        )
    return found


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        return False
