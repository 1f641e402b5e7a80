"""Weight excitation in Lightning: a callback that converts, and strips each checkpoint."""

from __future__ import annotations

from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import CheckpointIO

from we_surgery.training.lightning_base import LightningCallback, StrippingIO


class StrippingCheckpointIO(StrippingIO, CheckpointIO):
    """Wraps a CheckpointIO and writes a stripped file beside each checkpoint."""


class WeightExcitation(LightningCallback, Callback):
    """Converts the model before its optimizers are made, and strips each checkpoint it saves.

    The conversion happens in ``setup``, so checkpoints resume as usual. Beside each checkpoint
    ``NAME.ckpt`` it writes ``NAME.stripped.safetensors`` with the vanilla weights, and deletes it
    with its checkpoint. The weights come from the checkpoint's ``state_dict``, which holds the
    average if Lightning's weight averaging is on. If weights cannot be stripped (not finite, or
    saved as shards), a warning says so and training continues.

    Validating, testing or predicting does not convert, unless a checkpoint of a converted
    model is loaded for it.

    With ``form="attached"`` nothing is converted: :func:`~we_surgery.attach` is called when
    fitting starts, the module stays vanilla, and Lightning's checkpoints are those of a vanilla
    run, with the excitation's state in the optimizer's. A second ``fit`` continues with the new
    optimizer.

    Args:
        mode: as in :func:`~we_surgery.convert`.
        form: ``attached`` or ``converted``.
        submodule: the attribute of the LightningModule that holds the network, such as
            ``model``; the rest (losses with weights, for instance) is not converted, and the
            stripped file has the network's own keys. By default the whole module is converted.
        start_epoch: the first epoch with excitation: until then it is paused, as with
        ``start="paused"``. Averages of Lightning's callbacks are switched on with the model.
        strip_checkpoints: whether to write the stripped files; only for the converted form.
        **options: those of ``convert``: ``config``, ``rules`` (the layers' names begin at the
            submodule), ``plan``, ``transplants``, ``init``, ``start``, ``example_inputs``.

    Attributes:
        excitation: what :func:`~we_surgery.attach` returned; None before, and when converting.

    Raises:
        InputError: the options do not fit together. In ``setup``: they do not fit the model, there
            is no such submodule, a callback before this one has copied the model or frozen layers,
            or the strategy trains in child processes. When fitting starts: nothing was converted.

    Example:
        >>> trainer = Trainer(callbacks=[WeightExcitation("lwe", submodule="model")])
        >>> trainer.fit(module)
    """

    checkpoint_io = StrippingCheckpointIO
