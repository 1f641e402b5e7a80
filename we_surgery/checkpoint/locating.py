"""Which files a path means: one, an index and its shards, or a folder."""

from __future__ import annotations

from pathlib import Path

from we_surgery.checkpoint.dcp import DistributedCheckpoint
from we_surgery.checkpoint.indexed_shards import INDEX_ENDING, IndexedShards
from we_surgery.checkpoint.sharded import ShardedFiles
from we_surgery.checkpoint.wording import quoted
from we_surgery.errors import InputError

# What a folder of weights holds, in the order transformers and accelerate look for it.
_IN_FOLDERS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def open_sharded(source: str | Path) -> ShardedFiles | None:
    """The files of a sharded state dict; None where ``source`` is a single file or none.

    Raises:
        InputError: an index or a file of it is missing or damaged.
    """
    path = Path(source)
    if not _is_folder(path) and not path.name.endswith(INDEX_ENDING):
        return None
    path = resolve(path)
    if _is_folder(path):
        return DistributedCheckpoint(path)
    return IndexedShards(path) if path.name.endswith(INDEX_ENDING) else None


def resolve(path: Path) -> Path:
    """A file as it is; of a folder the weights in it, or itself if it is one checkpoint.

    Raises:
        InputError: the folder holds no weights under a usual name.
    """
    if not _is_folder(path):
        return path
    if (path / ".metadata").is_file():
        return path
    usual = [path / name for name in _IN_FOLDERS if (path / name).is_file()]
    indices = list(path.glob(f"*{INDEX_ENDING}"))
    found = next(iter(usual or (indices if len(indices) == 1 else [])), None)
    if found is None:
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
