"""Sparse training: zeros are counted in what strip leaves, run by run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from analysis_data import Residual, likelihood
from torch import nn

import we_surgery as ws
from we_surgery.analysis import sweep
from we_surgery.analysis.weights import sparsity


def masked(model: nn.Module, seed: int, strength: float) -> None:
    """Sets a share of each conv's raw weights to zero, as a sparse training would."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = getattr(module, "raw_weight", None)
            weight = module.weight if weight is None else weight
            weight.data.view(-1)[: round(strength * weight.numel())] = 0


VARIANTS = {
    "vanilla": lambda model: model,
    "mwe": lambda model: ws.convert(model, config={"mode": "mwe", "standardize": "off"}),
}


def test_zeros_and_metric_are_of_the_stripped_model() -> None:
    found = sweep(Residual, VARIANTS, masked, likelihood, strengths=(0.0, 0.5), seeds=(0, 1))
    assert len(found.rows) == 8
    torch.manual_seed(1)
    model = Residual()
    masked(model, 1, 0.5)
    rows = {(r["variant"], r["strength"], r["seed"]): r for r in found.rows}
    conv = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    expected = 0.5 * conv / (conv + model.head.weight.numel())
    for variant in VARIANTS:  # MWE keeps zeros
        assert rows[variant, 0.5, 1]["sparsity"] == pytest.approx(expected, abs=1e-3)
        assert rows[variant, 0.0, 1]["sparsity"] == 0
    assert rows["vanilla", 0.5, 1]["metric"] == pytest.approx(likelihood(model))
    assert rows["vanilla", 0.5, 1]["sparsity"] == sparsity(model)


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    trained: list[float] = []

    def interrupted(model: nn.Module, seed: int, strength: float) -> None:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(strength)
        masked(model, seed, strength)

    path = tmp_path / "progress.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sweep(
            Residual,
            VARIANTS,
            interrupted,
            likelihood,
            strengths=(0.0, 0.5),
            seeds=(0,),
            progress_file=path,
        )
    trained.clear()
    resumed = sweep(
        Residual,
        VARIANTS,
        interrupted,
        likelihood,
        strengths=(0.0, 0.5),
        seeds=(0,),
        progress_file=path,
    )
    assert trained == [0.0, 0.5]
    assert resumed == sweep(
        Residual, VARIANTS, masked, likelihood, strengths=(0.0, 0.5), seeds=(0,)
    )
    assert not path.exists()
    with pytest.raises(ws.InputError, match="nothing to train"):
        sweep(Residual, VARIANTS, masked, likelihood, strengths=())
