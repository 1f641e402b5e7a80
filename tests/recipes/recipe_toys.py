import torch
from PIL import Image
from torch import nn


def picture(path, size=(20, 16), seed=0, mode="RGB", high=256):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    values = torch.randint(high, shape, generator=generator, dtype=torch.uint8)
    Image.fromarray(values.numpy()).save(path)
    return path


def tiny_network(num_classes=2):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def network_without_norm(num_classes=2):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, num_classes),
    )  # fmt: skip


def tiny_video_network(num_classes=2):
    return nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, num_classes),
    )  # fmt: skip


class TinySegmentation(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, num_classes, 1)

    def forward(self, images):
        return {"out": self.head(self.norm(self.backbone(images)).relu())}
