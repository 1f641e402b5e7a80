"""The progress of a long run on disk, so that it can be stopped and resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from we_surgery.converted.proof import bits_of
from we_surgery.errors import InputError

_SCHEMA = 2


class ProgressFile:
    """A file of JSON lines: the job, then one line per result.

    A run that was killed while writing loses its last, incomplete line. A file of another job is
    refused. Without a path, results stay in memory.
    """

    def __init__(self, path: str | Path | None, job: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self._results: dict[str, Any] = {}
        # Written with the first result: a run that fails at once leaves no file.
        self._header = {"we_surgery_progress": _SCHEMA, **json.loads(json.dumps(job))}
        self._is_begun = False
        if self.path is not None:
            try:
                self._is_begun = self._resume(self.path)
            except OSError as error:
                raise InputError(
                    f"the progress file {path} cannot be used: {error}",
                    "Name another file, or make its folder writable.",
                ) from error

    def _resume(self, path: Path) -> bool:
        """Reads the results of an earlier run; returns whether there is one."""
        content = path.read_bytes() if path.exists() else b""
        if not content:
            return False
        whole = content[: content.rfind(b"\n") + 1]
        try:
            found, *lines = [json.loads(line) for line in whole.splitlines()]
            differences = [key for key in self._header if found.get(key) != self._header[key]]
            self._results = dict(lines)
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is not a progress file: {error}", "Name another file, or remove this one."
            ) from error
        if differences:
            raise InputError(
                f"{path} belongs to another analysis: {', '.join(differences)} differ",
                "Finish that analysis, use another file, or remove this one.",
            )
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        return True

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __getitem__(self, key: str) -> Any:
        return self._results[key]

    def add(self, key: str, value: Any) -> None:
        """Keeps a result, in JSON types."""
        self._results[key] = value
        if self.path is not None:
            with self.path.open("a") as file:
                if not self._is_begun:
                    file.write(json.dumps(self._header) + "\n")
                    self._is_begun = True
                file.write(json.dumps([key, value]) + "\n")

    def remove(self) -> None:
        """Deletes the file: the run is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def fingerprint_of_model(model: nn.Module) -> str:
    """Equal for models of the same tensors: SHA-256 over the state dict's names and bytes."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(fingerprint(value).encode())
    return digest.hexdigest()


def fingerprint(*values: Any) -> str:
    """SHA-256 over the shapes, dtypes and bytes of tensors in any nesting, and the rest's text."""
    digest = hashlib.sha256()
    for leaf in torch.utils._pytree.tree_leaves(values):
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            if leaf.layout != torch.strided:
                digest.update(str(leaf.layout).encode())
            for bits in bits_of(leaf):
                digest.update(bits.cpu().numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
