"""timm's optimizer, schedule, moving average and checkpoints on a converted model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, reparameterize_model

import we_surgery as ws

NAME, CLASSES = "resnet10t", 4


def main(folder: Path, steps: int = 6) -> None:
    torch.manual_seed(0)
    model = ws.convert(timm.create_model(NAME, num_classes=CLASSES), "lwe")

    # timm's factories as they are; `layer_decay=0.7` works as well.
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=1, updates_per_epoch=steps)
    average = ModelEmaV3(model, decay=0.9)
    saver = CheckpointSaver(
        model, optimizer, model_ema=average, checkpoint_dir=str(folder), recovery_dir=str(folder)
    )
    for step in range(steps):
        images, labels = torch.randn(16, 3, 32, 32), torch.randint(CLASSES, (16,))
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model)
        schedule.step_update(step)
    saver.save_checkpoint(0)

    # The checkpoint is enough: the averaged weights for a vanilla timm model.
    saved = torch.load(folder / "checkpoint-0.pth.tar", weights_only=True)
    torch.save(ws.strip_state_dict(saved, key="state_dict_ema"), folder / "deploy.pth")
    deployed = timm.create_model(
        NAME, num_classes=CLASSES, checkpoint_path=str(folder / "deploy.pth")
    )

    # With the model at hand, timm's own reparameterization strips too.
    fused = reparameterize_model(average.module)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        difference = (deployed.eval()(images) - fused.eval()(images)).abs().max()
    print(f"largest difference of the two ways to strip: {difference.item():g}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
