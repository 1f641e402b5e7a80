"""All excited weights of a model computed at once, in place of one after the other.

The layers of a group have one node in the graph. It is made when the first of their weights is
read after a change, and its backward pass runs when the gradients of all of them have arrived.
Launches of a GPU's kernels are then counted by model and not by layer.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from we_surgery.converted.compute_once import Watched, is_outdated, keep, may_share, watch
from we_surgery.converted.layer import ExcitedLayer, excited_layers
from we_surgery.excitations import Composition
from we_surgery.excitations.compute.backends import Backend
from we_surgery.excitations.compute.closed_form import excite_together
from we_surgery.excitations.compute.terms import Terms
from we_surgery.excitations.names import excitation_name, raw_name

logger = logging.getLogger(__name__)


def set_grouped(model: nn.Module, grouped: bool = True) -> None:
    """Computes the excited weights of a model together, once a step, or no longer so.

    On a GPU the Triton kernels (:func:`we_surgery.set_backend`) then need at most seven launches,
    forward and backward, for all layers that have the same stages, where they need up to seven
    for each otherwise; values and gradients are the same. Half-precision weights still have casts
    of their own. Eager formulas still run layer by layer and gain
    nothing, nor do compiled ones.

    What it costs:

    * All gradients of raw weights and of excitations arrive at the end of the backward pass.
      DDP, which sends gradients while others are computed, has to wait with those.
    * A layer that is not called is computed too. It gets no gradient, as it would without, nor
      does it under DDP, which needs ``find_unused_parameters`` for it all the same.
    * Each excited weight is held until its layer has read it, and its gradient until the end of
      the backward pass: at its peak, memory for one more copy of the weights.

    By themselves are computed: weights read in a backward pass, as activation checkpointing does,
    or read again after they were let go of; layers with :func:`we_surgery.set_recompute`, with
    stages that have no closed form, frozen ones, and those alone on a device; and all under
    ``torch.compile``, in the capture of a CUDA graph, without gradients, under FSDP2 where it
    shards them, and in a ``torch.fx.GraphModule``.

    Args:
        model: a converted model, or the part of one that is called as a whole: the first read of
            a weight in it computes them all. A copy, also one that was pickled, is not grouped.
        grouped: False ends it.

    Example:
        >>> model = ws.convert(model, mode="lwe").cuda()
        >>> ws.set_grouped(model)
    """
    layers = [layer for _, layer in excited_layers(model)]
    group = Group(layers) if grouped else None
    for _, excitation, _ in _weights(layers):
        excitation.forget()
        excitation.__dict__["group"] = group


class Group:
    """Layers whose excited weights are computed together.

    Args:
        layers: excited layers; they are not kept alive.
    """

    def __init__(self, layers: Iterable[ExcitedLayer]) -> None:
        self._layers: list[weakref.ref[nn.Module]] = [weakref.ref(layer) for layer in layers]

    def compute(self, excitation: Composition, raw: Tensor) -> None:
        """Computes all outdated weights, if the one that is going to be read is among them.

        They are kept by :mod:`we_surgery.converted.compute_once`.
        """
        # There a checkpointed block is run again and needs its own weights alone, as each block
        # after it: all of them would be computed for each.
        if torch._C._current_graph_task_id() != -1:
            return
        if not _is_for_groups(excitation, raw) or not is_outdated(excitation, raw):
            return
        for (_, backend), own in self._outdated().items():
            if len(own) > 1:
                _compute(own, backend)

    def _outdated(self) -> dict[tuple[torch.device, Backend], list[tuple[Watched, Terms]]]:
        found: dict[tuple[torch.device, Backend], list[tuple[Watched, Terms]]] = {}
        alive = [layer for reference in self._layers if (layer := reference()) is not None]
        seen: set[Composition] = set()
        for layer, excitation, raw in _weights(alive):
            if layer.recompute or excitation.group is not self or excitation in seen:
                continue
            seen.add(excitation)
            if not _is_for_groups(excitation, raw) or not is_outdated(excitation, raw):
                continue
            watched, terms = watch(excitation, raw), excitation.closed_form(raw)
            if watched is not None and terms is not None:
                key = (raw.device, excitation.backend)
                found.setdefault(key, []).append((watched, terms))
        return found


def _is_for_groups(excitation: Composition, raw: Tensor) -> bool:
    """Whether a weight is differentiated, by the closed form."""
    if not torch.is_grad_enabled() or not may_share(excitation, raw):
        return False
    is_trained = any(tensor.requires_grad for tensor in (raw, *excitation.parameters()))
    return is_trained and excitation.closed_form(raw) is not None


def _compute(weights: list[tuple[Watched, Terms]], backend: Backend) -> None:
    try:
        together = [(watched.raw, terms) for watched, terms in weights]
        excited = excite_together(together, backend)
    except Exception as error:
        # Each is computed by itself then, when it is read, and the one at fault says its name.
        logger.warning("%d excited weights are computed one by one: %s", len(weights), error)
        return
    for (watched, _), value in zip(weights, excited, strict=True):
        keep(watched, value)


def _weights(
    layers: Iterable[nn.Module],
) -> Iterator[tuple[ExcitedLayer, Composition, nn.Parameter]]:
    """The excited weights of layers that still have them."""
    for layer in layers:
        if not isinstance(layer, ExcitedLayer):
            continue
        for parameter in layer.excited_parameters:
            excitation = layer._modules.get(excitation_name(parameter))
            raw = layer._parameters.get(raw_name(parameter))
            if isinstance(excitation, Composition) and raw is not None:
                yield layer, excitation, raw
