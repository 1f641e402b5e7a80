"""State dicts in several files, read tensor by tensor.

Two layouts: an index of shards (:mod:`we_surgery.checkpoint.indexed_shards`) and a folder of
torch.distributed.checkpoint (:mod:`we_surgery.checkpoint.dcp`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from we_surgery.checkpoint.unwrap import Weights, unwrap
from we_surgery.errors import InputError

SAVE_AGAIN = "Save or fetch all of it again."
"""The cure for files that do not fit together."""

Load = Callable[[str], Tensor]


class ShardedFiles(ABC):
    """Tensors that lie in several files, known by shape and dtype before any is read.

    Attributes:
        path: the index or the folder.
        tensors: each tensor by its name in the files, on the meta device.
        shards: the names in groups that are read together, each at most as large as the
            largest file.
        notes: what in the files is left out, as sentences.
    """

    kind: ClassVar[str]
    path: Path
    tensors: dict[str, Tensor]
    shards: list[list[str]]
    notes: Sequence[str] = ()

    def checkpoint(self) -> Mapping[str, Any]:
        """What was saved, with tensors of the meta device; wrappers and all."""
        return self.tensors

    @abstractmethod
    @contextmanager
    def open(self, shard: int) -> Iterator[Load]:
        """Reads tensors of one shard by name, each once.

        They may be overwritten, and be used until it closes: one may be a view of the file, mapped
        so that what is written to it stays in memory.

        Raises:
            InputError: a file is missing, damaged, or does not hold what the index says.
        """

    def state_dict(
        self, key: str | None = None, weights: Weights | None = None
    ) -> ShardedStateDict:
        """The state dict in the files, without wrappers, with vanilla names.

        Args:
            key: as in :func:`~we_surgery.checkpoint.unwrap.unwrap`.
            weights: as there.

        Raises:
            InputError: there is none, or several and no ``key``.
        """
        try:
            state, notes = unwrap(self.checkpoint(), key, weights)
        except InputError as error:
            raise InputError(f"{self.path}: {error.cause}", error.cure) from error
        stored_as = {id(tensor): name for name, tensor in self.tensors.items()}
        stored = {}
        for name, tensor in state.items():
            # One in another shape than it is stored in is a view of that tensor.
            base = tensor if tensor._base is None else tensor._base
            if base.is_meta:
                stored[name] = stored_as[id(base)]
        return ShardedStateDict(self, state, stored, [*self.notes, *notes])


@dataclass(frozen=True)
class ShardedStateDict:
    """A state dict whose tensors are still in their files.

    Attributes:
        files: where they are.
        tensors: of the meta device, but for constants that are in no file.
        stored: the names in the files by the names here.
        notes: what was chosen and dropped, as sentences.
    """

    files: ShardedFiles
    tensors: dict[str, Tensor]
    stored: dict[str, str]
    notes: list[str]

    def shard_of(self) -> dict[str, int]:
        """The number of the shard that holds each tensor, by name."""
        shard_of = {key: i for i, keys in enumerate(self.files.shards) for key in keys}
        return {name: shard_of[key] for name, key in self.stored.items()}

    @contextmanager
    def open(self, shard: int) -> Iterator[Load]:
        """As :meth:`ShardedFiles.open`, by the names here; checked against the index."""
        with self.files.open(shard) as load_stored:

            def load(name: str) -> Tensor:
                expected = self.tensors[name]
                stored = self.files.tensors[self.stored[name]]
                tensor = load_stored(self.stored[name])
                if (tensor.shape, tensor.dtype) != (stored.shape, stored.dtype):
                    raise InputError(
                        f"{self.files.path} says that {name!r} is {_form(stored)}, and the file "
                        f"has {_form(tensor)}",
                        SAVE_AGAIN,
                    )
                # Sparse tensors know no reshape.
                return tensor if tensor.shape == expected.shape else tensor.reshape(expected.shape)

            yield load

    def load(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """The state dict with the wanted tensors in memory; by default all."""
        loaded = dict(self.tensors)
        by_shard: dict[int, list[str]] = {}
        for name, shard in self.shard_of().items():
            if wanted(name):
                by_shard.setdefault(shard, []).append(name)
        for shard, names in by_shard.items():
            with self.open(shard) as load:
                loaded |= {name: load(name).clone() for name in names}
        return loaded


def check_file_name(path: Path, name: object) -> str:
    """The name, if it is that of a file beside or in ``path``.

    Raises:
        InputError: it leads elsewhere.
    """
    if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name:
        raise InputError(f"{path} names a shard {name!r}, which is no file beside it", SAVE_AGAIN)
    return name


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
