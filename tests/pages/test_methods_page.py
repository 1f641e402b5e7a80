"""docs/methods.md says what the registries and the configs hold."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from we_surgery.jobs.methods import family

ROOT = Path(__file__).parents[2]
ROWS = [
    row
    for section in yaml.safe_load((ROOT / "docs" / "methods.yaml").read_text(encoding="utf-8"))
    for row in section["rows"]
]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods", ROOT / "benchmarks" / "methods.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_page_is_up_to_date(generator: ModuleType) -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page == generator.page() + "\n", "run `python benchmarks/methods.py`"


def test_each_method_and_each_config_has_a_row() -> None:
    text = (ROOT / "docs" / "methods.yaml").read_text(encoding="utf-8")
    texts = [
        text,
        *(path.read_text(encoding="utf-8") for path in ROOT.glob("configs/*.yaml")),
    ]
    names = [method.name for method in family() if method.kind != "mode"]
    assert [name for name in names if not any(name in text for text in texts)] == []
    configs = {path.name for path in ROOT.glob("configs/*.yaml")}
    of_modes = {"lwe.yaml", "we.yaml", "lwe+mwe.yaml", "thesis.yaml"}
    rows = {row["config"] for row in ROWS if isinstance(row.get("config"), str)}
    assert configs - of_modes - rows == set()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["system"])
def test_each_row_says_where_it_is_from_what_gives_it_and_what_was_found(
    row: dict[str, object],
) -> None:
    assert row["source"]
    assert row["published"]
    assert ("config" in row) != ("instead" in row)
    assert "planned" not in str(row)
