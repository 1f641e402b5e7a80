"""The structural proof of a conversion: no operation reads a converted weight raw.

Comparing outputs would not do: in some models a bypassed layer moves the output by 1e-7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from we_surgery.errors import SurgeryError
from we_surgery.layers import excitation_name, excited_layers, raw_name
from we_surgery.reading.recorded import EXCITATION, MODULE, Recording
from we_surgery.reading.recorded_facts import record_both_modes
from we_surgery.reading.weight_use import is_view, operation_name


def prove_excited(model: nn.Module, example_inputs: Any) -> int:
    """Records a converted model again and checks who reads its raw weights.

    Args:
        model: a converted model; it is not changed.
        example_inputs: as the model's forward takes them.

    Returns:
        How many excited weights the recorded forwards computed.

    Raises:
        SurgeryError: an operation outside the excitations reads a raw weight, or the
            converted model does not run on the inputs.
    """
    recordings, notes = record_both_modes(model, example_inputs)
    if not recordings:
        raise SurgeryError(
            f"the converted model {'; it '.join(notes)}",
            "Give inputs the vanilla model runs on; nothing was changed.",
        )
    raw = {
        f"{name}.{raw_name(parameter)}".lstrip("."): (name, excitation_name(parameter))
        for name, layer in excited_layers(model)
        for parameter in layer.excited_parameters
    }
    refuse_bypasses(recordings, list(raw))
    computed = {f"{name}.{excitation}".lstrip(".") for name, excitation in raw.values()}
    return len({called for r in recordings for called in r.calls if called in computed})


def refuse_bypasses(recordings: Sequence[Recording], raw_names: Sequence[str]) -> None:
    """Raises if an operation outside the excitations reads one of the raw weights.

    Raises:
        SurgeryError: naming the weight, the operation and the module that ran it.
    """
    for recording in recordings:
        for node in recording.graph.nodes:
            if node.op != "get_attr" or node.target not in raw_names:
                continue
            pending, seen = list(node.users), set()
            while pending:
                user = pending.pop()
                # What nobody uses is a question about the tensor, such as its device.
                if user in seen or user.meta.get(EXCITATION) or not user.users:
                    continue
                seen.add(user)
                if is_view(user):
                    pending.extend(user.users)
                    continue
                raise SurgeryError(
                    f"{operation_name(user) or user.op} in module {user.meta.get(MODULE)!r} reads "
                    f"{node.target!r} itself instead of the excited weight",
                    "Leave that layer alone by a rule, or make the module read the layer's "
                    "`weight` when it runs; nothing was changed.",
                )
