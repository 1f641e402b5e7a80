"""Jobs on files, as the command line runs them: opening a model, planning, converting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery import checkpoint
from we_surgery._util.copies import drawing_nothing
from we_surgery.checkpoint import Architecture, Contents, Metadata, Weights
from we_surgery.converted.convert import convert
from we_surgery.converted.sites import Init, Start
from we_surgery.converted.state import PLAN_ATTRIBUTE, is_converted
from we_surgery.errors import InputError, SurgeryError
from we_surgery.jobs.targets import check_extension, choose_target
from we_surgery.planning.decide import plan as make_plan
from we_surgery.planning.plans import Plan
from we_surgery.planning.policy import Policy


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and how to open it: the arguments of :func:`checkpoint.read`."""

    name: str
    architecture: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    weights: Weights | None = None
    allow: Sequence[str] = ()
    trust: bool = False

    def read(self, *, with_excitation: bool = False) -> Contents:
        """The file's or architecture's contents; see :func:`we_surgery.checkpoint.read`."""
        return checkpoint.read(
            self.name,
            key=self.key,
            weights=self.weights,
            with_excitation=with_excitation,
            allow=self.allow,
            trust=self.trust,
            arguments=None if self.architecture else self.arguments,
        )

    def architecture_of(self, contents: Contents) -> Architecture | None:
        """The architecture named by the user, else by the file."""
        if self.architecture is not None:
            return Architecture.parse(self.architecture, self.arguments)
        return contents.metadata.architecture if contents.metadata is not None else None

    def load(self, contents: Contents) -> nn.Module:
        """The model: from the file, or its architecture with the file's weights."""
        return checkpoint.model_from(
            contents, architecture=self.architecture_of(contents), allow=self.allow
        )


@dataclass(frozen=True)
class Converted:
    """The result of :func:`convert_file`; ``target`` is None for a dry run."""

    plan: Plan
    target: Path | None
    kind: str
    notes: list[str]


def plan_file(
    source: Source, asked: Policy | Plan, *, input_shape: Sequence[int] | None = None
) -> Converted:
    """The plan for a file's model, or a given plan checked against it; nothing is written."""
    contents, model = _read_vanilla(source)
    if isinstance(asked, Plan):
        with drawing_nothing(model):
            convert(model, plan=asked, inplace=True)
        plan = asked
    else:
        inputs = None if input_shape is None else random_inputs(input_shape)
        plan = make_plan(model, config=asked, example_inputs=inputs)
    return Converted(plan, None, contents.kind, contents.notes)


def convert_file(
    source: Source,
    asked: Policy | Plan,
    *,
    output: str | Path | None = None,
    to: str | None = None,
    force: bool = False,
    seed: int = 0,
    input_shape: Sequence[int] | None = None,
    init: Init | None = None,
    start: Start = "on",
) -> Converted:
    """Reads a model, converts it as :func:`we_surgery.convert` does, and writes it.

    A plan is applied exactly. The seed is for the new parameters; torch's generator does not
    change. With an input shape, the model is recorded on random inputs, which also proves that no
    converted weight is bypassed.
    """
    # Usage first: a mistake in -o must not cost reading a large file.
    check_extension(output, to)
    contents, model = _read_vanilla(source)
    target = choose_target(source.name, contents, output, to, ".we")
    target.check(force=force)
    inputs = None if input_shape is None else random_inputs(input_shape)
    if isinstance(asked, Plan):
        decided = asked
    else:
        decided = make_plan(model, config=asked, example_inputs=inputs)
    if not decided.changes:
        raise SurgeryError(
            f"the plan excites none of the {len(decided.decisions)} layers of {source.name}",
            "See the reasons with --dry-run, and change the mode, config or rules.",
        )
    with drawing_nothing(model):
        torch.default_generator.manual_seed(seed)
        converted = convert(
            model, plan=decided, init=init, start=start, example_inputs=inputs, inplace=True
        )
    architecture = source.architecture_of(contents)
    metadata = Metadata(plan=converted.__dict__[PLAN_ATTRIBUTE], architecture=architecture)
    with checkpoint.staged_together() as stage:
        temporary = target.stage(stage, force=force, like=contents.path)
        target.save(temporary, converted, metadata)
    notes = [*contents.notes, *target.notes]
    has_weights = contents.kind != "architecture" or (
        architecture is not None and architecture.fetches_weights
    )
    if init != "preserve" and start == "on" and has_weights:
        notes.append(
            "converting changed the model's outputs; train it before using it, or add "
            "`--init preserve` to keep them"
        )
    return Converted(decided, target.path, target.kind, notes)


def random_inputs(shape: Sequence[int]) -> Tensor:
    """Standard normal float32 values of this shape, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _read_vanilla(source: Source) -> tuple[Contents, nn.Module]:
    contents = source.read()
    model = source.load(contents)
    if is_converted(model):
        raise InputError(
            f"the model in {source.name} is converted already; nothing was written",
            "Train it as it is, or strip it first with we-strip.",
        )
    if source.architecture is not None and contents.model is not None:
        architecture = Architecture.parse(source.architecture, source.arguments)
        _check_architecture(architecture, model, source.name)
    return contents, model


def _check_architecture(architecture: Architecture, model: nn.Module, source: str) -> None:
    """Raises unless a module's weights fit the architecture that the result names."""
    with torch.random.fork_rng(devices=[]):
        built = architecture.build()
    try:
        built.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise InputError(
            f"the module in {source} is not a {architecture.name}: {error}",
            "Leave out --arch, which a whole module does not need, or pass the module's own, with "
            "its arguments (--arch-arg).",
        ) from error
