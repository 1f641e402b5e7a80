"""Copies of models, whole or sharing their tensors."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from we_surgery.errors import SurgeryError
from we_surgery.graphs import complete_copies


def copy_model(model: nn.Module, *, share_tensors: bool = False) -> nn.Module:
    """A deep copy.

    Args:
        model: the model.
        share_tensors: the modules are copied, their parameters and buffers are the same ones.

    Raises:
        SurgeryError: the model holds something that cannot be copied.
    """
    try:
        # Parameters that are made in inference mode cannot be trained.
        with torch.inference_mode(False):
            shared = [*model.parameters(), *model.buffers()] if share_tensors else []
            memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
            copied = copy.deepcopy(model, memo)
            complete_copies(model, memo)
            return copied
    except Exception as error:
        raise SurgeryError(
            f"the model cannot be copied: {type(error).__name__}: {error}",
            "Pass `inplace=True` to change the model itself."
            if not share_tensors
            else "Convert without transplants, which are planned on a copy of the modules.",
        ) from error


@contextlib.contextmanager
def drawing_nothing(model: nn.Module) -> Iterator[None]:
    """Gives torch's random generators, the CPU's and the model's GPUs', their state back."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        yield
