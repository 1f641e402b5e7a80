"""Which models the zoo holds: chosen once from what is installed, then pinned in a file.

All of torchvision's builders that are not quantized, and of timm the smallest model of each
module file and of each family that has one of a moderate size. A family is what is left of a
name without sizes, resolutions and numbers: ``seresnext26d_32x4d`` is a ``seresnextd``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn
from zoo_libraries import LIBRARIES
from zoo_models import build_bare

PINNED = Path(__file__).with_name("zoo_models.txt")
MODERATE = 30_000_000
"""Parameters that the smallest of a family may have; a module file's smallest may have more."""
SMALL_ENOUGH = 100_000_000
"""Parameters that a timm model may have under ``--all``."""
THIRD_PARTY = Path(__file__).with_name("zoo_third_party.txt")

_SIZES = frozenset(
    """
    atto femto pico zepto nano xxtiny xtiny tiny micro mini xxsmall xsmall small little medium
    base big large huge giant xxs xs s m l xl xxl xxxl t n b h g c p w x r d max full lite
    so150m so400m patch window rw
    """.split()
)

Note = Callable[[str], None]


def pinned_models() -> list[str]:
    """The names in the pinned list, the smallest model first."""
    return PINNED.read_text(encoding="utf-8").split()


def third_party_models() -> list[str]:
    """The pinned models of other libraries, of those libraries that are installed."""
    names = THIRD_PARTY.read_text(encoding="utf-8").split("\n")
    return [name for name in names if name and find_spec(LIBRARIES[name.partition(":")[0]])]


def all_models() -> list[str]:
    """Every torchvision builder and every timm model, whatever its size."""
    return torchvision_models() + [f"timm:{name}" for name in timm.list_models()]


def torchvision_models() -> list[str]:
    """All builders that are not quantized."""
    return [
        f"torchvision:{name}"
        for name in torchvision.models.list_models()
        if "quantized" not in name
    ]


def choose_models(note: Note) -> list[str]:
    """The zoo's models, the smallest first. Counts every model's parameters: some ten minutes."""
    sizes: dict[str, int] = {}
    for name in all_models():
        sizes[name] = parameters_of(name)
        note(f"{name}: {sizes[name]:,} parameters")
    chosen = {
        *torchvision_models(),
        *smallest_of_each({n: s for n, s in sizes.items() if n.startswith("timm:")}),
    }
    return sorted(chosen, key=lambda name: (sizes[name], name))


def smallest_of_each(sizes: dict[str, int]) -> Iterable[str]:
    """The smallest timm model of each module file, and of each family if it is moderate."""
    modules: dict[str, str] = {}
    families: dict[tuple[str, str], str] = {}
    for name, size in sizes.items():
        module = module_of(name)
        if module not in modules or size < sizes[modules[module]]:
            modules[module] = name
        key = (module, family_of(name))
        if key not in families or size < sizes[families[key]]:
            families[key] = name
    moderate = (name for name in families.values() if sizes[name] <= MODERATE)
    return {*modules.values(), *moderate}


def family_of(name: str) -> str:
    """The name without sizes, resolutions and numbers."""
    words = (re.sub(r"\d+", "", word) for word in name.partition(":")[2].split("_"))
    return "_".join(w for w in words if w not in _SIZES and not re.fullmatch(r"[xbdswp]*", w))


def module_of(name: str) -> str:
    """The file of timm that defines the model, such as ``resnet``."""
    return str(timm.model_entrypoint(name.partition(":")[2]).__module__)


def parameters_of(name: str) -> int:
    """How many parameters the model has; where possible, nothing of its size is allocated."""
    try:
        with torch.device("meta"):
            model: nn.Module = build_bare(name)
    except (NotImplementedError, RuntimeError):  # it computes its widths with tensors
        model = build_bare(name)
    return sum(parameter.numel() for parameter in model.parameters())
