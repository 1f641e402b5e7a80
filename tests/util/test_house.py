"""The command that measures the package, on a package whose figures are known."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "benchmarks" / "house.py"
FILES = {
    "__init__.py": "from house.top import job\n",
    "errors.py": "class Wrong(Exception):\n    pass\n",
    "top/__init__.py": "from house.top.job import work\n",
    "top/job.py": (
        "from ..errors import Wrong\nfrom . import help\n\n\n"
        "def work():\n    from house.low import first\n\n    return first\n"
    ),
    "top/help.py": "import house.low.first\n",
    "low/__init__.py": "",
    "low/first.py": (
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n"
        "    from house.low.second import thing\n"
    ),
    "low/second.py": "import os\n\nfrom house.low import first\n\nthing = first\n",
}


@pytest.fixture(scope="module")
def house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", COMMAND)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["house"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    del sys.modules["house"]
    return module


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        file = tmp_path / "house" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "house"


def test_figures_of_a_known_package(house: ModuleType, package: Path) -> None:
    found = house.measure(package)
    assert (found.files, found.files_in_root) == (8, 2)
    assert found.lines == sum(text.count("\n") for text in FILES.values())
    assert found.rooms["low"] == {"files": 3, "lines": 9}
    assert found.longest_chain == [
        "house",
        "house.top.job",
        "house.top.help",
        "house.low.first",
    ]
    assert found.floors == 4
    assert found.arrows == {"(root)": ["top"], "top": ["(root)", "low"], "low": []}
    assert found.floors_with_all_imports == 4  # the circle is one floor
    assert found.circles == [["house.low.first", "house.low.second"]]
    assert found.longest_function == (str(Path("top/job.py work")), 4)
    assert found.longest_file == (str(Path("top/job.py")), 8)
    assert found.median_file == 1.5


def test_a_circle_through_a_lazy_import_is_told_apart(house: ModuleType, package: Path) -> None:
    (package / "errors.py").write_text("def late():\n    import house.top.job\n")
    found = house.measure(package)
    assert ["house.errors", "house.top.job"] not in found.circles
    assert ["house.errors", "house.top.job"] in found.circles_with_lazy_imports


def test_the_command_measures_this_package() -> None:
    done = subprocess.run(
        [sys.executable, str(COMMAND), "--json"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["files"] == len(list((ROOT / "we_surgery").rglob("*.py")))
    assert found["rooms"]["excitations"]["files"] > 5
