"""What the README and the examples say is run."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ONE_PROGRAM = "writing_an_excitation.md"  # its blocks go together; see test_own_excitation.py
BLOCKS = [
    pytest.param(page, code, id=f"{page.stem}-{index}")
    for page in PAGES
    if page.name != ONE_PROGRAM
    for index, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_each_python_block_runs_and_prints_what_the_page_shows(
    page: Path,
    code: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    exec(compile(code, str(page), "exec"), {})
    printed = capsys.readouterr().out.rstrip()
    assert not printed or without_rules(printed) in without_rules(page.read_text())


def without_rules(text: str) -> str:
    """The line below a table's head: before version 14.3, rich draws it a sign longer."""
    return re.sub("─+", "─", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_within_the_repository_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.slow
def test_the_demo_runs_end_to_end(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/digits.py", "--folder", str(tmp_path), "--epochs", "1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "attached and converted weights differ by up to 0\n" in done.stdout
    assert "largest output difference" in done.stdout
    assert "bit-equal" in done.stderr


def test_the_library_imports_nothing_heavy() -> None:
    code = (
        "import sys, we_surgery; "
        "print([m for m in ('torchvision', 'timm', 'matplotlib', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_figures_of_the_analyses_are_made_by_their_command(tmp_path: Path) -> None:
    command = [sys.executable, "examples/analyse_digits.py", "--quick"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "demo"), "--output", str(tmp_path / "figures")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (tmp_path / "figures").glob("*.png")}
    shown = set(re.findall(r"figures/(\w+\.png)", (ROOT / "docs" / "analysis.md").read_text()))
    assert made == shown


def test_the_overview_is_drawn_by_its_script() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "draw_overview.py"))
    assert script["OUTPUT"].read_text(encoding="utf-8") == script["overview"]()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
