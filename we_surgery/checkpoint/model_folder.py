"""A folder of weights and what belongs to them, as transformers, accelerate and timm write it."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from we_surgery.checkpoint.shards.indexed import INDEX_ENDING
from we_surgery.errors import quoted

# Weights in another format beside those that are read would be taken for the same ones.
_WEIGHTS = re.compile(
    r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)(" + re.escape(INDEX_ENDING) + ")?"
)
_OPTIMIZER = "optimizer"  # .pt, .bin, _1.bin, or a folder of shards


@dataclass(frozen=True)
class ModelFolder:
    """A folder, and the file or index of the weights in it that are read."""

    path: Path
    weights: Path

    @property
    def others(self) -> list[str]:
        """The files that are copied, relative to the folder."""
        return self._listed[0]

    @property
    def notes(self) -> list[str]:
        """What is not copied, as a sentence."""
        left_out = self._listed[1]
        if not left_out:
            return []
        return [
            f"did not copy {quoted(left_out)}: other weights, the state of an optimizer, hidden "
            "folders and links to folders stay behind"
        ]

    def copy_others(self, target: Path) -> None:
        """Copies everything but the weights, with permissions; a link becomes a file."""
        for name in self.others:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.path / name, target / name)

    @cached_property
    def _listed(self) -> tuple[list[str], list[str]]:
        copied: list[str] = []
        left_out: list[str] = []
        replaced = self._replaced()

        def look(folder: Path, prefix: str) -> None:
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                name = prefix + entry.name
                is_folder = entry.is_dir(follow_symlinks=False)
                if name in replaced:
                    continue
                if (
                    _WEIGHTS.fullmatch(name)
                    or name.startswith(_OPTIMIZER)
                    or (is_folder and entry.name.startswith("."))
                ):
                    left_out.append(name)
                elif is_folder:
                    look(folder / entry.name, f"{name}/")
                else:
                    (copied if entry.is_file() else left_out).append(name)

        look(self.path, "")
        return copied, left_out

    def _replaced(self) -> set[str]:
        names = {self.weights.name}
        if self.weights.name.endswith(INDEX_ENDING):
            names |= set(json.loads(self.weights.read_bytes())["weight_map"].values())
        return names
