"""The figures of docs/analysis.md: what the demo's model learned, measured on the digits.

    make demo                                   # or: python examples/digits.py
    python examples/analyse_digits.py           # about half an hour of one core

Measures the model that the demo trained (it is trained here where `demo_output` is not there),
and trains a small residual network anew for the sweeps. A run that was stopped goes on where it
was. `--only NAME` makes one figure, `--quick` all of them from few evaluations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from digits import digits, resnet18_for_digits, train
from rich.console import Console
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import we_surgery as ws
from we_surgery import analysis

CONFIGS = Path(ws.__file__).parent / "configs"
STRENGTHS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def trained_model(folder: Path, epochs: int) -> nn.Module:
    """The demo's trained model, from its file or trained here in the same way."""
    path = folder / "trained.we.pt"
    if path.exists():
        return ws.load(path)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = ws.convert(resnet18_for_digits(), "lwe")
    images, labels, _, _ = digits()
    train(model, images, labels, epochs)
    ws.save(model, path)
    return model


def small_resnet() -> nn.Module:
    """A residual network of 5 convs on 8x8 images, small enough to be trained many times."""
    down = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        BasicBlock(16, 16),
        BasicBlock(16, 32, stride=2, downsample=down),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def train_small(model: nn.Module, seed: int, strength: float = 0.0, *, epochs: int = 8) -> None:
    """SGD with momentum at a cosine rate on the training digits.

    The strength is that of the pull towards zeros, for layers with trained thresholds.
    """
    images, labels, _, _ = digits()
    steps = epochs * len(images) // 64
    optimizer = torch.optim.SGD(ws.param_groups(model, 5e-4), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        if strength:
            loss = loss + strength * ws.sparsity_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def sparse(config: str) -> Callable[[nn.Module], nn.Module]:
    """Converts by one of the configs."""
    return lambda model: ws.convert(model, config=CONFIGS / config, inplace=True)


def main(folder: Path, output: Path, only: str | None, quick: bool) -> None:
    model = trained_model(folder, epochs=0 if quick else 3)
    _, _, images, labels = digits()
    batches: list[tuple[Tensor, Tensor]] = [(images, labels)]
    if quick:
        batches = [(images[:32], labels[:32])]
    samples = (1, 1) if quick else (5, 5)
    seeds = range(1 if quick else 5)
    train_fn = partial(train_small, epochs=0 if quick else 8)
    sweep = partial(analysis.sweep, small_resnet, train_fn=train_fn, metric=batches, seeds=seeds)
    # Of 360 images a single weight decides about none, so these two are told by the likelihood.
    fine = {"score": "log_likelihood"}
    positions = [50, 100] if quick else range(1, 101)
    measurements: dict[str, Callable[..., analysis.Result]] = {
        "importance": partial(
            analysis.magnitude_curve, model, batches, positions=positions, **fine
        ),
        "location": partial(analysis.location_maps, model, batches, samples=samples, **fine),
        "multipliers": partial(
            analysis.multiplier_validity, model, batches, random_draws=10, **fine
        ),
        "prune": partial(analysis.pruning_curve, model, batches),
        "epsilon": partial(sweep, variants=analysis.epsilon_variants(), title="epsilon of MWE"),
        "reduction": partial(
            sweep, variants=analysis.reduction_variants((16, 8)), title="reduction of LWE"
        ),
        "initialization": partial(
            sweep, variants=analysis.initialization_variants(), title="how LWE's layers start"
        ),
        "no_normalization": partial(
            sweep,
            variants=analysis.normalization_free_variants(),
            title="without normalization layers",
        ),
    }
    measurements["sparse_training"] = partial(
        analysis.sweep,
        small_resnet,
        {
            "Dynamic Sparse Training": sparse("dynamic-sparse.yaml"),
            "LWE + Dynamic Sparse Training": sparse("lwe-dynamic-sparse.yaml"),
        },
        partial(train_small, epochs=0 if quick else 12),
        batches,
        strengths=(1e-3,) if quick else STRENGTHS,
        seeds=range(1 if quick else 2),
        title="LWE with Dynamic Sparse Training",
    )
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    for name, measurement in measurements.items():
        if only is not None and name != only:
            continue
        console.print(f"[bold]{name}")
        stem = output / name
        with analysis.progress_bar(name) as progress:
            result = measurement(
                progress_file=stem.with_name(f"{name}.progress.jsonl"), progress=progress
            )
        analysis.save_result(result, stem, force=True)
        for row in result.summary()[:12]:
            console.print("  ", row)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("demo_output"), help="of the demo")
    parser.add_argument("--output", type=Path, default=FIGURES)
    parser.add_argument("--only", help="one figure")
    parser.add_argument("--quick", action="store_true", help="few evaluations, for a trial")
    options = parser.parse_args()
    torch.set_num_threads(1)
    main(options.folder, options.output, options.only, options.quick)
