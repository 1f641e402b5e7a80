"""Learning curves of variants: train/validation gap, smoothness, speed.

Thesis, sections 3.6 and 6.7, looks at weight excitation as regularization by such curves and gives
no numbers; Fig. 4c of the WE paper compares how fast accuracy is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from we_surgery._util.progress import Progress
from we_surgery.analysis.run_results import LearningCurves, LearningRow
from we_surgery.analysis.sweeps import MakeModel, all_runs, trained
from we_surgery.analysis.variants import Variant, unchanged
from we_surgery.converted.convert import convert
from we_surgery.errors import InputError

History = Sequence[tuple[float, float]]
"""The metric on training and on validation data after each epoch; more is better."""


@dataclass(frozen=True)
class Regularized:
    """A variant of a model, and the keyword arguments of the training function it needs."""

    variant: Variant = unchanged
    settings: Mapping[str, Any] = field(default_factory=dict)


def regularization_variants(
    mode: str = "lwe",
    *,
    dropout: float = 0.5,
    weight_decay: float = 5e-4,
    label_smoothing: float = 0.1,
) -> dict[str, Regularized]:
    """A vanilla model, an excited one, and regularized ones (thesis, sections 3.6 and 6.7).

    Dropout precedes the last linear layer. The training function gets the other settings as
    ``weight_decay`` or ``label_smoothing``.
    """
    return {
        "vanilla": Regularized(),
        mode: Regularized(lambda model: convert(model, mode, inplace=True)),
        f"dropout {dropout:g}": Regularized(lambda model: with_dropout(model, dropout)),
        f"weight decay {weight_decay:g}": Regularized(settings={"weight_decay": weight_decay}),
        f"label smoothing {label_smoothing:g}": Regularized(
            settings={"label_smoothing": label_smoothing}
        ),
    }


def with_dropout(model: nn.Module, rate: float) -> nn.Module:
    """Puts dropout in front of the last linear layer, in place."""
    names = [name for name, m in model.named_modules() if name and isinstance(m, nn.Linear)]
    if not names:
        raise InputError(
            "there is no linear layer to put dropout in front of", "Give another variant."
        )
    last = model.get_submodule(names[-1])
    model.set_submodule(names[-1], nn.Sequential(nn.Dropout(rate), last))
    return model


def learning_curves(
    make_model: MakeModel,
    variants: Mapping[str, Regularized],
    train_fn: Callable[..., History],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    goal: float | None = None,
    progress_file: str | Path | None = None,
    progress: Progress | None = None,
) -> LearningCurves:
    """Trains each variant with each seed, and describes its learning curves.

    Runs of one seed start from the same weights, as in :func:`~we_surgery.analysis.sweep`.

    Args:
        make_model: makes a vanilla model.
        variants: by name.
        train_fn: ``train_fn(model, seed, **settings)`` trains a model in place and returns its
            metric on training and on validation data after each epoch.
        seeds: one run each.
        goal: a validation metric; the rows say in which epoch it was first reached.
        progress_file: keeps finished runs, and resumes from them.
        progress: called with (runs done, runs in all).

    Raises:
        InputError: there is no variant or no seed, or ``train_fn`` returned no epochs.
    """
    if not variants or not seeds:
        raise InputError("there is no variant or no seed", "Give at least one of each.")

    def train(name: str, seed: int) -> list[list[float]]:
        found: list[History] = []
        own = variants[name]

        def keep(model: nn.Module) -> None:
            found.append(train_fn(model, seed, **own.settings))

        trained(make_model, own.variant, keep, seed)
        history = [[float(value) for value in epoch] for epoch in found[0] or ()]
        if not history or any(len(epoch) != 2 for epoch in history):
            raise InputError(
                f"the training function returned {found[0]!r} for {name!r}",
                "Return a list with (training metric, validation metric) of each epoch.",
            )
        return history

    runs = {f"{seed}:{name}": (name, seed) for seed in seeds for name in variants}
    job = {"analysis": LearningCurves.analysis, "variants": list(variants)}
    histories = all_runs(runs, train, job, "accuracy", progress_file, progress)
    rows = [
        LearningRow(name, seed, [e[0] for e in histories[key]], [e[1] for e in histories[key]])
        for key, (name, seed) in runs.items()
    ]
    return LearningCurves("metric_fn", goal, rows)
