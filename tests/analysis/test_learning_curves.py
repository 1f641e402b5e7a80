"""Learning curves of variants, and drawings of MWE's curves."""

import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import we_surgery as ws
from we_surgery import analysis
from we_surgery.cli import we_surgery
from we_surgery.converted.state import is_converted


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))


def curves(goal: float | None, **validation: list[float]) -> analysis.LearningCurves:
    """One run of each variant, whose training metric is 0.3 above the validation metric."""
    rows = [
        {"variant": name, "seed": 0, "epoch": epoch, "training": value + 0.3, "validation": value}
        for name, values in validation.items()
        for epoch, value in enumerate(values, 1)
    ]
    return analysis.LearningCurves(rows=rows, goal=goal)


def test_a_run_is_described_by_gap_roughness_and_epochs() -> None:
    first, second = curves(0.65, a=[0.4, 0.7, 0.6], b=[0.1, 0.2]).summary()
    assert (first["gap"], first["validation"]) == (pytest.approx(0.3), 0.6)
    assert first["roughness"] == pytest.approx((0.4 - 0.2) / 2)  # moves 0.4, gains 0.2, in 2 steps
    assert (first["epochs_to_goal"], first["reached"]) == (2, 1)
    assert (second["roughness"], second["epochs_to_goal"], second["reached"]) == (0, None, 0)
    assert curves(None, a=[0.4]).summary()[0]["epochs_to_goal"] is None


def test_each_variant_is_trained_with_its_settings_from_the_same_weights() -> None:
    seen = []

    def train(model: nn.Module, seed: int, **settings: float) -> list[tuple[float, float]]:
        has_dropout = any(isinstance(m, nn.Dropout) for m in model.modules())
        weight = model[0].raw_weight if is_converted(model) else model[0].weight
        seen.append((is_converted(model), has_dropout, settings, weight.detach().clone()))
        return [(0.5, 0.5), (1.0, 0.5 + seed / 10)]

    variants = analysis.regularization_variants("lwe", dropout=0.25)
    found = analysis.learning_curves(net, variants, train, seeds=(1, 3), goal=0.7)
    assert [one[:3] for one in seen[:5]] == [
        (False, False, {}),
        (True, False, {}),
        (False, True, {}),
        (False, False, {"weight_decay": 5e-4}),
        (False, False, {"label_smoothing": 0.1}),
    ]
    assert all(torch.equal(one[3], seen[0][3]) for one in seen[:5])
    assert not torch.equal(seen[5][3], seen[0][3])
    first = found.summary()[0]
    assert first["gap"] == pytest.approx(0.3)
    assert (first["runs"], first["reached"], first["epochs_to_goal"]) == (2, 1, 2)


@pytest.mark.parametrize("returned", [None, [], [(1.0,)]])
def test_a_training_function_without_a_history_is_refused(returned: object) -> None:
    with pytest.raises(ws.InputError, match="the training function returned"):
        analysis.learning_curves(
            net, {"vanilla": analysis.Regularized()}, lambda model, seed: returned, seeds=(0,)
        )


def test_the_gain_of_the_papers_curve_is_equation_3() -> None:
    drawing = analysis.curve_drawing(["atanh"], epsilon=0.1, largest=2.0, points=5)
    limit = 1.1 * 2.0
    for row in drawing.rows:
        x = row["weight"] / limit
        assert row["excited"] == pytest.approx(limit * 0.5 * math.log((1 + x) / (1 - x)))
        assert row["gain"] == pytest.approx(limit**2 / (limit**2 - row["weight"] ** 2))
    assert drawing.summary()[0]["largest_gain"] == pytest.approx(5.76, abs=5e-3)


def test_plain_curves_are_drawn_without_atanh() -> None:
    drawing = analysis.curve_drawing(relative=False, largest=3.0)
    assert "atanh" not in {row["curve"] for row in drawing.rows}
    novel = [row for row in drawing.rows if row["curve"] == "novel"]
    assert novel[-1]["excited"] == pytest.approx(0.5 * 3 / math.log(1 + math.exp(-0.9)))
    with pytest.raises(ws.InputError, match="did you mean 'tanh'"):
        analysis.curve_drawing(["tanhh"])


def test_the_command_writes_curves_and_pictures(tmp_path: Path) -> None:
    stem = tmp_path / "curves"
    done = CliRunner().invoke(we_surgery, ["analyse", "curve", "-o", str(stem), "--epsilon", "0.2"])
    assert done.exit_code == 0, done.stderr
    assert "atanh" in done.stdout
    assert (tmp_path / "curves.svg").stat().st_size > 1000
    assert (tmp_path / "curves.csv").read_text().startswith("curve,weight,excited,gain\natanh,")
    bad = CliRunner().invoke(we_surgery, ["analyse", "curve", "tan", "-o", str(stem), "--force"])
    assert bad.exit_code == 2


def test_learning_curves_are_drawn() -> None:
    figure = analysis.draw(curves(0.65, a=[0.4, 0.7], b=[0.4, 0.6]))
    assert len(figure.axes[0].lines) == 5
