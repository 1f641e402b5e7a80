"""One run: training, and what is measured of it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import evidence_data as data
import torch
import torch.nn.functional as F
from evidence_arms import EXPERIMENTS, Experiment
from evidence_data import Data, Split
from torch import Tensor, nn

import we_surgery as ws

BINS = 15
_PRETRAINING = {"lr": 0.1, "decay": 5e-4, "images": 4000, "steps": 300}
_HALF = data.CLASSES // 2


@dataclass(frozen=True)
class Run:
    """What makes a run; equal ones have equal curves on one machine."""

    network: str
    phase: str
    arm: str
    seed: int
    lr: float
    decay: float


@cache
def loaded(folder: Path | None) -> Data:
    """Fashion-MNIST of a folder; MNIST-1D without one."""
    return data.generate_signals() if folder is None else data.load(folder)


def perform(run: Run, folder: Path | None) -> dict[str, Any]:
    """Trains and measures; a tuning run does not see the test images."""
    torch.set_num_threads(1)
    experiment = EXPERIMENTS[run.network]
    images = loaded(None if experiment.signals else folder)
    model, optimizer, excitation = prepare(experiment, run, images)
    training = data.draw(images.pool, experiment.images, run.seed)
    shown = images.validation.part(slice(0, data.CURVE))
    watch = _Watch(model, excitation, shown)
    measured = {"settings": _settings(experiment, run.arm)}
    measured |= _train(experiment, run, model, optimizer, training, excitation, watch)
    measured["train_accuracy"] = measure(model, training.part(slice(0, data.CURVE)))["accuracy"]
    measured["validation_accuracy"] = measure(model, images.validation)["accuracy"]
    if run.phase == "count":
        measured |= {f"test_{name}": value for name, value in measure(model, images.test).items()}
    measured["parameters"] = sum(weight.numel() for weight in model.parameters())
    return measured


def _settings(experiment: Experiment, arm: str) -> dict[str, Any]:
    return {
        "images": experiment.images,
        "steps": experiment.steps(arm),
        "batch": experiment.batch,
        "optimizer": experiment.optimizer,
        "config": experiment.arms[arm].config,
    }


def prepare(
    experiment: Experiment, run: Run, images: Data
) -> tuple[nn.Module, torch.optim.Optimizer, ws.AttachedExcitation | None]:
    """The model, its optimizer, and what the arm adds to them.

    All arms of a seed begin with the same weights, but for those that have other layers.
    """
    arm = experiment.arms[run.arm]
    torch.manual_seed(run.seed)
    model = experiment.build(**arm.options)
    if experiment.pretrained:
        model.load_state_dict(_pretrained(run.network, run.seed, images))
        torch.manual_seed(run.seed + 1)
        model.fc.reset_parameters()
    if arm.se:
        ws.convert(model, config={"mode": "none", "transplants": ["se"]}, inplace=True)
    model.to(memory_format=torch.channels_last)
    optimizer = experiment.make_optimizer(model, run.lr, run.decay)
    if arm.config is None:
        return model, optimizer, None
    init = arm.init or ("preserve" if experiment.pretrained else "paper")
    start: Literal["on", "paused"] = "paused" if arm.begins else "on"
    excitation = ws.attach(model, optimizer, config=arm.config, init=init, start=start)
    return model, optimizer, excitation


@lru_cache(maxsize=2)
def _pretrained(network: str, seed: int, images: Data) -> dict[str, Tensor]:
    """Weights of the plain network after training on the first half of the classes."""
    experiment = EXPERIMENTS[network]
    model = experiment.build()
    optimizer = experiment.make_optimizer(model, _PRETRAINING["lr"], _PRETRAINING["decay"])
    training = data.draw(images.pool, int(_PRETRAINING["images"]), seed, _HALF)
    steps = int(_PRETRAINING["steps"])
    schedule = warm_cosine(optimizer, steps)
    for inputs, labels in data.batches(training, experiment.batch, steps, seed):
        train_step(model, optimizer, schedule, inputs, labels)
    return model.state_dict()


class _Watch:
    """Measures the model at the end of each epoch."""

    def __init__(
        self, model: nn.Module, excitation: ws.AttachedExcitation | None, shown: Split
    ) -> None:
        self._model, self._excitation, self._shown = model, excitation, shown
        self._weights = _weights(model)
        self.found: dict[str, list[float]] = {
            name: [] for name in ("validation_curve", "train_loss", "weight_change", "raw_norm")
        }

    def __call__(self, train_loss: float) -> None:
        after = _weights(self._model)
        trained = self._model if self._excitation is None else self._excitation.converted()
        raw = [
            weight.detach().square().sum().item()
            for name, weight in trained.named_parameters()
            if weight.dim() > 1 and ".excitation." not in name
        ]
        measured = {
            "validation_curve": measure(self._model, self._shown)["accuracy"],
            "train_loss": round(train_loss, 4),
            "weight_change": _relative_change(self._weights, after),
            "raw_norm": round(sum(raw) ** 0.5, 3),
        }
        for name, value in measured.items():
            self.found[name].append(value)
        self._weights = after


def _train(
    experiment: Experiment,
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    training: Split,
    excitation: ws.AttachedExcitation | None,
    watch: _Watch,
) -> dict[str, Any]:
    steps = experiment.steps(run.arm)
    schedule = warm_cosine(optimizer, steps)
    spent = 0.0
    losses: list[float] = []
    feed = data.batches(training, experiment.batch, steps, run.seed, mirror=not experiment.signals)
    arm = experiment.arms[run.arm]
    for step, (inputs, labels) in enumerate(feed, start=1):
        if excitation is not None and arm.begins and step == round(arm.begins * steps) + 1:
            excitation.resume()
        start = time.process_time()
        losses.append(train_step(model, optimizer, schedule, inputs, labels))
        spent += time.process_time() - start
        diverged = not math.isfinite(losses[-1])
        if step % experiment.steps_per_epoch == 0 or step == steps or diverged:
            watch(mean(losses))
            losses.clear()
        if diverged:
            break
    return {"diverged": diverged, "cpu_seconds": round(spent, 2)} | watch.found


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    inputs: Tensor,
    labels: Tensor,
) -> float:
    """One optimizer step; the loss before it."""
    model.train()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
    schedule.step()
    return loss.item()


def warm_cosine(
    optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over 5 % of the steps, then a cosine to 0."""
    warm = max(1, round(0.05 * steps))

    def share(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _weights(model: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in model.parameters() if weight.dim() > 1]


def _relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    """Median over layers of how far a weight went in an epoch, over its norm at the beginning."""
    ratios = [(new - old).norm() / old.norm() for old, new in zip(before, after, strict=True)]
    return round(torch.stack(ratios).median().item(), 4)


@torch.no_grad()
def measure(model: nn.Module, split: Split) -> dict[str, float]:
    """Accuracy and ECE in percent, and loss."""
    model.eval()
    logits = torch.cat([model(images) for images in split.images.split(500)])
    loss = F.cross_entropy(logits, split.labels).item()
    hits = logits.argmax(1) == split.labels
    return {
        "accuracy": round(100 * hits.double().mean().item(), 3),
        "loss": round(loss, 5),
        "ece": round(100 * calibration_error(logits.softmax(1).amax(1), hits), 3),
    }


def calibration_error(confidence: Tensor, hits: Tensor) -> float:
    """Expected calibration error over 15 equal bins of the confidence."""
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64)
    gaps.index_add_(0, bins.clamp(min=0), hits.double() - confidence.double())
    return (gaps.abs().sum() / len(hits)).item()
