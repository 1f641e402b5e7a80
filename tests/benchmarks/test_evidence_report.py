"""The report from lines that are made up here."""

import json
import math

import evidence_report
import numpy as np
import pytest


def line(arm, seed, accuracy, phase="count", **changed):
    row = {
        "network": "resnet_gn",
        "phase": phase,
        "arm": arm,
        "seed": seed,
        "lr": 0.1,
        "decay": 5e-4,
        "diverged": False,
        "cpu_seconds": 10.0 + 3 * (arm != "plain"),
        "validation_curve": [70.0, accuracy],
        "weight_change": [0.5, 0.1],
        "raw_norm": [10.0, 9.0],
        "train_accuracy": 90.0,
        "validation_accuracy": accuracy,
        "test_accuracy": accuracy,
        "test_loss": 0.5,
        "test_ece": 2.0,
    }
    return row | changed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A gain, a loss and neither; one arm is incomplete, and one run diverged."""
    folder = tmp_path_factory.mktemp("results")
    rng = np.random.default_rng(0)
    lines = []
    for seed in range(30):
        base = 80 + rng.normal()
        lines.append(line("plain", seed, base))
        lines.append(line("lwe", seed, base + 1 + 0.5 * rng.normal()))
        lines.append(line("standardize", seed, base - 1 + 0.5 * rng.normal()))
        lines.append(line("default", seed, base + 0.3 * (-1) ** seed))
        if seed < 12:
            lost = {"diverged": True, "test_loss": None} if seed == 3 else {}
            lines.append(line("mwe", seed, base + 1, **lost))
    public = {
        "arm": "lwe",
        "steps": 62,
        "losses": [[2.0, 1.25], [2.0, 1.25]],
        "test_accuracy": [70.0, 70.0],
        "largest_difference": 1e-12,
    }
    (folder / "evidence_public.json").write_text(json.dumps({"runs": [public]}))
    path = folder / "evidence_resnet_gn.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    page = folder / "page.md"
    for path in (page, folder / "README.md"):
        path.write_text(f"before\n{evidence_report.BEGIN}old\n{evidence_report.END}\nafter\n")
    evidence_report.write_report(folder, page, folder / "README.md")
    return folder


@pytest.fixture(scope="module")
def written(folder):
    return (folder / "page.md").read_text()


def row_of(page, arm):
    return next(each for each in page.splitlines() if each.startswith(f"| `{arm}` |"))


def test_verdicts(written):
    assert "| **gain** |" in row_of(written, "lwe")
    assert "| **loss** |" in row_of(written, "standardize")
    assert "| **no difference seen** |" in row_of(written, "default")
    second = next(each for each in written.splitlines() if "`lwe` over `standardize`" in each)
    assert second.endswith("| gain |")


def test_what_is_missing_is_marked(written):
    assert "12 of 30, incomplete, 1 diverged" in row_of(written, "mwe")
    assert "Incomplete: 0 of 90 tuning runs are done." in written
    assert "incomplete" not in row_of(written, "lwe")


def test_only_the_section_is_replaced(written, folder):
    assert written.startswith("before\n")
    assert written.endswith(f"{evidence_report.END}\nafter\n")
    assert "old" not in written
    evidence_report.write_report(folder, folder / "page.md", folder / "README.md")
    assert (folder / "page.md").read_text() == written
    assert (folder / "evidence_resnet_gn.svg").stat().st_size < 100_000


@pytest.mark.parametrize("page", [evidence_report.PAGE, evidence_report.README])
def test_the_pages_have_the_section(page):
    text = page.read_text(encoding="utf-8")
    assert text.index(evidence_report.BEGIN) < text.index(evidence_report.END)


def test_the_readme_has_few_arms_and_marks_what_is_shown(folder):
    row = next(
        each for each in (folder / "README.md").read_text().splitlines() if "group norm" in each
    )
    pairs, plain, standardize, lwe, mwe, default = row.split("|")[2:-1]
    assert pairs.strip() == "30"
    assert 79 < float(plain) < 81
    assert standardize.startswith(" **-0.82 [")
    assert lwe.startswith(" **+")
    assert mwe.startswith(" **+1.00")
    assert default.startswith(" +0.00 [")


def test_the_public_layers_are_beside(written):
    assert "| `lwe` | 62 | 1.25000000 and 1.25000000 | 70.00 and 70.00 | 1.0e-12 |" in written


def test_curve_measures():
    assert evidence_report.roughness({"validation_curve": [50, 60, 58, 70, 69]}) == 3
    assert evidence_report.epochs_to([50, 60, 70], 60) == 2
    assert math.isinf(evidence_report.epochs_to([50, 60], 61))
