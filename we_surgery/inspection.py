"""What a file or architecture is, and which of its weights are excited."""

from __future__ import annotations

from dataclasses import dataclass

from we_surgery import checkpoint
from we_surgery.jobs import Source
from we_surgery.layers import EXCITATION
from we_surgery.surgery import PLAN_ATTRIBUTE


@dataclass(frozen=True)
class InspectedWeight:
    """A row of an :class:`Inspection`."""

    name: str
    shape: tuple[int, ...]
    stages: tuple[str, ...]
    added: int


@dataclass(frozen=True)
class Inspection:
    """What a file is; see :func:`inspect_file`.

    Attributes:
        source: the file or architecture.
        kind: ``module``, ``state_dict``, ``safetensors``, ``sharded``, ``dcp`` or
            ``architecture``.
        tensors: entries of its state dict.
        values: their numbers in all, without counting tied ones twice.
        layers: its excited weights; none for a vanilla model.
        mode: the mode it was converted in, where the file says so.
        architecture: the architecture, where the file says so.
        notes: what was chosen and dropped on reading.
    """

    source: str
    kind: str
    tensors: int
    values: int
    layers: list[InspectedWeight]
    mode: str | None
    architecture: str | None
    notes: list[str]


def inspect_file(source: Source) -> Inspection:
    """What a file or architecture is and which of its weights are excited."""
    contents = source.read(values=False)
    state = contents.state_dict
    if contents.sharded is not None:
        # The shapes of the weights are known; of their excitations the options are values.
        state = contents.sharded.load(lambda name: f"{EXCITATION}." in name)
    plan = contents.metadata.plan if contents.metadata is not None else None
    if contents.model is not None:
        state = contents.model.state_dict()
        plan = contents.model.__dict__.get(PLAN_ATTRIBUTE, plan)
    state = state or {}
    layers = [
        InspectedWeight(
            name=entry.vanilla_key,
            shape=tuple(entry.raw.shape),
            stages=tuple(stage.name for stage in entry.rebuild().stages),
            added=sum(value.numel() for value in entry.excitation.values()),
        )
        for entry in checkpoint.find_excited(state)
    ]
    distinct = {checkpoint.tensor_identity(value): value.numel() for value in state.values()}
    architecture = source.architecture_of(contents)
    return Inspection(
        source=source.name,
        kind=contents.kind,
        tensors=len(state),
        values=sum(distinct.values()),
        layers=layers,
        mode=str(plan["mode"]) if plan and "mode" in plan else None,
        architecture=None if architecture is None else architecture.name,
        notes=contents.notes,
    )
