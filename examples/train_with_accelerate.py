"""accelerate needs nothing of ours but the two lines of any loop."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torchvision
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import we_surgery as ws


def main(folder: Path) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = torchvision.models.resnet18(num_classes=4)
    ws.convert(model, "lwe", inplace=True)  # before `prepare`, which may wrap it

    optimizer = torch.optim.AdamW(ws.param_groups(model, 0.05), lr=1e-3)
    data = TensorDataset(torch.randn(32, 3, 32, 32), torch.randint(4, (32,)))
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, 16))
    for images, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(torch.nn.functional.cross_entropy(model(images), labels))
        optimizer.step()
    accelerator.save_state(str(folder))

    if not accelerator.is_main_process:
        return
    # From the saved state, which `we-strip` reads too ...
    state = ws.strip_state_dict(load_file(folder / "model.safetensors"))
    torchvision.models.resnet18(num_classes=4).load_state_dict(state, strict=True)
    # ... or from the model at hand.
    deployed = ws.strip(accelerator.unwrap_model(model), example_inputs=torch.randn(1, 3, 32, 32))
    print(f"stripped: {type(deployed).__module__}.{type(deployed).__name__}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
