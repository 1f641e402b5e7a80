"""The formulas of :mod:`~we_surgery.excitations.formulas` as Triton kernels, float32 inside.

A weight is read as O filters of I channels with K kernel positions, in tiles of ``ROWS`` filters
and ``COLUMNS`` channels. Filters lie one after the other in memory; within one, ``channel_step``
and ``position_step`` tell contiguous weights (K and 1) from channels_last ones (1 and I).

Importing this module needs Triton. With ``TRITON_INTERPRET=1`` set before the import the kernels
run on the CPU.
"""

# Triton reads annotations itself: no `from __future__ import annotations` here.

import triton
import triton.language as tl

SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)


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
def _gate(
    hidden, fc2_weight, fc2_bias, rows, columns, units, out_channels, channels, hidden_channels
):
    """LWE's m for one tile, ``[ROWS, COLUMNS]``."""
    h = tl.load(
        hidden + rows[:, None] * hidden_channels + units[None, :],
        mask=(rows[:, None] < out_channels) & (units[None, :] < hidden_channels),
        other=0.0,
    )
    b = tl.load(
        fc2_weight + columns[None, :] * hidden_channels + units[:, None],
        mask=(columns[None, :] < channels) & (units[:, None] < hidden_channels),
        other=0.0,
    ).to(tl.float32)
    bias = tl.load(fc2_bias + columns, mask=columns < channels, other=0.0).to(tl.float32)
    return tl.sigmoid(tl.dot(h, b, input_precision="ieee") + bias[None, :])


@triton.jit
def _per_row(values, rows, out_channels, IS_THERE: tl.constexpr, DEFAULT: tl.constexpr):
    """A column of numbers, one a filter; ``DEFAULT`` where the stage is absent."""
    if IS_THERE:
        found = tl.load(values + rows, mask=rows < out_channels, other=DEFAULT).to(tl.float32)
    else:
        found = tl.full(rows.shape, DEFAULT, tl.float32)
    return found[:, None]


@triton.jit
def summarize(
    weight,
    epsilon,
    fc1_weight,
    fc1_bias,
    mean,
    norm,
    scale,
    hidden,
    out_channels,
    channels,
    positions,
    channel_step,
    position_step,
    hidden_channels,
    STANDARDIZE: tl.constexpr,
    LWE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Mean, |c|, r and h of each filter; one program for ``ROWS`` filters."""
    fan_in = channels * positions
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    units = tl.arange(0, UNITS)
    is_row = rows[:, None] < out_channels
    centre = tl.zeros([ROWS, 1], tl.float32)
    if STANDARDIZE:
        # Twice: the second sum corrects the rounding of the first.
        for _ in tl.static_range(2):
            total = tl.zeros([ROWS, 1], tl.float32)
            for start in range(0, channels, COLUMNS):
                columns = start + tl.arange(0, COLUMNS)
                is_there = is_row & (columns[None, :] < channels)
                place = weight + rows[:, None] * fan_in + columns[None, :] * channel_step
                for position in range(positions):
                    value = tl.load(place + position * position_step, mask=is_there, other=0.0)
                    value = tl.where(is_there, value.to(tl.float32) - centre, 0.0)
                    total += tl.sum(value, 1, keep_dims=True)
            centre += total / fan_in
    squares = tl.zeros([ROWS, 1], tl.float32)
    u = tl.zeros([ROWS, UNITS], tl.float32)
    for start in range(0, channels, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_there = is_row & (columns[None, :] < channels)
        place = weight + rows[:, None] * fan_in + columns[None, :] * channel_step
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for position in range(positions):
            value = tl.load(place + position * position_step, mask=is_there, other=0.0)
            value = tl.where(is_there, value.to(tl.float32) - centre, 0.0)
            squares += tl.sum(value * value, 1, keep_dims=True)
            sums += value
        if LWE:
            a = tl.load(
                fc1_weight + units[None, :] * channels + columns[:, None],
                mask=(units[None, :] < hidden_channels) & (columns[:, None] < channels),
                other=0.0,
            ).to(tl.float32)
            u += tl.dot(sums, a, input_precision="ieee")
    r = tl.full([ROWS, 1], 1.0, tl.float32)
    if STANDARDIZE:
        length = tl.sqrt(squares)
        r = 1 / (length / tl.sqrt(fan_in - 1.0) + tl.load(epsilon).to(tl.float32))
        tl.store(mean + rows[:, None], centre, mask=is_row)
        tl.store(norm + rows[:, None], length, mask=is_row)
        tl.store(scale + rows[:, None], r, mask=is_row)
    if LWE:
        is_unit = units < hidden_channels
        bias = tl.load(fc1_bias + units, mask=is_unit, other=0.0).to(tl.float32)
        u = u * (r / positions) + bias[None, :]
        tl.store(
            hidden + rows[:, None] * hidden_channels + units[None, :],
            tl.where(u < 0, 0.0, u),
            mask=is_row & is_unit[None, :],
        )


@triton.jit
def multiply(
    weight,
    excited,
    fc2_weight,
    fc2_bias,
    gain,
    shift,
    mean,
    scale,
    hidden,
    maxima,
    out_channels,
    channels,
    positions,
    channel_step,
    position_step,
    hidden_channels,
    STANDARDIZE: tl.constexpr,
    LWE: tl.constexpr,
    RESCALE: tl.constexpr,
    MWE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Computes w = p r m c + q, and the largest |w| of each tile; one program a tile."""
    fan_in = channels * positions
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_there = (rows[:, None] < out_channels) & (columns[None, :] < channels)
    centre = _per_row(mean, rows, out_channels, STANDARDIZE, 0.0)
    factor = _per_row(scale, rows, out_channels, STANDARDIZE, 1.0)
    factor *= _per_row(gain, rows, out_channels, RESCALE, 1.0)
    offset = _per_row(shift, rows, out_channels, RESCALE, 0.0)
    if LWE:
        factor = factor * _gate(
            hidden,
            fc2_weight,
            fc2_bias,
            rows,
            columns,
            tl.arange(0, UNITS),
            out_channels,
            channels,
            hidden_channels,
        )
    first = rows[:, None] * fan_in + columns[None, :] * channel_step
    largest = tl.zeros([ROWS, COLUMNS], tl.float32)
    for position in range(positions):
        place = first + position * position_step
        value = tl.load(weight + place, mask=is_there, other=0.0).to(tl.float32)
        value = (value - centre) * factor + offset
        largest = tl.maximum(largest, tl.where(is_there, tl.abs(value), 0.0))
        tl.store(excited + place, value, mask=is_there)
    if MWE:
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(maxima + tile, tl.max(tl.max(largest, 1), 0))


@triton.jit
def amplify(excited, maxima, epsilon, limit, numel, tiles, BLOCK: tl.constexpr):
    """W' = M atanh(w / M) in the place of w; one program for ``BLOCK`` weights."""
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles, BLOCK):
        places = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(maxima + places, mask=places < tiles, other=0.0))
    bound = (1 + tl.load(epsilon).to(tl.float32)) * tl.max(largest, 0)
    bound = tl.where(bound < SMALLEST_NORMAL, 1.0, bound)
    if tl.program_id(0) == 0:
        tl.store(limit, bound)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(excited + places, mask=places < numel, other=0.0)
    tl.store(excited + places, bound * _atanh(value / bound), mask=places < numel)


@triton.jit
def _gradient(gradient, value, factor, offset, gain, limit, MWE: tl.constexpr):
    """G = p G / (1 - (w / M)^2), w = factor c + offset."""
    g = gradient * gain
    if MWE:
        ratio = (value * factor + offset) / limit
        g = g / (1 - ratio * ratio)
    return g


@triton.jit
def sum_filters(
    weight,
    gradient,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    gain,
    shift,
    mean,
    norm,
    scale,
    hidden,
    limit,
    z_of,
    sums_of,
    v_of,
    f_of,
    average_of,
    out_channels,
    channels,
    positions,
    channel_step,
    position_step,
    hidden_channels,
    STANDARDIZE: tl.constexpr,
    LWE: tl.constexpr,
    RESCALE: tl.constexpr,
    MWE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Z, sum_K(c), v, f and the mean of d - f c of each filter; a program for ``ROWS`` filters."""
    fan_in = channels * positions
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    units = tl.arange(0, UNITS)
    is_row = rows[:, None] < out_channels
    is_unit = units[None, :] < hidden_channels
    centre = _per_row(mean, rows, out_channels, STANDARDIZE, 0.0)
    r = _per_row(scale, rows, out_channels, STANDARDIZE, 1.0)
    p = _per_row(gain, rows, out_channels, RESCALE, 1.0)
    offset = _per_row(shift, rows, out_channels, RESCALE, 0.0)
    bound = 1.0
    if MWE:
        bound = tl.load(limit)
    t = tl.zeros([ROWS, 1], tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32)
    y = tl.zeros([ROWS, UNITS], tl.float32)
    a_total = tl.zeros([1, UNITS], tl.float32)
    for start in range(0, channels, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_there = is_row & (columns[None, :] < channels)
        m = tl.full([ROWS, COLUMNS], 1.0, tl.float32)
        if LWE:
            m = _gate(
                hidden,
                fc2_weight,
                fc2_bias,
                rows,
                columns,
                units,
                out_channels,
                channels,
                hidden_channels,
            )
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for position in range(positions):
            place = rows[:, None] * fan_in + columns[None, :] * channel_step
            place += position * position_step
            value = tl.load(weight + place, mask=is_there, other=0.0).to(tl.float32)
            value = tl.where(is_there, value - centre, 0.0)
            g = tl.load(gradient + place, mask=is_there, other=0.0).to(tl.float32)
            g = _gradient(g, value, r * p * m, offset, p, bound, MWE)
            products += g * value
            sums += value
            total += tl.sum(tl.where(is_there, m * g, 0.0), 1, keep_dims=True)
        z = products * m
        t += tl.sum(z, 1, keep_dims=True)
        if LWE:
            z = z * (1 - m)
            place = rows[:, None] * channels + columns[None, :]
            tl.store(z_of + place, z, mask=is_there)
            tl.store(sums_of + place, sums, mask=is_there)
            is_weight = (columns[:, None] < channels) & is_unit
            b = tl.load(
                fc2_weight + columns[:, None] * hidden_channels + units[None, :],
                mask=is_weight,
                other=0.0,
            ).to(tl.float32)
            y += tl.dot(z, b, input_precision="ieee")
            a = tl.load(
                fc1_weight + units[None, :] * channels + columns[:, None],
                mask=is_weight,
                other=0.0,
            ).to(tl.float32)
            a_total += tl.sum(a, 0, keep_dims=True)
    average = r * total / fan_in
    if LWE:
        is_kept = is_row & is_unit
        place = rows[:, None] * hidden_channels + units[None, :]
        h = tl.load(hidden + place, mask=is_kept, other=0.0)
        y = tl.where(h > 0, y, 0.0)
        bias = tl.load(fc1_bias + units[None, :], mask=is_unit, other=0.0).to(tl.float32)
        t += tl.sum(y * (h - bias), 1, keep_dims=True)
        v = y * r * r / positions
        average += tl.sum(v * a_total, 1, keep_dims=True) / channels
        tl.store(v_of + place, v, mask=is_kept)
    if STANDARDIZE:
        length = tl.load(norm + rows[:, None], mask=is_row, other=1.0)
        # A constant filter has c = 0 and t = 0, and so f = 0.
        f = t * r * r / tl.maximum(length, SMALLEST_NORMAL) / tl.sqrt(fan_in - 1.0)
        tl.store(f_of + rows[:, None], f, mask=is_row)
        tl.store(average_of + rows[:, None], average, mask=is_row)


@triton.jit
def by_weight(
    weight,
    gradient,
    fc1_weight,
    fc2_weight,
    fc2_bias,
    gain,
    shift,
    mean,
    scale,
    hidden,
    limit,
    v_of,
    f_of,
    average_of,
    result,
    out_channels,
    channels,
    positions,
    channel_step,
    position_step,
    hidden_channels,
    STANDARDIZE: tl.constexpr,
    LWE: tl.constexpr,
    RESCALE: tl.constexpr,
    MWE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Computes dW = d - f c - mean(d - f c), d = r m g + v A; one program a tile."""
    fan_in = channels * positions
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    units = tl.arange(0, UNITS)
    is_there = (rows[:, None] < out_channels) & (columns[None, :] < channels)
    centre = _per_row(mean, rows, out_channels, STANDARDIZE, 0.0)
    r = _per_row(scale, rows, out_channels, STANDARDIZE, 1.0)
    p = _per_row(gain, rows, out_channels, RESCALE, 1.0)
    offset = _per_row(shift, rows, out_channels, RESCALE, 0.0)
    f = _per_row(f_of, rows, out_channels, STANDARDIZE, 0.0)
    average = _per_row(average_of, rows, out_channels, STANDARDIZE, 0.0)
    bound = 1.0
    if MWE:
        bound = tl.load(limit)
    factor = r
    through_fcs = tl.zeros([ROWS, COLUMNS], tl.float32)
    if LWE:
        factor = r * _gate(
            hidden,
            fc2_weight,
            fc2_bias,
            rows,
            columns,
            units,
            out_channels,
            channels,
            hidden_channels,
        )
        v = tl.load(
            v_of + rows[:, None] * hidden_channels + units[None, :],
            mask=(rows[:, None] < out_channels) & (units[None, :] < hidden_channels),
            other=0.0,
        )
        a = tl.load(
            fc1_weight + units[:, None] * channels + columns[None, :],
            mask=(units[:, None] < hidden_channels) & (columns[None, :] < channels),
            other=0.0,
        ).to(tl.float32)
        through_fcs = tl.dot(v, a, input_precision="ieee")
    first = rows[:, None] * fan_in + columns[None, :] * channel_step
    for position in range(positions):
        place = first + position * position_step
        value = tl.load(weight + place, mask=is_there, other=0.0).to(tl.float32) - centre
        g = tl.load(gradient + place, mask=is_there, other=0.0).to(tl.float32)
        g = _gradient(g, value, factor * p, offset, p, bound, MWE)
        found = factor * g + through_fcs - f * value - average
        tl.store(result + place, found, mask=is_there)


@triton.jit
def by_fcs(
    scale,
    hidden,
    z_of,
    sums_of,
    v_of,
    fc1_weight_result,
    fc1_bias_result,
    fc2_weight_result,
    fc2_bias_result,
    out_channels,
    channels,
    positions,
    hidden_channels,
    STANDARDIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The sums over filters: dA = v^T sum_K(c), da = y^T r, dB = z^T (r h), db = z^T r."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    units = tl.arange(0, UNITS)
    is_unit = units[None, :] < hidden_channels
    by_a = tl.zeros([COLUMNS, UNITS], tl.float32)
    by_b = tl.zeros([COLUMNS, UNITS], tl.float32)
    by_fc1_bias = tl.zeros([1, UNITS], tl.float32)
    by_fc2_bias = tl.zeros([COLUMNS, 1], tl.float32)
    for start in range(0, out_channels, ROWS):
        rows = start + tl.arange(0, ROWS)
        r = _per_row(scale, rows, out_channels, STANDARDIZE, 1.0)
        is_kept = (rows[:, None] < out_channels) & is_unit
        place = rows[:, None] * hidden_channels + units[None, :]
        h = tl.load(hidden + place, mask=is_kept, other=0.0)
        v = tl.load(v_of + place, mask=is_kept, other=0.0)
        transposed = rows[None, :] * channels + columns[:, None]
        is_there = (rows[None, :] < out_channels) & (columns[:, None] < channels)
        z = tl.load(z_of + transposed, mask=is_there, other=0.0)
        sums = tl.load(sums_of + transposed, mask=is_there, other=0.0)
        by_b += tl.dot(z, r * h, input_precision="ieee")
        by_a += tl.dot(sums, v, input_precision="ieee")
        by_fc2_bias += tl.sum(z * tl.trans(r), 1, keep_dims=True)
        by_fc1_bias += tl.sum(v * positions / r, 0, keep_dims=True)
    is_column = columns[:, None] < channels
    is_weight = is_column & is_unit
    tl.store(fc1_weight_result + units[None, :] * channels + columns[:, None], by_a, mask=is_weight)
    tl.store(
        fc2_weight_result + columns[:, None] * hidden_channels + units[None, :],
        by_b,
        mask=is_weight,
    )
    tl.store(fc2_bias_result + columns[:, None], by_fc2_bias, mask=is_column)
    if tl.program_id(0) == 0:
        tl.store(fc1_bias_result + units[None, :], by_fc1_bias, mask=is_unit)
