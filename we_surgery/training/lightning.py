"""Weight excitation in Lightning: a callback that converts, and strips each checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from torch import nn
from torch.optim.swa_utils import AveragedModel

from we_surgery.checkpoint import (
    is_excited_state_dict,
    strip_state_dict_with_report,
    write_safetensors,
)
from we_surgery.errors import InputError, WESurgeryError
from we_surgery.options import ConvertOptions, resolve_options
from we_surgery.surgery import convert, is_converted

SIDE_FILE = ".stripped.safetensors"


class WeightExcitation(Callback):
    """Converts the model before its optimizers are made, and strips each checkpoint it saves.

    The conversion happens in ``setup``, so checkpoints resume as ever. Beside each checkpoint
    ``NAME.ckpt`` lies ``NAME.stripped.safetensors`` with the vanilla weights, which comes and
    goes with it. It is made of the checkpoint's ``state_dict``, which is the average where
    Lightning's weight averaging is on. Where weights cannot be stripped (they are not finite,
    or the strategy writes shards) a warning says so and training goes on.

    Validating, testing or predicting does not convert, unless a checkpoint of a converted
    model is loaded for it.

    Args:
        mode: as in :func:`~we_surgery.convert`.
        submodule: the attribute of the LightningModule that holds the network, such as
            ``model``; the rest, losses with weights of their own for instance, is then left
            alone, and the stripped file has the network's own names. By default all is
            converted.
        strip_checkpoints: whether to write the stripped files.
        **options: those of ``convert``: ``config``, ``rules`` (the layers' names begin at the
            submodule), ``plan``, ``init``, ``start``, ``example_inputs``.

    Raises:
        InputError: the options do not fit together; in ``setup``: nor the model, there is no
            such submodule, or a callback before this one has copied the model already; when
            fitting starts: nothing was converted.

    Example:
        >>> trainer = Trainer(callbacks=[WeightExcitation("lwe", submodule="model")])
        >>> trainer.fit(module)
    """

    def __init__(
        self,
        mode: str | None = None,
        *,
        submodule: str = "",
        strip_checkpoints: bool = True,
        **options: Unpack[ConvertOptions],
    ) -> None:
        self.options = resolve_options(mode, options)
        self.submodule = submodule
        self.strip_checkpoints = strip_checkpoints

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.convert(trainer, pl_module)
        strategy = trainer.strategy
        inner = strategy.checkpoint_io
        if isinstance(inner, StrippingCheckpointIO):
            inner = inner.inner
        strategy.checkpoint_io = StrippingCheckpointIO(inner, self, trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_converted(pl_module):
            raise InputError(
                f"{type(self).__name__} has converted nothing: the model had no weights in "
                "`setup`, or the plan leaves all of them alone",
                "Build the layers in the LightningModule's __init__, or convert them where "
                "`configure_model` builds them; `ws.plan(model)` gives the reasons.",
            )

    def convert(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Converts the network in place, unless it is converted or not built yet."""
        network = self.network(pl_module)
        if is_converted(network) or next(network.parameters(), None) is None:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            copies = (AveragedModel, type(pl_module))
            if any(isinstance(value, copies) for value in vars(callback).values()):
                raise InputError(
                    f"{type(callback).__name__} has copied the model before its conversion",
                    f"List {type(self).__name__} before it in the trainer's callbacks.",
                )
        convert(network, inplace=True, **self.options)

    def network(self, pl_module: LightningModule) -> nn.Module:
        """The module that is converted."""
        try:
            return pl_module.get_submodule(self.submodule)
        except AttributeError as error:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise InputError(
                f"{type(pl_module).__name__} has no submodule {self.submodule!r}",
                f"Its submodules are: {names}.",
            ) from error


class StrippingCheckpointIO(CheckpointIO):
    """Saves and loads as another does, with a stripped file beside each checkpoint.

    Args:
        inner: what saves and loads.
        callback: whose model it is.
        trainer: the callback's.
        pl_module: the trainer's.
    """

    def __init__(
        self,
        inner: CheckpointIO,
        callback: WeightExcitation,
        trainer: Trainer,
        pl_module: LightningModule,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.callback = callback
        self.trainer = trainer
        self.pl_module = pl_module

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        self.inner.save_checkpoint(checkpoint, path, storage_options)
        if not self.callback.strip_checkpoints:
            return
        if "://" in str(path):
            _warn(path, "it is not in a local folder")
            return
        try:
            write_stripped(checkpoint, side_file(path), self.callback.submodule)
        except WESurgeryError as error:
            _warn(path, error.cause)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = self.inner.load_checkpoint(path, *args, **kwargs)
        state = checkpoint.get("state_dict")
        if isinstance(state, Mapping) and is_excited_state_dict(state):
            # While fitting it is converted already.
            self.callback.convert(self.trainer, self.pl_module)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)
        if "://" not in str(path):
            side_file(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        self.inner.teardown()


def side_file(checkpoint: str | Path) -> Path:
    """Where the stripped weights of a checkpoint lie: ``last.ckpt``, ``last.stripped...``."""
    path = Path(checkpoint)
    return path.with_name(path.name.removesuffix(".ckpt") + SIDE_FILE)


def write_stripped(checkpoint: Mapping[str, Any], path: Path, submodule: str = "") -> None:
    """Writes the vanilla weights of a Lightning checkpoint as safetensors.

    Args:
        checkpoint: what Lightning saves, with its ``state_dict``.
        path: the file; overwritten.
        submodule: whose weights alone are written, by the names they have in it.

    Raises:
        InputError: the state dict is sharded or cannot be written.
        SurgeryError: a folded weight is not finite, or writing failed.
    """
    state, _ = strip_state_dict_with_report(checkpoint, key="state_dict")
    prefix = f"{submodule}." if submodule else ""
    network = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    write_safetensors(network, path, metadata=None, force=True)


def _warn(path: Any, cause: str) -> None:
    warnings.warn(
        f"no stripped file was written beside {path}: {cause}. The checkpoint itself was saved; "
        "strip it with `we-strip`.",
        stacklevel=3,
    )
