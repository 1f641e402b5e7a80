"""What the callbacks for all frameworks share: form, options, and the start of excitation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack, get_args

from torch import nn

from we_surgery.attached import AttachedExcitation, attach
from we_surgery.attached.optimizers import supported_optimizers
from we_surgery.attached.registry import excitation_of
from we_surgery.attached.riding import loaded_states
from we_surgery.converted.options import ConvertOptions, resolve_options
from we_surgery.errors import InputError, check_known
from we_surgery.reading import Form
from we_surgery.training.schedule import WESchedule, paused_until


class CallbackOptions(ConvertOptions, total=False):
    """Keyword arguments of the callbacks."""

    form: Form
    start_epoch: int | None
    strip_checkpoints: bool


class ExcitingCallback:
    """Base of the callbacks ``WeightExcitation``; nothing here imports a framework."""

    def __init__(
        self,
        mode: str | None = None,
        *,
        form: Form = "converted",
        start_epoch: int | None = None,
        strip_checkpoints: bool = True,
        **options: Unpack[ConvertOptions],
    ) -> None:
        super().__init__()
        check_known("form", form, get_args(Form))
        self.form = form
        self.excitation: AttachedExcitation | None = None
        self.start_epoch = start_epoch
        self.options = resolve_options(mode, paused_until(start_epoch, options))
        self.strip_checkpoints = strip_checkpoints

    def __getstate__(self) -> dict[str, Any]:
        if self.excitation is not None:
            raise InputError(
                "this callback has attached an excitation in this process, which cannot be copied "
                "to another process",
                "Give a trainer that starts processes a new callback.",
            )
        return vars(self)

    def begin_epoch(self, epoch: int, model: nn.Module, *averages: nn.Module) -> None:
        """Switches paused excitation on, in either form, once its epoch is reached."""
        if self.start_epoch is not None:
            WESchedule(self.excitation or model, self.start_epoch, *averages).step(epoch)

    def attach(self, model: nn.Module, optimizers: Sequence[Any], *, is_resumed: bool) -> None:
        """Attaches when a framework begins to train, also where it trained this model before.

        A second run over the same model goes on from its present weights, as the vanilla run would:
        frameworks load the best epoch or an average at the end of the first. ``is_resumed`` is
        whether the framework loads the optimizer's state from a checkpoint later.
        """
        found = (excitation_of(parameter) for parameter in model.parameters())
        known = next((each for each in found if each is not None), None)
        stepped = supported_optimizers(optimizers)
        is_same = known is not None and known.is_in(stepped)
        if known is not None and (is_same or not (is_resumed or loaded_states(stepped))):
            known.adopt()
            if not is_same:
                known.move_to(optimizers)
            self.excitation = known
            return
        if known is not None:
            known.detach()
        self.excitation = attach(model, optimizers, **self.options)  # type: ignore[misc]
