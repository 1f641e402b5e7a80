"""What an excitation has become: its multipliers, its gains, and whether it learned anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from we_surgery.analysis.multipliers import multiplier_map, stage_inputs
from we_surgery.excitations import Composition

Verdict = Literal["learned", "nothing to learn", "paused", "constant", "untrained", "unchanged"]

VERDICTS: dict[Verdict, str] = {
    "paused": "excitation is still off, the weight is the raw weight",
    "nothing to learn": "the excitation has no parameters",
    "unchanged": "parameters within 0.1 % of those of --start",
    "untrained": "indistinguishable from a fresh initialization: all parameters lie within "
    "1/sqrt(fan_in), and their mean square is a third of its square, within 3 standard errors",
    "constant": "all multipliers are equal (deviation below 1 % of the mean), which a norm "
    "after the layer undoes",
    "learned": "parameters moved from their start, and multipliers differ",
}
"""Each verdict and its criterion, in order of precedence."""

LEARNED_NOTHING = ("paused", "constant", "untrained", "unchanged")

NEAR = 0.1
"""How near to 0 or 1 a multiplier counts as near."""

_BINS = 20
_WEIGHT_BINS = 21  # odd, so that one bin is around 0
_CONSTANT = 0.01
_UNCHANGED = 1e-3


@dataclass(frozen=True)
class MultiplierStatistics:
    """The multipliers ``[O, I]`` of one weight, over all kernels."""

    minimum: float
    maximum: float
    mean: float
    deviation: float  # unbiased
    near_zero: float  # the share within 0.1 of 0
    near_one: float
    low: float  # the histogram's ends: 0 and 1, or wider where the multipliers are
    high: float
    histogram: list[int]  # kernels in each of 20 equal bins


@dataclass(frozen=True)
class GainStatistics:
    """MWE's gain on the gradients of raw weights (WE paper, eq. 3), ``M_A^2 / (M_A^2 - w^2)``."""

    minimum: float
    mean: float
    percentile_99: float
    maximum: float


@dataclass(frozen=True)
class WeightStatistics:
    """One excited weight.

    Attributes:
        raw_norm: Euclidean norm of the raw weight.
        excited_norm: that of the excited weight, which strip leaves.
        raw_histogram: of the raw weight, in 21 equal bins from minus its largest absolute value to
            that value.
        excited_histogram: of the excited weight.
        multiplier: None if no stage has multipliers.
        gain: None without MWE.
        multiply_adds: of the excitation's linear layers, once per computation of the weight,
            whatever the batch size; 0 after strip.
        raw_distance: between the raw weight and its start, over the start's norm; None if the
            start is unknown.
        excitation_distance: the same for the excitation's parameters.
        verdict: whether it learned anything; one of :data:`VERDICTS`.
    """

    raw_norm: float
    excited_norm: float
    raw_histogram: list[int]
    excited_histogram: list[int]
    multiplier: MultiplierStatistics | None
    gain: GainStatistics | None
    multiply_adds: int
    raw_distance: float | None
    excitation_distance: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Start:
    """A weight before training; ``parameters`` is None if it was vanilla."""

    raw: Tensor
    parameters: Mapping[str, Tensor] | None


def weight_statistics(
    excitation: Composition, raw: Tensor, start: Start | None = None
) -> WeightStatistics:
    """Measures one excited weight; ``raw`` is as its layer stores it."""
    with torch.no_grad():
        raw = raw.detach()
        excited = excitation(raw)
        multipliers = multiplier_map(excitation, raw)
        statistics = None if multipliers is None else _multipliers(multipliers)
        distance = None if start is None else _excitation_distance(excitation, start)
        return WeightStatistics(
            raw_norm=_norm([raw]),
            excited_norm=_norm([excited]),
            raw_histogram=_histogram(raw),
            excited_histogram=_histogram(excited),
            multiplier=statistics,
            gain=_gain(excitation, raw),
            multiply_adds=_multiply_adds(excitation, raw),
            raw_distance=None if start is None else _distance([raw], [start.raw]),
            excitation_distance=distance,
            verdict=_verdict(excitation, statistics, distance),
        )


def _excitation_distance(excitation: Composition, start: Start) -> float | None:
    own = dict(excitation.named_parameters())
    before = start.parameters or {}
    if not own or any(n not in before or before[n].shape != own[n].shape for n in own):
        return None
    return _distance(own.values(), [before[name] for name in own])


def learned_nothing(verdicts: Iterable[str]) -> bool:
    """Whether no excitation learned anything; False if none has parameters."""
    able = [verdict for verdict in verdicts if verdict != "nothing to learn"]
    return bool(able) and all(verdict in LEARNED_NOTHING for verdict in able)


def _verdict(
    excitation: Composition,
    multiplier: MultiplierStatistics | None,
    distance: float | None,
) -> Verdict:
    if excitation.is_paused:
        return "paused"
    if next(excitation.parameters(), None) is None:
        return "nothing to learn"
    if distance is not None and distance < _UNCHANGED:
        return "unchanged"
    if distance is None and _is_as_drawn(excitation):
        return "untrained"
    if multiplier is not None and multiplier.deviation < _CONSTANT * abs(multiplier.mean):
        return "constant"
    return "learned"


def _is_as_drawn(excitation: Composition) -> bool:
    """Whether all its layers could come from torch's default initialization.

    It draws from U(-b, b) with b = 1 / sqrt(fan_in). The mean of ``3 x^2 / b^2`` over n values is
    then 1 with a standard error of sqrt(0.8 / n). Training moves some values out of the bounds.
    """
    layers = [
        module
        for module in excitation.modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    if not layers:
        return False
    for layer in layers:
        bound = 1 / math.sqrt(layer.weight[0].numel())
        values = torch.cat([parameter.double().flatten() for parameter in layer.parameters()])
        rounding = 4 * torch.finfo(layer.weight.dtype).eps
        mean_square = (3 * values.square() / bound**2).mean().item()
        if values.abs().max().item() > bound * (1 + rounding):
            return False
        if abs(mean_square - 1) > 3 * math.sqrt(0.8 / len(values)):
            return False
    return True


def _multipliers(multipliers: Tensor) -> MultiplierStatistics:
    values = multipliers.double().flatten()
    low, high = min(0.0, values.min().item()), max(1.0, values.max().item())
    bounds = (low, high) if math.isfinite(low) and math.isfinite(high) else (0.0, 1.0)
    return MultiplierStatistics(
        minimum=values.min().item(),
        maximum=values.max().item(),
        mean=values.mean().item(),
        deviation=values.std().item() if len(values) > 1 else 0.0,
        near_zero=(values.abs() < NEAR).double().mean().item(),
        near_one=((values - 1).abs() < NEAR).double().mean().item(),
        low=bounds[0],
        high=bounds[1],
        histogram=values.histc(_BINS, *bounds).long().tolist(),
    )


def _histogram(weight: Tensor) -> list[int]:
    values = weight.float().flatten()
    peak = values.abs().max().item() if len(values) else 0.0
    if not 0 < peak < math.inf:
        return [0] * _WEIGHT_BINS
    return values.histc(_WEIGHT_BINS, -peak, peak).long().tolist()


def _gain(excitation: Composition, raw: Tensor) -> GainStatistics | None:
    """The slope of the MWE stage at each weight, by autograd: it may have any curve."""
    for stage, filters in stage_inputs(excitation, raw):
        if stage.name == "mwe":
            with torch.enable_grad():
                fed = filters.detach().requires_grad_()
                (slope,) = torch.autograd.grad(stage.excite(fed).sum(), fed)
            ordered = slope.flatten().sort().values.double()
            return GainStatistics(
                minimum=ordered[0].item(),
                mean=ordered.mean().item(),
                percentile_99=ordered[math.ceil(0.99 * len(ordered)) - 1].item(),
                maximum=ordered[-1].item(),
            )
    return None


def _multiply_adds(excitation: Composition, raw: Tensor) -> int:
    outputs = raw.shape[0]
    if excitation.transposed_groups is not None:
        outputs = raw.shape[1] * excitation.transposed_groups
    layers = (module for module in excitation.modules() if isinstance(module, nn.Linear))
    return outputs * sum(layer.weight.numel() for layer in layers)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def _distance(tensors: Iterable[Tensor], before: Iterable[Tensor]) -> float | None:
    pairs = [
        (tensor.double(), start.double()) for tensor, start in zip(tensors, before, strict=True)
    ]
    scale = _norm(start for _, start in pairs)
    return _norm(tensor - start for tensor, start in pairs) / scale if scale else None
