"""Weight excitation in Lightning: a callback that converts, and strips each checkpoint."""

from __future__ import annotations

from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import CheckpointIO

from we_surgery.training.lightning_base import LightningCallback, StrippingIO


class StrippingCheckpointIO(StrippingIO, CheckpointIO):
    """Saves and loads as another does, with a stripped file beside each checkpoint."""


class WeightExcitation(LightningCallback, Callback):
    """Converts the model before its optimizers are made, and strips each checkpoint it saves.

    The conversion happens in ``setup``, so checkpoints resume as ever. Beside each checkpoint
    ``NAME.ckpt`` lies ``NAME.stripped.safetensors`` with the vanilla weights, which comes and
    goes with it. It is made of the checkpoint's ``state_dict``, which is the average where
    Lightning's weight averaging is on. Where weights cannot be stripped (they are not finite,
    or the strategy writes shards) a warning says so and training goes on.

    Validating, testing or predicting does not convert, unless a checkpoint of a converted
    model is loaded for it.

    With ``form="attached"`` nothing is converted: :func:`~we_surgery.attach` is called when
    fitting starts, the module stays vanilla, and Lightning's checkpoints are those of a vanilla
    run, with the excitation's state among the optimizer's. A second ``fit`` goes on with the new
    optimizer.

    Args:
        mode: as in :func:`~we_surgery.convert`.
        form: ``attached`` or ``converted``.
        submodule: the attribute of the LightningModule that holds the network, such as
            ``model``; the rest, losses with weights of their own for instance, is then left
            alone, and the stripped file has the network's own names. By default all is
            converted.
        start_epoch: the first epoch with excitation: until then it is paused, as by
            ``start="paused"``. Averages that Lightning's callbacks keep set in with the model.
        strip_checkpoints: whether to write the stripped files; of converted models alone.
        **options: those of ``convert``: ``config``, ``rules`` (the layers' names begin at the
            submodule), ``plan``, ``transplants``, ``init``, ``start``, ``example_inputs``.

    Attributes:
        excitation: what :func:`~we_surgery.attach` returned; None before, and when converting.

    Raises:
        InputError: the options do not fit together; in ``setup``: nor the model, there is no
            such submodule, a callback before this one has copied the model or frozen layers, or
            the strategy trains in child processes; when fitting starts: nothing was converted.

    Example:
        >>> trainer = Trainer(callbacks=[WeightExcitation("lwe", submodule="model")])
        >>> trainer.fit(module)
    """

    checkpoint_io = StrippingCheckpointIO
