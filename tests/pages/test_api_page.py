"""docs/api.md has every name that is exported, and none that is not."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

import we_surgery
from we_surgery import analysis, api

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (`.*`) \| (.+) \|$", PAGE, re.M)
NAMES = [name for cell, _ in ROWS for name in re.findall(r"`([^`]+)`", cell)]
SUBMODULES = ("lightning", "pytorch_lightning", "transformers")


def exported(module: ModuleType) -> set[str]:
    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    return set(re.findall(r"import \(?\s*\w+ as ([A-Za-z]\w*)", source))


@pytest.mark.parametrize(("module", "prefix"), [(api, "ws"), (analysis, "analysis")])
def test_each_exported_name_has_a_row_and_each_row_is_exported(
    module: ModuleType, prefix: str
) -> None:
    named = [name.partition(".")[2] for name in NAMES if name.startswith(f"{prefix}.")]
    assert sorted(named) == sorted(exported(module))


def test_the_reading_of_exports_finds_those_over_several_lines() -> None:
    assert "normalization_free_variants" in exported(analysis)
    assert exported(api) == {name for name in vars(api) if not name.startswith("_")}


def test_the_package_has_the_names_of_its_list() -> None:
    assert set(we_surgery.__all__) == exported(api)
    for name in we_surgery.__all__:
        assert getattr(we_surgery, name) is getattr(api, name)
    # A module of the same name would take its place once it is imported.
    package = Path(we_surgery.__file__).parent
    assert not {path.stem for path in package.iterdir()} & set(we_surgery.__all__)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("we_surgery.")])
def test_each_name_of_a_submodule_exists(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    if module.startswith("we_surgery.training."):
        pytest.importorskip(module.rpartition(".")[2])
    assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("submodule", [*(f"training.{name}" for name in SUBMODULES), "fx"])
def test_each_public_class_of_a_submodule_has_a_row(submodule: str) -> None:
    module = Path(we_surgery.__file__).parent.joinpath(*submodule.split(".")).with_suffix(".py")
    classes = re.findall(r"^class ([A-Z]\w*)", module.read_text(encoding="utf-8"), re.M)
    missing = {f"we_surgery.{submodule}.{name}" for name in classes} - set(NAMES)
    # It is documented once.
    assert missing <= {"we_surgery.training.pytorch_lightning.StrippingCheckpointIO"}


def test_every_row_is_read() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(lines) == len(ROWS)
    assert all(name.split(".")[0] in ("ws", "analysis", "we_surgery") for name in NAMES)
