"""Toy runs of the evidence: pairs, resuming, choosing settings."""

import argparse
import dataclasses
import gzip
import json
import struct

import evidence
import evidence_arms
import evidence_data
import evidence_training
import lines
import numpy as np
import pytest
import torch
from evidence_training import Run

import we_surgery as ws


def write_idx(path, values):
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images whose brightness tells their class, in torchvision's layout and half of it gzipped."""
    monkeypatch.setattr(evidence_data, "VALIDATION", 60)
    below = tmp_path / "data" / "FashionMNIST" / "raw"
    below.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count, suffix in (("train", 200, ""), ("t10k", 50, ".gz")):
        labels = rng.integers(10, size=count)
        images = rng.integers(30, size=(count, 28, 28)) + 20 * labels[:, None, None]
        write_idx(below / f"{name}-images-idx3-ubyte{suffix}", images)
        write_idx(below / f"{name}-labels-idx1-ubyte{suffix}", labels)
    return tmp_path / "data"


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The batch-norm ResNet with little to do, and no committed tuning."""
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "committed")
    experiment = evidence_arms.EXPERIMENTS["resnet_bn"]
    small = dataclasses.replace(
        experiment, images=64, epochs=2, batch=32, lrs=(0.03, 0.1), decays=(5e-4,)
    )
    monkeypatch.setitem(evidence_arms.EXPERIMENTS, "resnet_bn", small)
    return small


def options(folder, output, **changed):
    given = {"arms": None, "phase": "all", "seeds": [0, 1], "jobs": 1}
    return argparse.Namespace(**(given | {"data": folder, "output": output} | changed))


def test_missing_data_says_how_to_get_it(tmp_path):
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        evidence_data.load(tmp_path)


def test_images_are_pooled_and_split(folder):
    data = evidence_data.load(folder)
    assert [len(part) for part in (data.pool, data.validation, data.test)] == [140, 60, 50]
    assert data.pool.images.shape == (140, 1, 14, 14)
    drawn = evidence_data.draw(data.pool, 30, seed=1, classes=3)
    assert drawn.labels.max() == 2


def test_a_killed_run_goes_on_where_it_was(folder, toy, tmp_path):
    path = tmp_path / "evidence_resnet_bn.jsonl"
    given = options(folder, tmp_path, arms=["lwe"])
    evidence.run_network("resnet_bn", given)
    whole = path.read_text().splitlines()
    assert len(whole) == 2 * 3 + 2  # settings, tuning seeds; seeds
    path.write_text("\n".join(whole[:-2]) + "\n" + whole[-2][:40])  # killed while it wrote
    evidence.run_network("resnet_bn", given)
    again = path.read_text().splitlines()
    times = ("cpu_seconds",)
    strip = [{k: v for k, v in json.loads(row).items() if k not in times} for row in again]
    assert strip == [{k: v for k, v in json.loads(row).items() if k not in times} for row in whole]


def test_tuning_chooses_and_does_not_see_the_test_images(folder, toy, tmp_path):
    evidence.run_network("resnet_bn", options(folder, tmp_path, arms=["plain"], seeds=[0]))
    rows = lines.Lines(tmp_path / "evidence_resnet_bn.jsonl").rows()
    tuning = [row for row in rows if row["phase"] == "tune"]
    assert not any(name.startswith("test") for row in tuning for name in row)
    counted = rows[-1]
    means = {
        lr: np.mean([row["validation_accuracy"] for row in tuning if row["lr"] == lr])
        for lr in toy.lrs
    }
    assert counted["lr"] == max(means, key=means.__getitem__)
    assert counted["test_loss"] > 0
    assert counted["settings"]["steps"] == 4


def test_norms_of_raw_weights_are_not_those_of_excited_ones(folder, toy):
    run = Run("resnet_bn", "tune", "standardize", 0, 0.03, 5e-4)
    measured = evidence_training.perform(run, folder)
    plain = evidence_training.perform(dataclasses.replace(run, arm="plain"), folder)
    # Each filter of the ResNet's convs has a deviation of 1 after standardization: a norm of 500.
    assert measured["raw_norm"] == pytest.approx(plain["raw_norm"], rel=0.1)
    assert len(measured["raw_norm"]) == len(measured["validation_curve"]) == 2


def test_late_excitation_trains_as_plain_until_it_begins(folder, monkeypatch):
    small = dataclasses.replace(
        evidence_arms.EXPERIMENTS["settings"], images=64, epochs=2, batch=32
    )
    monkeypatch.setitem(evidence_arms.EXPERIMENTS, "settings", small)
    plain, late = (
        evidence_training.perform(Run("settings", "tune", arm, 0, 0.1, 5e-4), folder)
        for arm in ("plain", "late")
    )
    for name in ("train_loss", "weight_change"):
        assert late[name][0] == plain[name][0]
        assert late[name][1] != plain[name][1]


def test_two_processes_cannot_write_one_file(tmp_path):
    file = lines.Lines(tmp_path / "lines.jsonl")
    with file.locked(), pytest.raises(SystemExit, match="another process"), file.locked():
        pass


@pytest.fixture
def signals(monkeypatch):
    """MNIST-1D with few signals."""
    pytest.importorskip("mnist1d")
    monkeypatch.setattr(evidence_data, "_SIGNALS", {"pool": 100, "validation": 50, "test": 50})
    evidence_training.loaded.cache_clear()
    yield
    evidence_training.loaded.cache_clear()


def test_signals_are_those_of_the_package_and_are_not_mirrored(signals, monkeypatch):
    data = evidence_data.generate_signals()
    assert [len(part) for part in (data.pool, data.validation, data.test)] == [100, 50, 50]
    assert data.pool.images.shape == (100, 1, 40)
    again = evidence_data.generate_signals()
    assert data.test.images.equal(again.test.images)
    whole = torch.cat([part.images for part in (data.pool, data.validation, data.test)])
    assert whole.mean().item() == pytest.approx(0, abs=1e-5)
    assert whole.std().item() == pytest.approx(1, abs=1e-3)
    monkeypatch.setattr(evidence_data, "mirrored", None)
    small = dataclasses.replace(evidence_arms.EXPERIMENTS["signals"], images=64, epochs=2)
    monkeypatch.setitem(evidence_arms.EXPERIMENTS, "signals", small)
    measured = evidence_training.perform(Run("signals", "count", "default", 0, 0.03, 5e-4), None)
    assert len(measured["validation_curve"]) == 2
    assert 0 < measured["test_accuracy"] < 100


@pytest.mark.parametrize("network", list(evidence_arms.EXPERIMENTS))
def test_arms_of_a_seed_begin_with_the_same_raw_weights(network, folder):
    data = evidence_data.load(folder)
    experiment = evidence_arms.EXPERIMENTS[network]
    experiment = dataclasses.replace(experiment, pretrained=False)
    lr, decay = experiment.settings("plain")[0]

    def made(arm):
        return evidence_training.prepare(experiment, Run(network, "count", arm, 3, lr, decay), data)

    plain, _, _ = made("plain")
    excited = {"standardize", "lwe", "mwe", "default", "reduction", "last-block", "late"}
    for arm in sorted(excited & set(experiment.arms)):
        _, optimizer, _ = made(arm)
        state = optimizer.state_dict()["state"]["we_surgery"]
        raw = [value for name, value in flat(state) if name.endswith("raw")]
        assert raw
        weights = [weight.flatten().tolist() for weight in plain.parameters()]
        assert all(value.flatten().tolist() in weights for value in raw), arm


def flat(state, prefix=""):
    """Tensors of nested mappings, by their path."""
    if isinstance(state, torch.Tensor):
        return [(prefix, state)]
    if isinstance(state, dict):
        return [leaf for name, value in state.items() for leaf in flat(value, f"{prefix}.{name}")]
    return []


@pytest.mark.parametrize("network", ["resnet_bn", "mixer"])
def test_mwe_on_gradients_has_the_layers_of_mwe(network):
    experiment = evidence_arms.EXPERIMENTS[network]
    plans = [
        ws.plan(experiment.build(), config=experiment.arms[arm].config).decisions
        for arm in ("mwe", "mwe-gradient")
    ]
    own, on_gradients = ([(row.layer, "+".join(row.stages)) for row in rows] for rows in plans)
    assert [(layer, stages.replace("mwe", "mwe_gradient")) for layer, stages in own] == on_gradients


def test_matched_parameters():
    for network in ("resnet_bn", "mixer"):
        experiment = evidence_arms.EXPERIMENTS[network]
        wider = experiment.build(**experiment.arms["wider"].options)
        model = experiment.build()
        lwe = ws.convert(model, config=experiment.arms["lwe"].config)
        counts = [sum(p.numel() for p in each.parameters()) for each in (wider, lwe)]
        assert counts[0] == pytest.approx(counts[1], rel=0.015)
