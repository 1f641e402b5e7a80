"""What a file or architecture is, which of its weights are excited, and what they learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery import checkpoint
from we_surgery.analysis.learned import (
    VERDICTS,
    Start,
    WeightStatistics,
    learned_nothing,
    weight_statistics,
)
from we_surgery.analysis.multipliers import multiplier_map
from we_surgery.analysis.quantization import Int8Error, int8_error, int8_summary
from we_surgery.converted.state import PLAN_ATTRIBUTE
from we_surgery.errors import InputError
from we_surgery.excitations.layout import to_filters
from we_surgery.excitations.record import is_record
from we_surgery.jobs.convert import Source


@dataclass(frozen=True)
class InspectedWeight:
    """A row of an :class:`Inspection`: the weight by its vanilla key, and what it has become.

    ``added`` counts the values that the excitation keeps, all gone after strip.
    """

    name: str
    shape: tuple[int, ...]
    stages: tuple[str, ...]
    added: int
    statistics: WeightStatistics


@dataclass(frozen=True)
class PlainWeight:
    """A weight that is not excited: its key, shape and dtype, and whether it is quantized."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_quantized: bool


@dataclass(frozen=True)
class Inspection:
    """What a file is; see :func:`inspect_file`.

    Tied tensors count once in ``values`` and ``size`` (bytes), and in those that are left after
    strip. Mode, architecture and plan are there where the file says so; ``plain`` are weights of at
    least two axes that are not excited; ``int8`` is None where it was not measured.
    """

    source: str
    kind: str
    tensors: int
    values: int
    size: int
    stripped_values: int
    stripped_size: int
    layers: list[InspectedWeight]
    mode: str | None
    architecture: str | None
    plan: Mapping[str, Any] | None
    notes: list[str]
    is_attached: bool = False
    plain: list[PlainWeight] = field(default_factory=list)
    int8: list[Int8Error] | None = None

    @property
    def int8_summary(self) -> str:
        """In a sentence, which layers quantize badly; "" where it was not measured."""
        return "" if self.int8 is None else int8_summary(self.int8)

    @property
    def learned(self) -> str:
        """In a sentence, whether excitation learned anything; "" for a vanilla model."""
        verdicts = [layer.statistics.verdict for layer in self.layers]
        if not verdicts:
            return ""
        counts = {verdict: verdicts.count(verdict) for verdict in VERDICTS if verdict in verdicts}
        found = "; ".join(
            f"{count} of {len(verdicts)} {verdict}: {VERDICTS[verdict]}"
            for verdict, count in counts.items()
        )
        if learned_nothing(verdicts):
            return f"EXCITATION HAS LEARNED NOTHING ({found})"
        if set(verdicts) == {"nothing to learn"}:
            return f"excitation has nothing to learn here ({found})"
        return f"excitation: {found}"

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types."""
        found = {**asdict(self), "learned": self.learned}
        if self.int8 is not None:
            found["int8"] = [error.to_dict() for error in self.int8]
            found["int8_summary"] = self.int8_summary
        return found


@dataclass(frozen=True)
class ComparedWeight:
    """One weight in several files; None where it is not excited.

    Pearson's correlation of the multipliers in the last file with those in the first, and the
    distance of the excited weights over the first's norm; None where there is none.
    """

    name: str
    weights: list[InspectedWeight | None]
    correlation: float | None
    distance: float | None


@dataclass(frozen=True)
class Comparison:
    """Several files side by side; see :func:`compare_files`."""

    inspections: list[Inspection]
    weights: list[ComparedWeight]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return {
            "files": [inspection.to_dict() for inspection in self.inspections],
            "weights": [
                {"name": row.name, "correlation": row.correlation, "distance": row.distance}
                for row in self.weights
            ],
        }


def inspect_file(source: Source, start: Source | None = None, *, int8: bool = False) -> Inspection:
    """What a file or architecture is, which of its weights are excited, and what they learned.

    ``start`` is the same model before training, converted or vanilla; it tells how far the model
    has come. ``int8`` reads every weight, to tell what quantization does to it.
    """
    return _read(source, None if start is None else _starts(start), int8)[0]


def compare_files(
    sources: Sequence[Source], start: Source | None = None, *, int8: bool = False
) -> Comparison:
    """At least two files and the weights that any of them excites, side by side."""
    starts = None if start is None else _starts(start)
    read = [_read(source, starts, int8) for source in sources]
    rows = [{layer.name: layer for layer in inspection.layers} for inspection, _ in read]
    first, last = read[0][1], read[-1][1]
    names = dict.fromkeys(name for row in rows for name in row)
    return Comparison(
        [inspection for inspection, _ in read],
        [
            ComparedWeight(
                name,
                [row.get(name) for row in rows],
                *_likeness(first(name), last(name)),
            )
            for name in names
        ],
    )


def _read(
    source: Source, starts: Mapping[str, Start] | None, int8: bool
) -> tuple[Inspection, Callable[[str], checkpoint.ExcitedEntry | None]]:
    """The inspection, and a function that reads each excited weight with its values."""
    contents = source.read(with_excitation=True)
    # Of the weights the shapes are known; their values are read one by one below.
    state = {} if contents.weights is None else contents.weights.with_excitations()
    plan = contents.metadata.plan if contents.metadata is not None else None
    if contents.model is not None:
        state = _tensors(contents.model)
        plan = contents.model.__dict__.get(PLAN_ATTRIBUTE, plan)
    entries = {entry.vanilla_key: entry for entry in checkpoint.find_excited(state)}
    if starts is not None and entries:
        _refuse_other_start(entries, starts, source.name)
    layers = [
        _layer(name, entry, contents, (starts or {}).get(name), source.name)
        for name, entry in entries.items()
    ]
    added = {e.excitation_prefix + key for e in entries.values() for key in e.excitation}
    excited = {key for e in entries.values() for key in (e.raw_key, e.vanilla_key)}
    distinct = _distinct({key: value for key, value in state.items() if not is_record(key)})
    left = _distinct({key: value for key, value in state.items() if key not in added})
    plain = _plain_weights({k: v for k, v in state.items() if k not in added | excited})
    architecture = source.architecture_of(contents)
    inspection = Inspection(
        source=source.name,
        kind=contents.kind,
        tensors=len(state),
        values=sum(value.numel() for value in distinct),
        size=sum(value.numel() * value.element_size() for value in distinct),
        stripped_values=sum(value.numel() for value in left),
        stripped_size=sum(value.numel() * value.element_size() for value in left),
        layers=layers,
        mode=str(plan["mode"]) if plan and "mode" in plan else None,
        architecture=None if architecture is None else architecture.name,
        plan=plan,
        notes=contents.notes,
        is_attached=contents.is_attached,
        plain=plain,
        int8=_int8_errors(contents, state, entries, plain) if int8 else None,
    )

    def entry_of(name: str) -> checkpoint.ExcitedEntry | None:
        return _in_memory(contents, entries[name]) if name in entries else None

    return inspection, entry_of


def _plain_weights(state: Mapping[str, Tensor]) -> list[PlainWeight]:
    found = []
    for name, value in state.items():
        is_quantized = checkpoint.is_quantized(name, value)
        if (value.ndim > 1 or is_quantized) and not is_record(name):
            dtype = str(value.dtype).removeprefix("torch.")
            found.append(PlainWeight(name, tuple(value.shape), dtype, is_quantized))
    return found


def _int8_errors(
    contents: checkpoint.Contents,
    state: Mapping[str, Tensor],
    entries: Mapping[str, checkpoint.ExcitedEntry],
    plain: Sequence[PlainWeight],
) -> list[Int8Error]:
    """The int8 errors of the deployed weights, read one by one; excited ones first."""
    errors = []
    for name, entry in entries.items():
        excitation = entry.rebuild()
        with torch.no_grad():
            weight = excitation(_in_memory(contents, entry).raw.detach())
        errors.append(int8_error(name, to_filters(weight, excitation.transposed_groups)))
    for found in plain:
        key, known = found.name, state[found.name]
        if key.endswith("weight") and not found.is_quantized and known.is_floating_point():
            errors.append(int8_error(key, _value(contents, key, known)))
    return errors


def _layer(
    name: str,
    entry: checkpoint.ExcitedEntry,
    contents: checkpoint.Contents,
    start: Start | None,
    source: str,
) -> InspectedWeight:
    entry.refuse_no_weight()
    excitation = entry.rebuild()
    try:
        statistics = weight_statistics(excitation, _in_memory(contents, entry).raw, start)
    except RuntimeError as error:
        raise InputError(
            f"{source}: the excited {name!r} cannot be computed: {error}",
            "The file is damaged, or mixes the tensors of two models.",
        ) from error
    return InspectedWeight(
        name=name,
        shape=tuple(entry.raw.shape),
        stages=tuple(stage.name for stage in excitation.stages),
        added=sum(value.numel() for value in entry.tensors.values()),
        statistics=statistics,
    )


def _in_memory(
    contents: checkpoint.Contents, entry: checkpoint.ExcitedEntry
) -> checkpoint.ExcitedEntry:
    """The entry with its raw weight, which may still be in its file."""
    return replace(entry, raw=_value(contents, entry.raw_key, entry.raw))


def _value(contents: checkpoint.Contents, key: str, known: Tensor) -> Tensor:
    """The tensor of a key, which may be on the meta device."""
    if contents.weights is None or not known.is_meta:
        return known
    return contents.weights.load(lambda name: name == key)[key]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without entries of ``get_extra_state``, which may be anything."""
    return {k: value for k, value in model.state_dict().items() if isinstance(value, Tensor)}


def _distinct(state: Mapping[str, Tensor]) -> list[Tensor]:
    return list({checkpoint.tensor_identity(value): value for value in state.values()}.values())


def _starts(source: Source) -> dict[str, Start]:
    contents = source.read(with_excitation=True)
    state = _tensors(contents.model) if contents.model is not None else contents.state_dict
    state = state or {}
    starts = {key: Start(value, None) for key, value in state.items()}
    for entry in checkpoint.find_excited(state):
        starts[entry.vanilla_key] = Start(entry.raw, entry.excitation)
    return starts


def _refuse_other_start(
    entries: Mapping[str, checkpoint.ExcitedEntry], starts: Mapping[str, Start], name: str
) -> None:
    for key, entry in entries.items():
        if key not in starts or starts[key].raw.shape != entry.raw.shape:
            raise InputError(
                f"{key!r} is missing in the --start file, or has another shape than in {name}",
                "Give the same model before training: what `we-convert` wrote.",
            )


def _likeness(
    first: checkpoint.ExcitedEntry | None, last: checkpoint.ExcitedEntry | None
) -> tuple[float | None, float | None]:
    """Correlation of the multipliers, and distance of the excited weights."""
    if first is None or last is None or first.raw.shape != last.raw.shape:
        return None, None
    with torch.no_grad():
        maps = [multiplier_map(entry.rebuild(), entry.raw) for entry in (first, last)]
        one, other = (entry.rebuild()(entry.raw.detach()).double() for entry in (first, last))
    scale = one.norm().item()
    distance = (other - one).norm().item() / scale if scale else None
    if maps[0] is None or maps[1] is None:
        return None, distance
    pair = torch.stack([found.double().flatten() for found in maps if found is not None])
    if pair.shape[1] < 2 or bool((pair.std(1) == 0).any()):
        return None, distance
    return torch.corrcoef(pair)[0, 1].item(), distance
