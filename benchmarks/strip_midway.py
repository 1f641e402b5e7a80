"""What an optimizer's state of the excited weights does to a run that is stripped in the middle.

A small conv net on scikit-learn's digits, converted with ``lwe`` and stripped after 40 of 120
steps, with the state dropped as ``remove_from_optimizer`` does, or kept as if by hand; beside it
a run that is never stripped. Prints the mean of the last 50 losses over the seeds.

    python benchmarks/strip_midway.py
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

import we_surgery as ws
from we_surgery.converted.graphs import excited_weights

STEPS, STRIPPED_AFTER, LAST = 120, 40, 50
OPTIMIZERS = {
    "SGD with momentum": lambda groups: torch.optim.SGD(groups, 0.05, momentum=0.9),
    "AdamW": lambda groups: torch.optim.AdamW(groups, 2e-3),
}
ENDINGS = ("never stripped", "state kept", "state dropped")


def network() -> nn.Module:
    """Five convs with norms for images [N, 1, 8, 8] of ten classes."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def last_loss(optimizer_name: str, ending: str, seed: int) -> float:
    """The mean loss of a run's last steps."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    torch.manual_seed(seed)
    model = ws.convert(network(), "lwe")
    optimizer = OPTIMIZERS[optimizer_name](ws.param_groups(model, 5e-4))
    losses = []
    for step in range(STEPS):
        if step == STRIPPED_AFTER and ending != "never stripped":
            raw_weights = [weight.raw for weight in excited_weights(model)]
            kept = {raw: dict(optimizer.state[raw]) for raw in raw_weights}
            ws.remove_from_optimizer(optimizer, model)
            ws.strip(model, inplace=True)
            if ending == "state kept":
                optimizer.state.update(kept)
        batch = torch.randint(len(labels), (64,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-LAST:]) / LAST


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    table = Table("optimizer", *ENDINGS)
    for name in OPTIMIZERS:
        means = [sum(last_loss(name, e, seed) for seed in seeds) / len(seeds) for e in ENDINGS]
        table.add_row(name, *(f"{mean:.4f}" for mean in means))
    Console().print(table)


if __name__ == "__main__":
    main()
