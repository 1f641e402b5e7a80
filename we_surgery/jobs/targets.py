"""Where a job's result is written, and its kind."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from we_surgery import checkpoint
from we_surgery.checkpoint import Contents, Metadata, ModelFolder
from we_surgery.errors import InputError

_SLASHES = tuple(filter(None, (os.sep, os.altsep)))
_SAFETENSORS = ".safetensors"
_FOLDER_ENDINGS = {"sharded": "", "safetensors": _SAFETENSORS}
_TORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".tar")


@dataclass(frozen=True)
class Target:
    """A file or folder to write, of a kind that ``--to`` takes or ``sharded`` for several files.

    With ``copied`` it is a folder of the weights and the other files of that one.
    """

    path: Path
    kind: str
    copied: ModelFolder | None = None

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.kind == "sharded" or self.copied is not None

    @property
    def notes(self) -> list[str]:
        """What is not copied, as a sentence."""
        return [] if self.copied is None else self.copied.notes

    def marked(self, mark: str) -> Target:
        """The same with a word before its endings: ``model.pt`` -> ``model.ema.pt``."""
        folder, stem, ending = _split(self.path, is_folder=self.is_folder)
        return replace(self, path=folder / f"{stem}{mark}{ending}")

    def check(self, *, force: bool) -> None:
        """Raises if it cannot be written; see :func:`~we_surgery.checkpoint.check_target`."""
        checkpoint.check_target(self.path, force=force, folder=self.is_folder, others=self._others)

    def stage(self, stage: checkpoint.Staging, *, force: bool, like: Path | None) -> Path:
        """A name to write the weights to first, as :meth:`~we_surgery.checkpoint.Staging.add`."""
        staged = stage.add(
            self.path, force=force, folder=self.is_folder, others=self._others, like=like
        )
        if self.copied is None:
            return staged
        self.copied.copy_others(staged)
        return staged if self.kind == "sharded" else staged / self._weights_name

    def staged_files(self, weights: Path) -> list[tuple[Path, Path]]:
        """Each file that :meth:`stage` made, by its final name."""
        is_inside = self.copied is not None and self.kind != "sharded"
        staged = weights.parent if is_inside else weights
        files = sorted(staged.rglob("*")) if self.is_folder else [staged]
        return [(f, self.path / f.relative_to(staged)) for f in files if f.is_file()]

    @property
    def _others(self) -> list[str]:
        """The files of the folder beside shards."""
        if self.copied is None:
            return []
        return [*self.copied.others, self._weights_name]

    @property
    def _weights_name(self) -> str:
        assert self.copied is not None
        is_torch = self.kind == "state_dict"
        return self.copied.weights.name if is_torch else "model.safetensors"

    def save(self, temporary: Path, model: nn.Module, metadata: Metadata | None = None) -> None:
        """Writes the model, or its state dict, to a staged name."""
        content = model if self.kind == "module" else model.state_dict()
        checkpoint.write_to(content, temporary, self.kind, metadata)


def check_extension(output: str | Path | None, to: str | None) -> None:
    """Raises if the two contradict each other, before anything is read."""
    if output is None:
        return
    if not os.fspath(output):
        raise InputError("the output is an empty name", "Give a file (-o FILE).")
    if to is not None and (_ending(Path(output)) == _SAFETENSORS) != (to == "safetensors"):
        raise InputError(
            f"the output {output} does not fit --to {to}",
            "Leave out --to. Only with --to safetensors may the output end in .safetensors.",
        )


def choose_target(
    source: str,
    contents: Contents,
    output: str | Path | None,
    to: str | None,
    mark: str,
    *,
    keep_shards: bool = False,
) -> Target:
    """The file to write: same kind in, same kind out, unless ``output`` or ``to`` say else.

    By default it lies beside the source, with ``mark`` before its ending. An output that ends in a
    slash is a folder. Several files give several with ``keep_shards``, else one of safetensors.
    """
    kind = contents.kind
    names_folder = isinstance(output, str) and output.endswith(_SLASHES)
    output = None if output is None else Path(output)
    ending = "" if output is None else _ending(output)
    is_sharded = kind in ("sharded", "dcp")
    copied = None
    if to is None and ending not in (_SAFETENSORS, *_TORCH_ENDINGS):
        copied = _folder_of(source, contents)
    if to is not None:
        kind = to
    elif ending == _SAFETENSORS:
        kind = "safetensors"
    elif is_sharded and ending in _TORCH_ENDINGS:
        kind = "state_dict"
    elif is_sharded:
        kind = "sharded" if keep_shards else "safetensors"
    elif output is not None and kind == "safetensors" and copied is None:
        kind = "state_dict"
    elif kind == "architecture":
        kind = "module"
    if names_folder and kind != "sharded" and copied is None:
        raise InputError(
            f'the output ends in "/", but {source} yields a single file',
            "Give the file's name (-o FILE).",
        )
    if output is None:
        is_folder = is_sharded or copied is not None
        ending = "" if copied is not None else _FOLDER_ENDINGS.get(kind, ".pt")
        output = _beside_folder(source, ending, mark) if is_folder else _beside(source, kind, mark)
    if copied is not None and _is_within(output, copied.path):
        raise InputError(
            f"the output {output} lies inside the input folder", "Give a folder outside of it."
        )
    return Target(output, kind, copied)


def _folder_of(source: str, contents: Contents) -> ModelFolder | None:
    """The given folder, unless it is itself a checkpoint."""
    if contents.path in (None, Path(source)) or contents.model is not None:
        return None
    assert contents.path is not None
    return ModelFolder(Path(source), contents.path)


def _is_within(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def _beside(source: str, kind: str, mark: str) -> Path:
    """``dir/model.pt`` -> ``dir/model.we.pt``; ``torchvision:resnet50`` -> ``resnet50.we.pt``."""
    if checkpoint.looks_like_architecture(source):
        folder, stem, ending = Path(), Path(source.partition(":")[2]).name, ".pt"
    else:
        path = Path(source)
        is_folder = path.is_dir()
        folder, stem, ending = _split(_named(path) if is_folder else path, is_folder=is_folder)
    if kind == "safetensors":
        ending = _SAFETENSORS
    elif ending.lower() in ("", _SAFETENSORS):
        ending = ".pt"
    return folder / f"{stem.removesuffix('.we')}{mark}{ending}"


def _beside_folder(source: str, ending: str, mark: str) -> Path:
    """``dir`` and ``dir/model.safetensors.index.json`` -> ``dir.stripped``."""
    folder = _named(Path(source) if Path(source).is_dir() else Path(source).parent)
    return folder.with_name(f"{folder.name.removesuffix('.we')}{mark}{ending}")


def _named(folder: Path) -> Path:
    """Resolves ``.`` and ``..``, which have no name."""
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
