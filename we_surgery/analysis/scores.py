"""The metric of a model: a user's function, or a score over labelled batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from we_surgery.errors import InputError, check_known

MetricFunction = Callable[[nn.Module], float]
"""Any measure of a model; higher is better."""

LabelledBatches = Iterable[Any]
"""A data loader or list of ``(inputs, labels)``."""

Metric = MetricFunction | LabelledBatches

_IGNORED = -100
"""The label torch's losses pass over."""


def accuracy(outputs: Tensor, labels: Tensor) -> tuple[float, int]:
    """How many labels have the largest output, and the number of labels.

    Outputs are ``[N, classes]``, or ``[N, classes, ...]`` with one label per place; labels are
    int64, and -100 is ignored.
    """
    counted = labels != _IGNORED
    right = (outputs.argmax(1) == labels) & counted
    return float(right.sum()), int(counted.sum())


def log_likelihood(outputs: Tensor, labels: Tensor) -> tuple[float, int]:
    """The sum of the labels' log probabilities (natural logarithm), and their number.

    As :func:`accuracy`, for logits; it also changes when no prediction does.
    """
    loss = F.cross_entropy(outputs.double(), labels, ignore_index=_IGNORED, reduction="sum")
    return -float(loss), int((labels != _IGNORED).sum())


Score = Callable[[Tensor, Tensor], tuple[float, int]]

SCORES: dict[str, Score] = {
    "accuracy": accuracy,
    "log_likelihood": log_likelihood,
}
"""What a batch can be scored by: a sum, and what to divide it by."""


def score_name(metric: Metric, score: str) -> str:
    """What a metric is called in results; raises an InputError if there is no such score."""
    check_known("score", score, SCORES)
    return "metric_fn" if callable(metric) else score


def inputs_and_labels(batch: Any, device: torch.device) -> tuple[Any, Tensor]:
    """A batch on the model's device."""
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    if not is_pair or not isinstance(batch[1], Tensor):
        found = type(batch).__name__ + (f" of {len(batch)}" if hasattr(batch, "__len__") else "")
        raise InputError(
            f"a batch must be a pair of inputs and labels, got {found}",
            "Give a loader of (inputs, labels), or a metric_fn(model) of your own.",
        )
    inputs, labels = batch
    if isinstance(inputs, Mapping):
        return {k: _moved(v, device) for k, v in inputs.items()}, labels.to(device)
    if isinstance(inputs, tuple | list):
        return tuple(_moved(value, device) for value in inputs), labels.to(device)
    return _moved(inputs, device), labels.to(device)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def class_scores(outputs: Any) -> Tensor:
    """The tensor of class scores among what a model returns: itself, ``.logits`` or the first."""
    found = getattr(outputs, "logits", outputs)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if isinstance(found, Mapping):
        found = found.get("logits", found.get("out"))
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise InputError(
            f"the model returns {type(outputs).__name__}, in which no class scores were found",
            "Give a metric_fn(model) of your own instead of a loader.",
        )
    return found
