"""What each of two processes runs for ``test_framework_ranks``, by a framework's trainer."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from equal_forms import Net, batches, loss_of
from processes import joined_group
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import we_surgery as ws

MODE = "lwe+mwe"
STEPS = 4


def sgd(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def images() -> TensorDataset:
    x, y = zip(*batches(STEPS), strict=True)
    return TensorDataset(torch.cat(x), torch.cat(y))


def by_accelerate(folder: Path, rank: int) -> dict[str, torch.Tensor]:
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


def by_lightning(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    import lightning.pytorch as lightning

    from we_surgery.training.lightning import WeightExcitation

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return loss_of(self.net, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

    torch.manual_seed(0)
    module = Module()
    torch.manual_seed(1 + rank)
    trainer = lightning.Trainer(
        default_root_dir=folder,
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[WeightExcitation(MODE, form="attached")],
    )
    # Lightning's own would shuffle.
    sampler = DistributedSampler(images(), num_replicas=2, rank=rank, shuffle=False)
    trainer.fit(module, DataLoader(images(), batch_size=3, sampler=sampler))
    return module.net.state_dict()


FRAMEWORKS = {"accelerate": by_accelerate, "lightning": by_lightning}


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
