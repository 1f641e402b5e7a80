"""Lightning's strategies over two processes; as a script, those that fork the processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
import torch.distributed as dist
from equal_forms import loss_of
from framework_runs import MODE, NETS, images, sgd
from torch.utils.data import DataLoader, DistributedSampler

from we_surgery.training.lightning import WeightExcitation


class Module(lightning.LightningModule):
    """Trains one of ``NETS``; each process writes what it has at the end."""

    def __init__(self, net: str, results: Path) -> None:
        super().__init__()
        self.net = NETS[net]()
        self.results = results

    def train_dataloader(self) -> DataLoader[Any]:
        # Lightning's own sampler would shuffle.
        return DataLoader(images(), 3, sampler=DistributedSampler(images(), shuffle=False))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        torch.manual_seed(1 + dist.get_rank())  # the excitation is drawn next
        return sgd(self)

    def on_train_end(self) -> None:
        torch.save(self.net.state_dict(), f"{self.results}-{dist.get_rank()}.pt")


class Manual(Module):
    automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()


def fit(folder: Path, strategy: str, optimization: str) -> dict[str, torch.Tensor]:
    """What the caller's network is after training."""
    torch.manual_seed(0)
    net = "unused" if "unused" in strategy else "plain"
    kind = {"automatic": Module, "manual": Manual}[optimization]
    module = kind(net, folder / f"{strategy}-{optimization}")
    trainer = lightning.Trainer(
        default_root_dir=folder,
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[WeightExcitation(MODE, form="attached")],
    )
    trainer.fit(module)
    return module.net.state_dict()


if __name__ == "__main__":
    folder, _, *names = sys.argv[1:]
    for name in names:
        torch.save(fit(Path(folder), *name.split("-")), Path(folder, f"{name}-parent.pt"))
