"""Int8 after excitation: the threshold of `we-inspect --int8`, and one run with little to do."""

from __future__ import annotations

import dataclasses

import quantization_report
import quantization_runs
from lines import RESULTS, Lines
from quantization_runs import CASES, Run

from we_surgery.analysis.quantization import LARGE_ERROR

ROWS = Lines(RESULTS / "quantization.jsonl").rows()


def test_the_threshold_is_what_was_measured():
    assert quantization_report.threshold(ROWS) == LARGE_ERROR


def test_the_threshold_is_where_all_losses_begin():
    def row(drops):
        errors = (0.005, 0.015, 0.025, 0.06)
        pairs = zip(errors, drops, strict=True)
        return {"rounded": [{"channels": error, "drop": drop} for error, drop in pairs]}

    # The second bin is clear of zero, the third is not.
    rows = [row((0.0, 1.0, -0.1, 2.0)), row((0.1, 1.1, 0.1, 2.2)), row((-0.1, 1.2, 0.0, 2.4))]
    assert quantization_report.threshold(rows) == 0.05


def test_the_page_has_the_tables_of_the_lines(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(quantization_report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    quantization_report.write_report(RESULTS, page)
    assert page.read_text(encoding="utf-8") == quantization_report.PAGE.read_text(encoding="utf-8")


def test_a_run_quantizes_in_every_way(monkeypatch):
    case = CASES["digits_resnet"]
    small = dataclasses.replace(case, images=96, epochs=2, qat_epochs=1)
    monkeypatch.setitem(quantization_runs.CASES, "digits_resnet", small)
    monkeypatch.setattr(quantization_runs, "BITS", (8, 2))
    found = quantization_runs.perform(Run("digits_resnet", "lwe+mwe", 0))
    accuracies = found["accuracies"]
    assert list(accuracies) == ["float", *quantization_report.SCHEMES]
    assert accuracies["pt2e"] is None  # of a block that calls one ReLU twice
    assert abs(accuracies["static"] - accuracies["float"]) < 5
    assert len(found["layers"]) == 7
    errors = {
        bits: [e["channels"] for e in found["rounded"] if e["bits"] == bits] for bits in (8, 2)
    }
    assert max(errors[8]) < min(errors[2])
