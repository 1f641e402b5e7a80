"""BAM: attention between the stages of a network (Park et al., BMVC 2018).

``x * (1 + sigmoid(C(x) * S(x)))``: a channel branch, ``[B, C, 1, 1]``, with a mean over positions
and an MLP, and a position branch, ``[B, 1, H, W]``, with dilated convs. This is the authors' code.
Their text, and equations 3.5 and 3.6 of the thesis, have the sum of the branches in the sigmoid and
a batch norm at the end of each: ``form="sum"``. The published file fails when the module is made
(an undefined name), so this follows its intent.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from we_surgery.errors import InputError
from we_surgery.excitations.functions import check_count
from we_surgery.transplants.attention import like
from we_surgery.transplants.base import Site, Transplant, qualified_name, replace_module
from we_surgery.transplants.residual_blocks import residual_blocks

FORMS = ("product", "sum")


class BAM(nn.Module):
    """The attention module: ``[B, channels, H, W]`` to the same shape."""

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        dilation: int = 4,
        form: str = "product",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = max(channels // reduction, 1)

        def conv(inputs: int, outputs: int, size: int = 1) -> nn.Conv2d:
            step = dilation if size > 1 else 1
            padding = step * (size // 2)
            return nn.Conv2d(
                inputs, outputs, size, padding=padding, dilation=step, device=device, dtype=dtype
            )

        def norm(features: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(features, device=device, dtype=dtype)

        # 1x1 convs of a 1x1 map compute what linear layers of the flattened map would.
        self.channel = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            conv(channels, inner),
            norm(inner),
            nn.ReLU(inplace=True),
            conv(inner, channels),
        )
        self.spatial = nn.Sequential(conv(channels, inner), norm(inner), nn.ReLU(inplace=True))
        for _ in range(2):
            self.spatial.extend([conv(inner, inner, 3), norm(inner), nn.ReLU(inplace=True)])
        self.spatial.append(conv(inner, 1))
        if form == "sum":
            self.channel.append(norm(channels))
            self.spatial.append(norm(1))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        channel, spatial = self.channel(x), self.spatial(x)
        both = channel + spatial if self.form == "sum" else channel * spatial
        gated: Tensor = x * (1 + both.sigmoid())
        return gated

    def extra_repr(self) -> str:
        return f"form={self.form!r}"


@dataclass(frozen=True)
class BAMTransplant(Transplant):
    """BAM after the last block of each stage except the last: before each downsampling.

    Training needs more than one image per batch, for the norm of the channel branch.

    Attributes:
        reduction: channels over hidden channels, at least one.
        dilation: of the two 3x3 convs over positions.
        form: ``product`` (the authors' code) or ``sum`` (their text).
    """

    name: ClassVar[str] = "bam"
    summary: ClassVar[str] = "bottleneck attention: weighs channels and positions between stages"
    source: ClassVar[str] = (
        "Park et al., BMVC 2018; WE paper, Table 1; code Jongchan/attention-module"
    )
    published: ClassVar[tuple[str, ...]] = (
        "ImageNet top-1 of ResNet50 with LWE and without: 77.4/76.0 (WE paper, Table 1); the "
        "authors report 76.86 without",
    )
    deploys_to: ClassVar[str] = "stays; a class of we_surgery"

    reduction: int = 16
    dilation: int = 4
    form: str = "product"

    def __post_init__(self) -> None:
        check_count("reduction", self.reduction)
        check_count("dilation", self.dilation)
        if self.form not in FORMS:
            raise ValueError(f"the form must be one of {', '.join(FORMS)}, not {self.form!r}")

    @property
    def stays(self) -> bool:
        return True

    def sites(self, model: nn.Module) -> list[Site]:
        blocks = [block for block in residual_blocks(model) if block.name]
        found = []
        for block, following in itertools.pairwise(blocks):
            same_stage = block.name.rpartition(".")[0] == following.name.rpartition(".")[0]
            if same_stage and not following.downsamples:
                continue
            type_name = qualified_name(type(model.get_submodule(block.name)))
            has_gate = _follows(model, block.name) is not None
            reason = "has a BAM behind it" if has_gate else "the last block of a stage"
            found.append(Site(block.name, type_name, reason, fits=not has_gate))
        return found

    def attach(self, model: nn.Module, place: str) -> None:
        block = model.get_submodule(place)
        channels = {block.name: block.channels for block in residual_blocks(model)}.get(place)
        if channels is None or not place:
            raise InputError(
                f"bam goes behind a residual block, and {place!r} is {qualified_name(type(block))}",
                "Use a plan that was made for this model.",
            )
        device, dtype = like(block, model)
        attention = BAM(channels, self.reduction, self.dilation, self.form, device, dtype)
        attention.train(block.training)
        parent_name, _, child_name = place.rpartition(".")
        parent = model.get_submodule(parent_name)
        if type(parent) is nn.Sequential and child_name == str(len(parent) - 1):
            parent.append(attention)
        else:
            replace_module(model, place, nn.Sequential(block, attention).train(block.training))


def _follows(model: nn.Module, name: str) -> BAM | None:
    """The BAM that :meth:`BAMTransplant.attach` put behind a block, or None."""
    parent = model.get_submodule(name.rpartition(".")[0])
    last = list(parent.children())[-1] if type(parent) is nn.Sequential else None
    return last if isinstance(last, BAM) else None
