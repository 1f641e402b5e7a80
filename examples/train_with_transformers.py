"""The Trainer of transformers: a callback converts, and each checkpoint has a stripped model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from we_surgery.training.transformers import WeightExcitation


class Images(Dataset[dict[str, Any]]):
    """Sixteen random images of three classes."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": torch.randn(3, 32, 32), "labels": index % 3}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        ResNetForImageClassification(config),
        arguments,
        train_dataset=Images(),
        callbacks=[WeightExcitation("lwe")],  # the one line
    )
    trainer.train()

    stripped = ResNetForImageClassification.from_pretrained(folder / "checkpoint-4" / "stripped")
    print(f"stripped: {sum(p.numel() for p in stripped.parameters())} parameters, as vanilla")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
