"""The family of excitations by name: build one from a recipe, rebuild one from a state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from we_surgery.errors import InputError, near_matches
from we_surgery.excitations.base import Excitation
from we_surgery.excitations.composition import Composition
from we_surgery.excitations.layout import WeightLayout
from we_surgery.excitations.lwe import LWE
from we_surgery.excitations.mwe import MWE
from we_surgery.excitations.rescale import Rescale
from we_surgery.excitations.standardize import Standardize

EXCITATIONS: dict[str, type[Excitation]] = {
    Standardize.name: Standardize,
    LWE.name: LWE,
    MWE.name: MWE,
}
"""Every excitation by the name that configs, plans and state dicts use."""

_STAGES: dict[str, type[Excitation]] = EXCITATIONS | {Rescale.name: Rescale}
"""And those that no config asks for but a state dict may hold."""

Recipe = Sequence[Mapping[str, Mapping[str, Any]]]
"""What a layer gets: ``[{"standardize": {}}, {"lwe": {"reduction": 16}}]``; empty: left alone."""


def check_stage(name: object, options: object = None) -> type[Excitation]:
    """The class of the stage ``name``, its option names checked.

    Raises:
        InputError: there is no such stage, or it has no such option.
    """
    if not isinstance(name, str) or name not in EXCITATIONS:
        raise InputError(
            f"there is no excitation called {name!r}{near_matches(str(name), EXCITATIONS)}",
            f"Use one of: {', '.join(EXCITATIONS)}.",
        )
    excitation = EXCITATIONS[name]
    known = excitation.options()
    if options is not None and not isinstance(options, Mapping):
        raise InputError(
            f"the options of {name} must be a mapping, not {options!r}",
            f"Write them as {{{', '.join(f'{k}: {v}' for k, v in known.items())}}}.",
        )
    for option in options or {}:
        if option not in known:
            raise InputError(
                f"{name} has no option {option!r}{near_matches(str(option), known)}",
                f"Its options are: {', '.join(known)}.",
            )
    return excitation


def build_excitation(
    recipe: Recipe,
    layout: WeightLayout,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Composition:
    """A new composition for one layer, its parameters in their default initialization.

    Raises:
        InputError: an unknown stage, an unknown option, a value out of range, or a
            stage named twice.
    """
    device = None if device is None else torch.device(device)
    try:
        stages = [
            check_stage(name, options).for_layout(layout, device=device, dtype=dtype, **options)
            for stage in recipe
            for name, options in stage.items()
        ]
        composition = Composition(stages, layout.groups if layout.transposed else None)
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(error), "Correct the option in the config, rule or plan.") from error
    return composition if device is None else composition.to(device)


def rebuild_excitation(state: Mapping[str, Tensor]) -> Composition:
    """A composition with the stages, options and values that ``state`` holds.

    Args:
        state: the entries below a layer's ``excitation.``, without that prefix.

    Raises:
        InputError: ``state`` names an excitation this version does not know, or lacks
            one of its tensors.
    """
    by_stage: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        stage, _, rest = key.partition(".")
        if rest:
            by_stage.setdefault(stage, {})[rest] = value
    try:
        stages = [
            (_STAGES.get(name) or check_stage(name)).from_state(entries)
            for name, entries in by_stage.items()
        ]
        groups = state["transposed_groups"].shape[0] if "transposed_groups" in state else None
        composition = Composition(stages, groups)
        composition.paused = state.get("paused")
        composition.load_state_dict(dict(state), strict=True, assign=True)
    except InputError:
        raise
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            f"an excitation cannot be rebuilt from its tensors {sorted(state)}: {error}",
            "The file is damaged or comes from another version; save it again.",
        ) from error
    return composition
