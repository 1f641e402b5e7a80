"""Whole jobs on files, as the command line runs them: convert one, strip one, inspect one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery import checkpoint
from we_surgery.checkpoint import Architecture, Contents, Metadata
from we_surgery.errors import InputError, SurgeryError
from we_surgery.grafting import Init
from we_surgery.planning import Plan
from we_surgery.planning import plan as make_plan
from we_surgery.policy import Policy
from we_surgery.proof import StripReport
from we_surgery.rules import Rule
from we_surgery.surgery import (
    PLAN_ATTRIBUTE,
    Progress,
    convert,
    is_converted,
    stored_plan,
    strip_with_report,
)

KINDS = ("module", "state_dict", "safetensors")


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and what may be done to open it.

    Attributes:
        name: a file, or ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory``.
        architecture: the same three forms, for a file that holds only weights.
        arguments: keyword arguments of the architecture's factory.
        key: where in a wrapped checkpoint the state dict is.
        allow: further packages whose ``nn.Module`` classes a pickle may name.
        trust: unpickle whatever the file says, running its code.
    """

    name: str
    architecture: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    allow: Sequence[str] = ()
    trust: bool = False

    def read(self) -> Contents:
        """The file's or architecture's contents."""
        return checkpoint.read(
            self.name,
            key=self.key,
            allow=self.allow,
            trust=self.trust,
            arguments=None if self.architecture else self.arguments,
        )

    def architecture_of(self, contents: Contents) -> Architecture | None:
        """The architecture the user names, or else the one that the file carries."""
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


@dataclass(frozen=True)
class Stripped:
    """The result of :func:`strip_file`."""

    target: Path
    kind: str
    report: StripReport
    notes: list[str]


def plan_file(
    source: Source,
    *,
    mode: str | None = None,
    config: Path | Policy | None = None,
    rules: Sequence[Rule] = (),
    transplants: Sequence[Any] = (),
    plan: Plan | None = None,
    input_shape: Sequence[int] | None = None,
) -> Converted:
    """The plan for a file's model, or a given plan checked against it; nothing is written."""
    contents, model = _read_vanilla(source)
    if plan is None:
        inputs = _random_inputs(input_shape)
        plan = make_plan(
            model,
            mode,
            config=config,
            rules=rules,
            transplants=transplants,
            example_inputs=inputs,
        )
    else:
        with torch.random.fork_rng():
            convert(model, plan=plan, inplace=True)
    return Converted(plan, None, contents.kind, contents.notes)


def convert_file(
    source: Source,
    *,
    mode: str | None = None,
    config: Path | Policy | None = None,
    rules: Sequence[Rule] = (),
    transplants: Sequence[Any] = (),
    plan: Plan | None = None,
    output: Path | None = None,
    to: str | None = None,
    force: bool = False,
    seed: int = 0,
    input_shape: Sequence[int] | None = None,
    init: Init = "paper",
) -> Converted:
    """Reads a model, converts it, and writes it in the kind it came in.

    Args:
        source: the model.
        mode: as in :func:`we_surgery.convert`.
        config: as in :func:`we_surgery.convert`.
        rules: as in :func:`we_surgery.convert`.
        transplants: as in :func:`we_surgery.convert`.
        plan: a plan to do exactly, instead of mode, config, rules and transplants.
        output: the file to write; by default beside the input, ``model.we.pt``.
        to: ``module``, ``state_dict`` or ``safetensors``, instead of the input's kind.
        force: overwrite an existing file.
        seed: seeds the new parameters; torch's own generator is left as it was.
        input_shape: reads the model by recording a forward on random inputs of this shape,
            and proves on them that no converted weight is bypassed.
        init: as in :func:`we_surgery.convert`.

    Raises:
        InputError: bad usage, an unreadable input, or a model that is converted already.
        SurgeryError: no layer would be excited, or a weight is not finite.
    """
    # Usage first: a slip in -o must not cost reading a large file.
    _check_extension(output, to)
    contents, model = _read_vanilla(source)
    target, kind = _target(source.name, contents.kind, output, to, ".we")
    checkpoint.check_target(target, force=force)
    inputs = _random_inputs(input_shape)
    decided = plan or make_plan(
        model,
        mode,
        config=config,
        rules=rules,
        transplants=transplants,
        example_inputs=inputs,
    )
    if not decided.changes:
        raise SurgeryError(
            f"the plan excites none of the {len(decided.decisions)} layers of {source.name}",
            "See the reasons with --dry-run, and change the mode, config or rules.",
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        converted = convert(model, plan=decided, init=init, example_inputs=inputs, inplace=True)
    architecture = source.architecture_of(contents)
    metadata = Metadata(plan=converted.__dict__[PLAN_ATTRIBUTE], architecture=architecture)
    _write(converted, converted.state_dict(), target, kind, metadata, force)
    notes = list(contents.notes)
    has_weights = contents.kind != "architecture" or (
        architecture is not None and architecture.fetches_weights
    )
    if init == "paper" and has_weights:
        notes.append(
            "the model no longer computes what the weights that were read made it compute, until "
            "it is trained further; to start from what it computed, add `--init preserve`"
        )
    return Converted(decided, target, kind, notes)


def strip_file(
    source: Source,
    *,
    output: Path | None = None,
    to: str | None = None,
    force: bool = False,
    input_shape: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Stripped:
    """Reads a converted model or checkpoint, folds it, proves it, and writes it.

    A state dict needs no model: it says itself what was excited.

    Args:
        source: the model or checkpoint.
        output: the file to write; by default beside the input, ``model.stripped.pt``.
        to: ``module``, ``state_dict`` or ``safetensors``, instead of the input's kind.
        force: overwrite an existing file.
        input_shape: compares the outputs of both models on random inputs of this shape;
            needs a module, or an architecture.
        progress: called with (layers done, layers in all).

    Raises:
        InputError: bad usage or an unreadable input.
        SurgeryError: there is nothing to strip, or the proof failed; nothing is written.
    """
    _check_extension(output, to)
    contents = source.read()
    target, kind = _target(source.name, contents.kind, output, to, ".stripped")
    checkpoint.check_target(target, force=force)
    if contents.state_dict is not None and kind != "module" and input_shape is None:
        plan = None if contents.metadata is None else contents.metadata.stored_plan
        is_excited = checkpoint.is_excited_state_dict(contents.state_dict)
        _refuse_vanilla(is_excited or (plan is not None and plan.changes), source.name)
        state, found = checkpoint.strip_state_dict_with_report(
            contents.state_dict, progress=progress
        )
        # Counted by key: a state dict does not tell parameters from buffers.
        left = sum(value.numel() for value in state.values())
        before = sum(value.numel() for value in contents.state_dict.values())
        report = StripReport(found.layers, before - left, left)
        kept = None if plan is None else plan.kept
        _write(None, state, target, kind, _kept_metadata(kept, source, contents), force)
        return Stripped(target, kind, report, [*contents.notes, *found.notes])
    model = source.load(contents)
    _refuse_vanilla(is_converted(model), source.name)
    inputs = _random_inputs(input_shape)
    # Not in place: the fold is then compared with the excited model itself.
    stripped, report = strip_with_report(model, example_inputs=inputs, progress=progress)
    plan = stored_plan(stripped)
    metadata = _kept_metadata(plan, source, contents)
    _write(stripped, stripped.state_dict(), target, kind, metadata, force)
    return Stripped(target, kind, report, contents.notes)


def _kept_metadata(plan: Plan | None, source: Source, contents: Contents) -> Metadata | None:
    """What a stripped file says of itself: nothing, unless transplants are part of its model."""
    if plan is None or not plan.transplants:
        return None
    return Metadata(plan=plan.to_dict(), architecture=source.architecture_of(contents))


def _random_inputs(shape: Sequence[int] | None) -> Tensor | None:
    if shape is None:
        return None
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _read_vanilla(source: Source) -> tuple[Contents, nn.Module]:
    contents = source.read()
    model = source.load(contents)
    if is_converted(model):
        raise InputError(
            f"the model in {source.name} is converted already; nothing was written",
            "Train it as it is, or strip it first with we-strip.",
        )
    return contents, model


def _refuse_vanilla(excited: bool, name: str) -> None:
    if not excited:
        raise SurgeryError(
            f"{name} holds no excited weights, so there is nothing to strip",
            "Give the checkpoint of a converted model; `we-inspect FILE` tells what a file is.",
        )


def _check_extension(output: Path | None, to: str | None) -> None:
    if output is None or to is None:
        return
    if (output.suffix == ".safetensors") != (to == "safetensors"):
        raise InputError(
            f"the output {output} does not fit --to {to}",
            "Drop --to, or give a file that ends in .safetensors for safetensors alone.",
        )


def _target(
    source: str, kind: str, output: Path | None, to: str | None, mark: str
) -> tuple[Path, str]:
    """The file to write and its kind: same kind in, same kind out, unless something says else."""
    if to is not None:
        kind = to
    elif output is not None and output.suffix == ".safetensors":
        kind = "safetensors"
    elif output is not None and kind == "safetensors":
        kind = "state_dict"
    elif kind == "architecture":
        kind = "module"
    return output or _beside(source, kind, mark), kind


def _beside(source: str, kind: str, mark: str) -> Path:
    """``dir/model.pt`` -> ``dir/model.we.pt``; ``torchvision:resnet50`` -> ``resnet50.we.pt``."""
    if checkpoint.looks_like_architecture(source):
        folder, stem, extension = Path(), source.rpartition(":")[2].replace("/", "_"), ".pt"
    else:
        path = Path(source)
        folder, stem, extension = path.parent, path.stem, path.suffix or ".pt"
        if extension == ".tar" and Path(stem).suffix in (".pth", ".pt"):
            stem, extension = Path(stem).stem, Path(stem).suffix + extension
        stem = stem.removesuffix(".we")
    if kind == "safetensors":
        extension = ".safetensors"
    elif extension == ".safetensors":
        extension = ".pt"
    return folder / f"{stem}{mark}{extension}"


def _write(
    model: nn.Module | None,
    state: Mapping[str, Tensor],
    target: Path,
    kind: str,
    metadata: Metadata | None,
    force: bool,
) -> None:
    if kind == "module":
        assert model is not None
        checkpoint.write_module(model, target, force=force)
    elif kind == "safetensors":
        checkpoint.write_safetensors(state, target, metadata=metadata, force=force)
    else:
        checkpoint.write_state_dict(state, target, metadata=metadata, force=force)
