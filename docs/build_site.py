"""Builds the site of the pages: ``python docs/build_site.py`` (``make docs``).

The README becomes the first page, and notebooks are run. What pages link to outside of ``docs``
(results, configs, tests) is copied beside them, so that the site needs no other place. The
reference is made of the public names' docstrings. Needs the extra ``docs``; nothing is fetched.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
GATHERED = ROOT / "build" / "docs"
OUTSIDE = "repository"
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)]*)?\))")
LARGEST = 1_000_000
"""Bytes of a linked file that is copied; larger ones, such as raw results, are only named."""
PUBLIC = re.compile(r"^from (we_surgery[\w.]*) import \w+ as (\w+)$", re.M)


def gather() -> None:
    """Puts the pages and what they link to into ``build/docs``."""
    shutil.rmtree(GATHERED, ignore_errors=True)
    left_out = shutil.ignore_patterns("*.py", "*.csv", "*.yaml", "*.ipynb")
    shutil.copytree(DOCS, GATHERED, ignore=left_out)
    run_notebooks()
    pages = [ROOT / "README.md", *DOCS.glob("*.md"), *NOTEBOOKS]
    waiting = [(page, in_site(page)) for page in pages]
    done: set[Path] = set()
    while waiting:
        source, target = waiting.pop()
        if target in done:
            continue
        done.add(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".md":
            text, linked = rewritten(source, target)
            target.write_text(text, encoding="utf-8")
            waiting += linked
        elif source != target:
            shutil.copy(source, target)
    (GATHERED / "reference.md").write_text(reference(), encoding="utf-8")


def run_notebooks() -> None:
    """Writes each notebook as a page, with the outputs of running it now."""
    convert = [sys.executable, "-m", "nbconvert", "--execute", "--to", "markdown"]
    target = ["--log-level", "WARN", "--output-dir", GATHERED / "notebooks"]
    subprocess.run([*convert, *target, *NOTEBOOKS], check=True)


def rewritten(source: Path, target: Path) -> tuple[str, list[tuple[Path, Path]]]:
    """A page with its links as they are in the site, and the files outside that it links to."""
    linked: list[tuple[Path, Path]] = []

    def replace(match: re.Match[str]) -> str:
        file = (source.parent / match[2]).resolve()
        if not file.is_file() or file.stat().st_size > LARGEST:
            return f"]({match[2]}{match[3]}" if file.is_dir() else match[0]
        place = in_site(file)
        linked.append((file, place))
        climb = len(target.parent.relative_to(GATHERED).parts)
        return f"]({'../' * climb}{place.relative_to(GATHERED).as_posix()}{match[3]}"

    page = target if source in NOTEBOOKS else source
    text = LINK.sub(replace, page.read_text(encoding="utf-8"))
    return text, linked


def in_site(file: Path) -> Path:
    """Where a file of the repository lies in the site."""
    if file == ROOT / "README.md":
        return GATHERED / "index.md"
    if file in NOTEBOOKS:
        file = file.with_suffix(".md")
    if file.is_relative_to(DOCS):
        return GATHERED / file.relative_to(DOCS)
    return GATHERED / OUTSIDE / file.relative_to(ROOT)


def reference() -> str:
    """A page with the docstring of each public name."""
    api = (ROOT / "we_surgery" / "api.py").read_text(encoding="utf-8")
    names = [f"{module}.{name}" for module, name in PUBLIC.findall(api)]
    names += [f"we_surgery.fx.{name}" for name in ("ExcitePass", "StripPass")]
    ordered = sorted(names, key=lambda path: path.rpartition(".")[2].lower())
    return "# Reference\n\n" + "\n".join(f"::: {path}\n" for path in ordered)


def main() -> int:
    """Gathers the pages and builds the site; the exit code of the builder."""
    gather()
    builder = Path(sys.executable).with_name("zensical")
    return subprocess.run(
        [builder, "build", "--strict", "--clean"], cwd=ROOT, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
