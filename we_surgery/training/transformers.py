"""Weight excitation in the Trainer of transformers: a callback that converts and strips."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from we_surgery.converted.convert import convert
from we_surgery.converted.state import is_converted
from we_surgery.converted.strip import strip
from we_surgery.errors import WESurgeryError
from we_surgery.training.callback import ExcitingCallback
from we_surgery.training.optimizers import add_to_optimizer
from we_surgery.training.vanilla_view import inside_wrappers

STRIPPED_FOLDER = "stripped"


class WeightExcitation(ExcitingCallback, TrainerCallback):
    """Converts the Trainer's model before its optimizer is made, and strips each checkpoint.

    The conversion happens in place when the Trainer has been built, so checkpoints resume as usual.
    Each folder ``checkpoint-N`` gets a folder ``stripped`` with the vanilla model and its
    configuration, for ``from_pretrained``. Do not open the converted checkpoint with
    ``from_pretrained``: it initializes the excited weights at random. If weights cannot be stripped
    (not finite or sharded), a warning says so and training continues.

    With ``form="attached"`` nothing is converted: :func:`~we_surgery.attach` is called when
    training begins, the model stays vanilla. Checkpoints and ``save_model`` write plain folders
    that ``from_pretrained`` opens with the trained weights. The excitation's state is in
    ``optimizer.pt``. A second ``train()`` continues from the model's current weights.

    Args:
        mode: as in :func:`~we_surgery.convert`.
        form: ``attached`` or ``converted``.
        start_epoch: the first epoch with excitation: until then it is paused, as with
        ``start="paused"``.
        strip_checkpoints: whether to write the stripped models; only for the converted form.
        **options: those of ``convert``: ``config``, ``rules``, ``plan``, ``transplants``,
            ``init``, ``start``, ``example_inputs``.

    Attributes:
        excitation: what :func:`~we_surgery.attach` returned; None before, and when converting.

    Raises:
        InputError: the options do not fit together. While the Trainer is built: they do not fit the
            model. When training begins: an optimizer that was passed to the Trainer cannot take the
            excitations.

    Example:
        >>> trainer = Trainer(model, arguments, callbacks=[WeightExcitation("lwe")], ...)
        >>> trainer.train()
        >>> strip(trainer.model, inplace=True)
    """

    _next_epoch = 0

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = inside_wrappers(kwargs["model"])
        if self.form == "converted" and not is_converted(model):
            convert(model, inplace=True, **self.options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A run that is resumed within an epoch begins at a fraction.
        self._next_epoch = int(state.epoch or 0)
        optimizer = kwargs.get("optimizer")
        if self.form == "attached":
            # A checkpoint's state is in the optimizer by now.
            self.attach(inside_wrappers(kwargs["model"]), [optimizer], is_resumed=False)
            return
        # One that was given to the Trainer was made before the conversion. DeepSpeed's holds
        # pieces of tensors, and was made by the Trainer.
        if optimizer is not None and not args.deepspeed:
            add_to_optimizer(optimizer, kwargs["model"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Counted: of data without a length, the state has each epoch as a fraction of the whole.
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        self.begin_epoch(epoch, kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.form == "attached":
            return
        if not (self.strip_checkpoints and state.is_world_process_zero):
            return
        checkpoint = Path(args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        try:
            stripped: Any = strip(inside_wrappers(kwargs["model"]))
        except WESurgeryError as error:
            warnings.warn(
                f"no stripped model was written to {checkpoint}: {error.cause}. The checkpoint "
                "itself was saved.",
                stacklevel=2,
            )
        else:
            stripped.save_pretrained(checkpoint / STRIPPED_FOLDER)
