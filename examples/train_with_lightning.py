"""Lightning: a callback converts before the optimizer is made and strips each checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torchvision
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import we_surgery as ws
from we_surgery.training.lightning import WeightExcitation


class Classifier(LightningModule):
    """An ordinary LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torchvision.models.resnet18(num_classes=4)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(ws.param_groups(self, 0.05), lr=1e-3)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 3, 32, 32), torch.randint(4, (32,)))
    trainer = Trainer(
        callbacks=[WeightExcitation("lwe", submodule="network")],  # the one line
        default_root_dir=folder,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=16))

    for path in sorted((folder / "checkpoints").iterdir()):
        print(path.name)
    stripped = next((folder / "checkpoints").glob("*.stripped.safetensors"))
    torchvision.models.resnet18(num_classes=4).load_state_dict(load_file(stripped), strict=True)
    print("the stripped file is a vanilla ResNet18")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
