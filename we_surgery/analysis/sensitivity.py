"""Sweeps that train: what a method's settings change, with paired seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from we_surgery.analysis.changes import Monitor
from we_surgery.analysis.kernels import as_deployed
from we_surgery.analysis.measuring import measure
from we_surgery.analysis.progress_file import ProgressFile
from we_surgery.analysis.scores import Metric, check_score
from we_surgery.converted.graphs import excited_weights
from we_surgery.converted.surgery import convert
from we_surgery.errors import InputError, SurgeryError, near_matches
from we_surgery.excitations import Composition, Rescale
from we_surgery.excitations.names import excitation_name
from we_surgery.reading.kinds import is_norm

MakeModel = Callable[[], nn.Module]
"""Makes the vanilla model, drawing its weights from torch's global generator."""

TrainFunction = Callable[[nn.Module, int], object]
"""Trains a model in place, with a seed for whatever is random in that."""

Variant = Callable[[nn.Module], nn.Module]
"""Changes a vanilla model, in place or not, before it is trained."""

Initialization = Literal["default", "xavier", "kaiming"]


@dataclass(frozen=True)
class SweepRow:
    """One training run.

    Attributes:
        variant: its name.
        seed: of the weights, of the excitations' start, and given to the training function.
        metric: of the model as it would be deployed; None where training failed.
        difference: to the baseline's run of the same seed; None where either failed.
        failure: why there is no metric.
    """

    variant: str
    seed: int
    metric: float | None
    difference: float | None = None
    failure: str = ""


@dataclass(frozen=True)
class Sweep:
    """The result of :func:`sweep`.

    Attributes:
        title: what was varied.
        score: what was measured.
        baseline: the variant that the others are compared with.
        runs: a row for each variant and seed.
    """

    title: str
    score: str
    baseline: str
    runs: list[SweepRow]

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each run."""
        return (asdict(row) for row in self.runs)

    def summary(self) -> list[dict[str, Any]]:
        """For each variant its mean, its mean paired difference, and the error of that.

        The error is the standard error of the mean of the paired differences, in the metric's
        unit; None for fewer than two pairs.
        """
        found = []
        for variant in dict.fromkeys(row.variant for row in self.runs):
            own = [row for row in self.runs if row.variant == variant]
            metrics = [row.metric for row in own if row.metric is not None]
            pairs = [row.difference for row in own if row.difference is not None]
            found.append(
                {
                    "variant": variant,
                    "runs": len(own),
                    "failed": len(own) - len(metrics),
                    "mean": statistics.fmean(metrics) if metrics else None,
                    "difference": statistics.fmean(pairs) if pairs else None,
                    "standard_error": statistics.stdev(pairs) / math.sqrt(len(pairs))
                    if len(pairs) > 1
                    else None,
                }
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """The runs and their summary as JSON types."""
        return {"analysis": "sensitivity", **asdict(self), "summary": self.summary()}


def sweep(
    make_model: MakeModel,
    variants: Mapping[str, Variant],
    train_fn: TrainFunction,
    metric: Metric,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    title: str = "variants",
    score: str = "accuracy",
    progress_file: str | Path | None = None,
    monitor: Monitor | None = None,
) -> Sweep:
    """Trains each variant with each seed and measures the models as they would be deployed.

    Runs of one seed are paired: before each the global generator is seeded the same, so all
    variants start from the same vanilla weights, and ``train_fn`` gets the same seed. Torch's
    generator is given back as it was.

    Args:
        make_model: makes a vanilla model.
        variants: by name; the first is what the others are compared with.
        train_fn: trains a model in place.
        metric: ``metric_fn(model) -> float`` of the stripped model, or a labelled loader.
        seeds: one run each.
        title: of the table and picture.
        score: of a loader.
        progress_file: keeps finished runs, and resumes from them.
        monitor: told of each finished run.

    Raises:
        InputError: there is nothing to vary, or the metric cannot be used.

    A model whose weights are not finite after training, or whose metric is not, gives a row that
    says so.
    """
    check_score(score)
    if not variants or not seeds:
        raise InputError("there is no variant or no seed", "Give at least one of each.")
    job = {"analysis": "sensitivity", "title": title, "score": score}
    path = None if progress_file is None else Path(progress_file)
    progress = ProgressFile(path, {**job, "variants": list(variants)})
    if monitor is not None:
        monitor.start(len(variants) * len(seeds), None)
    runs = []
    label = "metric_fn" if callable(metric) else score
    for seed in seeds:
        # A whole seed after the other, so that what is there of a stopped sweep is paired.
        baseline: float | None = None
        for name, variant in variants.items():
            key = f"{seed}:{name}"
            if key not in progress:
                progress.add(key, _trained(make_model, variant, train_fn, metric, seed, score))
            if monitor is not None:
                monitor.advance(1)
            value, failure = progress[key]
            if name == next(iter(variants)):
                baseline = value
            both = value is not None and baseline is not None
            runs.append(SweepRow(name, seed, value, value - baseline if both else None, failure))
    progress.remove()
    return Sweep(title, label, next(iter(variants)), runs)


def _trained(
    make_model: MakeModel,
    variant: Variant,
    train_fn: TrainFunction,
    metric: Metric,
    seed: int,
    score: str,
) -> tuple[float | None, str]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = make_model()
        # Again: a variant may draw before others do.
        torch.manual_seed(seed)
        model = variant(model)
        train_fn(model, seed)
        try:
            deployed = as_deployed(model)
        except SurgeryError as error:
            return None, error.cause
    value = measure(deployed, [], metric, score=score).baseline
    if not math.isfinite(value):
        return None, f"the metric is {value}"
    return value, ""


def epsilon_variants(
    epsilons: Sequence[float] = (1e-3, 0.1, 0.2), *, mode: str = "mwe"
) -> dict[str, Variant]:
    """MWE with several epsilons, against the vanilla model (WE paper, Table 5)."""
    variants: dict[str, Variant] = {"vanilla": _unchanged}
    for epsilon in epsilons:
        variants[f"{mode}, epsilon {epsilon:g}"] = _converted(mode, mwe={"epsilon": epsilon})
    return variants


def reduction_variants(
    reductions: Sequence[int] = (16, 8), *, mode: str = "lwe"
) -> dict[str, Variant]:
    """LWE with several reduction ratios (WE paper, section 4.2: 8 gives +0.05 % over 16)."""
    variants: dict[str, Variant] = {"vanilla": _unchanged}
    for reduction in reductions:
        variants[f"{mode}, reduction {reduction}"] = _converted(mode, lwe={"reduction": reduction})
    return variants


def initialization_variants(*, mode: str = "lwe") -> dict[str, Variant]:
    """LWE's layers in torch's default, Xavier's and Kaiming's initialization.

    Supplement, section 1: "similar" accuracy with Xavier's. Kaiming's normal one over
    ``fan_out`` is what the public code draws. Weights only; biases keep torch's default.
    """

    def started(initialization: Initialization) -> Variant:
        def variant(model: nn.Module) -> nn.Module:
            return initialize_excitations(convert(model, mode, inplace=True), initialization)

        return variant

    variants: dict[str, Variant] = {"vanilla": _unchanged}
    names: tuple[Initialization, ...] = ("default", "xavier", "kaiming")
    return variants | {f"{mode}, {name} start": started(name) for name in names}


def initialize_excitations(model: nn.Module, initialization: Initialization) -> nn.Module:
    """Draws the weights of the excitations' linear layers anew, in place.

    Args:
        model: a converted model.
        initialization: ``default`` leaves torch's, ``xavier`` is uniform, ``kaiming`` normal
            over ``fan_out``.

    Raises:
        InputError: there is no such initialization.
    """
    draw = {
        "default": None,
        "xavier": nn.init.xavier_uniform_,
        "kaiming": lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
    }
    if initialization not in draw:
        raise InputError(
            f"there is no initialization {initialization!r}{near_matches(initialization, draw)}",
            f"Use one of: {', '.join(draw)}.",
        )
    function = draw[initialization]
    for weight in excited_weights(model):
        for module in weight.excitation.modules():
            if function is not None and isinstance(module, nn.Linear):
                function(module.weight)
    return model


def normalization_free_variants() -> dict[str, Variant]:
    """Training without any normalization layer (supplement, section 2).

    The paper's ResNet50-LWE still learns so, its plain ResNet50 does not. Which standardization
    that was it does not say. With the public code's, filters of standard deviation 1 multiply
    the signal's scale by about ``sqrt(N) / 2`` in each layer, N being the fan-in. So four forms
    are tried beside the vanilla one: the paper's as it is, none, and standardized filters times
    ``sqrt(1 / N)`` and ``2 sqrt(2 / N)``, of which the last makes up for a ReLU and for
    multipliers of one half as well.
    """

    def lwe(standardize: str, factor: float | None = None) -> Variant:
        def variant(model: nn.Module) -> nn.Module:
            bare = without_normalization(model)
            config = {"mode": "lwe", "linear": "skip", "standardize": standardize}
            converted = convert(bare, config=config, inplace=True)
            return converted if factor is None else scale_standardized(converted, factor)

        return variant

    return {
        "vanilla, no norm": without_normalization,
        "lwe, no norm, standardized": lwe("on"),
        "lwe, no norm, not standardized": lwe("off"),
        "lwe, no norm, standardized x sqrt(1/N)": lwe("on", 1.0),
        "lwe, no norm, standardized x 2 sqrt(2/N)": lwe("on", 2 * math.sqrt(2)),
    }


def without_normalization(model: nn.Module) -> nn.Module:
    """Replaces each normalization layer by an identity, in place."""
    for name, module in list(model.named_modules()):
        if name and is_norm(module):
            model.set_submodule(name, nn.Identity())
    return model


def scale_standardized(model: nn.Module, factor: float = 1.0) -> nn.Module:
    """Multiplies each standardized weight by ``factor * sqrt(1 / N)``, in place; N is the fan-in.

    It is a fixed stage of the excitation behind LWE. With a factor of 1 a layer's output has the
    scale of its input, but for the multipliers and the activation function.
    """
    made: dict[Composition, Composition] = {}  # tied layers share one
    for weight in excited_weights(model):
        excitation = weight.excitation
        names = [stage.name for stage in excitation.stages]
        if "standardize" not in names or Rescale.name in names:
            continue
        if excitation not in made:
            made[excitation] = _scaled(excitation, weight.raw, factor)
        setattr(weight.owner, excitation_name(weight.parameter), made[excitation])
    return model


def _scaled(excitation: Composition, raw: Tensor, factor: float) -> Composition:
    groups = excitation.transposed_groups
    outputs = raw.shape[0] if groups is None else raw.shape[1] * groups
    gain = torch.full((outputs,), factor * math.sqrt(outputs / raw.numel())).to(raw)
    stages = [*excitation.stages, Rescale(gain, torch.zeros_like(gain))]
    return Composition(stages, groups).to(raw.device)


def _unchanged(model: nn.Module) -> nn.Module:
    return model


def _converted(mode: str, **options: Mapping[str, Any]) -> Variant:
    def variant(model: nn.Module) -> nn.Module:
        return convert(model, config={"mode": mode, **options}, inplace=True)

    return variant
