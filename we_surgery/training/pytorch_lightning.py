"""Weight excitation in Lightning under its older name, the package ``pytorch_lightning``."""

from __future__ import annotations

from pytorch_lightning import Callback
from pytorch_lightning.plugins.io import CheckpointIO

from we_surgery.training.lightning_base import LightningCallback, StrippingIO


class StrippingCheckpointIO(StrippingIO, CheckpointIO):
    """Wraps a CheckpointIO and writes a stripped file beside each checkpoint."""


class WeightExcitation(LightningCallback, Callback):
    """See :class:`we_surgery.training.lightning.WeightExcitation`."""

    checkpoint_io = StrippingCheckpointIO
