"""The pages as a site: it builds, has no dead link, and loads nothing from elsewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import we_surgery as ws

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs" / "build_site.py"))
ADDRESS = re.compile(r'(?:src|href)="([^"#?]+)(?:[#?][^"]*)?"')


def test_the_reference_has_each_public_name() -> None:
    listed = set(re.findall(r"^::: [\w.]*?(\w+)$", SCRIPT["reference"](), re.M))
    assert set(ws.__all__) <= listed


def test_each_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    listed = set(re.findall(r'"([\w/]+)\.md"', navigation)) - {"index", "reference"}
    docs = ROOT / "docs"
    pages = [*docs.glob("*.md"), *docs.rglob("*.ipynb")]
    assert {page.relative_to(docs).with_suffix("").as_posix() for page in pages} == listed


def test_the_site_builds_and_is_whole() -> None:
    for needed in ("zensical", "nbconvert", "ipykernel"):
        pytest.importorskip(needed)
    assert SCRIPT["main"]() == 0
    site = ROOT / "site"
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        html = page.read_text(encoding="utf-8")
        for address in ADDRESS.findall(html):
            if address.startswith(("http:", "https:", "mailto:", "data:")):
                continue
            target = site / address[1:] if address.startswith("/") else page.parent / address
            assert target.exists(), f"{page.relative_to(site)} links to {address}"
        assert not re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="https?:', html), page
    reference = (site / "reference" / "index.html").read_text(encoding="utf-8")
    assert "we_surgery.attached.attach" in reference
