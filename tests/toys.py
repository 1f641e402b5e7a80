"""Small models and helpers that several tests share."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from we_surgery.converted.layer import excited_layers
from we_surgery.planning.policy import MODES

EXCITING_MODES = [mode for mode in MODES if mode != "none"]

EVERYTHING = {"mode": "lwe+mwe", "linear": "lwe+mwe", "depthwise": "lwe+mwe", "shift": "lwe"}
"""A config that leaves few layers alone, and none with a gentle excitation."""


class ConvNet(nn.Module):
    """Two convs with norms, a depthwise conv, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2, padding=1, padding_mode="reflect")
        self.group_norm = nn.GroupNorm(3, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.depthwise(x))
        x = F.relu(self.group_norm(self.grouped(x)))
        return self.head(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    """A gate, known by its class name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, 4, 1)
        self.expand = nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.expand(F.relu(self.reduce(pooled))).sigmoid()


class Shift(nn.Module):
    """A temporal shift as TSM writes it: around the layer it feeds, in ``net``."""

    def __init__(self, net: nn.Module, n_segment: int = 2, fold_div: int = 4) -> None:
        super().__init__()
        self.net = net
        self.n_segment = n_segment
        self.fold_div = fold_div

    def forward(self, x: Tensor) -> Tensor:
        clips = x.reshape(-1, self.n_segment, *x.shape[1:])
        fold = x.shape[1] // self.fold_div
        shifted = torch.cat(
            [
                torch.cat([clips[:, 1:, :fold], torch.zeros_like(clips[:, :1, :fold])], 1),
                torch.cat([torch.zeros_like(clips[:, :1, fold:]), clips[:, :-1, fold:]], 1),
            ],
            2,
        )
        return self.net(shifted.reshape(x.shape))


class Zoo(nn.Module):
    """One layer of each sort that the modes tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.grey = nn.Conv2d(1, 8, 3, padding=1)
        self.grey_norm = nn.BatchNorm2d(8)
        self.normed = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.unnormed = nn.Conv2d(16, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.depthwise_norm = nn.BatchNorm2d(16)
        self.gate = SqueezeExcite(16)
        self.shifted = Shift(nn.Conv2d(16, 16, 1, bias=False))
        self.shifted_norm = nn.BatchNorm2d(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grey_norm(self.grey(x)))
        x = F.relu(self.norm(self.normed(x)))
        x = F.relu(self.unnormed(x))
        x = self.gate(F.relu(self.depthwise_norm(self.depthwise(x))))
        x = F.relu(self.shifted_norm(self.shifted(x)))
        tokens = x.flatten(2).transpose(1, 2)
        attended, _ = self.attention(tokens, tokens, tokens)
        return self.head(attended.mean(1))


ZOO_INPUT = (2, 1, 8, 8)


def substituted(vanilla: nn.Module, converted: nn.Module) -> nn.Module:
    """A copy of ``vanilla`` with the excited weights of ``converted`` written in by hand."""
    result = copy.deepcopy(vanilla)
    for name, layer in excited_layers(converted):
        for parameter in layer.excited_parameters:
            excited = getattr(layer, parameter).detach().clone(memory_format=torch.preserve_format)
            result.get_submodule(name)._parameters[parameter].data = excited
    return result


def is_vanilla(model: nn.Module) -> bool:
    """Whether no excited layer is left."""
    return next(excited_layers(model), None) is None
