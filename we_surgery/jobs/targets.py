"""Where a job's result goes, and of which kind it is."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from we_surgery import checkpoint
from we_surgery.checkpoint import Metadata
from we_surgery.errors import InputError

KINDS = ("module", "state_dict", "safetensors")
"""What can be asked for; a folder of shards comes of an input that is one."""

_SLASHES = tuple(filter(None, (os.sep, os.altsep)))
_TORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".tar")


@dataclass(frozen=True)
class Target:
    """A file or folder to write, of one of :data:`KINDS` or ``sharded`` for a folder."""

    path: Path
    kind: str

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of shards."""
        return self.kind == "sharded"

    def marked(self, mark: str) -> Target:
        """The same with a word before its endings: ``model.pt`` -> ``model.ema.pt``."""
        folder, stem, ending = _split(self.path, is_folder=self.is_folder)
        return replace(self, path=folder / f"{stem}{mark}{ending}")

    def check(self, *, force: bool) -> None:
        """Raises if it cannot be written, as :func:`~we_surgery.checkpoint.check_target`."""
        checkpoint.check_target(self.path, force=force, folder=self.is_folder)

    def stage(self, stage: checkpoint.Staging, *, force: bool, like: Path | None) -> Path:
        """A name to write to first, as :meth:`~we_surgery.checkpoint.Staging.add`."""
        return stage.add(self.path, force=force, folder=self.is_folder, like=like)

    def save(self, temporary: Path, model: nn.Module, metadata: Metadata | None = None) -> None:
        """Writes the model, or its state dict, to a staged name."""
        content = model if self.kind == "module" else model.state_dict()
        checkpoint.write_to(content, temporary, self.kind, metadata)


def check_extension(output: str | Path | None, to: str | None) -> None:
    """Raises if the two contradict each other, before anything is read."""
    if output is None:
        return
    if not os.fspath(output):
        raise InputError("the output has no name", "Give one (-o FILE).")
    if to is not None and (_ending(Path(output)) == ".safetensors") != (to == "safetensors"):
        raise InputError(
            f"the output {output} does not fit --to {to}",
            "Drop --to, or give a file that ends in .safetensors for safetensors alone.",
        )


def choose_target(
    source: str,
    kind: str,
    output: str | Path | None,
    to: str | None,
    mark: str,
    *,
    keep_shards: bool = False,
) -> Target:
    """The file to write: same kind in, same kind out, unless ``output`` or ``to`` say else.

    By default it lies beside the source, with ``mark`` before its ending. An output that ends in a
    slash is a folder. With ``keep_shards`` an input of several files gives a folder of several, and
    otherwise one file of safetensors.
    """
    names_folder = isinstance(output, str) and output.endswith(_SLASHES)
    output = None if output is None else Path(output)
    ending = "" if output is None else _ending(output)
    is_sharded = kind in ("sharded", "dcp")
    if to is not None:
        kind = to
    elif ending == ".safetensors":
        kind = "safetensors"
    elif is_sharded and ending in _TORCH_ENDINGS:
        kind = "state_dict"
    elif is_sharded:
        kind = "sharded" if keep_shards else "safetensors"
    elif output is not None and kind == "safetensors":
        kind = "state_dict"
    elif kind == "architecture":
        kind = "module"
    if names_folder and kind != "sharded":
        raise InputError(
            f'the output ends in "/", but {source} yields a single file',
            "Give the file's name (-o FILE).",
        )
    if output is None:
        output = (_beside_folder if is_sharded else _beside)(source, kind, mark)
    return Target(output, kind)


def _beside(source: str, kind: str, mark: str) -> Path:
    """``dir/model.pt`` -> ``dir/model.we.pt``; ``torchvision:resnet50`` -> ``resnet50.we.pt``."""
    if checkpoint.looks_like_architecture(source):
        folder, stem, ending = Path(), source.rpartition(":")[2].replace("/", "_"), ".pt"
    else:
        path = Path(source)
        is_folder = path.is_dir()
        folder, stem, ending = _split(_named(path) if is_folder else path, is_folder=is_folder)
    if kind == "safetensors":
        ending = ".safetensors"
    elif ending.lower() in ("", ".safetensors"):
        ending = ".pt"
    return folder / f"{stem.removesuffix('.we')}{mark}{ending}"


def _beside_folder(source: str, kind: str, mark: str) -> Path:
    """``dir`` and ``dir/model.safetensors.index.json`` -> ``dir.stripped``."""
    folder = _named(Path(source) if Path(source).is_dir() else Path(source).parent)
    ending = {"sharded": "", "safetensors": ".safetensors"}.get(kind, ".pt")
    return folder.with_name(f"{folder.name.removesuffix('.we')}{mark}{ending}")


def _named(folder: Path) -> Path:
    """``.`` and ``..`` have a name only once they are resolved."""
    return folder.resolve() if folder.name in ("", "..") else folder


def _ending(path: Path) -> str:
    return path.suffix.lower()


def _split(path: Path, *, is_folder: bool) -> tuple[Path, str, str]:
    """Folder, stem and ending; ``last.pth.tar`` has a double one, and a folder none."""
    stem, ending = path.stem, path.suffix
    if is_folder:
        return path.parent, path.name, ""
    if ending.lower() == ".tar" and _ending(Path(stem)) in (".pth", ".pt"):
        stem, ending = Path(stem).stem, Path(stem).suffix + ending
    return path.parent, stem, ending
