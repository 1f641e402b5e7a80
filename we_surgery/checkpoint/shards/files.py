"""State dicts in files, read tensor by tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from we_surgery.checkpoint.metadata import Metadata
from we_surgery.errors import damaged
from we_surgery.excitations.names import EXCITATION

Load = Callable[[str], Tensor]


class TensorFiles(ABC):
    """Tensors in one or several files, known by shape and dtype before any is read.

    ``tensors`` are on the meta device, by their names in the files; ``shards`` are groups of names
    that are read together, each at most as large as the largest file; ``notes`` say what is
    ignored.
    """

    kind: ClassVar[str]
    path: Path
    tensors: dict[str, Tensor]
    shards: list[list[str]]
    notes: Sequence[str] = ()
    metadata: Metadata | None = None

    def checkpoint(self, objects: Collection[str] = ()) -> Mapping[str, Any]:
        """The saved mapping with its wrappers, tensors on the meta device.

        Other objects are read only if their last key is among ``objects``.
        """
        return self.tensors

    @abstractmethod
    @contextmanager
    def open(self, shard: int) -> Iterator[Load]:
        """Reads tensors of one shard by name, each once.

        They are valid until the context ends, and may be overwritten: a mapped one's file does not
        change.
        """

    def located(self, state: dict[str, Tensor], notes: Sequence[str]) -> StateDict:
        """A state dict that was found in :meth:`checkpoint`, and where its values are."""
        stored_as = {id(tensor): name for name, tensor in self.tensors.items()}
        stored = {}
        for name, tensor in state.items():
            # A tensor whose shape differs from the stored one is a view of it.
            base = tensor if tensor._base is None else tensor._base
            if base.is_meta:
                stored[name] = stored_as[id(base)]
        return StateDict(state, [*self.notes, *notes], self, stored)


@dataclass(frozen=True)
class StateDict:
    """A state dict in memory, or with tensors on the meta device that are still in their files.

    ``stored`` has the names in the files, by the names here.
    """

    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    files: TensorFiles | None = None
    stored: Mapping[str, str] = field(default_factory=dict)

    def shard_of(self) -> dict[str, int]:
        """The number of the shard that holds each tensor, by name; 0 for what is in memory."""
        if self.files is None:
            return dict.fromkeys(self.tensors, 0)
        shard_of = {key: i for i, keys in enumerate(self.files.shards) for key in keys}
        return {name: shard_of[key] for name, key in self.stored.items()}

    @contextmanager
    def open(self, shard: int) -> Iterator[Load]:
        """As :meth:`TensorFiles.open`, by the names here; checked against the index."""
        files = self.files
        if files is None:
            yield self.tensors.__getitem__
            return
        with files.open(shard) as load_stored:

            def load(name: str) -> Tensor:
                expected = self.tensors[name]
                stored = files.tensors[self.stored[name]]
                tensor = load_stored(self.stored[name])
                if (tensor.shape, tensor.dtype) != (stored.shape, stored.dtype):
                    raise damaged(
                        f"{files.path} says that {name!r} is {_form(stored)}, but the file "
                        f"has {_form(tensor)}"
                    )
                # Sparse tensors have no reshape.
                return tensor if tensor.shape == expected.shape else tensor.reshape(expected.shape)

            yield load

    def with_excitations(self) -> dict[str, Tensor]:
        """The state dict with the excitations in memory, which are small, and records readable."""
        return self.load(lambda name: f"{EXCITATION}." in name)

    def load(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """The state dict with the wanted tensors in memory; by default all."""
        if self.files is None:
            return self.tensors
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
    """The name, if it is that of a file beside or in ``path``."""
    if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name:
        raise damaged(
            f"{path} refers to a shard {name!r}, which is not the name of a file beside it"
        )
    return name


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
