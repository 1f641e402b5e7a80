"""What the callbacks for Lightning under its two names share; nothing here imports Lightning.

``lightning.pytorch`` and ``pytorch_lightning`` are the same code with classes of their own, and a
Trainer of one takes callbacks and modules of its own only.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Unpack

from torch import nn
from torch.optim.swa_utils import AveragedModel

from we_surgery.checkpoint import (
    is_excited_state_dict,
    strip_state_dict_with_report,
    write,
)
from we_surgery.converted.convert import convert
from we_surgery.converted.state import is_converted
from we_surgery.errors import InputError, WESurgeryError
from we_surgery.training.callback import CallbackOptions, ExcitingCallback

SIDE_FILE = ".stripped.safetensors"


class LightningCallback(ExcitingCallback):
    """The methods of the callback ``WeightExcitation``."""

    checkpoint_io: ClassVar[type[StrippingIO]]

    def __init__(
        self, mode: str | None = None, *, submodule: str = "", **options: Unpack[CallbackOptions]
    ) -> None:
        super().__init__(mode, **options)
        self.submodule = submodule

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        if self.form == "attached":
            return
        if stage == "fit":
            if not is_converted(self.network(pl_module)):
                refuse_child_process(trainer)
            self.convert(trainer, pl_module)
        strategy = trainer.strategy
        inner = strategy.checkpoint_io
        if isinstance(inner, StrippingIO):
            inner = inner.inner
        strategy.checkpoint_io = self.checkpoint_io(inner, self, trainer, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        if self.form == "attached":
            # It has loaded the model by now and loads the optimizers next.
            is_resumed = trainer.ckpt_path is not None
            self.attach(self.network(pl_module), trainer.optimizers, is_resumed=is_resumed)
            return
        if not is_converted(pl_module):
            raise InputError(
                f"{type(self).__name__} has converted nothing: the model had no weights in "
                "`setup`, or the plan leaves all of them alone",
                "Build the layers in the LightningModule's __init__, or convert them where "
                "`configure_model` builds them; `ws.plan(model)` gives the reasons.",
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        kept = [value for callback in trainer.callbacks for value in vars(callback).values()]
        averages = [value for value in kept if isinstance(value, AveragedModel)]
        self.begin_epoch(trainer.current_epoch, pl_module, *averages)

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
        # The epoch for the norms' statistics after SWA: Lightning runs no backward and steps all
        # the same, with the gradients of the last batch before, over the average.
        if self.excitation is not None and getattr(trainer.fit_loop, "_skip_backward", False):
            pl_module.zero_grad()

    def convert(self, trainer: Any, pl_module: nn.Module) -> None:
        """Converts the network in place, unless it is converted or not built yet."""
        network = self.network(pl_module)
        if is_converted(network) or next(network.parameters(), None) is None:
            return
        self._refuse_earlier_freezing(trainer, network)
        for callback in trainer.callbacks:
            copies = (AveragedModel, type(pl_module))
            if any(isinstance(value, copies) for value in vars(callback).values()):
                raise InputError(
                    f"{type(callback).__name__} has copied the model before its conversion",
                    f"List {type(self).__name__} before it in the trainer's callbacks.",
                )
        convert(network, inplace=True, **self.options)

    def _refuse_earlier_freezing(self, trainer: Any, network: nn.Module) -> None:
        earlier = itertools.takewhile(lambda callback: callback is not self, trainer.callbacks)
        finetuning = [callback for callback in earlier if _is_a("BaseFinetuning", callback)]
        if finetuning and not all(parameter.requires_grad for parameter in network.parameters()):
            raise InputError(
                f"{type(finetuning[0]).__name__} has frozen layers before the conversion, which "
                "leaves frozen layers alone",
                f"List {type(self).__name__} before it in the trainer's callbacks.",
            )

    def network(self, pl_module: nn.Module) -> nn.Module:
        """The module that is converted."""
        try:
            return pl_module.get_submodule(self.submodule)
        except AttributeError as error:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise InputError(
                f"{type(pl_module).__name__} has no submodule {self.submodule!r}",
                f"Its submodules are: {names}.",
            ) from error


class StrippingIO:
    """Wraps ``inner`` and writes a stripped file beside each checkpoint."""

    def __init__(
        self, inner: Any, callback: LightningCallback, trainer: Any, pl_module: nn.Module
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
        # What a child process hands its parent is a bare state dict in a temporary file.
        if not self.callback.strip_checkpoints or "state_dict" not in checkpoint:
            return
        if "://" in str(path):
            _warn(path, "it is not in a local folder")
            return
        try:
            write_stripped(checkpoint, side_file(path), self.callback.submodule)
        except WESurgeryError as error:
            _warn(path, error.cause)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = self.inner.load_checkpoint(path, *args, **kwargs)
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


def refuse_child_process(trainer: Any) -> None:
    """Raises if Lightning would load the weights of child processes into the vanilla model."""
    if _is_a("_MultiProcessingLauncher", trainer.strategy.launcher):
        raise InputError(
            "the strategy trains in child processes and would load their weights into a model that "
            "is not converted, which keeps its untrained weights",
            "Use strategy='ddp', or convert the network before `trainer.fit`: "
            "`we_surgery.convert(module.network, inplace=True)`.",
        )


def _is_a(name: str, thing: object) -> bool:
    """Whether a class of the object has that name, in either of Lightning's two packages."""
    return any(base.__name__ == name for base in type(thing).__mro__)


def side_file(checkpoint: str | Path) -> Path:
    """The path of a checkpoint's stripped file: ``last.ckpt`` -> ``last.stripped...``."""
    path = Path(checkpoint)
    return path.with_name(path.name.removesuffix(".ckpt") + SIDE_FILE)


def write_stripped(checkpoint: Mapping[str, Any], path: Path, submodule: str = "") -> None:
    """Writes the vanilla weights of a Lightning checkpoint, or of one submodule, as safetensors."""
    state, _ = strip_state_dict_with_report(checkpoint, key="state_dict")
    prefix = f"{submodule}." if submodule else ""
    network = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    write(network, path, "safetensors", force=True)


def _warn(path: Any, cause: str) -> None:
    warnings.warn(
        f"no stripped file was written beside {path}: {cause}. The checkpoint itself was saved; "
        "strip it with `we-strip`.",
        stacklevel=3,
    )
