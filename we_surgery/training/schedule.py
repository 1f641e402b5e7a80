"""Weight excitation that starts during training (thesis, section 3.4)."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from we_surgery.attached import AttachedExcitation
from we_surgery.converted.graphs import excited_weights
from we_surgery.converted.options import ConvertOptions
from we_surgery.converted.proof import check_preserved, refuse_non_finite
from we_surgery.errors import InputError
from we_surgery.excitations import Composition, Rescale
from we_surgery.training.vanilla_view import inside_wrappers

logger = logging.getLogger(__name__)


@torch.no_grad()
def resume(model: nn.Module | AttachedExcitation, *averages: nn.Module) -> int:
    """Switches paused excitations on.

    The outputs do not jump, except with ``init="paper"``: each raw weight is replaced by one whose
    excitation equals the current weight. Raw weights stay the same Parameters, so the optimizer can
    continue. Its momentum is that of the weights before.

    Args:
        model: a model converted with ``start="paused"``; also inside DDP or ``torch.compile``,
            which recompiles once. Or an excitation attached with ``start="paused"``.
        *averages: averages (EMA) of a converted model, such as ``ModelEmaV3`` and
            ``AveragedModel``; they are switched on too. Do not pass averages of an attached model:
            they are vanilla models.

    Returns:
        The number of weights that were switched on, including those of averages.

    Raises:
        InputError: the model is sharded, or an ``AveragedModel`` does not average the buffers that
            the excitations have. The model is as it was.
        SurgeryError: a weight is not finite. The model is as it was.
    """
    if isinstance(model, AttachedExcitation):
        return model.resume()
    _refuse_copied_buffers(averages)
    paused: dict[int, tuple[str, nn.Parameter, Composition]] = {}
    for root in (model, *averages):
        for weight in excited_weights(inside_wrappers(root)):
            if weight.excitation.is_paused:
                paused[id(weight.raw)] = (weight.name, weight.raw, weight.excitation)
    for name, raw, _ in paused.values():
        if hasattr(raw, "full_tensor"):
            raise InputError(
                f"the raw weight of layer {name!r} is sharded",
                "Resume before fully_shard, from a full state dict.",
            )
        refuse_non_finite(name, raw, "the raw weight")
    for name, raw, excitation in paused.values():
        before = raw.clone()
        raw.copy_(excitation.resume(raw))
        if excitation.sets_in == "preserve":
            check_preserved(name, before, excitation(raw))
    if paused:
        logger.info("resumed %d excitations", len(paused))
    return len(paused)


class WESchedule:
    """Plain training first, weight excitation from an epoch on.

    The schedule has no state: the model or the attached excitation records whether it is paused. A
    resumed run makes the schedule again.

    Args:
        model: converted with ``start="paused"``, also inside DDP or ``torch.compile``; or an
            excitation attached with ``start="paused"``.
        start_epoch: the first epoch with excitation, in the numbering of :meth:`step`.
        *averages: averages of its weights (EMA), as for :func:`resume`.

    Raises:
        InputError: ``start_epoch`` is negative or not an integer, or an average is not supported;
            see :func:`resume`.

    Example:
        >>> model = ws.convert(model, start="paused")
        >>> schedule = ws.WESchedule(model, start_epoch=30)
        >>> for epoch in range(90):
        ...     schedule.step(epoch)
        ...     train_one_epoch(model)
    """

    def __init__(
        self, model: nn.Module | AttachedExcitation, start_epoch: int, *averages: nn.Module
    ) -> None:
        _check_epoch(start_epoch)
        _refuse_copied_buffers(averages)  # here and not in the middle of training
        self.model = model
        self.start_epoch = start_epoch
        self.averages = averages

    def step(self, epoch: int) -> bool:
        """To be called before each epoch.

        Returns:
            Whether excitation was switched on by this call.
        """
        return epoch >= self.start_epoch and resume(self.model, *self.averages) > 0


def paused_until(start_epoch: int | None, options: ConvertOptions) -> ConvertOptions:
    """The options, with ``start="paused"`` if there is a start epoch."""
    if start_epoch is None:
        return options
    _check_epoch(start_epoch)
    if options.get("start", "paused") != "paused":
        raise InputError(
            f"both start_epoch={start_epoch} and start={options['start']!r} were given",
            "Give start_epoch alone: excitation is paused until then.",
        )
    return {**options, "start": "paused"}


def _refuse_copied_buffers(averages: Iterable[nn.Module]) -> None:
    """Raises if an average would use the buffers of the model's excitations."""
    for average in averages:
        if not isinstance(average, AveragedModel) or average.use_buffers:
            continue
        for weight in excited_weights(average.module):
            stages = weight.excitation.stages
            if weight.excitation.is_paused and any(isinstance(s, Rescale) for s in stages):
                raise InputError(
                    "an AveragedModel without use_buffers copies the model's buffers, but those of "
                    f"layer {weight.name!r} depend on its weights",
                    "Make it as `AveragedModel(model, ..., use_buffers=True)`.",
                )


def _check_epoch(start_epoch: object) -> None:
    if isinstance(start_epoch, bool) or not isinstance(start_epoch, int) or start_epoch < 0:
        raise InputError(
            f"start_epoch must be an integer of at least 0, not {start_epoch!r}",
            "Give the first epoch with excitation, such as 30.",
        )
