"""The gradients of ``formulas`` by Triton kernels, in float32.

Each is launched once at most, for all layers of a table (``triton_tiles``).

Importing this module needs Triton. With ``TRITON_INTERPRET=1`` set before the import the kernels
run on the CPU.
"""

# Triton reads annotations itself: no `from __future__ import annotations` here.

import triton
import triton.language as tl

from we_surgery.excitations.compute import triton_tiles as tiles


@triton.jit
def _limit(layer, MWE: tl.constexpr):
    bound = float("inf")  # of a straight line
    if MWE:
        place, is_curved = tiles.tensor_of(layer, tiles.LIMIT), tiles.has(layer, tiles.LIMIT)
        bound = tl.load(place, mask=is_curved, other=float("inf"))
    return bound


@triton.jit
def _gradient(gradient, value, factor, offset, gain, bound, MWE: tl.constexpr):
    """G = p G / (1 - (w / M)^2), w = factor c + offset."""
    g = gradient * gain
    if MWE:
        ratio = (value * factor + offset) / bound
        g = g / (1 - ratio * ratio)
    return g


@triton.jit
def sum_tiles(
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
    """Z, sum_K(c), and each tile's share of sum_F(m g c) and sum_F(m g); one program per tile."""
    layer, number, rows, is_row, columns = tiles.tile_of(
        table, tiles.BY_SUMMED_TILES, LAYERS, ROWS, COLUMNS
    )
    out_channels, channels = (
        tiles.size_of(layer, tiles.OUT_CHANNELS),
        tiles.size_of(layer, tiles.CHANNELS),
    )
    is_there = is_row & (columns < channels)
    centre, r, p, q = tiles.affine_of(layer, rows, is_row, STANDARDIZE, RESCALE)
    m = tiles.gate_of(layer, rows, is_row, columns, UNITS, LWE)
    bound = _limit(layer, MWE)
    first = tiles.places_of(layer, rows, columns)
    position_step = tiles.size_of(layer, tiles.POSITION_STEP)
    weight, gradient = (
        tiles.tensor_of(layer, tiles.WEIGHT),
        tiles.tensor_of(layer, tiles.GRADIENT),
    )
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for position in range(tiles.size_of(layer, tiles.POSITIONS)):
        place = first + position * position_step
        value = tl.load(weight + place, mask=is_there, other=0.0)
        value = tl.where(is_there, value - centre, 0.0)
        g = tl.load(gradient + place, mask=is_there, other=0.0)
        g = _gradient(g, value, r * p * m, q, p, bound, MWE)
        products += g * value
        sums += value
        total += g
    z = products * m
    share = number % tl.cdiv(channels, COLUMNS) * out_channels + rows
    tl.store(
        tiles.tensor_of(layer, tiles.PARTIAL_T) + share,
        tl.sum(z, 1, keep_dims=True),
        mask=is_row,
    )
    all_g = tl.sum(total * m, 1, keep_dims=True)
    tl.store(tiles.tensor_of(layer, tiles.PARTIAL_TOTAL) + share, all_g, mask=is_row)
    if LWE:
        place = rows * channels + columns
        is_kept = is_there & tiles.has(layer, tiles.Z)
        tl.store(tiles.tensor_of(layer, tiles.Z) + place, z * (1 - m), mask=is_kept)
        tl.store(tiles.tensor_of(layer, tiles.SUMS) + place, sums, mask=is_kept)


@triton.jit
def sum_filters(
    table,
    LAYERS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    LWE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The v and f of each filter and the mean of d - f c; one program for ``ROWS`` filters."""
    layer, number = tiles.layer_of(table, tiles.BY_FILTERS, LAYERS)
    rows, is_row = tiles.filters_of(layer, number, ROWS)
    out_channels, channels = (
        tiles.size_of(layer, tiles.OUT_CHANNELS),
        tiles.size_of(layer, tiles.CHANNELS),
    )
    positions = tiles.size_of(layer, tiles.POSITIONS)
    r = tiles.per_row(layer, tiles.SCALE, rows, is_row, STANDARDIZE, 1.0)
    partial_t, partial_total = (
        tiles.tensor_of(layer, tiles.PARTIAL_T),
        tiles.tensor_of(layer, tiles.PARTIAL_TOTAL),
    )
    t = tl.zeros([ROWS, 1], tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32)
    for tile in range(0, tl.cdiv(channels, COLUMNS)):
        share = tile * out_channels + rows
        t += tl.load(partial_t + share, mask=is_row, other=0.0)
        total += tl.load(partial_total + share, mask=is_row, other=0.0)
    average = r * total / (channels * positions)
    if LWE:
        hidden_channels = tiles.size_of(layer, tiles.HIDDEN_CHANNELS)
        z_of = tiles.tensor_of(layer, tiles.Z)
        for first_unit in range(0, hidden_channels, UNITS):
            units = first_unit + tl.arange(0, UNITS)[None, :]
            is_unit = units < hidden_channels
            y = tl.zeros([ROWS, UNITS], tl.float32)
            a_total = tl.zeros([1, UNITS], tl.float32)
            for start in range(0, channels, COLUMNS):
                columns = start + tl.arange(0, COLUMNS)
                is_there = is_row & (columns[None, :] < channels)
                z = tl.load(z_of + rows * channels + columns[None, :], mask=is_there, other=0.0)
                b = tiles.fc2_of(layer, columns[:, None], units)
                y += tl.dot(z, b, input_precision="ieee")
                a_total += tl.sum(tiles.fc1_of(layer, columns[:, None], units), 0, keep_dims=True)
            h = tiles.by_unit(tiles.tensor_of(layer, tiles.HIDDEN), layer, rows, is_row, units)
            y = tl.where(h > 0, y, 0.0)
            bias = tl.load(tiles.tensor_of(layer, tiles.FC1_BIAS) + units, mask=is_unit, other=0.0)
            t += tl.sum(y * (h - bias), 1, keep_dims=True)
            v = y * r * r / positions
            average += tl.sum(v * a_total, 1, keep_dims=True) / channels
            place = tiles.tensor_of(layer, tiles.V) + rows * hidden_channels + units
            tl.store(place, v, mask=is_row & is_unit)
    if STANDARDIZE:
        length = tiles.per_row(layer, tiles.NORM, rows, is_row, STANDARDIZE, 1.0)
        # A constant filter has c = 0 and t = 0, and so f = 0.
        f = (
            t
            * r
            * r
            / tl.maximum(length, tiles.SMALLEST_NORMAL)
            / tl.sqrt(channels * positions - 1.0)
        )
        is_kept = is_row & tiles.has(layer, tiles.F)
        tl.store(tiles.tensor_of(layer, tiles.F) + rows, f, mask=is_kept)
        tl.store(tiles.tensor_of(layer, tiles.AVERAGE) + rows, average, mask=is_kept)


@triton.jit
def by_weight(
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
    """Computes dW = d - f c - mean(d - f c), d = r m g + v A; one program per tile."""
    layer, _, rows, is_row, columns = tiles.tile_of(
        table, tiles.BY_TRAINED_TILES, LAYERS, ROWS, COLUMNS
    )
    is_there = is_row & (columns < tiles.size_of(layer, tiles.CHANNELS))
    centre, r, p, q = tiles.affine_of(layer, rows, is_row, STANDARDIZE, RESCALE)
    f = tiles.per_row(layer, tiles.F, rows, is_row, STANDARDIZE, 0.0)
    average = tiles.per_row(layer, tiles.AVERAGE, rows, is_row, STANDARDIZE, 0.0)
    factor = r * tiles.gate_of(layer, rows, is_row, columns, UNITS, LWE)
    bound = _limit(layer, MWE)
    through_fcs = tl.zeros([ROWS, COLUMNS], tl.float32)
    if LWE:
        for start in range(0, tiles.size_of(layer, tiles.HIDDEN_CHANNELS), UNITS):
            units = start + tl.arange(0, UNITS)
            v = tiles.by_unit(tiles.tensor_of(layer, tiles.V), layer, rows, is_row, units[None, :])
            through_fcs += tl.dot(
                v, tiles.fc1_of(layer, columns, units[:, None]), input_precision="ieee"
            )
    first = tiles.places_of(layer, rows, columns)
    position_step = tiles.size_of(layer, tiles.POSITION_STEP)
    weight, gradient = (
        tiles.tensor_of(layer, tiles.WEIGHT),
        tiles.tensor_of(layer, tiles.GRADIENT),
    )
    result = tiles.tensor_of(layer, tiles.RESULT)
    for position in range(tiles.size_of(layer, tiles.POSITIONS)):
        place = first + position * position_step
        value = tl.load(weight + place, mask=is_there, other=0.0) - centre
        g = tl.load(gradient + place, mask=is_there, other=0.0)
        g = _gradient(g, value, factor * p, q, p, bound, MWE)
        found = factor * g + through_fcs - f * value - average
        tl.store(result + place, found, mask=is_there)


@triton.jit
def by_fcs(
    table,
    LAYERS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The sums over filters: dA = v^T sum_K(c), da = y^T r, dB = z^T (r h), db = z^T r.

    One program for ``COLUMNS`` channels and ``UNITS`` hidden ones.
    """
    layer, number = tiles.layer_of(table, tiles.BY_UNITS, LAYERS)
    out_channels, channels = (
        tiles.size_of(layer, tiles.OUT_CHANNELS),
        tiles.size_of(layer, tiles.CHANNELS),
    )
    positions, hidden_channels = (
        tiles.size_of(layer, tiles.POSITIONS),
        tiles.size_of(layer, tiles.HIDDEN_CHANNELS),
    )
    across = tl.cdiv(hidden_channels, UNITS)
    columns = number // across * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    units = number % across * UNITS + tl.arange(0, UNITS)[None, :]
    is_column, is_unit = columns < channels, units < hidden_channels
    z_of, sums_of = tiles.tensor_of(layer, tiles.Z), tiles.tensor_of(layer, tiles.SUMS)
    by_a = tl.zeros([COLUMNS, UNITS], tl.float32)
    by_b = tl.zeros([COLUMNS, UNITS], tl.float32)
    by_fc1_bias = tl.zeros([1, UNITS], tl.float32)
    by_fc2_bias = tl.zeros([COLUMNS, 1], tl.float32)
    for start in range(0, tl.cdiv(out_channels, ROWS)):
        rows, is_row = tiles.filters_of(layer, start, ROWS)
        r = tiles.per_row(layer, tiles.SCALE, rows, is_row, STANDARDIZE, 1.0)
        h = tiles.by_unit(tiles.tensor_of(layer, tiles.HIDDEN), layer, rows, is_row, units)
        v = tiles.by_unit(tiles.tensor_of(layer, tiles.V), layer, rows, is_row, units)
        is_there = tl.trans(is_row) & is_column
        transposed = tl.trans(rows) * channels + columns
        z = tl.load(z_of + transposed, mask=is_there, other=0.0)
        sums = tl.load(sums_of + transposed, mask=is_there, other=0.0)
        by_b += tl.dot(z, r * h, input_precision="ieee")
        by_a += tl.dot(sums, v, input_precision="ieee")
        by_fc2_bias += tl.sum(z * tl.trans(r), 1, keep_dims=True)
        by_fc1_bias += tl.sum(v * positions / r, 0, keep_dims=True)
    is_weight = is_column & is_unit
    tl.store(
        tiles.tensor_of(layer, tiles.BY_FC1_WEIGHT) + units * channels + columns,
        by_a,
        mask=is_weight,
    )
    place = tiles.tensor_of(layer, tiles.BY_FC2_WEIGHT) + columns * hidden_channels + units
    tl.store(place, by_b, mask=is_weight)
    if number % across == 0:
        tl.store(tiles.tensor_of(layer, tiles.BY_FC2_BIAS) + columns, by_fc2_bias, mask=is_column)
    if number // across == 0:
        tl.store(tiles.tensor_of(layer, tiles.BY_FC1_BIAS) + units, by_fc1_bias, mask=is_unit)
