"""Training that goes on bit for bit wherever it was killed: run it, kill it, run it again.

    python examples/resume_training.py --folder run

Excitation adds nothing to the recipe: whether it has set in is part of the model's state dict.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import we_surgery as ws

STEPS_PER_EPOCH = 4


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(16, 4),
    )


def batch() -> tuple[Tensor, Tensor]:
    """Noisy images [N, 3, 8, 8] of four brightnesses, drawn from torch's own generator."""
    labels = torch.randint(4, (16,))
    return torch.randn(16, 3, 8, 8) + labels.view(-1, 1, 1, 1), labels


def save(state: dict[str, Any], path: Path) -> None:
    """Writes beside the last checkpoint and then takes its place, so that one is always whole."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)


def main(folder: Path, epochs: int = 3) -> list[float]:
    """Trains on from the folder's checkpoint, if there is one.

    Returns:
        The losses of the steps that were taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    # Build all as the first time, in the same order; then load.
    model = ws.convert(network(), "lwe+mwe", start="paused")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.AdamW(ws.param_groups(model, 0.05), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * STEPS_PER_EPOCH)
    excitation = ws.WESchedule(model, 1, average)  # has no state of its own
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}

    first, losses = 0, []
    path = folder / "last.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])  # and those of NumPy, Python and CUDA where used
        first = saved["step"]
    for step in range(first, epochs * STEPS_PER_EPOCH):
        if excitation.step(step // STEPS_PER_EPOCH):
            print(f"excitation sets in before step {step}")
        images, labels = batch()
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.6f}", flush=True)
        state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
        save(state | {"step": step + 1, "random": torch.get_rng_state()}, path)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("resumable_run"))
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    main(options.folder, options.epochs)
