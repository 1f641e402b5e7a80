"""What recordings of a forward tell about each layer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from we_surgery._util.scripted import own_parameters
from we_surgery.excitations import WeightLayout
from we_surgery.reading.dataflow import Dataflow
from we_surgery.reading.facts import LayerFacts
from we_surgery.reading.gates import gate_operations, gate_reason
from we_surgery.reading.hooks import has_shared_hooks
from we_surgery.reading.kinds import kind_of
from we_surgery.reading.norms import After, after
from we_surgery.reading.recorded import Recording, record, uncollected
from we_surgery.reading.shifts import shift_before
from we_surgery.reading.stand_ins import Fakes
from we_surgery.reading.tree import converted_obstacle_of, obstacle_of
from we_surgery.reading.weight_use import WeightRead, weight_reads, written_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Use:
    """One read with the recording it stands in."""

    read: WeightRead
    recording: Recording
    flow: Dataflow
    gates: Mapping[fx.Node, str]


def record_both_modes(model: nn.Module, example_inputs: Any) -> tuple[list[Recording], list[str]]:
    """Recordings in eval and in train mode, and what went wrong.

    On fake tensors, and where those fail on real ones. Where both fail, the same once more with
    the hooks that a copy shares with the model: some models compute by them, others only log,
    which a recording is not to add to. Some layers run in one mode alone, such as auxiliary heads.
    The list is empty when the model runs in neither.

    Args:
        model: any model in eager mode.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping.
    """
    with uncollected(), Fakes() as fakes:
        return _record_both_modes(model, example_inputs, fakes)


def _record_both_modes(
    model: nn.Module, example_inputs: Any, fakes: Fakes
) -> tuple[list[Recording], list[str]]:
    recordings, notes = [], []
    attempts: list[tuple[Fakes | None, bool]] = [(fakes, False), (None, False)]
    if has_shared_hooks(model):
        attempts += [(fakes, True), (None, True)]
    for training in (False, True):
        mode = "train" if training else "eval"
        for index, (kind, shared_hooks) in enumerate(attempts):
            try:
                recording = record(
                    model,
                    example_inputs,
                    training=training,
                    fakes=kind,
                    shared_hooks=shared_hooks,
                )
            except Exception as error:
                failure = _first_line(error)
            else:
                recordings.append(recording)
                # What one mode cannot run on, the other one seldom can; nor needs it other hooks.
                attempts = [attempt for attempt in attempts[index:] if attempt[1] == shared_hooks]
                break
            name = "real tensors" if kind is None else "fake tensors"
            logger.info("not recorded on %s in %s mode: %s", name, mode, failure)
        else:
            notes.append(f"does not run in {mode} mode: {failure}")
    return recordings, notes


def apply_recordings(
    model: nn.Module, layers: Sequence[LayerFacts], recordings: Sequence[Recording]
) -> list[LayerFacts]:
    """The layers with the facts of the recordings, and weights that no layer class owns.

    Args:
        model: the recorded model.
        layers: the facts of the module tree; those with dataflow are replaced.
        recordings: at least one.
    """
    written = {n: by for recording in recordings for n, by in written_weights(recording).items()}
    modules = dict(model.named_modules())
    uses = _uses(recordings, modules)
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    known = set()
    for layer in layers:
        parameter = own_parameters(modules[layer.module]).get(layer.parameter)
        name = first_names.get(id(parameter), layer.path)
        known.add(name)
        _mark_written(layer, written.get(name))
        if parameter is not None:
            _apply(layer, uses.get(name, []), model)
    all_parameters = list(model.named_parameters(remove_duplicate=False))
    bare = [
        facts
        for name, found in uses.items()
        if name not in known and name in first_names.values()
        if (facts := _bare_parameter(name, found, modules, all_parameters)) is not None
    ]
    for facts in bare:
        _mark_written(facts, written.get(facts.path))
        _apply(facts, uses[facts.path], model)
    order = {name: index for index, name in enumerate(modules)}
    return sorted([*layers, *bare], key=lambda facts: order[facts.module])


def _uses(
    recordings: Sequence[Recording], modules: Mapping[str, nn.Module]
) -> dict[str, list[_Use]]:
    uses: dict[str, list[_Use]] = {}
    for recording in recordings:
        flow = Dataflow(recording.graph, modules)
        gates = gate_operations(flow)
        for name, reads in weight_reads(recording, flow.fed).items():
            uses.setdefault(name, []).extend(_Use(r, recording, flow, gates) for r in reads)
    return uses


def _apply(layer: LayerFacts, uses: Sequence[_Use], model: nn.Module) -> None:
    per_recording: dict[int, int] = {}
    for use in uses:
        key = id(use.recording)
        per_recording[key] = per_recording.get(key, 0) + 1
    layer.reads = max(per_recording.values(), default=0)
    if not uses:
        return
    layer.readers = tuple(
        dict.fromkeys(use.read.reader for use in uses if use.read.reader != layer.module)
    )
    trained = [use.read.no_gradient for use in uses if use.recording.training]
    layer.no_gradient = bool(trained) and all(trained)
    layer.constant_input = all(use.read.constant_input for use in uses)
    if layer.gate is None:
        gates = [use.gates[use.read.node] for use in uses if use.read.node in use.gates]
        layer.gate = gate_reason(gates[0]) if gates else None
    found = After.all_of(after(use.read.node, use.flow) for use in uses)
    layer.followed_by_norm, layer.norm_evidence = found.is_norm, found.reason
    _apply_shift(layer, uses, model)


def _mark_written(layer: LayerFacts, writer: str | None) -> None:
    """An excited weight is a result, and what is written into it is lost."""
    if writer is not None and layer.obstacle is None:
        by = "the model" if not writer else "its layer" if writer == layer.module else repr(writer)
        layer.obstacle = f"is written to in the forward pass, by {by}"


def _apply_shift(layer: LayerFacts, uses: Sequence[_Use], model: nn.Module) -> None:
    """A conv that is shift-fed in one of its calls counts as shift-fed: LWE would harm that call.

    What the data does replaces what the class names hinted at.
    """
    layer.shift = layer.shift_unknown = None
    if layer.kind == "attention":
        return
    shifts = []
    channel_dim = 1 if layer.kind.startswith("conv") else -1
    for use in uses:
        if use.read.data is None:
            continue
        try:
            shift = shift_before(use.read.data, channel_dim, use.recording, model, use.flow.fed)
            shifts.append(shift)
        except Exception as error:
            layer.shift_unknown = f"its input's movement cannot be replayed: {_first_line(error)}"
    found = [shift for shift in shifts if shift is not None]
    if found:
        layer.shift_unknown = None
        calls = f" in {len(found)} of {len(uses)} reads" if len(found) < len(uses) else ""
        layer.shift = f"{found[0]}{calls}"


def _bare_parameter(
    name: str,
    uses: Sequence[_Use],
    modules: Mapping[str, nn.Module],
    all_parameters: Sequence[tuple[str, nn.Parameter]],
) -> LayerFacts | None:
    """Facts of a parameter that is a conv's or linear's weight without a module of that kind."""
    owner_name, _, parameter_name = name.rpartition(".")
    owner = modules.get(owner_name)
    parameter = own_parameters(owner).get(parameter_name) if owner is not None else None
    if owner is None or parameter is None or isinstance(parameter, UninitializedParameter):
        return None
    read = uses[0].read
    if isinstance(owner, parametrize.ParametrizationList):
        return None  # the layer that has the parametrized weight has a row
    if kind_of(owner) is not None or parameter.ndim < 2:
        return None
    others = [n for n, p in all_parameters if p is parameter and n != name]
    is_conv = read.operation == "aten.convolution"
    kind = (
        f"conv{'_transpose' if read.transposed else ''}{parameter.ndim - 2}d"
        if is_conv and parameter.ndim > 2
        else "linear"
    )
    obstacle = obstacle_of(owner, parameter_name)
    converted_obstacle = converted_obstacle_of(owner, parameter_name)
    filters_last = kind == "linear" and not any(use.read.filters_first for use in uses)
    if filters_last and parameter.ndim == 2:
        kind = "linear_transpose"
        converted_obstacle = "is multiplied as x @ W, whose filters are not its first axis"
    if obstacle is None and others:
        obstacle = f"is shared with {others[0]!r}"
    elif obstacle is None and isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        # One may write to its weight, or give it sparse gradients.
        obstacle = "is also the table of an embedding"
    elif obstacle is None and any(use.read.computed for use in uses):
        obstacle = "is one part of a weight that its module computes"
    elif (
        obstacle is None
        and kind != "linear_transpose"
        and not all(use.read.filters_first for use in uses)
    ):
        obstacle = "is multiplied as x @ W, whose filters are not its first axis"
    elif obstacle is None and not is_conv and parameter.ndim != 2:
        obstacle = f"is a stack of matrices of shape {tuple(parameter.shape)}"
    return LayerFacts(
        module=owner_name,
        parameter=parameter_name,
        kind=kind,
        type_name=f"{type(owner).__module__}.{type(owner).__qualname__}",
        layout=WeightLayout(
            tuple(parameter.shape), read.groups, read.transposed or kind == "linear_transpose"
        ),
        frozen=not parameter.requires_grad,
        obstacle=obstacle,
        converted_obstacle=converted_obstacle,
    )


def _first_line(error: Exception) -> str:
    message = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {message}"
