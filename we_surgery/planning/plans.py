"""The plan: one row a layer, with the decision and the reason; as an object and as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from we_surgery._util.version import __version__
from we_surgery.errors import InputError
from we_surgery.excitations import EXCITATIONS, Recipe, WeightLayout, build_excitation
from we_surgery.planning.transplant_rows import TransplantDecision
from we_surgery.reading import layer_display_name

SCHEMA_VERSION = 2
_READ_VERSIONS = (1, 2)
"""Version 1 knew no transplants."""


@dataclass(frozen=True)
class Decision:
    """What one weight gets.

    Attributes:
        module: name of the module that owns the weight ("" for the model itself).
        parameter: the weight's name in it.
        kind: ``conv2d``, ``linear``, ``attention``, ...
        type_name: the module's class, qualified.
        shape: the weight's shape.
        groups: the layer's groups.
        excitation: the stages and their options; empty when the layer is left alone.
        reason: why.
        added_parameters: parameters that training gains; 0 where the excitation is shared.
        shared_with: the tied layer whose excitation this one shares, or None.
    """

    module: str
    parameter: str
    kind: str
    type_name: str
    shape: tuple[int, ...]
    groups: int
    excitation: Recipe
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
        """The names of the stages; empty when the layer is left alone."""
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
    """``LWE(attention=cbam)``: with the options that are not the method's own."""
    known = EXCITATIONS[stage].options() if stage in EXCITATIONS else {}
    given = [f"{k}={v}" for k, v in options.items() if k not in known or v != known[k]]
    return f"{stage.upper()}({', '.join(given)})" if given else stage.upper()


@dataclass(frozen=True)
class Plan:
    """Decisions for a whole model. ``convert`` does exactly what it says.

    Attributes:
        mode: the mode it was made from.
        read_by: how the model was read: ``recorded``, ``symbolic`` or ``listed``.
        read_by_reason: why a more precise reading was not possible, or what could not be read.
        decisions: a row for each weight, in the model's order.
        model_parameters: parameters of the vanilla model.
        pattern_matches: how many layers each rule's pattern matched.
        transplants: a row for each place of a transplant, in the order in which they go in.
            They go in first: the names of ``decisions`` are those of the model that has them.
    """

    mode: str
    read_by: str
    read_by_reason: str
    decisions: tuple[Decision, ...]
    model_parameters: int
    pattern_matches: Mapping[str, int] = field(default_factory=dict)
    transplants: tuple[TransplantDecision, ...] = ()

    @property
    def excited(self) -> tuple[Decision, ...]:
        """The rows of the weights that are excited."""
        return tuple(decision for decision in self.decisions if decision.excitation)

    @property
    def changes(self) -> bool:
        """Whether any row changes something."""
        return bool(self.excited) or any(row.attach for row in self.transplants)

    @property
    def added_parameters(self) -> int:
        """Parameters that training gains."""
        by_transplants = sum(row.added_parameters for row in self.transplants)
        return by_transplants + sum(decision.added_parameters for decision in self.decisions)

    @property
    def kept_parameters(self) -> int:
        """Those of them that are left after strip: none of an excitation's."""
        return sum(row.added_parameters for row in self.transplants if row.stays)

    @property
    def kept(self) -> Plan:
        """What the plan says of the model after strip: the transplants that stay."""
        kept = tuple(row for row in self.transplants if row.stays)
        return replace(self, decisions=(), pattern_matches={}, transplants=kept)

    def after(self, earlier: Plan | None) -> Plan:
        """This plan, made for a model that the plan ``earlier`` was done to before."""
        if earlier is None:
            return self
        return replace(self, transplants=(*earlier.transplants, *self.transplants))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types, with the schema's version."""
        return {
            "schema": SCHEMA_VERSION,
            "we_surgery": __version__,
            "mode": self.mode,
            "read_by": self.read_by,
            "read_by_reason": self.read_by_reason,
            "model_parameters": self.model_parameters,
            "added_parameters": self.added_parameters,
            "pattern_matches": dict(self.pattern_matches),
            "transplants": [row.to_dict() for row in self.transplants],
            "layers": [_row(decision) for decision in self.decisions],
        }

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "the plan") -> Plan:
        """The inverse of :meth:`to_dict`; totals are counted anew.

        Raises:
            InputError: a newer schema, a missing key, or a value of the wrong type.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("layers"), list):
            raise InputError(
                f"{source} is no plan: it has no list `layers`",
                "Make one with `we-convert MODEL --dry-run --json`.",
            )
        if data.get("schema") not in _READ_VERSIONS:
            known = " and ".join(map(str, _READ_VERSIONS))
            raise InputError(
                f"{source} has schema {data.get('schema')!r}; this version reads {known}",
                "Make the plan again, or install the version of we_surgery that wrote it.",
            )
        return cls(
            mode=str(data.get("mode", "")),
            # Older plans have them as `rung` and `rung_reason`.
            read_by=str(data.get("read_by", data.get("rung", ""))),
            read_by_reason=str(data.get("read_by_reason", data.get("rung_reason", ""))),
            decisions=_decisions(data["layers"], source),
            model_parameters=int(data.get("model_parameters", 0)),
            pattern_matches=dict(data.get("pattern_matches", {})),
            transplants=tuple(
                TransplantDecision.from_dict(row, source) for row in data.get("transplants") or ()
            ),
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Plan:
        """A plan from a JSON file, edited or not.

        Raises:
            InputError: the file cannot be read or holds no plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"the plan {path} cannot be read: {error}",
                "Make one with `we-convert MODEL --dry-run --json > plan.json`.",
            ) from error
        return cls.from_dict(data, str(path))

    def __str__(self) -> str:
        from we_surgery._util.tables import NARROW
        from we_surgery._util.text import SafeConsole
        from we_surgery.planning.table import plan_table

        buffer = io.StringIO()
        SafeConsole(file=buffer, width=NARROW).print(plan_table(self), crop=False)
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def added_parameters(
    recipe: Recipe, layout: WeightLayout, parts: dict[Hashable, nn.Module] | None = None
) -> int:
    """How many parameters an excitation of this recipe adds; nothing is allocated.

    Args:
        recipe: its stages and their options.
        layout: of the layer's weight.
        parts: what layers counted before have in common and is not counted again; it is filled.
    """
    if not recipe:
        return 0
    parts = {} if parts is None else parts
    known = {id(parameter) for part in parts.values() for parameter in part.parameters()}
    excitation = build_excitation(recipe, layout, device="meta", parts=parts)
    return sum(p.numel() for p in excitation.parameters() if id(p) not in known)


def _row(decision: Decision) -> dict[str, Any]:
    row = asdict(decision)
    row["shape"] = list(decision.shape)
    row["excitation"] = [
        {name: dict(options) for name, options in stage.items()} for stage in decision.excitation
    ]
    return row


def _decisions(rows: list[Any], source: str) -> tuple[Decision, ...]:
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
