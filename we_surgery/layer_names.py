"""What an excited layer calls its parts, and how a parameter is renamed in its place."""

from __future__ import annotations

from torch import nn

RAW_PREFIX = "raw_"
EXCITATION = "excitation"


def raw_name(parameter: str) -> str:
    """Where the raw tensor of ``parameter`` is kept: ``weight`` -> ``raw_weight``."""
    return RAW_PREFIX + parameter


def excitation_name(parameter: str) -> str:
    """The submodule that excites ``parameter``: ``in_proj_weight`` -> ``in_proj_excitation``."""
    stem = parameter.removesuffix("weight")
    return stem + EXCITATION if stem != parameter else f"{parameter}_{EXCITATION}"


def names_taken(parameter: str) -> tuple[str, ...]:
    """The attributes that exciting ``parameter`` adds to a layer."""
    return raw_name(parameter), excitation_name(parameter), "layer_name", "recompute"


def rename_parameter(module: nn.Module, old: str, new: str) -> None:
    """Renames a parameter without a change of its position."""
    renamed = {new if name == old else name: p for name, p in module._parameters.items()}
    module._parameters.clear()
    module._parameters.update(renamed)
