"""Folded weights put in the place of raw ones: all at once, or one layer after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, fx, nn

from we_surgery._util.transaction import AllOrNothing
from we_surgery.converted.graphs import ExcitedWeight, excited_weights
from we_surgery.converted.proof import not_deterministic, refuse_non_finite
from we_surgery.converted.sites import ungraft

Progress = Callable[[int, int], None]

_HASHED_AT_A_TIME = 2**19
"""Values whose bytes are gathered at a time."""


def put_in_place(
    model: nn.Module, weights: Sequence[ExcitedWeight], folded: Mapping[int, Tensor]
) -> None:
    """Makes folded values the weights, and takes the excitations off.

    Args:
        model: a converted model.
        weights: those to take off; all of their owners' and all of their raw Parameters'.
        folded: each raw Parameter's new values, by its ``id``.
    """
    for weight in _one_of_each_raw(weights):
        raw = weight.raw
        raw.data, raw.grad = folded[id(raw)], None
    ungraft(model, [weight.owner for weight in weights])


def fold_layer_by_layer(model: nn.Module, progress: Progress | None = None) -> None:
    """Folds each weight into the place of its raw one before the next is computed, in place.

    All folds are proven before the first layer is changed, by checksums, so that no two weights
    are held at once. Whatever fails after that, such as memory or Ctrl-C, leaves a model that
    computes what it did, of which some layers are vanilla already; a second call goes on.

    Args:
        model: a converted model.
        progress: called with (weights proven, weights in all).

    Raises:
        SurgeryError: a fold is not finite, or its excitation is not deterministic; nothing was
            changed.
    """
    weights = list(excited_weights(model))
    checksums: dict[int, bytes] = {}
    for index, weight in enumerate(weights):
        if not weight.raw.is_meta:
            if id(weight.raw) not in checksums:
                folded = weight.folded()
                refuse_non_finite(weight.name, folded, "the folded weight")
                checksums[id(weight.raw)] = _checksum(folded)
                del folded
            with torch.no_grad():
                if _checksum(weight.excited()) != checksums[id(weight.raw)]:
                    raise not_deterministic(weight.name)
        if progress is not None:
            progress(index + 1, len(weights))
    graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    for linked in _linked(weights):
        folds = {id(w.raw): w.folded() for w in _one_of_each_raw(linked)}
        with AllOrNothing([*(weight.owner for weight in linked), *graphs]):
            put_in_place(model, linked, folds)


def _linked(weights: Iterable[ExcitedWeight]) -> Iterator[list[ExcitedWeight]]:
    """The weights in parts that share neither an owner nor a raw Parameter with another part."""
    part_of: dict[int, list[ExcitedWeight]] = {}
    for weight in weights:
        touched = {id(p): p for key in _keys(weight) if (p := part_of.get(key)) is not None}
        part = [*chain(*touched.values()), weight]
        part_of |= {key: part for member in part for key in _keys(member)}
    yield from {id(part): part for part in part_of.values()}.values()


def _keys(weight: ExcitedWeight) -> tuple[int, int]:
    return id(weight.owner), id(weight.raw)


def _one_of_each_raw(weights: Iterable[ExcitedWeight]) -> Iterable[ExcitedWeight]:
    return {id(weight.raw): weight for weight in reversed(list(weights))}.values()


def _checksum(weight: Tensor) -> bytes:
    """Of all bits and the dtype, a part at a time."""
    found = hashlib.sha256(str(weight.dtype).encode())
    rows = max(_HASHED_AT_A_TIME // max(weight[:1].numel(), 1), 1)
    for part in torch.split(weight.detach(), rows):
        found.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.digest()
