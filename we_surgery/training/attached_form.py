"""The attached form in callbacks: attach where the framework has made its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from torch import nn

from we_surgery.attached import AttachedExcitation, attach
from we_surgery.attached.optimizers import supported_optimizers
from we_surgery.attached.registry import excitation_of
from we_surgery.attached.riding import loaded_states
from we_surgery.converted.options import ConvertOptions
from we_surgery.errors import InputError, near_matches
from we_surgery.reading import Form as Form


def check_form(form: str) -> None:
    """Raises where there is no such form.

    Raises:
        InputError: as said.
    """
    if form not in get_args(Form):
        raise InputError(
            f"there is no form {form!r}{near_matches(form, get_args(Form))}",
            f"Use one of: {', '.join(get_args(Form))}.",
        )


def attach_or_go_on(
    model: nn.Module,
    optimizers: Sequence[Any],
    options: ConvertOptions,
    *,
    is_resumed: bool,
) -> AttachedExcitation:
    """Attaches when a framework begins to train, also where it trained this model before.

    A second run over the same model goes on from its present weights, as the vanilla run would:
    frameworks load the best epoch or an average at the end of the first.

    Args:
        model: the network; also inside DDP or ``torch.compile``.
        optimizers: those that the framework steps.
        options: as :func:`~we_surgery.converted.options.resolve_options` returned them.
        is_resumed: whether the framework loads the optimizer's state from a checkpoint later.

    Returns:
        The excitation.
    """
    found = (excitation_of(parameter) for parameter in model.parameters())
    known: AttachedExcitation | None = next((each for each in found if each is not None), None)
    if known is not None:
        stepped = supported_optimizers(optimizers)
        is_resumed = is_resumed or loaded_states(stepped) is not None
        if known.is_in(stepped):
            known.adopt()
            return known
        if not is_resumed:
            known.adopt()
            known.move_to(optimizers)
            return known
        known.detach()
    return attach(model, optimizers, **options)  # type: ignore[misc]
