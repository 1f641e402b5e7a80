"""A converted model, and archives around pickles that torch.save would never write."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import EVERYTHING, ConvNet

import we_surgery as ws


@pytest.fixture
def converted() -> torch.nn.Module:
    """A toy with weights excited in every way there is."""
    torch.manual_seed(0)
    return ws.convert(ConvNet(), config=EVERYTHING)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that exists only after a payload has run."""
    return tmp_path / "canary"


@pytest.fixture
def write_archive(tmp_path: Path) -> Callable[..., Path]:
    """Writes pickle bytes as the object of a torch.save archive."""

    def write(content: bytes, name: str = "doctored.pt") -> Path:
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/version", "3\n")
        return path

    return write


class Calls:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.fixture
def calls() -> type[Calls]:
    return Calls
