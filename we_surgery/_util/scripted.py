"""TorchScript inside a model: its parameters can be read, and nothing of it can be replaced."""

from __future__ import annotations

import torch
from torch import nn


def is_scripted(module: nn.Module) -> bool:
    """Whether the module was scripted or traced by ``torch.jit``."""
    return isinstance(module, torch.jit.ScriptModule)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters that the module itself registers, by name.

    A scripted module has a container of its own kind for them, which only knows ``items``.
    """
    return dict(module._parameters.items())
