"""Train in both forms, strip: ResNet18 on real 8x8 digits, end to end, in about a minute on a CPU.

Run it with `make demo`. One epoch is trained with excitation attached and with the converted model,
from the same seed, and the weights of both are compared. The converted model trains on; each
surgery of it goes through the command line, as a user's would, and the table at the end is measured
on the files that were written.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import subprocess
import sys
from collections.abc import Generator
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


def epochs_of_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    epochs: int,
    form: str,
) -> Generator[int]:
    """The same loop for both forms; gives the number of each epoch after it."""
    images, labels = data
    steps = epochs * len(images) // 64
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in track(range(1, steps + 1), description=f"training, {form}", transient=True):
        batch = torch.randint(len(images), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % (steps // epochs) == 0:
            yield step // (steps // epochs)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    for _ in epochs_of_training(model, sgd(model), (images, labels), epochs, "converted"):
        pass


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).double().mean().item()


def command(*words: str | Path) -> None:
    """Runs one of the tool's commands, shown as a user would type it."""
    print(f"$ we-{shlex.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, "-m", "we_surgery", *map(str, words)], check=True)


def attached_epoch(path: Path, data: tuple[Tensor, Tensor], epochs: int) -> nn.Module:
    """The vanilla model in a file after its first epoch with excitation attached."""
    model = ws.load(path)
    optimizer = sgd(model)
    torch.manual_seed(0)  # as we-convert does: the excitations start from the same values
    ws.attach(model, optimizer, mode="lwe")
    with contextlib.closing(
        epochs_of_training(model, optimizer, data, epochs, "attached")
    ) as training:
        next(training)
    return model


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Over all tensors of two models of the same architecture."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def main(folder: Path, epochs: int) -> None:
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    *data, test_images, test_labels = digits()
    train_data = (data[0], data[1])

    torch.save(resnet18_for_digits(), folder / "model.pt")
    attached = attached_epoch(folder / "model.pt", train_data, epochs)

    command("convert", folder / "model.pt", "--mode", "lwe", "--force")
    excited = ws.load(folder / "model.we.pt")
    training = epochs_of_training(excited, sgd(excited), train_data, epochs, "converted")
    next(training)
    between_forms = largest_difference(attached, ws.strip(excited))
    print(f"after one epoch, attached and converted weights differ by up to {between_forms:g}")
    for _ in training:
        pass
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
    if between_forms > 1e-3:
        raise SystemExit("the two forms did not train the same weights")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo_output"))
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    main(options.folder, options.epochs)
