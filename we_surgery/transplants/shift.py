"""Convs with one weight per kernel as a shift of each channel and a 1x1 conv.

Shift Attention Layers are trained for this (Hacene et al., ICPR 2020): once hardened, each kernel
``W[o, i]`` has one weight. If its position ``q_i`` is the same for all filters, ``conv(x; W)`` is
``conv1x1(shift(x, q_i); w)``, with the stride on the 1x1 conv and zeros from outside. This depends
on the dense weight alone, so any such conv qualifies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from we_surgery.errors import InputError
from we_surgery.transplants.base import Site, Transplant, qualified_name, replace_module


class Shift(nn.Module):
    """Moves each channel of ``[B, C, H, W]`` by its own offset, with zeros from outside.

    It computes a depthwise conv of this kernel size, padding and dilation whose kernels have a
    single one, at ``positions``, ``[C]``, int64, in row-major order.
    """

    positions: Tensor

    def __init__(
        self,
        channels: int,
        kernel_size: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int] = (1, 1),
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.padding = padding
        self.dilation = dilation
        self.register_buffer("positions", torch.zeros(channels, dtype=torch.int64, device=device))

    def forward(self, x: Tensor) -> Tensor:
        (rows, columns), (down, right) = self.kernel_size, self.dilation
        height = x.shape[2] + 2 * self.padding[0] - down * (rows - 1)
        width = x.shape[3] + 2 * self.padding[1] - right * (columns - 1)
        padded = F.pad(x, (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        positions = self.positions[:, None, None]
        shifted = padded[:, :, :height, :width]
        # A choice, not a product with zero: infinities elsewhere must not matter.
        for position in range(1, rows * columns):
            top, left = down * (position // columns), right * (position % columns)
            moved = padded[:, :, top : top + height, left : left + width]
            shifted = torch.where(positions == position, moved, shifted)
        return shifted

    def extra_repr(self) -> str:
        return f"{len(self.positions)}, kernel_size={self.kernel_size}, padding={self.padding}"


class ShiftConv2d(nn.Module):
    """A shift of each input channel and a 1x1 conv: a conv with one weight per kernel.

    The weights of the conv that it replaces are not read.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        device, dtype = conv.weight.device, conv.weight.dtype
        kernel_size = (conv.kernel_size[0], conv.kernel_size[1])
        dilation = (conv.dilation[0], conv.dilation[1])
        self.shift = Shift(conv.in_channels, kernel_size, padding_of(conv), dilation, device)
        self.pointwise = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            1,
            stride=(conv.stride[0], conv.stride[1]),
            bias=conv.bias is not None,
            device=device,
            dtype=dtype,
        )
        self.train(conv.training)

    @staticmethod
    def from_conv(conv: nn.Conv2d) -> ShiftConv2d:
        """What computes the same as ``conv``."""
        reason = unsupported_reason(conv)
        positions = None if reason else shared_positions(conv.weight)
        if positions is None:
            raise InputError(
                f"the conv {reason or _SEVERAL}, so it is not a shift and 1x1 conv",
                "Deploy it as the dense conv it is.",
            )
        converted = ShiftConv2d(conv)
        weights = conv.weight.detach().flatten(2)
        with torch.no_grad():
            converted.shift.positions.copy_(positions)
            index = positions[None, :, None].expand(conv.out_channels, -1, 1)
            converted.pointwise.weight.copy_(weights.gather(2, index)[:, :, None])
            if conv.bias is not None and converted.pointwise.bias is not None:
                converted.pointwise.bias.copy_(conv.bias)
        if not torch.equal(converted.dense_weight(), conv.weight):
            raise InputError("the conv holds NaN", "Go back to an earlier checkpoint.")
        return converted

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.pointwise(self.shift(x))
        return result

    def dense_weight(self) -> Tensor:
        """The weight ``[O, I, kH, kW]`` of the conv that computes the same."""
        weight = self.pointwise.weight.detach()
        filters, channels = weight.shape[:2]
        dense = weight.new_zeros(filters, channels, math.prod(self.shift.kernel_size))
        index = self.shift.positions[None, :, None].expand(filters, -1, 1)
        dense.scatter_(2, index, weight[:, :, 0])
        return dense.reshape(filters, channels, *self.shift.kernel_size)

    @property
    def stored_words(self) -> float:
        """The 32-bit words it needs: a weight per kernel, and a position per input channel.

        A position takes 4 bits in a 3x3 kernel. As in the authors' code, biases do not count.
        """
        bits = math.ceil(math.log2(math.prod(self.shift.kernel_size)))
        return self.pointwise.weight.numel() + len(self.shift.positions) * bits / 32


_SEVERAL = "has kernels with several weights, or at different places in its filters"


@dataclass(frozen=True)
class ShiftTransplant(Transplant):
    """:class:`ShiftConv2d` in the place of each conv that computes the same."""

    name: ClassVar[str] = "shift"
    summary: ClassVar[str] = "convs with one weight per kernel, at shared places, as shift and 1x1"
    source: ClassVar[str] = "Hacene et al., ICPR 2020; code eghouti/SAL"
    published: ClassVar[tuple[str, ...]] = (
        "20 layers of 83 maps, CIFAR-10: 882,124 words of 32 bits, dense 7,274,711 (from the "
        "formulas of the authors' code)",
    )
    deploys_to: ClassVar[str] = "stays; a class of we_surgery"

    @property
    def stays(self) -> bool:
        return True

    def sites(self, model: nn.Module) -> list[Site]:
        return [
            self._site(name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d) and math.prod(module.kernel_size) > 1
        ]

    def _site(self, name: str, conv: nn.Conv2d) -> Site:
        reason = unsupported_reason(conv)
        if reason is None and shared_positions(conv.weight) is None:
            reason = _SEVERAL
        why = reason or "has one weight per kernel, at the same place in all filters"
        return Site(name, qualified_name(type(conv)), why, fits=reason is None)

    def attach(self, model: nn.Module, place: str) -> None:
        replace_module(model, place, ShiftConv2d.from_conv(_conv_at(model, place)))

    def reattach(self, model: nn.Module, place: str) -> None:
        replace_module(model, place, ShiftConv2d(_conv_at(model, place)))


def _conv_at(model: nn.Module, place: str) -> nn.Conv2d:
    module = model.get_submodule(place)
    reason = unsupported_reason(module) if isinstance(module, nn.Conv2d) else "is not a conv"
    if not isinstance(module, nn.Conv2d) or reason is not None:
        raise InputError(
            f"shift replaces a conv, but {place!r} {reason}",
            "Use a plan that was made for this model.",
        )
    return module


def unsupported_reason(conv: nn.Conv2d) -> str | None:
    """Why the conv cannot be a shift and a 1x1 conv, whatever its weights; or None."""
    if type(conv) is not nn.Conv2d:
        return "is of a class of its own"
    if conv.groups > 1:
        return "has groups"
    if conv.padding_mode != "zeros":
        return f"pads with {conv.padding_mode!r}"
    if conv.padding == "same" and any(
        step * (size - 1) % 2 for size, step in zip(conv.kernel_size, conv.dilation, strict=True)
    ):
        return "pads unevenly"
    return None


def padding_of(conv: nn.Conv2d) -> tuple[int, int]:
    """The conv's padding of rows and columns in numbers."""
    if conv.padding == "same":
        sizes = zip(conv.kernel_size, conv.dilation, strict=True)
        rows, columns = (step * (size - 1) // 2 for size, step in sizes)
        return rows, columns
    return (0, 0) if isinstance(conv.padding, str) else (conv.padding[0], conv.padding[1])


def shared_positions(weight: Tensor) -> Tensor | None:
    """The position of the one weight in each input channel's kernels, ``[I]``, row-major.

    None if a channel's kernels, in ``[O, I, kH, kW]``, have weights at several positions. A channel
    without weights has position 0.
    """
    if weight.is_meta:
        return None
    used = (weight.detach() != 0).any(0).flatten(1)
    return used.int().argmax(1) if bool((used.sum(1) <= 1).all()) else None
