"""The row of one weight in a plan: what it gets and why; as an object and as JSON."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from we_surgery.errors import InputError
from we_surgery.excitations import EXCITATIONS, Stages, WeightLayout, build_excitation
from we_surgery.reading import layer_display_name


@dataclass(frozen=True)
class Decision:
    """The decision for one weight.

    Attributes:
        module: name of the module that owns the weight ("" for the model itself).
        parameter: the weight's name in it.
        kind: ``conv2d``, ``linear``, ``attention``, ...
        type_name: the module's class, qualified.
        shape: the weight's shape.
        groups: the layer's groups.
        excitation: the stages and their options; empty if the layer is skipped.
        reason: why.
        added_parameters: number of added parameters; 0 if the excitation is shared.
        shared_with: the tied layer whose excitation this one shares, or None.
    """

    module: str
    parameter: str
    kind: str
    type_name: str
    shape: tuple[int, ...]
    groups: int
    excitation: Stages
    reason: str
    added_parameters: int = 0
    shared_with: str | None = None

    @property
    def layer(self) -> str:
        """The name that patterns match."""
        return layer_display_name(self.module, self.parameter)

    @property
    def layout(self) -> WeightLayout:
        """How the weight's axes are read."""
        return WeightLayout(self.shape, self.groups, "_transpose" in self.kind)

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages; empty if the layer is skipped."""
        return tuple(name for stage in self.excitation for name in stage)

    @property
    def verdict(self) -> str:
        """The decision in a word: ``skip``, ``LWE``, ``LWE(skip=True)+MWE (standardized)``."""
        if not self.stages:
            return "skip"
        stages = [(name, options) for stage in self.excitation for name, options in stage.items()]
        named = "+".join(_named(*stage) for stage in stages if stage[0] != "standardize")
        if "standardize" not in self.stages:
            return named
        return f"{named} (standardized)" if named else "standardize"


def _named(stage: str, options: Mapping[str, Any]) -> str:
    """``LWE(attention=cbam)``: with the options that differ from the defaults."""
    known = EXCITATIONS[stage].options() if stage in EXCITATIONS else {}
    given = [f"{k}={v}" for k, v in options.items() if k not in known or v != known[k]]
    return f"{stage.upper()}({', '.join(given)})" if given else stage.upper()


def added_parameters(
    stages: Stages, layout: WeightLayout, parts: dict[Hashable, nn.Module] | None = None
) -> int:
    """The number of parameters that these stages add; nothing is allocated."""
    if not stages:
        return 0
    parts = {} if parts is None else parts
    known = {id(parameter) for part in parts.values() for parameter in part.parameters()}
    excitation = build_excitation(stages, layout, device="meta", parts=parts)
    return sum(p.numel() for p in excitation.parameters() if id(p) not in known)


def row_of(decision: Decision) -> dict[str, Any]:
    """The row as JSON types."""
    row = asdict(decision)
    row["shape"] = list(decision.shape)
    row["excitation"] = [
        {name: dict(options) for name, options in stage.items()} for stage in decision.excitation
    ]
    return row


def read_rows(rows: list[Any], source: str) -> tuple[Decision, ...]:
    """The inverse of :func:`row_of` for a whole plan."""
    parts: dict[Hashable, nn.Module] = {}
    return tuple(_decision(row, source, parts) for row in rows)


def _decision(row: Any, source: str, parts: dict[Hashable, nn.Module]) -> Decision:
    try:
        decision = Decision(
            module=str(row["module"]),
            parameter=str(row.get("parameter", "weight")),
            kind=str(row["kind"]),
            type_name=str(row["type_name"]),
            shape=tuple(int(size) for size in row["shape"]),
            groups=int(row["groups"]),
            excitation=[
                {str(name): dict(options or {}) for name, options in stage.items()}
                for stage in row["excitation"]
            ],
            reason=str(row.get("reason", "")),
            shared_with=row.get("shared_with"),
        )
        # Counted anew: the row may have been edited.
        if decision.shared_with is None:
            added = added_parameters(decision.excitation, decision.layout, parts)
            decision = replace(decision, added_parameters=added)
        return decision
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        known = ("module", "parameter", "kind", "type_name", "shape", "groups", "excitation")
        raise InputError(
            f"{source} has a row that cannot be read ({type(error).__name__}: {error}): {row!r}",
            f'A row holds {", ".join(known)}; leave a layer alone with `"excitation": []`.',
        ) from error
