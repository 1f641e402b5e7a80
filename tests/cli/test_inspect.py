"""``we-inspect``: what was learned, files side by side, and the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import nn

import we_surgery as ws
from we_surgery.analysis import Ablation, save_result
from we_surgery.analysis.quantization import int8_error
from we_surgery.cli import convert_command, inspect_command
from we_surgery.jobs.html_report import diverging

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def inspect(*words: str | Path) -> Result:
    return CliRunner().invoke(inspect_command, [str(word) for word in words])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A converted model as it starts, and the same after some training."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 1), nn.Flatten()
    )
    model = ws.convert(nn.Sequential(layers, nn.Linear(8 * 4, 5)), "lwe")
    torch.save(model, tmp_path / "start.we.pt")
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(5):
        model(torch.randn(8, 16, 4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model, tmp_path / "trained.we.pt")
    return tmp_path / "start.we.pt", tmp_path / "trained.we.pt"


def test_a_file_that_learned_nothing_is_told_so(files: tuple[Path, Path]) -> None:
    result = inspect(files[0])
    assert "EXCITATION HAS LEARNED NOTHING" in result.stdout
    assert "2 of 3 untrained: indistinguishable from a fresh initialization" in result.stdout
    assert json.loads(inspect(files[0], "--json").stdout)["learned"].startswith("EXCITATION HAS")


def test_a_trained_file_shows_what_it_learned(files: tuple[Path, Path]) -> None:
    result = inspect(files[1])
    assert "LEARNED NOTHING" not in result.stdout
    assert "2 of 3 learned" in result.stdout
    found = json.loads(inspect(files[1], "--json").stdout)
    assert [layer["statistics"]["verdict"] for layer in found["layers"]] == [
        "learned",
        "learned",
        "nothing to learn",
    ]
    model = torch.load(files[1], weights_only=False)
    conv = model[0][0]
    statistics = found["layers"][0]["statistics"]
    assert statistics["raw_norm"] == pytest.approx(conv.raw_weight.norm().item())
    assert statistics["excited_norm"] == pytest.approx(conv.weight.norm().item())
    assert found["layers"][2]["statistics"]["gain"]["maximum"] == pytest.approx(5.7619, rel=1e-4)
    assert found["values"] - found["stripped_values"] == sum(
        row["added"] for row in found["layers"]
    )


def test_the_start_tells_how_far_it_came(files: tuple[Path, Path]) -> None:
    found = json.loads(inspect(files[1], "--start", files[0], "--json").stdout)
    before, after = (torch.load(path, weights_only=False)[0][0].raw_weight for path in files)
    distance = ((after - before).norm() / before.norm()).item()
    assert found["layers"][0]["statistics"]["raw_distance"] == pytest.approx(distance)
    assert found["layers"][0]["statistics"]["excitation_distance"] > 0
    same = inspect(files[0], "--start", files[0])
    assert "2 of 3 unchanged" in same.stdout


def test_the_start_of_another_model_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "other.pt")
    result = inspect(files[1], "--start", tmp_path / "other.pt")
    assert (result.exit_code, "'0.0.weight' is missing in the --start file" in result.stderr) == (
        2,
        True,
    )


def test_two_files_stand_side_by_side(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = inspect(*files, "--wide")
    assert result.exit_code == 0, result.output
    assert "excitation 2" in result.stdout
    narrow = inspect(*files).stdout.splitlines()
    assert max(len(line) for line in narrow if line.startswith(("layer", "0.", "1."))) <= 80
    assert "LEARNED NOTHING" in result.stdout
    found = json.loads(inspect(*files, "--json").stdout)
    assert [file["source"] for file in found["files"]] == [str(path) for path in files]
    rows = {row["name"]: row for row in found["weights"]}
    maps = [
        ws_model[0][0].excitation.lwe.multiplier(
            ws_model[0][0].excitation.standardize.excite(ws_model[0][0].raw_weight)
        )
        for ws_model in (torch.load(path, weights_only=False) for path in files)
    ]
    expected = torch.corrcoef(torch.stack([one.detach().flatten() for one in maps]))[0, 1].item()
    assert rows["0.0.weight"]["correlation"] == pytest.approx(expected, abs=1e-4)
    assert rows["1.weight"]["correlation"] is None
    assert rows["1.weight"]["distance"] > 0
    # A vanilla file beside it has no excited weights to show.
    ws.save(ws.strip(ws.load(files[1])), tmp_path / "vanilla.pt")
    mixed = inspect(files[1], tmp_path / "vanilla.pt")
    assert mixed.exit_code == 0
    assert "vanilla: no excited weights" in mixed.stdout


def test_a_vanilla_file_shows_its_weights_and_the_next_command(tmp_path: Path) -> None:
    convs = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3)))
    torch.save(convs, tmp_path / "model.pt")
    shown = inspect(tmp_path / "model.pt").stdout
    assert re.search(r"^\{0-2\}.weight +3 +4x4x3x3 +float32", shown, re.M)
    assert f"`we-convert {tmp_path / 'model.pt'} --dry-run` shows" in shown
    assert re.search(r"^1.weight +4x4x3x3", inspect(tmp_path / "model.pt", "--wide").stdout, re.M)
    torch.save(convs.state_dict(), tmp_path / "weights.pt")
    assert "weights.pt --arch NAME --dry-run`" in inspect(tmp_path / "weights.pt").stdout
    assert inspect(tmp_path / "weights.pt", tmp_path / "model.pt").exit_code == 0


def test_a_quantized_file_is_called_so(tmp_path: Path) -> None:
    state = {
        "fc.qweight": torch.ones(4, dtype=torch.int32),
        "conv.weight": torch.ones(2, 2, dtype=torch.int8),
        "norm.weight": torch.ones(2),
        "qat.weight_fake_quant.zero_point": torch.zeros(1),
    }
    torch.save(state, tmp_path / "int8.pt")
    shown = inspect(tmp_path / "int8.pt").stdout
    assert "quantized: 2 tensors hold quantized weights" in shown
    assert "dry-run" not in shown
    assert "vanilla" not in shown


def test_a_quantized_file_does_not_fit_an_architecture(tmp_path: Path) -> None:
    state = {"weight": torch.ones(2, 2), "weight_scale": torch.ones(2)}
    torch.save(state, tmp_path / "int8.pt")
    linear = ["--arch", "torch.nn:Linear", "--arch-arg", "in_features=2"]
    words = [tmp_path / "int8.pt", *linear, "--arch-arg", "out_features=2"]
    result = CliRunner().invoke(convert_command, [str(word) for word in words])
    assert "the state dict is quantized: 'weight_scale' holds" in result.stderr


def test_the_table_of_a_trained_file_fits_80_columns(files: tuple[Path, Path]) -> None:
    lines = inspect(files[1]).stdout.splitlines()
    table = [line for line in lines if line.startswith(("layer", "0.", "1."))]
    assert len(table) == 4
    assert max(map(len, table)) <= 80
    assert all("learn" in line for line in table[1:])
    assert "near 0, 1" in inspect(files[1], "--wide").stdout


def with_outliers() -> nn.Sequential:
    """Weights that fit int8, that need a scale per channel, and that do not fit."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(128, 16, 3, bias=False) for _ in range(3)))
    with torch.no_grad():
        model[1].weight[2] *= 1000
        model[2].weight[:, 0, 0, 0] = 1
    return model


def test_int8_tells_which_weights_it_damages(tmp_path: Path) -> None:
    torch.save(with_outliers().state_dict() | {"steps": torch.ones(2, 2)}, tmp_path / "model.pt")
    shown = inspect(tmp_path / "model.pt", "--int8").stdout
    table = [line.split("  ")[-1].strip() for line in shown.splitlines() if ".weight " in line]
    assert table[:3] == ["fits", "scale per channel", "keep in float"]
    assert "1 of 3 weights lose over 5% with one scale per tensor; quantize them" in shown
    assert "5% even with one scale per output channel; keep them in float" in shown
    assert max(map(len, shown.splitlines()[:5])) <= 80
    found = json.loads(inspect(tmp_path / "model.pt", "--int8", "--json").stdout)
    assert [row["advice"] for row in found["int8"]] == ["", *table[1:3]]
    assert found["int8"][1]["per_tensor"] > 0.5 > 0.02 > found["int8"][1]["per_channel"]
    assert json.loads(inspect(tmp_path / "model.pt", "--json").stdout)["int8"] is None


def test_int8_is_of_the_weights_that_are_deployed(tmp_path: Path) -> None:
    model = ws.convert(nn.Sequential(nn.ConvTranspose2d(6, 4, 3)), "mwe")
    torch.save(model, tmp_path / "model.pt")
    (row,) = json.loads(inspect(tmp_path / "model.pt", "--int8", "--json").stdout)["int8"]
    weight = ws.strip(model)[0].weight.detach()
    assert (row["low"], row["high"]) == pytest.approx((weight.min().item(), weight.max().item()))
    expected = int8_error("", weight.transpose(0, 1))  # output channels are the second axis
    assert row["per_channel"] == pytest.approx(expected.per_channel)


class Page(HTMLParser):
    """Collects what a page would load or run, and checks that its tags match."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []  # of the body, with the tag around each

    def handle_data(self, data: str) -> None:
        if "body" in self.open and data.strip():
            self.texts.append((self.open[-1], " ".join(data.split())))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [f"{n}={v}" for n, v in attrs if n in ("src", "href") or n.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(text: str) -> Page:
    page = Page()
    page.feed(text)
    assert page.open == []
    return page


def maps_file(folder: Path) -> Path:
    rows = [
        {"layer": "<b>first</b>", "out_channel": output, "in_channel": channel, "drop": drop}
        for (output, channel), drop in {(0, 0): 0, (0, 1): 2, (1, 0): -1, (1, 1): 1}.items()
    ]
    maps = Ablation(
        analysis="location",
        rows=rows,
        score="log_likelihood",
        baseline=1.0,
        layers=["<b>first</b>"],
    )
    save_result(maps, folder / "maps", picture=False)
    return folder / "maps.json"


def test_the_page_is_whole_escaped_and_loads_nothing(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    odd = tmp_path / "<img src=x onerror=alert(1)> & co.pt"
    odd.write_bytes(files[1].read_bytes())
    target = tmp_path / "report.html"
    result = inspect(odd, "--start", files[0], "--html", target, "--maps", maps_file(tmp_path))
    assert result.exit_code == 0, result.output
    text = target.read_text()
    page = page_of(text)
    assert page.loads == []
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert "b" not in page.tags
    assert "url(" not in text
    assert "@import" not in text
    for expected in (
        "0.0.weight",
        "5.76",
        "&lt;b&gt;first&lt;/b&gt;",
        diverging(1.0),
        diverging(-0.5),
    ):
        assert expected in text, expected
    sections = ["Parameters and cost", "What was learned", "Int8", "Importance by location"]
    assert [text for tag, text in page.texts if tag == "h2"] == [*sections, "Left alone"]
    # Bars; of three weights before, after, and the multipliers of two; the scale and a map.
    assert text.count("<svg") == 2 + 3 + 3 + 2 + 2
    assert text.count('class="minus"') == 1
    again = inspect(odd, "--html", target)
    assert (again.exit_code, "exists already" in again.stderr) == (2, True)
    assert inspect(odd, "--html", target, "--force").exit_code == 0
    several = tmp_path / "several.html"
    assert inspect(*files, "--html", several).exit_code == 0
    page_of(several.read_text())
    assert "Side by side" in several.read_text()
    assert "EXCITATION HAS LEARNED NOTHING" in several.read_text()


def page_about(path: Path, folder: Path) -> Page:
    assert inspect(path, "--html", folder / "about.html", "--force").exit_code == 0
    return page_of((folder / "about.html").read_text())


def test_the_page_begins_with_the_verdict(files: tuple[Path, Path], tmp_path: Path) -> None:
    """In words and by a sign, so that its colour need not be seen."""
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    told = {
        files[0]: ("✗ Excitation has learned nothing", "converted in mode lwe: 0 of its 3 excited"),
        files[1]: ("✓ Excitation has learned", "converted in mode lwe: 2 of its 3 excited weights"),
        tmp_path / "weights.pt": ("○ Vanilla", "none of its weights is excited"),
    }
    for path, (verdict, sentence) in told.items():
        first, name, summary = page_about(path, tmp_path).texts[:3]
        assert (first, name) == (("strong", verdict), ("h1", str(path)))
        assert sentence in summary[1]


def test_the_page_says_what_is_left_alone_and_why(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    torch.save(ws.convert(layers, "mwe", rules=[ws.Rule("1", "skip")]), tmp_path / "model.pt")
    texts = [text for _, text in page_about(tmp_path / "model.pt", tmp_path).texts]
    left = texts[texts.index("Left alone") : texts.index("The plan")]
    assert left[-3:] == ["1", "conv2d, 4 x 4 x 3 x 3", "rule '1'"]
    torch.save(ws.convert(layers, "mwe").state_dict(), tmp_path / "weights.pt")
    assert any("holds no plan" in t for _, t in page_about(tmp_path / "weights.pt", tmp_path).texts)


def test_the_style_knows_dark_screens_phones_and_paper(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    page_about(files[1], tmp_path)
    style = (tmp_path / "about.html").read_text().partition("</style>")[0]
    for condition in ("prefers-color-scheme: dark", "max-width: 640px", "print"):
        assert f"@media {condition} {{" in style or f"@media ({condition}) {{" in style, condition
    widths = re.findall(r"(?<!-)\b(?:min-)?width: (\d+)px(?!\))", style)
    assert all(int(width) <= 390 for width in widths)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("{", "cannot be read"),
        ('{"analysis": "prune"}', "not hold importance maps"),
        ("[]", "not hold importance"),
    ],
)
def test_maps_that_are_none_are_refused(
    files: tuple[Path, Path], tmp_path: Path, content: str, cause: str
) -> None:
    (tmp_path / "maps.json").write_text(content)
    result = inspect(files[1], "--html", tmp_path / "p.html", "--maps", tmp_path / "maps.json")
    assert (result.exit_code, cause in result.stderr) == (2, True)
    assert not (tmp_path / "p.html").exists()
    alone = inspect(files[1], "--maps", tmp_path / "maps.json")
    assert (alone.exit_code, "without --html" in alone.stderr) == (2, True)


def pixels(path: Path) -> tuple[int, int, set[bytes]]:
    """Width, height and colours of a picture."""
    image = Image.open(path).convert("RGB")
    return image.width, image.height, {bytes(color) for _, color in image.getcolors(2**24)}


def test_a_browser_shows_the_page(files: tuple[Path, Path], tmp_path: Path) -> None:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    target, shot = tmp_path / "report.html", tmp_path / "shot.png"
    inspect(files[1], "--start", files[0], "--html", target, "--maps", maps_file(tmp_path))
    common = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1280,1500",
    ]
    subprocess.run(
        [*common, f"--screenshot={shot}", target.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    width, height, colors = pixels(shot)
    assert (width, height) == (1280, 1500)
    for color in ("#1b3a6b", "#c4661f", "#1d7044"):
        assert bytes.fromhex(color[1:]) in colors, color
    done = subprocess.run(
        [*common, "--dump-dom", target.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
        text=True,
    )
    assert re.search(r"<h2>Importance by location</h2>", done.stdout)
    assert done.stdout.count("<rect") == target.read_text().count("<rect")
    for width in (1280, 800, 390):
        assert scroll_width(common, target, width) <= width


FRAME = """<iframe width={width} height=900 style="border: 0" src="{page}" onload="
document.body.append('needs ' + this.contentDocument.documentElement.scrollWidth + ' px')">
</iframe>"""


def scroll_width(browser: list[str], page: Path, width: int) -> int:
    """How wide a page is in a window of some width, narrower than a browser's own may be."""
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(width=width, page=page.as_uri()))
    options = ["--allow-file-access-from-files", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run(
        [*browser, *options, frame.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
        text=True,
    )
    return int(done.stdout.rpartition("needs ")[2].split()[0])
