"""The formulas of :mod:`~we_surgery.excitations.formulas` as Triton kernels, float32 inside.

Each launch works on a group of layers: one, or all of a model that have the same stages. What a
program has to know of its layer it reads in a table in the GPU's memory, int64 throughout: for
each of the ``DEALS`` the number of each layer's first program, then the :class:`Row` of each
layer. A layer without a program in a deal has the first number of the layer after it.

A weight is read as O filters of I channels with K kernel positions, in tiles of ``ROWS`` filters
and ``COLUMNS`` channels. Filters lie one after the other in memory; within one, ``channel_step``
and ``position_step`` tell contiguous weights (K and 1) from channels_last ones (1 and I). LWE's
hidden channels are gone through ``UNITS`` at a time.

Importing this module needs Triton. With ``TRITON_INTERPRET=1`` set before the import the kernels
run on the CPU.
"""

# Triton reads annotations itself: no `from __future__ import annotations` here.

from typing import NamedTuple

import triton
import triton.language as tl

SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)


class Row(NamedTuple):
    """One layer: where its float32 tensors are, and its sizes.

    A weight and its terms stay where they are, and their addresses are given. What a pass
    allocates moves from step to step: given is its distance, in elements, from one such tensor
    of the launch, whose address a kernel is passed. Kernels do not look where a layer has no such
    tensor. The names are those of :class:`~we_surgery.excitations.terms.Terms`,
    :class:`~we_surgery.excitations.terms.Kept` and the formulas.
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

# How programs are dealt out to layers: by ROWS filters, by tile (of all layers, or of those whose
# weight is trained), by COLUMNS channels with UNITS hidden ones, by BLOCK weights.
BY_FILTERS, BY_TILES, BY_TRAINED_TILES, BY_UNITS, BY_BLOCKS = (tl.constexpr(i) for i in range(5))
DEALS = tl.constexpr(5)


@triton.jit
def _layer(table, DEAL: tl.constexpr, LAYERS: tl.constexpr):
    """The row of the program's layer, and the program's number within the layer."""
    program = tl.program_id(0)
    firsts = table + DEAL * LAYERS
    layer = tl.sum((tl.load(firsts + tl.arange(0, LAYERS)) <= program).to(tl.int32), 0) - 1
    number = program - tl.load(firsts + layer).to(tl.int32)
    return table + DEALS * LAYERS + layer * FIELDS, number


@triton.jit
def _size(layer, FIELD: tl.constexpr):
    return tl.load(layer + FIELD).to(tl.int32)


@triton.jit
def _tensor(layer, FIELD: tl.constexpr):
    return tl.load(layer + FIELD).to(tl.pointer_type(tl.float32))


@triton.jit
def _near(anchor, layer, FIELD: tl.constexpr):
    return anchor + tl.load(layer + FIELD)


@triton.jit
def _filters(layer, number, ROWS: tl.constexpr):
    """The filters of a program, ``[ROWS, 1]``, and whether they are there."""
    # A weight may have more than 2**31 elements.
    rows = (number * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    return rows, rows < _size(layer, OUT_CHANNELS)


@triton.jit
def _tile(table, DEAL: tl.constexpr, LAYERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS):
    """Layer, number in it, filters ``[ROWS, 1]`` and channels ``[1, COLUMNS]`` of a program."""
    layer, number = _layer(table, DEAL, LAYERS)
    across = tl.cdiv(_size(layer, CHANNELS), COLUMNS)
    rows, is_row = _filters(layer, number // across, ROWS)
    columns = number % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return layer, number, rows, is_row, columns


@triton.jit
def _places(layer, rows, columns):
    """Where the weights of a tile are at position 0, from the start of their tensor."""
    fan_in = _size(layer, CHANNELS) * _size(layer, POSITIONS)
    return rows * fan_in + columns * _size(layer, CHANNEL_STEP)


@triton.jit
def _per_row(values, rows, is_row, IS_THERE: tl.constexpr, DEFAULT: tl.constexpr):
    """A number for each filter, ``[ROWS, 1]``; ``DEFAULT`` where the stage is absent."""
    if IS_THERE:
        found = tl.load(values + rows, mask=is_row, other=DEFAULT)
    else:
        found = tl.full(rows.shape, DEFAULT, tl.float32)
    return found


@triton.jit
def _affine(layer, kept, rows, is_row, STANDARDIZE: tl.constexpr, RESCALE: tl.constexpr):
    """The mean, r, p and q of each filter."""
    centre = _per_row(_near(kept, layer, MEAN), rows, is_row, STANDARDIZE, 0.0)
    r = _per_row(_near(kept, layer, SCALE), rows, is_row, STANDARDIZE, 1.0)
    p = _per_row(_tensor(layer, GAIN), rows, is_row, RESCALE, 1.0)
    q = _per_row(_tensor(layer, SHIFT), rows, is_row, RESCALE, 0.0)
    return centre, r, p, q


@triton.jit
def _by_unit(values, layer, rows, is_row, units):
    """``[ROWS, UNITS]`` of a tensor ``[O, hidden]``."""
    hidden_channels = _size(layer, HIDDEN_CHANNELS)
    place = values + rows * hidden_channels + units
    return tl.load(place, mask=is_row & (units < hidden_channels), other=0.0)


@triton.jit
def _fc1(layer, columns, units):
    """A, or its transpose, as ``columns`` and ``units`` stand."""
    channels = _size(layer, CHANNELS)
    is_there = (columns < channels) & (units < _size(layer, HIDDEN_CHANNELS))
    return tl.load(_tensor(layer, FC1_WEIGHT) + units * channels + columns, mask=is_there, other=0)


@triton.jit
def _fc2(layer, columns, units):
    """B, or its transpose, as ``columns`` and ``units`` stand."""
    hidden_channels = _size(layer, HIDDEN_CHANNELS)
    is_there = (columns < _size(layer, CHANNELS)) & (units < hidden_channels)
    place = _tensor(layer, FC2_WEIGHT) + columns * hidden_channels + units
    return tl.load(place, mask=is_there, other=0)


@triton.jit
def _gate(layer, kept, rows, is_row, columns, UNITS: tl.constexpr, LWE: tl.constexpr):
    """LWE's m for one tile, ``[ROWS, COLUMNS]``; 1 where the stage is absent."""
    m = tl.full([rows.shape[0], columns.shape[1]], 1.0, tl.float32)
    if LWE:
        is_column = columns < _size(layer, CHANNELS)
        m *= tl.load(_tensor(layer, FC2_BIAS) + columns, mask=is_column, other=0.0)
        for start in range(0, _size(layer, HIDDEN_CHANNELS), UNITS):
            units = start + tl.arange(0, UNITS)
            h = _by_unit(_near(kept, layer, HIDDEN), layer, rows, is_row, units[None, :])
            m += tl.dot(h, _fc2(layer, columns, units[:, None]), input_precision="ieee")
        m = tl.sigmoid(m)
    return m


@triton.jit
def _atanh(x):
    """``0.5 log((1 + x) / (1 - x))``; below 1/4, where that loses its digits, by its series."""
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
    kept,
    LAYERS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    LWE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Mean, |c|, r and h of each filter; one program for ``ROWS`` filters."""
    layer, number = _layer(table, BY_FILTERS, LAYERS)
    rows, is_row = _filters(layer, number, ROWS)
    channels, positions = _size(layer, CHANNELS), _size(layer, POSITIONS)
    position_step = _size(layer, POSITION_STEP)
    weight = _tensor(layer, WEIGHT)
    centre = tl.zeros([ROWS, 1], tl.float32)
    r = tl.full([ROWS, 1], 1.0, tl.float32)
    if STANDARDIZE:
        fan_in = channels * positions
        squares = tl.zeros([ROWS, 1], tl.float32)
        # The second sum corrects the rounding of the first, the third is of squares.
        for turn in tl.static_range(3):
            total = tl.zeros([ROWS, 1], tl.float32)
            for start in range(0, channels, COLUMNS):
                columns = start + tl.arange(0, COLUMNS)[None, :]
                is_there = is_row & (columns < channels)
                place = weight + _places(layer, rows, columns)
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
        epsilon = tl.load(_tensor(layer, STANDARDIZE_EPSILON))
        r = 1 / (length / tl.sqrt(fan_in - 1.0) + epsilon)
        tl.store(_near(kept, layer, MEAN) + rows, centre, mask=is_row)
        tl.store(_near(kept, layer, NORM) + rows, length, mask=is_row)
        tl.store(_near(kept, layer, SCALE) + rows, r, mask=is_row)
    if LWE:
        hidden_channels = _size(layer, HIDDEN_CHANNELS)
        for first_unit in range(0, hidden_channels, UNITS):
            units = first_unit + tl.arange(0, UNITS)[None, :]
            u = tl.zeros([ROWS, UNITS], tl.float32)
            for start in range(0, channels, COLUMNS):
                columns = start + tl.arange(0, COLUMNS)
                is_there = is_row & (columns[None, :] < channels)
                place = weight + _places(layer, rows, columns[None, :])
                sums = tl.zeros([ROWS, COLUMNS], tl.float32)
                for position in range(positions):
                    value = tl.load(place + position * position_step, mask=is_there, other=0.0)
                    sums += tl.where(is_there, value - centre, 0.0)
                a = _fc1(layer, columns[:, None], units)
                u += tl.dot(sums, a, input_precision="ieee")
            is_unit = units < hidden_channels
            u *= r / positions
            u += tl.load(_tensor(layer, FC1_BIAS) + units, mask=is_unit, other=0.0)
            place = _near(kept, layer, HIDDEN) + rows * hidden_channels + units
            tl.store(place, tl.where(u < 0, 0.0, u), mask=is_row & is_unit)


@triton.jit
def multiply(
    table,
    kept,
    result,
    LAYERS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    LWE: tl.constexpr,
    RESCALE: tl.constexpr,
    MWE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Computes w = p r m c + q, and the largest |w| of each tile; one program a tile."""
    layer, number, rows, is_row, columns = _tile(table, BY_TILES, LAYERS, ROWS, COLUMNS)
    is_there = is_row & (columns < _size(layer, CHANNELS))
    centre, r, p, q = _affine(layer, kept, rows, is_row, STANDARDIZE, RESCALE)
    factor = r * p * _gate(layer, kept, rows, is_row, columns, UNITS, LWE)
    first = _places(layer, rows, columns)
    position_step = _size(layer, POSITION_STEP)
    weight, excited = _tensor(layer, WEIGHT), _near(result, layer, RESULT)
    largest = tl.zeros([ROWS, COLUMNS], tl.float32)
    for position in range(_size(layer, POSITIONS)):
        place = first + position * position_step
        value = tl.load(weight + place, mask=is_there, other=0.0)
        value = (value - centre) * factor + q
        largest = tl.maximum(largest, tl.where(is_there, tl.abs(value), 0.0))
        tl.store(excited + place, value, mask=is_there)
    if MWE:
        tl.store(_near(kept, layer, MAXIMA) + number, tl.max(tl.max(largest, 1), 0))


@triton.jit
def amplify(
    table,
    kept,
    result,
    LAYERS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """W' = M atanh(w / M) in the place of w; one program for ``BLOCK`` weights."""
    layer, number = _layer(table, BY_BLOCKS, LAYERS)
    out_channels, channels = _size(layer, OUT_CHANNELS), _size(layer, CHANNELS)
    tiles = tl.cdiv(out_channels, ROWS) * tl.cdiv(channels, COLUMNS)
    maxima = _near(kept, layer, MAXIMA)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles, BLOCK):
        places = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(maxima + places, mask=places < tiles, other=0.0))
    bound = (1 + tl.load(_tensor(layer, MWE_EPSILON))) * tl.max(largest, 0)
    bound = tl.where(bound < SMALLEST_NORMAL, 1.0, bound)
    if number == 0:
        tl.store(_near(kept, layer, LIMIT), bound)
    numel = out_channels.to(tl.int64) * (channels * _size(layer, POSITIONS))
    places = number.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    excited = _near(result, layer, RESULT) + places
    value = tl.load(excited, mask=places < numel, other=0.0)
    tl.store(excited, bound * _atanh(value / bound), mask=places < numel)


@triton.jit
def _limit(layer, kept, MWE: tl.constexpr):
    bound = 1.0
    if MWE:
        bound = tl.load(_near(kept, layer, LIMIT))
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
    kept,
    gradient,
    scratch,
    LAYERS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    LWE: tl.constexpr,
    RESCALE: tl.constexpr,
    MWE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Z, sum_K(c), and each tile's share of sum_F(m g c) and sum_F(m g); one program a tile."""
    layer, number, rows, is_row, columns = _tile(table, BY_TILES, LAYERS, ROWS, COLUMNS)
    out_channels, channels = _size(layer, OUT_CHANNELS), _size(layer, CHANNELS)
    is_there = is_row & (columns < channels)
    centre, r, p, q = _affine(layer, kept, rows, is_row, STANDARDIZE, RESCALE)
    m = _gate(layer, kept, rows, is_row, columns, UNITS, LWE)
    bound = _limit(layer, kept, MWE)
    first = _places(layer, rows, columns)
    position_step = _size(layer, POSITION_STEP)
    weight, gradient = _tensor(layer, WEIGHT), _near(gradient, layer, GRADIENT)
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for position in range(_size(layer, POSITIONS)):
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
    tl.store(_near(scratch, layer, PARTIAL_T) + share, tl.sum(z, 1, keep_dims=True), mask=is_row)
    all_g = tl.sum(total * m, 1, keep_dims=True)
    tl.store(_near(scratch, layer, PARTIAL_TOTAL) + share, all_g, mask=is_row)
    if LWE:
        place = rows * channels + columns
        tl.store(_near(scratch, layer, Z) + place, z * (1 - m), mask=is_there)
        tl.store(_near(scratch, layer, SUMS) + place, sums, mask=is_there)


@triton.jit
def sum_filters(
    table,
    kept,
    scratch,
    LAYERS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    LWE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The v and f of each filter and the mean of d - f c; one program for ``ROWS`` filters."""
    layer, number = _layer(table, BY_FILTERS, LAYERS)
    rows, is_row = _filters(layer, number, ROWS)
    out_channels, channels = _size(layer, OUT_CHANNELS), _size(layer, CHANNELS)
    positions = _size(layer, POSITIONS)
    r = _per_row(_near(kept, layer, SCALE), rows, is_row, STANDARDIZE, 1.0)
    partial_t, partial_total = (
        _near(scratch, layer, PARTIAL_T),
        _near(scratch, layer, PARTIAL_TOTAL),
    )
    t = tl.zeros([ROWS, 1], tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32)
    for tile in range(0, tl.cdiv(channels, COLUMNS)):
        share = tile * out_channels + rows
        t += tl.load(partial_t + share, mask=is_row, other=0.0)
        total += tl.load(partial_total + share, mask=is_row, other=0.0)
    average = r * total / (channels * positions)
    if LWE:
        hidden_channels = _size(layer, HIDDEN_CHANNELS)
        z_of = _near(scratch, layer, Z)
        for first_unit in range(0, hidden_channels, UNITS):
            units = first_unit + tl.arange(0, UNITS)[None, :]
            is_unit = units < hidden_channels
            y = tl.zeros([ROWS, UNITS], tl.float32)
            a_total = tl.zeros([1, UNITS], tl.float32)
            for start in range(0, channels, COLUMNS):
                columns = start + tl.arange(0, COLUMNS)
                is_there = is_row & (columns[None, :] < channels)
                z = tl.load(z_of + rows * channels + columns[None, :], mask=is_there, other=0.0)
                b = _fc2(layer, columns[:, None], units)
                y += tl.dot(z, b, input_precision="ieee")
                a_total += tl.sum(_fc1(layer, columns[:, None], units), 0, keep_dims=True)
            h = _by_unit(_near(kept, layer, HIDDEN), layer, rows, is_row, units)
            y = tl.where(h > 0, y, 0.0)
            bias = tl.load(_tensor(layer, FC1_BIAS) + units, mask=is_unit, other=0.0)
            t += tl.sum(y * (h - bias), 1, keep_dims=True)
            v = y * r * r / positions
            average += tl.sum(v * a_total, 1, keep_dims=True) / channels
            place = _near(scratch, layer, V) + rows * hidden_channels + units
            tl.store(place, v, mask=is_row & is_unit)
    if STANDARDIZE:
        length = tl.load(_near(kept, layer, NORM) + rows, mask=is_row, other=1.0)
        # A constant filter has c = 0 and t = 0, and so f = 0.
        f = t * r * r / tl.maximum(length, SMALLEST_NORMAL) / tl.sqrt(channels * positions - 1.0)
        tl.store(_near(scratch, layer, F) + rows, f, mask=is_row)
        tl.store(_near(scratch, layer, AVERAGE) + rows, average, mask=is_row)


@triton.jit
def by_weight(
    table,
    kept,
    gradient,
    scratch,
    result,
    LAYERS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    LWE: tl.constexpr,
    RESCALE: tl.constexpr,
    MWE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Computes dW = d - f c - mean(d - f c), d = r m g + v A; one program a tile."""
    layer, _, rows, is_row, columns = _tile(table, BY_TRAINED_TILES, LAYERS, ROWS, COLUMNS)
    is_there = is_row & (columns < _size(layer, CHANNELS))
    centre, r, p, q = _affine(layer, kept, rows, is_row, STANDARDIZE, RESCALE)
    f = _per_row(_near(scratch, layer, F), rows, is_row, STANDARDIZE, 0.0)
    average = _per_row(_near(scratch, layer, AVERAGE), rows, is_row, STANDARDIZE, 0.0)
    factor = r * _gate(layer, kept, rows, is_row, columns, UNITS, LWE)
    bound = _limit(layer, kept, MWE)
    through_fcs = tl.zeros([ROWS, COLUMNS], tl.float32)
    if LWE:
        for start in range(0, _size(layer, HIDDEN_CHANNELS), UNITS):
            units = start + tl.arange(0, UNITS)
            v = _by_unit(_near(scratch, layer, V), layer, rows, is_row, units[None, :])
            through_fcs += tl.dot(v, _fc1(layer, columns, units[:, None]), input_precision="ieee")
    first = _places(layer, rows, columns)
    position_step = _size(layer, POSITION_STEP)
    weight, gradient = _tensor(layer, WEIGHT), _near(gradient, layer, GRADIENT)
    result = _near(result, layer, RESULT)
    for position in range(_size(layer, POSITIONS)):
        place = first + position * position_step
        value = tl.load(weight + place, mask=is_there, other=0.0) - centre
        g = tl.load(gradient + place, mask=is_there, other=0.0)
        g = _gradient(g, value, factor * p, q, p, bound, MWE)
        found = factor * g + through_fcs - f * value - average
        tl.store(result + place, found, mask=is_there)


@triton.jit
def by_fcs(
    table,
    kept,
    scratch,
    fcs,
    LAYERS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The sums over filters: dA = v^T sum_K(c), da = y^T r, dB = z^T (r h), db = z^T r.

    One program for ``COLUMNS`` channels and ``UNITS`` hidden ones.
    """
    layer, number = _layer(table, BY_UNITS, LAYERS)
    out_channels, channels = _size(layer, OUT_CHANNELS), _size(layer, CHANNELS)
    positions, hidden_channels = _size(layer, POSITIONS), _size(layer, HIDDEN_CHANNELS)
    across = tl.cdiv(hidden_channels, UNITS)
    columns = number // across * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    units = number % across * UNITS + tl.arange(0, UNITS)[None, :]
    is_column, is_unit = columns < channels, units < hidden_channels
    z_of, sums_of = _near(scratch, layer, Z), _near(scratch, layer, SUMS)
    by_a = tl.zeros([COLUMNS, UNITS], tl.float32)
    by_b = tl.zeros([COLUMNS, UNITS], tl.float32)
    by_fc1_bias = tl.zeros([1, UNITS], tl.float32)
    by_fc2_bias = tl.zeros([COLUMNS, 1], tl.float32)
    for start in range(0, tl.cdiv(out_channels, ROWS)):
        rows, is_row = _filters(layer, start, ROWS)
        r = _per_row(_near(kept, layer, SCALE), rows, is_row, STANDARDIZE, 1.0)
        h = _by_unit(_near(kept, layer, HIDDEN), layer, rows, is_row, units)
        v = _by_unit(_near(scratch, layer, V), layer, rows, is_row, units)
        is_there = tl.trans(is_row) & is_column
        transposed = tl.trans(rows) * channels + columns
        z = tl.load(z_of + transposed, mask=is_there, other=0.0)
        sums = tl.load(sums_of + transposed, mask=is_there, other=0.0)
        by_b += tl.dot(z, r * h, input_precision="ieee")
        by_a += tl.dot(sums, v, input_precision="ieee")
        by_fc2_bias += tl.sum(z * tl.trans(r), 1, keep_dims=True)
        by_fc1_bias += tl.sum(v * positions / r, 0, keep_dims=True)
    is_weight = is_column & is_unit
    tl.store(_near(fcs, layer, BY_FC1_WEIGHT) + units * channels + columns, by_a, mask=is_weight)
    place = _near(fcs, layer, BY_FC2_WEIGHT) + columns * hidden_channels + units
    tl.store(place, by_b, mask=is_weight)
    if number % across == 0:
        tl.store(_near(fcs, layer, BY_FC2_BIAS) + columns, by_fc2_bias, mask=is_column)
    if number // across == 0:
        tl.store(_near(fcs, layer, BY_FC1_BIAS) + units, by_fc1_bias, mask=is_unit)
