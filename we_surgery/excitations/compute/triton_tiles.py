"""What several Triton kernels read of a tile of weights: filters, channels, LWE's multipliers.

A weight is read as O filters of I channels with K kernel positions, in tiles of ``ROWS`` filters
and ``COLUMNS`` channels. Filters lie one after the other in memory; within one, ``channel_step``
and ``position_step`` tell contiguous weights (K and 1) from channels_last ones (1 and I). LWE's
hidden channels are gone through ``UNITS`` at a time.

Importing this module needs Triton.
"""

# Triton reads annotations itself: no `from __future__ import annotations` here.

import triton
import triton.language as tl

from we_surgery.excitations.compute.triton_table import (
    CHANNEL_STEP,
    CHANNELS,
    FC1_WEIGHT,
    FC2_BIAS,
    FC2_WEIGHT,
    GAIN,
    HIDDEN,
    HIDDEN_CHANNELS,
    MEAN,
    OUT_CHANNELS,
    POSITIONS,
    SCALE,
    SHIFT,
    layer_of,
    near,
    size_of,
    tensor_of,
)

SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def filters_of(layer, number, ROWS: tl.constexpr):
    """The filters of a program, ``[ROWS, 1]``, and whether they are there."""
    # A weight may have more than 2**31 elements.
    rows = (number * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    return rows, rows < size_of(layer, OUT_CHANNELS)


@triton.jit
def tile_of(table, DEAL: tl.constexpr, LAYERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS):
    """Layer, number in it, filters ``[ROWS, 1]`` and channels ``[1, COLUMNS]`` of a program."""
    layer, number = layer_of(table, DEAL, LAYERS)
    across = tl.cdiv(size_of(layer, CHANNELS), COLUMNS)
    rows, is_row = filters_of(layer, number // across, ROWS)
    columns = number % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return layer, number, rows, is_row, columns


@triton.jit
def places_of(layer, rows, columns):
    """Where the weights of a tile are at position 0, from the start of their tensor."""
    fan_in = size_of(layer, CHANNELS) * size_of(layer, POSITIONS)
    return rows * fan_in + columns * size_of(layer, CHANNEL_STEP)


@triton.jit
def per_row(values, rows, is_row, IS_THERE: tl.constexpr, DEFAULT: tl.constexpr):
    """A number for each filter, ``[ROWS, 1]``; ``DEFAULT`` where the stage is absent."""
    if IS_THERE:
        found = tl.load(values + rows, mask=is_row, other=DEFAULT)
    else:
        found = tl.full(rows.shape, DEFAULT, tl.float32)
    return found


@triton.jit
def affine_of(layer, kept, rows, is_row, STANDARDIZE: tl.constexpr, RESCALE: tl.constexpr):
    """The mean, r, p and q of each filter."""
    centre = per_row(near(kept, layer, MEAN), rows, is_row, STANDARDIZE, 0.0)
    r = per_row(near(kept, layer, SCALE), rows, is_row, STANDARDIZE, 1.0)
    p = per_row(tensor_of(layer, GAIN), rows, is_row, RESCALE, 1.0)
    q = per_row(tensor_of(layer, SHIFT), rows, is_row, RESCALE, 0.0)
    return centre, r, p, q


@triton.jit
def by_unit(values, layer, rows, is_row, units):
    """``[ROWS, UNITS]`` of a tensor ``[O, hidden]``."""
    hidden_channels = size_of(layer, HIDDEN_CHANNELS)
    place = values + rows * hidden_channels + units
    return tl.load(place, mask=is_row & (units < hidden_channels), other=0.0)


@triton.jit
def fc1_of(layer, columns, units):
    """A, or its transpose, as ``columns`` and ``units`` stand."""
    channels = size_of(layer, CHANNELS)
    is_there = (columns < channels) & (units < size_of(layer, HIDDEN_CHANNELS))
    return tl.load(
        tensor_of(layer, FC1_WEIGHT) + units * channels + columns, mask=is_there, other=0
    )


@triton.jit
def fc2_of(layer, columns, units):
    """B, or its transpose, as ``columns`` and ``units`` stand."""
    hidden_channels = size_of(layer, HIDDEN_CHANNELS)
    is_there = (columns < size_of(layer, CHANNELS)) & (units < hidden_channels)
    place = tensor_of(layer, FC2_WEIGHT) + columns * hidden_channels + units
    return tl.load(place, mask=is_there, other=0)


@triton.jit
def gate_of(layer, kept, rows, is_row, columns, UNITS: tl.constexpr, LWE: tl.constexpr):
    """LWE's m for one tile, ``[ROWS, COLUMNS]``; 1 where the stage is absent."""
    m = tl.full([rows.shape[0], columns.shape[1]], 1.0, tl.float32)
    if LWE:
        is_column = columns < size_of(layer, CHANNELS)
        m *= tl.load(tensor_of(layer, FC2_BIAS) + columns, mask=is_column, other=0.0)
        for start in range(0, size_of(layer, HIDDEN_CHANNELS), UNITS):
            units = start + tl.arange(0, UNITS)
            h = by_unit(near(kept, layer, HIDDEN), layer, rows, is_row, units[None, :])
            m += tl.dot(h, fc2_of(layer, columns, units[:, None]), input_precision="ieee")
        m = tl.sigmoid(m)
    return m
