"""What torchrun runs for ``test_ranks``: attached training over two processes."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from equal_forms import Net, batches, loss_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import we_surgery as ws

STEPS = 4


def train(model: nn.Module, optimizer: torch.optim.Optimizer, part: slice) -> list[float]:
    losses = []
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, (x[part], y[part]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def attached_around_ddp(is_first: bool, mode: str, seed: int, part: slice) -> dict[str, Any]:
    """Excitation attached before or after the model is wrapped; ranks begin with other seeds."""
    torch.manual_seed(0)
    model = Net()
    torch.manual_seed(seed)
    if is_first:
        optimizer = sgd(model)
        excitation = ws.attach(model, optimizer, mode)
        wrapped: nn.Module = DistributedDataParallel(model)
    else:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer = sgd(wrapped)
        excitation = ws.attach(wrapped, optimizer, mode)
    losses = train(wrapped, optimizer, part)
    return {
        "losses": losses,
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "raws": {name: p.detach().clone() for name, p in excitation.named_parameters().items()},
    }


def alone(mode: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Net()
    torch.manual_seed(1)
    optimizer = sgd(model)
    ws.attach(model, optimizer, mode)
    losses = train(model, optimizer, slice(None))
    return {"losses": losses, "weights": dict(model.named_parameters())}


def cases(rank: int) -> dict[str, Callable[[], Any]]:
    part = slice(3 * rank, 3 * rank + 3)
    found: dict[str, Callable[[], Any]] = {}
    for mode in ("lwe+mwe", "thesis"):
        for is_first in (True, False):
            name = f"{mode}, {'before' if is_first else 'after'} DDP"
            found[name] = partial(attached_around_ddp, is_first, mode, 1 + rank, part)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(sys.argv[2])
    result: dict[str, Any] = {}
    for number, (name, run) in enumerate(cases(rank).items()):
        dist.init_process_group(
            "gloo",
            init_method=(folder / f"rendezvous-{number}").as_uri(),
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=60),
        )
        try:
            result[name] = run()
        except Exception:
            result[name] = traceback.format_exc()
        finally:
            dist.destroy_process_group()
    torch.save(result, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
