"""The pages as a site: it builds, has no dead link, and loads nothing from elsewhere."""

from __future__ import annotations

import re
import runpy
import shutil
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import we_surgery as ws

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs" / "build_site.py"))
BEYOND_THE_EDGE = """
document.documentElement.scrollWidth - document.documentElement.clientWidth
"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
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


@pytest.fixture(scope="module")
def site() -> Path:
    for needed in ("zensical", "nbconvert", "ipykernel"):
        pytest.importorskip(needed)
    assert SCRIPT["main"]() == 0
    return ROOT / "site"


def test_the_site_builds_and_is_whole(site: Path) -> None:
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


class Opened:
    """A page of the site in a real browser, with what went wrong in it."""

    def __init__(self, browser: Any, address: str, width: int) -> None:
        self.wrong: list[str] = []
        self.address = address
        self.page = browser.new_page(viewport={"width": width, "height": 800})
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", self._heard)
        self.page.on("request", self._asked)

    def _heard(self, message: Any) -> None:
        if message.type == "error":
            self.wrong.append(message.text)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.wrong.append(f"asks for {request.url}")


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(address: str) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("needs Chromium or Chrome")
    options = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=options)
        yield opened
        opened.close()


def test_no_page_scrolls_sideways_on_a_phone_or_has_an_error(
    site: Path, address: str, browser: Any
) -> None:
    phone = Opened(browser, address, 390)
    too_wide: dict[str, int] = {}
    for page in sorted(site.rglob("index.html")):
        name = page.parent.relative_to(site).as_posix()
        phone.page.goto(address + ("" if name == "." else f"{name}/"))
        beyond = phone.page.evaluate(BEYOND_THE_EDGE)
        if beyond > 0:
            too_wide[name] = beyond
    assert (too_wide, phone.wrong) == ({}, [])


def test_the_search_finds_a_page(address: str, browser: Any) -> None:
    desk = Opened(browser, address, 1280)
    desk.page.goto(address)
    desk.page.wait_for_load_state("networkidle")
    desk.page.keyboard.press("/")
    desk.page.keyboard.type("gradient accumulation")
    desk.page.get_by_role("option").filter(has_text="Training").first.click()
    desk.page.wait_for_url(f"{address}training/**")
    assert desk.wrong == []
