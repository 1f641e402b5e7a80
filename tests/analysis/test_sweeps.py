"""Sweeps train each variant from the same start, and say what failed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from analysis_data import Residual, batches, likelihood, sweep_of
from torch import nn

import we_surgery as ws
from we_surgery.analysis import (
    draw,
    epsilon_variants,
    initialization_variants,
    normalization_free_variants,
    reduction_variants,
    sweep,
)
from we_surgery.analysis.progress import fingerprint
from we_surgery.analysis.variants import (
    initialize_excitations,
    scale_standardized,
    without_normalization,
)
from we_surgery.converted.graphs import excited_weights


def train(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        F.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_runs_of_one_seed_start_from_the_same_weights() -> None:
    starts: list[tuple[int, bytes]] = []

    def noting(model: nn.Module, seed: int) -> None:
        vanilla = {k.replace("raw_weight", "weight"): v for k, v in model.state_dict().items()}
        starts.append((seed, vanilla["first.weight"].numpy().tobytes()))

    state = torch.get_rng_state()
    found = sweep(Residual, epsilon_variants((0.1, 0.2)), noting, likelihood, seeds=(4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert [seed for seed, _ in starts] == [4, 4, 4, 5, 5, 5]
    assert len({start for seed, start in starts if seed == 4}) == 1
    assert starts[0][1] != starts[-1][1]
    assert [(row["variant"], row["seed"]) for row in found.rows][:2] == [
        ("vanilla", 4),
        ("mwe, epsilon 0.1", 4),
    ]


def test_metrics_are_of_the_trained_model_and_paired() -> None:
    found = sweep(
        Residual, epsilon_variants((0.1,)), train, batches(), seeds=(0, 1), score="log_likelihood"
    )
    torch.manual_seed(1)
    model = Residual()
    torch.manual_seed(1)
    model = ws.convert(model, config={"mode": "mwe", "mwe": {"epsilon": 0.1}})
    train(model, 1)
    rows = {(row["variant"], row["seed"]): row for row in found.rows}
    own, vanilla = rows["mwe, epsilon 0.1", 1], rows["vanilla", 1]
    assert own["metric"] == pytest.approx(likelihood(model), abs=1e-5)
    assert own["difference"] == pytest.approx(own["metric"] - vanilla["metric"])
    summary = {row["variant"]: row for row in found.summary()}
    differences = [rows["mwe, epsilon 0.1", seed]["difference"] for seed in (0, 1)]
    assert summary["mwe, epsilon 0.1"]["difference"] == pytest.approx(sum(differences) / 2)
    spread = abs(differences[0] - differences[1])
    assert summary["mwe, epsilon 0.1"]["standard_error"] == pytest.approx(spread / 2)
    low, high = (summary["mwe, epsilon 0.1"][end] for end in ("low", "high"))
    assert [high - low, (high + low) / 2] == pytest.approx(
        [12.706 * spread, sum(differences) / 2], abs=1e-9
    )
    assert summary["vanilla"]["difference"] == 0


def test_a_training_that_diverges_is_a_row_that_says_so() -> None:
    def diverging(model: nn.Module, seed: int) -> None:
        if any("lwe" in name for name, _ in model.named_parameters()):
            with torch.no_grad():
                model.first.raw_weight.fill_(float("nan"))

    found = sweep(Residual, reduction_variants((16, 8)), diverging, likelihood, seeds=(0,))
    assert [row["metric"] is None for row in found.rows] == [False, True, True]
    assert "'first'" in found.rows[1]["failure"]
    assert found.summary()[1] == {
        "variant": "lwe, reduction 16",
        "runs": 1,
        "failed": 1,
        "mean": None,
        "sparsity": None,
        "difference": None,
        "standard_error": None,
        "low": None,
        "high": None,
    }


@pytest.mark.parametrize("pairs", [2, 5, 10, 11, 30])
def test_intervals_are_students(pairs: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    differences = torch.randn(pairs, generator=torch.Generator().manual_seed(0)).double().tolist()
    runs = [("lwe", seed, 1.0, value) for seed, value in enumerate(differences)]
    (found,) = sweep_of(*runs).summary()
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx(interval, abs=3e-3)


def test_the_picture_shows_differences_and_their_intervals() -> None:
    runs = [("vanilla", seed, 0.5, 0.0) for seed in range(3)]
    runs += [("lwe", seed, 0.6 + seed / 100, 0.1 + seed / 100) for seed in range(3)]
    result = sweep_of(*runs, ("mwe", 0, None, None))
    (axes,) = draw(result).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lwe", "mwe"]
    drawn = [list(line.get_xdata()) for line in axes.get_lines()]
    row = result.summary()[1]
    assert [row["low"], row["high"]] in drawn
    assert [row["difference"]] * 2 in drawn
    assert [text.get_text() for text in axes.texts] == ["1 of 1 failed"]


def test_a_metric_that_is_not_finite_is_a_failure() -> None:
    def nan(model: nn.Module) -> float:
        return likelihood(model) * float("nan")

    found = sweep(Residual, epsilon_variants(()), train, nan, seeds=(0,))
    assert (found.rows[0]["metric"], found.rows[0]["failure"]) == (None, "the metric is nan")


def test_a_sweep_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    trained: list[int] = []

    def interrupted(model: nn.Module, seed: int) -> None:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(seed)
        train(model, seed)

    arguments = {"seeds": (0, 1), "progress_file": tmp_path / "sweep.jsonl"}
    variants = epsilon_variants((0.1,))
    with pytest.raises(KeyboardInterrupt):
        sweep(Residual, variants, interrupted, likelihood, **arguments)
    assert len(trained) == 3
    resumed = sweep(
        Residual, variants, lambda model, seed: train(model, seed), likelihood, **arguments
    )
    assert resumed == sweep(Residual, variants, train, likelihood, seeds=(0, 1))
    assert list(tmp_path.iterdir()) == []


def test_the_variants_differ_by_what_they_name() -> None:
    models = {name: make(Residual()) for name, make in reduction_variants((4, 8)).items()}
    hidden = [
        model.first.excitation.lwe.fc1.out_features
        for name, model in models.items()
        if name != "vanilla"
    ]
    assert hidden == [2, 1]
    epsilons = [
        make(Residual()).first.excitation.mwe.epsilon
        for name, make in epsilon_variants((1e-3, 0.2)).items()
        if name != "vanilla"
    ]
    assert epsilons == pytest.approx([1e-3, 0.2])


def test_initializations_draw_as_they_say() -> None:
    torch.manual_seed(0)
    model = ws.convert(nn.Sequential(nn.Conv2d(256, 64, 3), nn.BatchNorm2d(64)), "lwe")
    fc1 = model[0].excitation.lwe.fc1  # 256 -> 16
    default = fc1.weight.detach().clone()
    assert torch.equal(
        initialize_excitations(model, "default")[0].excitation.lwe.fc1.weight, default
    )
    bias = fc1.bias.detach().clone()
    initialize_excitations(model, "xavier")
    assert fc1.weight.abs().max() <= (6 / (256 + 16)) ** 0.5
    assert fc1.weight.std().item() == pytest.approx((2 / (256 + 16)) ** 0.5, rel=0.05)
    initialize_excitations(model, "kaiming")
    assert fc1.weight.std().item() == pytest.approx((2 / 16) ** 0.5, rel=0.05)
    assert torch.equal(fc1.bias, bias)
    assert len(initialization_variants()) == 4
    with pytest.raises(ws.InputError, match="did you mean 'xavier'"):
        initialize_excitations(model, "xaver")  # type: ignore[arg-type]


def test_models_without_norms_are_standardized_as_named() -> None:
    variants = normalization_free_variants()
    models = {name: make(Residual()) for name, make in variants.items()}
    for model in models.values():
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    stages = {
        name: [[s.name for s in weight.excitation.stages] for weight in excited_weights(model)]
        for name, model in models.items()
    }
    names = list(variants)
    assert stages[names[0]] == []
    assert all(found == ["standardize", "lwe"] for found in stages[names[1]])
    assert all(found == ["lwe"] for found in stages[names[2]])
    for name in names[3:]:
        assert all(found == ["standardize", "lwe", "rescale"] for found in stages[name])
    gains = [models[name].first.excitation.rescale.gain[0].item() for name in names[3:]]
    assert gains == pytest.approx([(1 / 72) ** 0.5, 2 * (2 / 72) ** 0.5])


def test_scaled_filters_have_the_deviation_of_one_over_the_root_of_the_fan_in() -> None:
    torch.manual_seed(0)
    model = ws.convert(
        nn.Sequential(nn.Conv2d(16, 8, 3), nn.ConvTranspose2d(8, 16, 3, groups=2)),
        config={"mode": "lwe", "standardize": "on"},
    )
    before = [model[0].weight.detach().clone(), model[1].weight.detach().clone()]
    scale_standardized(model)
    for layer, weight, fan_in in zip(model, before, (16 * 9, 4 * 9), strict=True):
        assert torch.allclose(layer.weight, weight / fan_in**0.5, atol=1e-6)
    ws.strip(model)  # the factor is folded like anything else
    assert isinstance(without_normalization(nn.Sequential(nn.BatchNorm2d(2)))[0], nn.Identity)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_without_plain_memory_have_a_fingerprint_too() -> None:
    def quantized(scale: float) -> torch.Tensor:
        return torch.quantize_per_tensor(torch.ones(3), scale, 0, torch.qint8)

    eye = torch.eye(3)
    values = [quantized(0.5), quantized(0.25), eye.to_sparse(), (2 * eye).to_sparse(), eye]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint(quantized(0.5)) == fingerprint(values[0])
