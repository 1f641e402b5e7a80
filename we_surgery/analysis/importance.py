"""Which weights matter: by their magnitude, and by where they are (WE paper, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Unpack

import torch
from torch import Tensor, nn

from we_surgery.analysis.measuring import Cells, Change, Measuring, measure
from we_surgery.analysis.results import Ablation
from we_surgery.analysis.scores import Metric
from we_surgery.analysis.weights import (
    MeasuredWeight,
    deployed_copy,
    equidistant,
    find_weights,
    kernel_mask,
)
from we_surgery.errors import InputError


def magnitude_curve(
    model: nn.Module,
    metric: Metric,
    *,
    positions: Sequence[int] = range(1, 101),
    layers: Sequence[str] = (),
    **measuring: Unpack[Measuring],
) -> Ablation:
    """Sets the weight at each percentile of magnitude to zero, in all conv layers at once.

    WE paper, section 3.1 and Fig. 1a: of n weights sorted by magnitude, percentile b is the one
    at index ``ceil(b * n / 100) - 1``, so that 100 is the largest. Of equal magnitudes the first
    in memory comes first.

    Args:
        model: vanilla or converted. A copy is measured, of a converted model a stripped one.
        metric: ``metric_fn(model) -> float``, or a loader of ``(inputs, labels)``, which is run
            in eval mode on the model's device.
        positions: the percentiles, each from 1 to 100.
        layers: patterns of the layers to take; by default every conv.
        **measuring: ``score``, ``progress_file`` and ``progress``; see
            :class:`~we_surgery.analysis.Measuring`.

    Returns:
        Rows with a ``percentile``.

    Raises:
        InputError: there is no such layer, or the metric cannot be used.
    """
    for position in positions:
        if not 1 <= position <= 100:
            raise InputError(
                f"percentiles must be in 1..100, got {position!r}", "Correct `positions`."
            )
    copied = deployed_copy(model)
    weights = find_weights(copied, layers)
    places = {weight.parameter: _at_percentiles(weight.parameter, positions) for weight in weights}

    def cells(number: int) -> Cells:
        found = {}
        for parameter, indices in places.items():
            mask = torch.zeros(parameter.numel(), dtype=torch.bool)
            mask[indices[number]] = True
            found[parameter] = mask.view(parameter.shape)
        return found

    changes = [Change({"percentile": b}, partial(cells, n)) for n, b in enumerate(positions)]
    names = [weight.name for weight in weights]
    return measure("magnitude", copied, changes, metric, layers=names, **measuring)


def _at_percentiles(parameter: nn.Parameter, positions: Sequence[int]) -> Tensor:
    """The flat index of the weight at each percentile of magnitude."""
    order = parameter.detach().flatten().abs().argsort(stable=True)
    return order[[math.ceil(b * len(order) / 100) - 1 for b in positions]].cpu()


def location_maps(
    model: nn.Module,
    metric: Metric,
    *,
    samples: tuple[int, int] = (5, 5),
    layers: Sequence[str] = (),
    **measuring: Unpack[Measuring],
) -> Ablation:
    """Sets single kernels to zero, in each conv with a kernel larger than 1 except depthwise ones.

    WE paper, section 3.1 and Fig. 2. The sampled filters and input channels are evenly spaced from
    the first to the last ("equidistant" in the paper).

    Args:
        model: as in :func:`magnitude_curve`.
        metric: as there.
        samples: N1 filters, and N2 input channels of each; fewer where there are not as many.
        layers: patterns; by default every conv with more than one kernel position and more than
            one input channel per filter. Layers named here may be any conv.
        **measuring: as in :func:`magnitude_curve`.

    Returns:
        Rows with ``layer``, ``out_channel`` and ``in_channel``.
        :meth:`~we_surgery.analysis.Ablation.kernel_maps` arranges them as the maps of the layers.

    Raises:
        InputError: there is no such layer, or the metric cannot be used.
    """
    if min(samples) < 1:
        raise InputError(f"`samples` must be positive, got {samples}", "Give two positive numbers.")
    copied = deployed_copy(model)
    weights = [weight for weight in find_weights(copied, layers) if layers or _has_map(weight)]
    if not weights:
        raise InputError(
            "the model has no conv with a kernel larger than 1 and several input channels",
            "Name the layers to map; in Python, `layers=[...]`.",
        )
    changes = [
        Change(
            {"layer": weight.name, "out_channel": output, "in_channel": channel},
            partial(_one_kernel, weight, output, channel),
        )
        for weight in weights
        for output in equidistant(weight.layout.out_channels, samples[0])
        for channel in equidistant(weight.layout.channels, samples[1])
    ]
    names = [weight.name for weight in weights]
    return measure("location", copied, changes, metric, layers=names, **measuring)


def _has_map(weight: MeasuredWeight) -> bool:
    return math.prod(weight.layout.kernel_size) > 1 and weight.layout.channels > 1


def _one_kernel(weight: MeasuredWeight, output: int, channel: int) -> Cells:
    chosen = torch.zeros(weight.layout.out_channels, weight.layout.channels, dtype=torch.bool)
    chosen[output, channel] = True
    return {weight.parameter: kernel_mask(weight.layout, chosen)}
