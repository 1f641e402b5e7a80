"""Small models and labelled data for the analyses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import we_surgery as ws
from we_surgery.analysis import Sweep


class Residual(nn.Module):
    """Convs in sequence, a branch that is added in place, a shared ReLU, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.branch = nn.Conv2d(8, 8, 1)
        self.last = nn.Sequential(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        out = self.second(self.relu(self.first(x)))
        out += self.branch(x)
        return self.head(self.last(self.relu(out)).mean((2, 3)))


def batches(count: int = 2, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator),
            torch.randint(5, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def likelihood(model: nn.Module) -> float:
    """What the score ``log_likelihood`` is over :func:`batches`, written out."""
    inputs = torch.cat([x for x, _ in batches()])
    labels = torch.cat([y for _, y in batches()])
    was_training = model.training
    model.eval()
    with torch.no_grad():
        loss = F.cross_entropy(model(inputs).double(), labels)
    model.train(was_training)
    return -loss.item()


def converted(mode: str = "lwe") -> nn.Module:
    """A converted model whose multipliers differ by layer and kernel."""
    torch.manual_seed(3)
    model = ws.convert(Residual(), mode)
    for name, parameter in model.named_parameters():
        if "lwe" in name:
            parameter.data.mul_(4)
    return model


def sweep_of(*runs: tuple[str, int, float | None, float | None]) -> Sweep:
    """A sweep of runs, each a variant, a seed, a metric, and a difference to the first variant."""
    rows = [
        {
            "variant": variant,
            "seed": seed,
            "metric": metric,
            "sparsity": None if metric is None else 0.0,
            "failure": "diverged" if metric is None else "",
            "difference": difference,
        }
        for variant, seed, metric, difference in runs
    ]
    return Sweep(rows=rows, title="modes", score="accuracy", baseline=runs[0][0])


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
