"""The closed form by the Triton kernels: 3 to 6 launches a layer, forward and backward together.

Imported where it is used alone: it needs Triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from we_surgery.excitations import triton_kernels as kernels
from we_surgery.excitations.backends import Arithmetic
from we_surgery.excitations.terms import Kept, Terms

ROWS = 16
COLUMNS = 32
BLOCK = 1024
LARGEST_HIDDEN = 256
"""Widest hidden layer of LWE that a program holds in its registers."""


def supports(filters: Tensor, terms: Terms) -> bool:
    """Whether the kernels compute this composition; otherwise eager does."""
    if filters.dtype != torch.float32 or filters.numel() >= 2**31:
        return False
    if terms.mwe_epsilon is not None and not terms.detach_max:
        return False
    return terms.fc1_bias is None or terms.fc1_bias.shape[0] <= LARGEST_HIDDEN


def excite(filters: Tensor, terms: Terms) -> tuple[Tensor, Kept]:
    """As :func:`we_surgery.excitations.formulas.excite`, of float32 weights."""
    filters = _dense(filters)
    layer = _Layer(filters, terms)
    mean = norm = scale = hidden = limit = None
    if layer.standardizes:
        mean, norm, scale = (layer.new(layer.out_channels, 1) for _ in range(3))
    if layer.locates:
        hidden = layer.new(layer.out_channels, layer.hidden_channels)
    if layer.standardizes or layer.locates:
        launch(
            kernels.summarize,
            (layer.row_tiles,),
            filters,
            *layer.given(terms.standardize_epsilon, *terms[1:3], mean, norm, scale, hidden),
            *layer.sizes,
            STANDARDIZE=layer.standardizes,
            LWE=layer.locates,
            **layer.blocks,
        )
    amplifies = terms.mwe_epsilon is not None
    excited = torch.empty_like(filters)
    tiles = layer.row_tiles * layer.column_tiles
    maxima = layer.new(tiles) if amplifies else None
    launch(
        kernels.multiply,
        (layer.row_tiles, layer.column_tiles),
        filters,
        excited,
        *layer.given(*terms[3:7], mean, scale, hidden, maxima),
        *layer.sizes,
        STANDARDIZE=layer.standardizes,
        LWE=layer.locates,
        RESCALE=terms.gain is not None,
        MWE=amplifies,
        **layer.blocks,
    )
    if amplifies:
        limit = layer.new()
        launch(
            kernels.amplify,
            (math.ceil(filters.numel() / BLOCK),),
            excited,
            *layer.given(maxima, terms.mwe_epsilon, limit),
            filters.numel(),
            tiles,
            BLOCK=BLOCK,
        )
    shaped = None if mean is None else mean.view(-1, *[1] * (filters.ndim - 1))
    return excited, Kept(shaped, norm, scale, hidden, limit)


def differentiate(
    g: Tensor, filters: Tensor, terms: Terms, kept: Kept, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """As :func:`we_surgery.excitations.formulas.differentiate`."""
    filters = _dense(filters)
    if g.stride() != filters.stride():
        g = torch.empty_like(filters).copy_(g)
    layer = _Layer(filters, terms)
    rows, channels, hidden_channels = layer.out_channels, layer.channels, layer.hidden_channels
    z = sums = v = f = average = None
    if layer.locates:
        z, sums, v = (layer.new(rows, width) for width in (channels, channels, hidden_channels))
    if layer.standardizes:
        f, average = layer.new(rows), layer.new(rows)
    stages: dict[str, Any] = {
        "STANDARDIZE": layer.standardizes,
        "LWE": layer.locates,
        "RESCALE": terms.gain is not None,
        "MWE": terms.mwe_epsilon is not None,
    }
    if layer.standardizes or layer.locates:
        launch(
            kernels.sum_filters,
            (layer.row_tiles,),
            filters,
            g,
            *layer.given(*terms[1:7], *kept, z, sums, v, f, average),
            *layer.sizes,
            **stages,
            **layer.blocks,
        )
    by_filters: Tensor | None = None
    if needed[0]:
        by_filters = torch.empty_like(filters)
        launch(
            kernels.by_weight,
            (layer.row_tiles, layer.column_tiles),
            filters,
            g,
            *layer.given(terms.fc1_weight, *terms[3:7], kept.mean, *kept[2:], v, f, average),
            by_filters,
            *layer.sizes,
            **stages,
            **layer.blocks,
        )
    by_fcs: tuple[Tensor | None, ...] = (None,) * 4
    if layer.locates and any(needed[1:]):
        found = [
            layer.new(*shape)
            for shape in (
                (hidden_channels, channels),
                (hidden_channels,),
                (channels, hidden_channels),
                (channels,),
            )
        ]
        launch(
            kernels.by_fcs,
            (layer.column_tiles,),
            *layer.given(kept.scale, kept.hidden, z, sums, v),
            *found,
            rows,
            channels,
            layer.positions,
            hidden_channels,
            STANDARDIZE=layer.standardizes,
            **layer.blocks,
        )
        by_fcs = tuple(
            value if is_needed else None for value, is_needed in zip(found, needed[1:], strict=True)
        )
    return by_filters, *by_fcs


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs one kernel; every launch goes through here, to be counted."""
    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        kernel[grid](*arguments, **constants)


class _Layer:
    """The sizes of one launch."""

    def __init__(self, filters: Tensor, terms: Terms) -> None:
        self.filters = filters
        self.out_channels, self.channels = filters.shape[:2]
        self.positions = math.prod(filters.shape[2:])
        self.standardizes = terms.standardize_epsilon is not None
        self.locates = terms.fc1_bias is not None
        self.hidden_channels = 1 if terms.fc1_bias is None else terms.fc1_bias.shape[0]
        self.row_tiles = math.ceil(self.out_channels / ROWS)
        self.column_tiles = math.ceil(self.channels / COLUMNS)
        is_channels_last = self.positions > 1 and not filters.is_contiguous()
        steps = (1, self.channels) if is_channels_last else (self.positions, 1)
        self.sizes = (
            self.out_channels,
            self.channels,
            self.positions,
            *steps,
            self.hidden_channels,
        )
        self.blocks = {
            "ROWS": ROWS,
            "COLUMNS": COLUMNS,
            # Powers of two, and at least what a matrix product takes.
            "UNITS": max(16, 1 << (self.hidden_channels - 1).bit_length()),
        }

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.filters.device)

    def given(self, *tensors: Tensor | None) -> list[Tensor]:
        """What a kernel is given; the weight itself where it will not look."""
        return [self.filters if tensor is None else tensor.contiguous() for tensor in tensors]


def _dense(filters: Tensor) -> Tensor:
    """The same weight, filter after filter, contiguous or channels_last within each."""
    if filters.is_contiguous():
        return filters
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats.get(filters.ndim)
    if memory_format is not None and filters.is_contiguous(memory_format=memory_format):
        return filters
    return filters.contiguous()


ARITHMETIC = Arithmetic(excite, differentiate)
