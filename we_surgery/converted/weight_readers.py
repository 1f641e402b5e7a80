"""Clear errors for tools that replace ``layer.weight``, which an excited layer computes.

Torch's own errors there speak of leaf tensors and missing keys. What can be told apart only by who
reads the weight is told apart by the reading module's name.
"""

from __future__ import annotations

from torch import Tensor, nn

from we_surgery.errors import ExcitationError

_PRUNE_INSTEAD = (
    "Strip the model (`we_surgery.strip`) and prune the result, or prune before converting: the "
    "plan leaves pruned layers alone."
)
_REPARAMETRIZE_FIRST = (
    "Apply it before converting, the plan leaves such layers alone; or use the stage "
    "`weight_norm` of a rule instead."
)
_SHARD_OTHERWISE = (
    "ColwiseParallel works on linear layers with MWE; else leave the layer alone by a rule "
    "(`we_surgery.Rule(pattern, 'skip')`), or shard the model with FSDP2 (`fully_shard`)."
)

REPLACING: dict[str, tuple[str, str]] = {
    "torch.nn.utils.prune": ("torch.nn.utils.prune", _PRUNE_INSTEAD),
    "torch.nn.utils.weight_norm": ("torch.nn.utils.weight_norm", _REPARAMETRIZE_FIRST),
    "torch.distributed.tensor.parallel.style": ("RowwiseParallel", _SHARD_OTHERWISE),
}
"""Modules of torch that read a weight in order to replace it: what they are, and what to do."""


def refused(reader: str, layer: str, parameter: str) -> ExcitationError:
    """The error for one of :data:`REPLACING` that reads an excited weight.

    Args:
        reader: the name of the module that reads it.
        layer: the layer's name and class.
        parameter: the weight's name.
    """
    tool, hint = REPLACING[reader]
    return ExcitationError(
        f"{tool} cannot replace {parameter!r} of layer {layer}: it is computed from a raw weight",
        hint,
    )


def refuse_offloaded(
    layer: str, parameter: str, raw: Tensor, excitation: nn.Module, error: Exception
) -> None:
    """Raises where a weight could not be computed because its excitation was offloaded.

    accelerate moves each module's own parameters to the device just before that module's forward,
    and an excitation is read by its layer.

    Raises:
        ExcitationError: a tensor of the excitation is on the meta device, and the raw weight not.
    """
    tensors = [*excitation.parameters(), *excitation.buffers()]
    if not raw.is_meta and any(tensor.is_meta for tensor in tensors):
        raise ExcitationError(
            f"the excited {parameter} of layer {layer} cannot be computed: its excitation is on "
            "the meta device, as accelerate's offloading leaves it",
            "Pass `preload_module_classes=sorted({type(m).__name__ for m in model.modules() if "
            "hasattr(m, 'excitation')})` to accelerate's `cpu_offload` or `dispatch_model`, or "
            "strip the model first.",
        ) from error
