"""Activation attention at the end of residual branches: SE and CBAM, timm's modules.

An attention module multiplies activations, so it stays in the deployed model. Weight excitation is
folded as usual, and does not excite the attention's layers.

As in the papers, the module follows the last norm (or conv) of each residual branch, before the
addition. timm's ResNets have a slot for it, ``se``, and get timm's keys; in other blocks the last
norm becomes ``nn.Sequential(norm, attention)``.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from we_surgery.errors import InputError
from we_surgery.excitations.functions import check_count
from we_surgery.transplants.base import Site, Transplant, qualified_name, replace_module
from we_surgery.transplants.residual_blocks import ResidualBlock, channels_of, residual_blocks


@dataclass(frozen=True)
class BranchAttention(Transplant):
    """An attention module at the end of each residual branch.

    Attributes:
        reduction: channels over hidden channels of the attention module, at least one.
    """

    reduction: int = 16

    def __post_init__(self) -> None:
        check_count("reduction", self.reduction)

    @property
    def stays(self) -> bool:
        return True

    @abstractmethod
    def build(self, channels: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The module for maps ``[B, channels, H, W]``."""

    def sites(self, model: nn.Module) -> list[Site]:
        return [self._site(model, block) for block in residual_blocks(model)]

    def _site(self, model: nn.Module, block: ResidualBlock) -> Site:
        type_name = qualified_name(type(model.get_submodule(block.end)))
        if block.gate is not None:
            return Site(block.end, type_name, f"has an attention gate ({block.gate})", fits=False)
        where = f" of {block.type_name} {block.name!r}" if block.name else ""
        return Site(block.end, type_name, f"the residual branch{where} ends here")

    def attach(self, model: nn.Module, place: str) -> None:
        end = model.get_submodule(place)
        channels = channels_of(end)
        if not channels:
            raise InputError(
                f"{self.name} goes behind a norm or conv of maps, and {place!r} is "
                f"{qualified_name(type(end))}",
                "Use a plan that was made for this model.",
            )
        device, dtype = like(end, model)
        attention = self.build(channels, device, dtype)
        attention.train(end.training)
        block = model.get_submodule(place.rpartition(".")[0])
        if block.__dict__.get("se", block) is None:
            block.se = attention
        else:
            replace_module(model, place, nn.Sequential(end, attention).train(end.training))


@dataclass(frozen=True)
class SqueezeExcitation(BranchAttention):
    """``x * sigmoid(W2 relu(W1 mean(x)))``, with the mean over positions."""

    name: ClassVar[str] = "se"
    summary: ClassVar[str] = "squeeze-and-excitation: weighs channels by what they all hold"
    source: ClassVar[str] = "Hu et al., CVPR 2018; WE paper, Table 1; timm's SEModule"
    published: ClassVar[tuple[str, ...]] = (
        "ImageNet top-1 with LWE and without: ResNet18 71.7/71.0, ResNet50 77.5/77.1, "
        "ResNet152 79.0/78.7, ResNeXt50 78.1/77.8, WRN50-2 78.6/78.3 (WE paper, Table 1)",
    )
    deploys_to: ClassVar[str] = "stays; timm's class"

    def build(self, channels: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        from timm.layers import SEModule

        squeezed = max(channels // self.reduction, 1)
        module: nn.Module = SEModule(channels, rd_channels=squeezed, device=device, dtype=dtype)
        return module


@dataclass(frozen=True)
class CBAM(BranchAttention):
    """A gate over channels, then one over positions.

    ``x * sigmoid(MLP(mean) + MLP(max))``, with mean and max over positions, then
    ``x * sigmoid(BN(conv([mean, max])))``, with mean and max over channels.

    timm's module, with two parts of the authors' code that timm lacks: biases in the MLP, and a
    last norm with momentum 0.01 whose weight starts at zero, so the gate over positions starts at
    one half. The authors stack max before mean; that only swaps two input channels.
    ``kernel_size`` is that of the conv over positions.
    """

    name: ClassVar[str] = "cbam"
    summary: ClassVar[str] = "convolutional block attention: weighs channels, then positions"
    source: ClassVar[str] = "Woo et al., ECCV 2018; WE paper, Table 1; timm's CbamModule"
    published: ClassVar[tuple[str, ...]] = (
        "ImageNet top-1 of ResNet50 with LWE and without: 77.7/77.2 (WE paper, Table 1); the "
        "authors report 77.62 without",
    )
    deploys_to: ClassVar[str] = "stays; timm's class"

    kernel_size: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("kernel_size", self.kernel_size)
        if self.kernel_size % 2 == 0:  # it would leave a map of another size
            raise ValueError(f"the kernel_size must be odd, not {self.kernel_size}")

    def build(self, channels: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        from timm.layers.cbam import CbamModule

        module: nn.Module = CbamModule(
            channels,
            rd_channels=max(channels // self.reduction, 1),
            spatial_kernel_size=self.kernel_size,
            mlp_bias=True,
            device=device,
            dtype=dtype,
        )
        norm = module.get_submodule("spatial.conv.bn")
        assert isinstance(norm, nn.BatchNorm2d)
        norm.momentum = 0.01
        nn.init.zeros_(norm.weight)
        return module


def like(module: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of a module's parameters, or else of its model's."""
    for parameters in (module.parameters(), model.parameters()):
        for parameter in parameters:
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.get_default_dtype()
