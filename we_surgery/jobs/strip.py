"""Stripping a file: fold, write, read back, compare."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery import checkpoint
from we_surgery._util.copies import copy_model
from we_surgery._util.progress import Progress
from we_surgery.checkpoint import Contents, Metadata
from we_surgery.converted.proof import StripReport, same_bits
from we_surgery.converted.state import is_converted, stored_plan
from we_surgery.converted.strip import strip_with_report
from we_surgery.errors import InputError, SurgeryError, quoted
from we_surgery.jobs.convert import Source
from we_surgery.jobs.targets import Target, check_extension, choose_target
from we_surgery.jobs.verify import (
    cast_model,
    compare_outputs,
    input_shape_of,
    inputs_for,
    is_half,
    rounding_effect,
)
from we_surgery.planning.plans import Plan


@dataclass(frozen=True)
class Stripped:
    """The result of stripping a file; ``sha256`` is of each file written, by its path."""

    target: Path
    kind: str
    report: StripReport
    tensors: int
    sha256: dict[str, str]
    input_shape: tuple[int, ...] | None
    notes: list[str]


@dataclass(frozen=True)
class StripOptions:
    """How to strip a file, and where the result goes; see ``we-strip --help``.

    The dtype is of all floating-point values; weights are folded in float32 (or float64 where they
    are) and rounded once. An output without the ending of a file is a folder where the input is
    several files or a folder.
    """

    output: str | Path | None = None
    to: str | None = None
    force: bool = False
    dtype: torch.dtype | None = None
    verify: bool = False
    input_shape: Sequence[int] | None = None
    deploy: str = "dense"
    progress: Progress | None = None

    @property
    def compares(self) -> bool:
        """Whether outputs are compared."""
        return self.verify or self.input_shape is not None


def strip_files(sources: Sequence[Source], options: StripOptions) -> list[Stripped]:
    """Reads converted models or checkpoints, folds them, writes them, and verifies the files.

    A state dict needs no model. It is stripped to safetensors tensor by tensor. The written file is
    read back and compared bit for bit with a second fold. All files are verified before any gets
    its name. An average goes to ``model.stripped.ema.pt``, or where it is the only one to the given
    output.
    """
    # Usage first: a mistake in -o must not cost reading a large file.
    check_extension(options.output, options.to)
    done: list[Stripped] = []
    with checkpoint.staged_together() as stage:
        for source in sources:
            contents = source.read()
            checkpoint.check_plan(contents)
            target = choose_target(
                source.name,
                contents,
                options.output,
                options.to,
                ".stripped",
                keep_shards=True,
            )
            if source.weights == "ema" and (options.output is None or len(sources) > 1):
                target = target.marked(".ema")
            needs_model = target.kind == "module" or options.deploy != "dense"
            strip = _strip_model if needs_model or contents.model else _strip_weights
            temporary = target.stage(stage, force=options.force, like=contents.path)
            stripped = strip(source, contents, target, temporary, options)
            done.append(
                replace(
                    stripped,
                    sha256=_sha256(target.staged_files(temporary)),
                    notes=[*stripped.notes, *target.notes],
                )
            )
    return done


def _strip_weights(
    source: Source, contents: Contents, target: Target, temporary: Path, options: StripOptions
) -> Stripped:
    architecture = source.architecture_of(contents)
    if options.compares and architecture is None:
        raise InputError(
            f"{source.name} holds weights but does not name their architecture, so there is no "
            "model to run",
            "Name it with --arch, or leave out --verify and --input-shape: the weights are "
            "compared in any case.",
        )
    assert contents.weights is not None
    plan = None if contents.metadata is None else contents.metadata.stored_plan
    if plan is None or not plan.changes:
        checkpoint.refuse_vanilla(contents.weights, source.name)
    kept = None if plan is None else plan.kept
    transplants = 0 if plan is None or kept is None else _attached(plan) - _attached(kept)
    metadata = _kept_metadata(kept, source, contents)
    found = _fold(contents, target, temporary, options, metadata)
    notes = list(dict.fromkeys([*contents.notes, *found.notes]))
    report = StripReport(found.layers, found.removed_values, found.values, transplants=transplants)
    done = Stripped(target.path, target.kind, report, found.tensors, {}, None, notes)
    if not options.compares:
        return done
    excited = checkpoint.model_from(contents, architecture=architecture, allow=source.allow)
    vanilla = checkpoint.load(temporary, architecture=architecture, allow=source.allow)
    shape, note = _shape(excited, source, contents, options)
    differences = compare_outputs(excited, vanilla, shape, options.dtype)
    return replace(
        done,
        report=_with_differences(report, differences),
        input_shape=shape,
        notes=notes + note,
    )


def _fold(
    contents: Contents,
    target: Target,
    temporary: Path,
    options: StripOptions,
    metadata: Metadata | None,
) -> checkpoint.StateDictReport:
    """Writes the folded weights, and compares what was written with a second fold."""
    if target.kind != "state_dict":
        assert contents.weights is not None
        return checkpoint.save_stripped(
            contents.weights,
            temporary,
            folder=target.kind == "sharded",
            dtype=options.dtype,
            metadata=metadata,
            progress=options.progress,
        )
    state = contents.state_dict
    assert state is not None
    stripped, found = checkpoint.strip_state_dict_with_report(
        state, dtype=options.dtype, progress=options.progress
    )
    checkpoint.write_to(stripped, temporary, "state_dict", metadata)
    again, _ = checkpoint.strip_state_dict_with_report(state, dtype=options.dtype)
    _check_written(checkpoint.read(temporary).state_dict, again)
    return found


def _strip_model(
    source: Source, contents: Contents, target: Target, temporary: Path, options: StripOptions
) -> Stripped:
    model = source.load(contents)
    if not is_converted(model):
        raise checkpoint.nothing_to_strip(source.name)
    notes = list(contents.notes)
    shape: tuple[int, ...] | None = None
    inputs = None
    if options.compares:
        shape, note = _shape(model, source, contents, options)
        notes += note
    if options.dtype is not None and any(is_half(tensor) for tensor in model.state_dict().values()):
        model = model.float()
    if shape is not None:
        inputs = inputs_for(model, shape)
    # Not in place: the fold is then compared with the excited model itself.
    stripped, report = strip_with_report(
        model, example_inputs=inputs, deploy=options.deploy, progress=options.progress
    )
    if options.dtype is not None:
        cast_model(stripped, options.dtype)
        if shape is not None:
            differences = rounding_effect(model, copy_model(stripped), shape)
            report = _with_differences(report, differences)
    state = stripped.state_dict()
    target.save(temporary, stripped, _kept_metadata(stored_plan(stripped), source, contents))
    # Nothing is in this file but what this process holds.
    written = checkpoint.read(temporary, trust=target.kind == "module")
    found = written.state_dict if written.model is None else written.model.state_dict()
    _check_written(found, state)
    return Stripped(target.path, target.kind, report, len(state), {}, shape, notes)


def _kept_metadata(plan: Plan | None, source: Source, contents: Contents) -> Metadata | None:
    """The metadata of a stripped file; empty unless transplants stay in the model."""
    if plan is None or not plan.transplants:
        return None
    return Metadata(plan=plan.to_dict(), architecture=source.architecture_of(contents))


def _attached(plan: Plan) -> int:
    return sum(row.attach for row in plan.transplants)


def _with_differences(report: StripReport, differences: tuple[float, float]) -> StripReport:
    absolute, relative = differences
    return replace(report, output_difference=absolute, relative_difference=relative)


def _shape(
    model: nn.Module, source: Source, contents: Contents, options: StripOptions
) -> tuple[tuple[int, ...], list[str]]:
    """The shape to compare on, and a note on its source if the user did not give it."""
    if options.input_shape is not None:
        return tuple(options.input_shape), []
    return input_shape_of(model, source.architecture_of(contents))


def _check_written(found: Mapping[str, Tensor] | None, expected: Mapping[str, Any]) -> None:
    """Raises unless a file's tensors are those expected, bit for bit."""
    tensors = {key: value for key, value in expected.items() if isinstance(value, Tensor)}
    wrong = [
        key
        for key, value in tensors.items()
        if found is None or key not in found or not same_bits(found[key], value)
    ]
    if wrong or (found is not None and len(found) < len(tensors)):
        raise SurgeryError(
            f"the written tensors are not bit-equal to the folded ones: {quoted(wrong)}",
            "The disk or the memory is faulty, or an excitation is not deterministic; no file "
            "was left.",
        )


def _sha256(written: Sequence[tuple[Path, Path]]) -> dict[str, str]:
    """The checksum of each written file, by its final name."""
    sums: dict[str, str] = {}
    for file, name in written:
        with file.open("rb") as content:
            sums[str(name)] = hashlib.file_digest(content, "sha256").hexdigest()
    return sums
