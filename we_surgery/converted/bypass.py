"""The structural proof of a conversion: no operation reads a raw weight.

Comparing outputs is not enough: in some models a bypassed layer changes them by 1e-7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from we_surgery.converted.graphs import excited_weights
from we_surgery.errors import SurgeryError
from we_surgery.excitations.names import excitation_name, raw_name
from we_surgery.reading.graph import EXCITATION, MODULE, ModelGraph, is_view, operation_name
from we_surgery.reading.recorded import record_both_modes
from we_surgery.reading.weights import written_weights


def prove_excited(model: nn.Module, example_inputs: Any, *, ran_in_both: bool = False) -> int:
    """Records a converted model and checks who reads its raw weights.

    Returns the number of excited weights that were computed. ``ran_in_both``: the vanilla model
    runs on the inputs in eval and in train mode.
    """
    recordings, notes = record_both_modes(model, example_inputs)
    if not recordings or (ran_in_both and notes):
        raise SurgeryError(
            f"the converted model {'; it '.join(notes)}",
            "Leave out `example_inputs` to convert without this proof, or give others that the "
            "vanilla model runs on; nothing was changed.",
        )
    raw = {
        f"{weight.module}.{raw_name(weight.parameter)}".lstrip("."): weight
        for weight in excited_weights(model)
    }
    refuse_bypasses(recordings, list(raw))
    refuse_excited_activations(recordings)
    refuse_writes(recordings)
    called = {name for recording in recordings for name in recording.calls}
    # Tied layers share one excitation, which has its name in the first of them.
    computed = {
        weight.excitation
        for weight in raw.values()
        if f"{weight.module}.{excitation_name(weight.parameter)}".lstrip(".") in called
    }
    for weight in raw.values():
        if weight.module in called and weight.excitation not in computed:
            raise SurgeryError(
                f"module {weight.module!r} runs, but nothing reads its {weight.parameter!r}: it "
                "may keep another tensor over the same memory",
                "Leave that layer alone by a rule, or make the module read the layer's "
                "`weight` when it runs; nothing was changed.",
            )
    return len(computed)


def refuse_bypasses(recordings: Sequence[ModelGraph], raw_names: Sequence[str]) -> None:
    """Raises if an operation outside the excitations reads one of the raw weights."""
    for recording in recordings:
        for node in recording.graph.nodes:
            if node.op != "get_attr" or node.target not in raw_names:
                continue
            pending, seen = list(node.users), {node}
            while pending:
                user = pending.pop()
                # An unused result is a query, such as the tensor's device.
                if user in seen or user.meta.get(EXCITATION) or not user.users:
                    continue
                seen.add(user)
                is_written = operation_name(user).endswith("_") and user.args[0] in seen
                if is_view(user) or is_written:  # still the raw weight
                    pending.extend(user.users)
                    continue
                raise SurgeryError(
                    f"{operation_name(user) or user.op} in module {user.meta.get(MODULE)!r} reads "
                    f"{node.target!r} itself instead of the excited weight",
                    "Leave that layer alone by a rule, or make the module read the layer's "
                    "`weight` when it runs; nothing was changed.",
                )


def refuse_excited_activations(recordings: Sequence[ModelGraph]) -> None:
    """Raises if an excitation runs on anything that depends on the model's input.

    This happens in modules that own a weight and run all their children.
    """
    for recording in recordings:
        for node in recording.graph.nodes:
            if node in recording.fed and node.meta.get(EXCITATION):
                raise SurgeryError(
                    f"module {node.meta[MODULE]!r} runs on activations: the module that owns the "
                    "weight runs all of its children",
                    "Leave that weight alone by a rule; nothing was changed.",
                )


def refuse_writes(recordings: Sequence[ModelGraph]) -> None:
    """Raises if the forward writes into an excited weight: what it writes would be lost."""
    for recording in recordings:
        excitations = {n.meta[MODULE] for n in recording.graph.nodes if n.meta.get(EXCITATION)}
        for name, writer in written_weights(recording).items():
            if name in excitations:
                raise SurgeryError(
                    f"module {writer!r} writes into the weight that {name!r} computes, in its "
                    "forward pass",
                    "Leave that layer alone by a rule; nothing was changed.",
                )
