"""What all Triton kernels share: the table of layers, and the reading of a tile of weights.

Each launch works on all layers. A program reads what it needs to know about its layer from a table
in the GPU's memory, int64 throughout: for each of the ``DEALS`` the number of each layer's first
program, then the :class:`Row` of each layer. A layer without a program in a deal has the first
number of the layer after it. A kernel's constants name the stages that any layer has; a layer
without one of them reads a neutral value instead.

A weight is read as O filters of I channels with K kernel positions, in tiles of ``ROWS`` filters
and ``COLUMNS`` channels. Filters lie one after the other in memory; within one, ``channel_step``
and ``position_step`` distinguish contiguous weights (K and 1) from channels_last ones (1 and I).
LWE's hidden channels are read ``UNITS`` at a time.

Importing this module needs Triton.
"""

# Triton reads annotations itself: no `from __future__ import annotations` here.

from typing import NamedTuple

import triton
import triton.language as tl


class Row(NamedTuple):
    """One layer: where its float32 tensors are, and its sizes.

    Addresses are 0 where a layer has no such tensor; kernels ask :func:`has` before they look.
    The names are those of ``ClosedFormInputs``, ``Kept`` and the formulas.
    """

    weight: int
    standardize_epsilon: int = 0
    fc1_weight: int = 0
    fc1_bias: int = 0
    fc2_weight: int = 0
    fc2_bias: int = 0
    gain: int = 0
    shift: int = 0
    mwe_epsilon: int = 0
    result: int = 0
    """The excited weight, or the gradient of the raw one."""
    gradient: int = 0
    """Of the excited weight."""
    mean: int = 0
    norm: int = 0
    scale: int = 0
    hidden: int = 0
    limit: int = 0
    maxima: int = 0
    """The largest ``|w|`` of each tile."""
    partial_t: int = 0
    """sum(m g c) over the columns of each tile, ``[column tiles, O]``."""
    partial_total: int = 0
    """sum(m g), likewise."""
    z: int = 0
    sums: int = 0
    """sum_K(c), ``[O, I]``"""
    v: int = 0
    f: int = 0
    average: int = 0
    """The mean of d - f c, ``[O]``."""
    by_fc1_weight: int = 0
    by_fc1_bias: int = 0
    by_fc2_weight: int = 0
    by_fc2_bias: int = 0
    out_channels: int = 0
    channels: int = 0
    positions: int = 0
    channel_step: int = 0
    position_step: int = 0
    hidden_channels: int = 0


# Where each of them is in a row; the order is that of Row.
(
    WEIGHT, STANDARDIZE_EPSILON, FC1_WEIGHT, FC1_BIAS, FC2_WEIGHT, FC2_BIAS,
    GAIN, SHIFT, MWE_EPSILON,
    RESULT, GRADIENT, MEAN, NORM, SCALE, HIDDEN, LIMIT, MAXIMA,
    PARTIAL_T, PARTIAL_TOTAL, Z, SUMS, V, F, AVERAGE,
    BY_FC1_WEIGHT, BY_FC1_BIAS, BY_FC2_WEIGHT, BY_FC2_BIAS,
    OUT_CHANNELS, CHANNELS, POSITIONS, CHANNEL_STEP, POSITION_STEP, HIDDEN_CHANNELS,
) = (tl.constexpr(place) for place in range(len(Row._fields)))  # fmt: skip
FIELDS = tl.constexpr(len(Row._fields))

# How programs are distributed over layers: by ROWS filters (of layers whose filters are summed up,
# for standardization or LWE), by tile (of all layers, of the former, or of those whose weight is
# trained), by COLUMNS channels with UNITS hidden ones, by BLOCK weights (of layers with MWE).
(
    BY_FILTERS, BY_TILES, BY_SUMMED_TILES, BY_TRAINED_TILES, BY_UNITS, BY_BLOCKS,
) = (tl.constexpr(deal) for deal in range(6))  # fmt: skip
DEALS = tl.constexpr(6)


@triton.jit
def layer_of(table, DEAL: tl.constexpr, LAYERS: tl.constexpr):
    """The row of the program's layer, and the program's number within the layer."""
    program = tl.program_id(0)
    firsts = table + DEAL * LAYERS
    layer = tl.sum((tl.load(firsts + tl.arange(0, LAYERS)) <= program).to(tl.int32), 0) - 1
    number = program - tl.load(firsts + layer).to(tl.int32)
    return table + DEALS * LAYERS + layer * FIELDS, number


@triton.jit
def size_of(layer, FIELD: tl.constexpr):
    """One of a layer's sizes."""
    return tl.load(layer + FIELD).to(tl.int32)


@triton.jit
def tensor_of(layer, FIELD: tl.constexpr):
    """Where one of a layer's tensors begins."""
    return tl.load(layer + FIELD).to(tl.pointer_type(tl.float32))


@triton.jit
def has(layer, FIELD: tl.constexpr):
    """Whether the layer has this tensor."""
    return tl.load(layer + FIELD) != 0


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
def per_row(layer, FIELD: tl.constexpr, rows, is_row, STAGE: tl.constexpr, DEFAULT: tl.constexpr):
    """A number for each filter, ``[ROWS, 1]``; ``DEFAULT`` where the stage is absent."""
    if STAGE:
        place = tensor_of(layer, FIELD) + rows
        found = tl.load(place, mask=is_row & has(layer, FIELD), other=DEFAULT)
    else:
        found = tl.full(rows.shape, DEFAULT, tl.float32)
    return found


@triton.jit
def affine_of(layer, rows, is_row, STANDARDIZE: tl.constexpr, RESCALE: tl.constexpr):
    """The mean, r, p and q of each filter."""
    centre = per_row(layer, MEAN, rows, is_row, STANDARDIZE, 0.0)
    r = per_row(layer, SCALE, rows, is_row, STANDARDIZE, 1.0)
    p = per_row(layer, GAIN, rows, is_row, RESCALE, 1.0)
    q = per_row(layer, SHIFT, rows, is_row, RESCALE, 0.0)
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
def gate_of(layer, rows, is_row, columns, UNITS: tl.constexpr, LWE: tl.constexpr):
    """LWE's m for one tile, ``[ROWS, COLUMNS]``; 1 where the stage is absent."""
    m = tl.full([rows.shape[0], columns.shape[1]], 1.0, tl.float32)
    if LWE:
        is_located = has(layer, FC2_BIAS)
        is_column = (columns < size_of(layer, CHANNELS)) & is_located
        m *= tl.load(tensor_of(layer, FC2_BIAS) + columns, mask=is_column, other=0.0)
        for start in range(0, size_of(layer, HIDDEN_CHANNELS), UNITS):
            units = start + tl.arange(0, UNITS)
            h = by_unit(tensor_of(layer, HIDDEN), layer, rows, is_row, units[None, :])
            m += tl.dot(h, fc2_of(layer, columns, units[:, None]), input_precision="ieee")
        m = tl.where(is_located, tl.sigmoid(m), 1.0)
    return m
