"""Weight excitation in Lightning under its older name, the package ``pytorch_lightning``."""

from __future__ import annotations

from pytorch_lightning import Callback
from pytorch_lightning.plugins.io import CheckpointIO

from we_surgery.training.lightning_base import LightningCallback, StrippingIO


class StrippingCheckpointIO(StrippingIO, CheckpointIO):
    """Saves and loads as another does, with a stripped file beside each checkpoint."""


class WeightExcitation(LightningCallback, Callback):
    """As :class:`we_surgery.training.lightning.WeightExcitation`, which documents it."""

    checkpoint_io = StrippingCheckpointIO
