"""The excited weights of ``formulas`` by Triton kernels, in float32.

Each is launched once at most, for all layers of a table (``triton_tiles``).

Importing this module needs Triton. With ``TRITON_INTERPRET=1`` set before the import the kernels
run on the CPU.
"""

# Triton reads annotations itself: no `from __future__ import annotations` here.

import triton
import triton.language as tl

from we_surgery.excitations.compute import triton_tiles as tiles


@triton.jit
def _atanh(x):
    """``0.5 log((1 + x) / (1 - x))``; by its series below 1/4, where the formula loses digits."""
    square = x * x
    series = 1 / 11 + square * (1 / 13 + square * (1 / 15))
    series = 1 / 5 + square * (1 / 7 + square * (1 / 9 + square * series))
    series = x * (1 + square * (1 / 3 + square * series))
    is_small = tl.abs(x) < 0.25
    safe = tl.where(is_small, 0.5, x)
    return tl.where(is_small, series, 0.5 * tl.log((1 + safe) / (1 - safe)))


@triton.jit
def summarize(
    table,
    LAYERS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    LWE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Mean, |c|, r and h of each filter; one program for ``ROWS`` filters."""
    layer, number = tiles.layer_of(table, tiles.BY_FILTERS, LAYERS)
    rows, is_row = tiles.filters_of(layer, number, ROWS)
    channels, positions = (
        tiles.size_of(layer, tiles.CHANNELS),
        tiles.size_of(layer, tiles.POSITIONS),
    )
    position_step = tiles.size_of(layer, tiles.POSITION_STEP)
    weight = tiles.tensor_of(layer, tiles.WEIGHT)
    centre = tl.zeros([ROWS, 1], tl.float32)
    r = tl.full([ROWS, 1], 1.0, tl.float32)
    # The constants decide what is compiled, the layer's tensors what is run.
    if STANDARDIZE:  # noqa: SIM102
        if tiles.has(layer, tiles.STANDARDIZE_EPSILON):
            fan_in = channels * positions
            squares = tl.zeros([ROWS, 1], tl.float32)
            # The second sum corrects the rounding of the first, the third is of squares.
            for turn in tl.static_range(3):
                total = tl.zeros([ROWS, 1], tl.float32)
                for start in range(0, channels, COLUMNS):
                    columns = start + tl.arange(0, COLUMNS)[None, :]
                    is_there = is_row & (columns < channels)
                    place = weight + tiles.places_of(layer, rows, columns)
                    for position in range(positions):
                        value = tl.load(place + position * position_step, mask=is_there, other=0.0)
                        value = tl.where(is_there, value - centre, 0.0)
                        if turn == 2:
                            value *= value
                        total += tl.sum(value, 1, keep_dims=True)
                if turn == 2:
                    squares = total
                else:
                    centre += total / fan_in
            length = tl.sqrt(squares)
            epsilon = tl.load(tiles.tensor_of(layer, tiles.STANDARDIZE_EPSILON))
            r = 1 / (length / tl.sqrt(fan_in - 1.0) + epsilon)
            tl.store(tiles.tensor_of(layer, tiles.MEAN) + rows, centre, mask=is_row)
            tl.store(tiles.tensor_of(layer, tiles.NORM) + rows, length, mask=is_row)
            tl.store(tiles.tensor_of(layer, tiles.SCALE) + rows, r, mask=is_row)
    if LWE:
        hidden_channels = tiles.size_of(layer, tiles.HIDDEN_CHANNELS)
        for first_unit in range(0, hidden_channels, UNITS):
            units = first_unit + tl.arange(0, UNITS)[None, :]
            u = tl.zeros([ROWS, UNITS], tl.float32)
            for start in range(0, channels, COLUMNS):
                columns = start + tl.arange(0, COLUMNS)
                is_there = is_row & (columns[None, :] < channels)
                place = weight + tiles.places_of(layer, rows, columns[None, :])
                sums = tl.zeros([ROWS, COLUMNS], tl.float32)
                for position in range(positions):
                    value = tl.load(place + position * position_step, mask=is_there, other=0.0)
                    sums += tl.where(is_there, value - centre, 0.0)
                a = tiles.fc1_of(layer, columns[:, None], units)
                u += tl.dot(sums, a, input_precision="ieee")
            is_unit = units < hidden_channels
            u *= r / positions
            u += tl.load(tiles.tensor_of(layer, tiles.FC1_BIAS) + units, mask=is_unit, other=0.0)
            place = tiles.tensor_of(layer, tiles.HIDDEN) + rows * hidden_channels + units
            tl.store(place, tl.where(u < 0, 0.0, u), mask=is_row & is_unit)


@triton.jit
def multiply(
    table,
    LAYERS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    LWE: tl.constexpr,
    RESCALE: tl.constexpr,
    MWE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Computes w = p r m c + q, and the largest |w| of each tile; one program per tile."""
    layer, number, rows, is_row, columns = tiles.tile_of(
        table, tiles.BY_TILES, LAYERS, ROWS, COLUMNS
    )
    is_there = is_row & (columns < tiles.size_of(layer, tiles.CHANNELS))
    centre, r, p, q = tiles.affine_of(layer, rows, is_row, STANDARDIZE, RESCALE)
    factor = r * p * tiles.gate_of(layer, rows, is_row, columns, UNITS, LWE)
    first = tiles.places_of(layer, rows, columns)
    position_step = tiles.size_of(layer, tiles.POSITION_STEP)
    weight, excited = tiles.tensor_of(layer, tiles.WEIGHT), tiles.tensor_of(layer, tiles.RESULT)
    largest = tl.zeros([ROWS, COLUMNS], tl.float32)
    for position in range(tiles.size_of(layer, tiles.POSITIONS)):
        place = first + position * position_step
        value = tl.load(weight + place, mask=is_there, other=0.0)
        value = (value - centre) * factor + q
        largest = tl.maximum(largest, tl.where(is_there, tl.abs(value), 0.0))
        tl.store(excited + place, value, mask=is_there)
    if MWE:
        is_curved = tiles.has(layer, tiles.MAXIMA)
        place = tiles.tensor_of(layer, tiles.MAXIMA) + number
        tl.store(place, tl.max(tl.max(largest, 1), 0), mask=is_curved)


@triton.jit
def amplify(
    table,
    LAYERS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """W' = M atanh(w / M) in the place of w; one program for ``BLOCK`` weights."""
    layer, number = tiles.layer_of(table, tiles.BY_BLOCKS, LAYERS)
    out_channels, channels = (
        tiles.size_of(layer, tiles.OUT_CHANNELS),
        tiles.size_of(layer, tiles.CHANNELS),
    )
    tile_count = tl.cdiv(out_channels, ROWS) * tl.cdiv(channels, COLUMNS)
    maxima = tiles.tensor_of(layer, tiles.MAXIMA)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tile_count, BLOCK):
        places = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(maxima + places, mask=places < tile_count, other=0.0))
    bound = (1 + tl.load(tiles.tensor_of(layer, tiles.MWE_EPSILON))) * tl.max(largest, 0)
    bound = tl.where(bound < tiles.SMALLEST_NORMAL, 1.0, bound)
    if number == 0:
        tl.store(tiles.tensor_of(layer, tiles.LIMIT), bound)
    numel = out_channels.to(tl.int64) * (channels * tiles.size_of(layer, tiles.POSITIONS))
    places = number.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    excited = tiles.tensor_of(layer, tiles.RESULT) + places
    value = tl.load(excited, mask=places < numel, other=0.0)
    tl.store(excited, bound * _atanh(value / bound), mask=places < numel)
