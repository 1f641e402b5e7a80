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
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import we_surgery as ws

STEPS = 4


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, part: slice, *, looks: bool = False
) -> list[float]:
    """With ``looks`` a forward pass before each step leaves the whole weights of FSDP behind."""
    losses = []
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, (x[part], y[part]))
        loss.backward()
        if looks:
            with torch.no_grad():
                model(x)
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


def attached_after_fully_shard(config: dict[str, Any], part: slice) -> dict[str, Any]:
    """Uneven shards: 5 filters of the head over two ranks."""
    torch.manual_seed(0)
    model = Net(is_tied=False)
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.stem, model.mix, model.head):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.manual_seed(1)
    optimizer = sgd(model)
    excitation = ws.attach(model, optimizer, config=config)
    losses = train(model, optimizer, part, looks=True)
    return {
        "losses": losses,
        "weights": {name: p.full_tensor() for name, p in model.named_parameters()},
        "raws": {
            name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone()
            for name, p in excitation.named_parameters().items()
        },
    }


SHARDED = {
    "lwe": {"mode": "lwe", "linear": "lwe"},
    "lwe+mwe": {"mode": "lwe+mwe", "standardize": "on"},
    "thesis": {"mode": "thesis"},
    "spectral norm": {"conv": "spectral_norm", "linear": "spectral_norm"},
    "mwe with a moving maximum": {"mode": "mwe", "mwe": {"detach_max": False}},
}


def alone_by(config: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Net(is_tied=False)
    torch.manual_seed(1)
    optimizer = sgd(model)
    excitation = ws.attach(model, optimizer, config=config)
    losses = train(model, optimizer, slice(None))
    return {
        "losses": losses,
        "weights": dict(model.named_parameters()),
        "raws": excitation.named_parameters(),
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
    for name, config in SHARDED.items():
        found[f"{name}, FSDP2"] = partial(attached_after_fully_shard, config, part)
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
