"""A training loop of your own, excited by one line: seconds on a CPU.

The line is marked. Everything else is the loop as it was.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn

import we_surgery as ws


def stripes(number: int) -> tuple[Tensor, Tensor]:
    """Noisy images [N, 3, 16, 16] of four kinds: striped across, along, both ways, not at all."""
    labels = torch.randint(4, (number,))
    wave = torch.sin(torch.arange(16.0))
    across, along = (labels % 2).view(-1, 1, 1, 1), (labels // 2).view(-1, 1, 1, 1)
    clean = across * wave.view(1, 1, 16, 1) + along * wave.view(1, 1, 1, 16)
    return clean + 0.5 * torch.randn(number, 3, 16, 16), labels


def main(steps: int = 20) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4)
    optimizer = torch.optim.SGD(ws.param_groups(model, 5e-4), lr=0.01, momentum=0.9)
    excitation = ws.attach(model, optimizer, mode="lwe")  # the line

    for step in range(steps):
        images, labels = stripes(16)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")

    print(f"excited weights: {len(excitation.plan.excited)}")
    assert type(model.conv1) is nn.Conv2d
    images, labels = stripes(64)
    with torch.no_grad():
        accuracy = (model.eval()(images).argmax(1) == labels).double().mean()
    print(f"the model's accuracy, as it is deployed: {accuracy:.0%}")


if __name__ == "__main__":
    main()
