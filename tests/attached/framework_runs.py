"""What each of two processes runs for ``test_framework_ranks``, by a framework's trainer."""

from __future__ import annotations

import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from equal_forms import Net, batches, loss_of, plain_step
from processes import joined_group
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import we_surgery as ws

MODE = "lwe+mwe"
STEPS = 4


def sgd(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def images() -> TensorDataset:
    x, y = zip(*batches(STEPS), strict=True)
    return TensorDataset(torch.cat(x), torch.cat(y))


def by_accelerate(folder: Path, rank: int) -> dict[str, Tensor]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = Net()
    model, optimizer, data = accelerator.prepare(
        model, sgd(model), DataLoader(images(), batch_size=3)
    )
    torch.manual_seed(1 + rank)
    ws.attach(model, optimizer, MODE)
    for batch in data:
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, batch))
        optimizer.step()
    return accelerator.unwrap_model(model).state_dict()


def by_lightning(strategy: str, optimization: str, folder: Path, _: int) -> dict[str, Tensor]:
    import lightning_runs

    return lightning_runs.fit(folder, strategy, optimization)


def by_hand(net: str, _: Path, rank: int) -> dict[str, Tensor]:
    """A loop of one's own with DDP."""
    torch.manual_seed(0)
    model = NETS[net]()
    optimizer = sgd(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=net == "unused")
    torch.manual_seed(1 + rank)
    ws.attach(wrapped, optimizer, MODE)
    sampler = DistributedSampler(images(), shuffle=False)
    for batch in DataLoader(images(), batch_size=3, sampler=sampler):
        plain_step(optimizer, wrapped, batch, 0)
    return model.state_dict()


class SometimesUnused(Net):
    """The second process never reads ``extra``, and no process reads ``idle``."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Conv2d(3, 5, 3)
        self.idle = nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.extra(x).mean((2, 3)) if dist.get_rank() == 0 else y


NETS = {"plain": Net, "unused": SometimesUnused}
OWN = ["ddp", "ddp_find_unused_parameters_true"]
"""Strategies of Lightning that join processes that run."""
FRAMEWORKS = {
    "accelerate": by_accelerate,
    **{f"by hand-{net}": partial(by_hand, net) for net in NETS},
    **{
        f"{strategy}-{optimization}": partial(by_lightning, strategy, optimization)
        for strategy in OWN
        for optimization in ("automatic", "manual")
    },
}


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "NODE_RANK": 0}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, and not used
    found: dict[str, Any] = {}
    for name, run in FRAMEWORKS.items():
        with joined_group(folder / name, rank, 2):
            try:
                found[name] = run(folder, rank)
            except Exception:
                found[name] = traceback.format_exc()
    torch.save(found, folder / f"frameworks-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
