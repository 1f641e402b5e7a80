"""Learning curves of variants: train/validation gap, smoothness, speed.

Thesis, sections 3.6 and 6.7, looks at weight excitation as regularization by such curves and gives
no numbers; Fig. 4c of the WE paper compares how fast accuracy is reached.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from we_surgery._util.progress import Progress
from we_surgery.analysis.results import Result, Row
from we_surgery.analysis.sweeps import MakeModel, all_runs, mean_of, trained
from we_surgery.analysis.variants import Variant, unchanged
from we_surgery.converted.convert import convert
from we_surgery.errors import InputError

History = Sequence[tuple[float, float]]
"""The metric on training and on validation data after each epoch; more is better."""


@dataclass(frozen=True, kw_only=True)
class LearningCurves(Result):
    """The result of :func:`~we_surgery.analysis.learning_curves`, a row for each epoch of each run.

    Attributes:
        goal: the validation metric whose epoch is given; None for none.
    """

    analysis: str = "learning_curves"
    goal: float | None

    def summary(self) -> list[Row]:
        """Per variant: means over its runs, and how many reached the goal.

        ``gap`` is the training metric minus the validation metric after the last epoch;
        ``roughness`` the mean of ``|v[t+1] - v[t]|`` minus that of ``v[t+1] - v[t]`` of the
        validation metric, 0 if it never falls. ``epochs_to_goal`` is the mean over the runs that
        reached the goal.
        """
        runs: dict[str, dict[int, list[Row]]] = {}
        for row in self.rows:
            runs.setdefault(row["variant"], {}).setdefault(row["seed"], []).append(row)
        found = []
        for variant, by_seed in runs.items():
            own = [self._described(rows) for rows in by_seed.values()]
            means = {key: mean_of(run[key] for run in own) for key in own[0]}
            reached = sum(run["epochs_to_goal"] is not None for run in own)
            found.append({"variant": variant, "runs": len(own), **means, "reached": reached})
        return found

    def _described(self, rows: Sequence[Row]) -> Row:
        steps = [b["validation"] - a["validation"] for a, b in itertools.pairwise(rows)]
        goal = math.inf if self.goal is None else self.goal
        return {
            "validation": rows[-1]["validation"],
            "gap": rows[-1]["training"] - rows[-1]["validation"],
            "roughness": statistics.fmean(abs(s) - s for s in steps) if steps else 0.0,
            "epochs_to_goal": next((r["epoch"] for r in rows if r["validation"] >= goal), None),
        }


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
        goal: a validation metric; the summary says in which epoch it was first reached.
        progress_file: keeps finished runs, and resumes from them.
        progress: called with (runs done, runs in all).

    Raises:
        InputError: there is no variant or no seed, or ``train_fn`` returned no epochs.
    """

    def train(variant: str, seed: int) -> Row:
        found: list[History] = []
        own = variants[variant]
        trained(
            make_model,
            own.variant,
            lambda model: found.append(train_fn(model, seed, **own.settings)),
            seed,
        )
        history = [[float(value) for value in epoch] for epoch in found[0] or ()]
        if not history or any(len(epoch) != 2 for epoch in history):
            raise InputError(
                f"the training function returned {found[0]!r} for {variant!r}",
                "Return a list with (training metric, validation metric) of each epoch.",
            )
        return {"history": history}

    runs = [{"variant": variant, "seed": seed} for seed in seeds for variant in variants]
    job = {"analysis": "learning_curves", "variants": list(variants)}
    rows = [
        {
            "variant": run["variant"],
            "seed": run["seed"],
            "epoch": epoch,
            "training": training,
            "validation": validation,
        }
        for run in all_runs(runs, train, job, progress_file, progress)
        for epoch, (training, validation) in enumerate(run["history"], 1)
    ]
    return LearningCurves(rows=rows, goal=goal)
