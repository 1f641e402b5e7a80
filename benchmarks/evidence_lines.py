"""The settings that the tuning lines of the evidence choose."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean

from evidence_arms import EXPERIMENTS, TUNING
from lines import Row


def choose(rows: list[Row], network: str) -> dict[str, tuple[float, float]]:
    """Learning rate and decay of each arm whose tuning is complete.

    The best mean validation accuracy wins; of equal ones the smaller values.
    """
    found: dict[str, dict[tuple[float, float], dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        if row["network"] == network and row["phase"] == "tune":
            setting = row["lr"], row["decay"]
            found[row["arm"]][setting][row["seed"]] = row["validation_accuracy"]
    chosen = {}
    for arm in EXPERIMENTS[network].arms:
        tried = found[arm]
        settings = EXPERIMENTS[network].settings(arm)
        if all(len(tried[setting]) == len(TUNING) for setting in settings):
            chosen[arm] = max(sorted(settings), key=lambda each: mean(tried[each].values()))
    return chosen
