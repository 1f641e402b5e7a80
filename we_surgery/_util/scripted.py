"""TorchScript inside a model: its parameters can be read, and nothing of it can be replaced."""

from __future__ import annotations

import torch
from torch import nn


def is_scripted(module: nn.Module) -> bool:
    """Whether the module was scripted or traced by ``torch.jit``."""
    return isinstance(module, torch.jit.ScriptModule)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own parameters by name; a scripted module's container has only ``items``."""
    return dict(module._parameters.items())
