"""The wheel and the source archive: what is in them, and that the wheel alone works."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import we_surgery as ws

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, which has only what a clone has."""
    folder = tmp_path_factory.mktemp("clone")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("we_surgery", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("pyproject.toml", "LICENSE", "NOTICE", "MANIFEST.in", "CITATION.cff"):
        shutil.copy(ROOT / name, folder)
    for page in ROOT.glob("*.md"):
        shutil.copy(page, folder)
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "dist"


def test_the_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    assert wheel.name.startswith(f"we_surgery-{ws.__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"we_surgery"}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "we_surgery").rglob("*.py")}
    assert sources <= set(names)
    assert {"we_surgery/py.typed", "we_surgery/jobs/report.html.j2"} <= set(names)
    for rights in ("LICENSE", "NOTICE"):
        assert any(name.endswith(f"licenses/{rights}") for name in names)
    data = {p.suffix for p in (ROOT / "we_surgery").rglob("*.*")} - {".py", ".pyc"}
    assert data <= {Path(name).suffix for name in names} | {".typed"}


def test_the_source_archive_builds_the_same(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "pyproject.toml"} <= names
    configs = [p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml")]
    assert {f"we_surgery/configs/{path.as_posix()}" for path in configs} <= names
    assert {"we_surgery/py.typed", "we_surgery/jobs/report.html.j2"} <= names
    # Half of them would be there by default, without the helpers they import.
    assert not [name for name in names if name.startswith("tests")]


def test_the_wheel_alone_runs(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import we_surgery.cli as c; from we_surgery.recipes import load_recipe; "
        "load_recipe('imagenet/resnet18-lwe'); "
        "c.convert_command(['torchvision:resnet18', '--dry-run', '--config', 'lwe'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "weights excited" in done.stdout


def test_readme_and_notice_name_the_same_patents() -> None:
    numbers = r"US [\d,]+ B2|WO \d+/\d+|CN \d+"
    readme, notice = ((ROOT / name).read_text() for name in ("README.md", "NOTICE"))
    assert set(re.findall(numbers, readme)) == set(re.findall(numbers, notice))
    assert len(re.findall(numbers, readme)) == 3
    assert "legal advice" in readme
