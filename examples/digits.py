"""Convert, train, strip: ResNet18 on real 8x8 digits, end to end, in about a minute on a CPU.

Run it with `make demo`. Each surgery goes through the command line, as a user's would; the
table at the end is measured on the files that were written.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import we_surgery as ws


def resnet18_for_digits() -> nn.Module:
    """ResNet18 of torchvision with a stem for 8x8 grey images and 10 classes."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then test images and labels; images are [N, 1, 8, 8]."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return images[train], labels[train], images[test], labels[test]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    steps = epochs * len(images) // 64
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in track(range(steps), description="training", transient=True):
        batch = torch.randint(len(images), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).double().mean().item()


def command(*words: str | Path) -> None:
    """Runs one of the tool's commands, shown as a user would type it."""
    print(f"$ we-{shlex.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, "-m", "we_surgery", *map(str, words)], check=True)


def main(folder: Path, epochs: int) -> None:
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    train_images, train_labels, test_images, test_labels = digits()

    torch.save(resnet18_for_digits(), folder / "model.pt")
    command("convert", folder / "model.pt", "--mode", "lwe", "--force")

    excited = ws.load(folder / "model.we.pt")
    train(excited, train_images, train_labels, epochs)
    torch.save(excited, folder / "trained.we.pt")
    command("strip", folder / "trained.we.pt", "--input-shape", "1,1,8,8", "--force")

    stripped = torch.load(folder / "trained.stripped.pt", weights_only=False)
    with torch.no_grad():
        difference = (excited.eval()(test_images) - stripped.eval()(test_images)).abs().max()
    rows = {
        "parameters": [f"{sum(p.numel() for p in m.parameters()):,}" for m in (excited, stripped)],
        "test accuracy": [
            f"{accuracy(model, test_images, test_labels):.2%}" for model in (excited, stripped)
        ],
        "largest output difference": ["", f"{difference.item():g}"],
    }
    table = Table("", "excited (training)", "stripped (inference)")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console().print(table)
    if difference != 0 or type(stripped) is not torchvision.models.ResNet:
        raise SystemExit("the stripped model is not what was trained")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo_output"))
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    main(options.folder, options.epochs)
