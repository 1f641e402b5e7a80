"""The table in which a Triton kernel finds its layers.

Each launch works on a group of layers: one, or all of a model that have the same stages. What a
program has to know of its layer it reads in a table in the GPU's memory, int64 throughout: for
each of the ``DEALS`` the number of each layer's first program, then the :class:`Row` of each
layer. A layer without a program in a deal has the first number of the layer after it.

Importing this module needs Triton.
"""

# Triton reads annotations itself: no `from __future__ import annotations` here.

from typing import NamedTuple

import triton
import triton.language as tl


class Row(NamedTuple):
    """One layer: where its float32 tensors are, and its sizes.

    A weight and its parameters stay where they are, and their addresses are given. What a pass
    allocates moves from step to step: given is its distance, in elements, from one such tensor
    of the launch, whose address a kernel is passed. Kernels do not look where a layer has no such
    tensor. The names are those of :class:`~we_surgery.excitations.compute.inputs.ClosedFormInputs`,
    :class:`~we_surgery.excitations.compute.inputs.Kept` and the formulas.
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
    """Where one of the tensors that stay where they are begins."""
    return tl.load(layer + FIELD).to(tl.pointer_type(tl.float32))


@triton.jit
def near(anchor, layer, FIELD: tl.constexpr):
    """Where one of the tensors that move begins."""
    return anchor + tl.load(layer + FIELD)
