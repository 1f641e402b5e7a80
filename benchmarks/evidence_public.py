"""The same run with the authors' published layers: is a result the method's, or ours?

    python benchmarks/evidence_public.py      # some minutes of one core

The layers compute in each forward pass what the public code computes: weight standardization, LWE
by two 1x1 convs on the pooled kernels, MWE by the logarithm with a maximum that is part of the
graph. The batch-norm ResNet trains with them, and with `we_surgery.attach` from the same weights on
the same batches, in float64. Writes `results/evidence_public.json`: the losses of both and their
largest relative difference.

Left out is a flag of the public code by which MWE is skipped in a layer's very first forward pass.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import evidence_data as data
import torch
import torch.nn.functional as F
from evidence_arms import EXPERIMENTS
from evidence_training import measure
from lines import RESULTS, origin
from torch import Tensor, nn

import we_surgery as ws

ARMS = ("standardize", "lwe", "mwe", "lwe+mwe")
LR, DECAY = 0.1, 5e-4
_EPSILON = 0.1


class PublicConv2d(nn.Conv2d):
    """A conv that excites its weight in each forward pass."""

    def excite(self, stages: list[str]) -> None:
        """Makes the layers of LWE, where it is among the stages."""
        self.stages = stages
        if "lwe" in stages:
            hidden = max(self.in_channels // 16, 1)
            self.fc1 = nn.Conv2d(self.weight.shape[1], hidden, 1)
            self.fc2 = nn.Conv2d(hidden, self.weight.shape[1], 1)

    def forward(self, images: Tensor) -> Tensor:
        weight = self.weight
        if "standardize" in self.stages:
            flat = weight.flatten(1)
            mean, deviation = flat.mean(1), flat.std(1) + 1e-5
            weight = (weight - mean.view(-1, 1, 1, 1)) / deviation.view(-1, 1, 1, 1)
        if "lwe" in self.stages:
            pooled = F.avg_pool2d(weight, weight.shape[2])
            weight = weight * torch.sigmoid(self.fc2(torch.relu(self.fc1(pooled))))
        if "mwe" in self.stages:
            pole = (1 + _EPSILON) * weight.abs().max()
            weight = pole * 0.5 * torch.log((1 + weight / pole) / (1 - weight / pole))
        return F.conv2d(images, weight, self.bias, self.stride, self.padding, 1, self.groups)


def pair(
    arm: str, seed: int = 0, detach_max: bool = False, **options: Any
) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    """The attached model and that of public layers, with equal raw weights and excitations."""
    experiment = EXPERIMENTS["resnet_bn"]
    torch.manual_seed(seed)
    attached = experiment.build(**options).double()
    public = experiment.build(**options).double()
    optimizer = experiment.make_optimizer(attached, LR, DECAY)
    config = dict(experiment.arms[arm].config or {})
    if "mwe" in arm:
        config["mwe"] = {"detach_max": detach_max}
    excitation = ws.attach(attached, optimizer, config=config)
    for decision in excitation.plan.decisions:
        if decision.excitation:
            layer = public.get_submodule(decision.module)
            layer.__class__ = PublicConv2d
            layer.excite([name for stage in decision.excitation for name in stage])
    public.double()
    public.load_state_dict(_public_names(excitation.converted().state_dict(), public))
    return [(attached, optimizer), (public, experiment.make_optimizer(public, LR, DECAY))]


def _public_names(state: dict[str, Tensor], public: nn.Module) -> dict[str, Tensor]:
    shapes = {name: value.shape for name, value in public.state_dict().items()}
    renamed = {
        name.replace("raw_weight", "weight").replace("excitation.lwe.", ""): value
        for name, value in state.items()
    }
    return {name: value.view(shapes[name]) for name, value in renamed.items() if name in shapes}


def losses(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: data.Split, steps: int
) -> list[float]:
    """Training losses at a constant learning rate."""
    found = []
    for inputs, labels in data.batches(images, EXPERIMENTS["resnet_bn"].batch, steps, seed=0):
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def compare(arm: str, images: data.Data, steps: int) -> dict[str, Any]:
    """Trains both; each epoch's mean loss, test accuracies, and the largest difference."""
    experiment = EXPERIMENTS["resnet_bn"]
    training = _double(data.draw(images.pool, experiment.images, seed=0))
    test = _double(images.test)
    curves, accuracies = [], []
    for model, optimizer in pair(arm):
        curves.append(losses(model, optimizer, training, steps))
        accuracies.append(measure(model, test)["accuracy"])
    gaps = [abs(ours / theirs - 1) for ours, theirs in zip(*curves, strict=True)]
    size = experiment.steps_per_epoch
    return {
        "arm": arm,
        "steps": steps,
        "losses": [
            [round(sum(curve[n : n + size]) / size, 8) for n in range(0, steps, size)]
            for curve in curves
        ],
        "test_accuracy": accuracies,
        "largest_difference": max(gaps),
    }


def _double(split: data.Split) -> data.Split:
    return data.Split(split.images.double(), split.labels)


def main() -> None:
    """Compares all arms and writes the file."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--data", type=Path, default=data.FOLDER, help="IDX files")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = data.load(options.data)
    steps = options.epochs * EXPERIMENTS["resnet_bn"].steps_per_epoch
    found = origin() | {"runs": [compare(arm, images, steps) for arm in ARMS]}
    path = RESULTS / "evidence_public.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
