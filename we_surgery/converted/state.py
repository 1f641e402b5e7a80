"""The state of a model: converted or not, by which plan, wrapped or not."""

from __future__ import annotations

from torch import nn

from we_surgery._util.scripted import is_scripted
from we_surgery.converted.graphs import excited_weights
from we_surgery.errors import InputError
from we_surgery.planning import transplant_rows
from we_surgery.planning.plans import Plan

PLAN_ATTRIBUTE = "we_surgery_plan"
"""The attribute of a converted model that holds the applied plan, as plain data."""


def is_converted(model: nn.Module) -> bool:
    """Whether strip has something to remove."""
    return any(excited_weights(model)) or any(transplant_rows.attached(model))


def stored_plan(model: nn.Module) -> Plan | None:
    """The plan that was applied; for a stripped model, only the transplants that stay."""
    stored = model.__dict__.get(PLAN_ATTRIBUTE)
    return None if stored is None else Plan.from_dict(stored, "the plan of the model")


def kept_plan(model: nn.Module) -> Plan | None:
    """The part of the plan about transplants that stay after strip."""
    if not model.__dict__.get(PLAN_ATTRIBUTE, {}).get("transplants"):
        return None  # without a look at its layers, which builds their excitations to count them
    plan = stored_plan(model)
    return plan.kept if plan is not None and plan.kept.transplants else None


def refuse_wrappers(model: nn.Module, *, sharded: bool = True) -> None:
    """Raises for DDP, FSDP, compiled and scripted models."""
    kind = type(model).__name__
    if is_scripted(model):
        raise InputError(
            "the model is TorchScript, whose layers cannot be changed",
            "Give the eager model it was scripted or traced from.",
        )
    if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
        raise InputError(
            f"the model is wrapped in {kind}",
            "Convert and strip the model inside (`model.module`), before wrapping it.",
        )
    if kind == "OptimizedModule":
        raise InputError(
            "the model is wrapped by torch.compile",
            "Convert and strip the model inside (`model._orig_mod`), before compiling it.",
        )
    if sharded and any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise InputError(
            "the model is sharded (its parameters are DTensors)",
            "Convert before fully_shard; strip a full state dict with `strip_state_dict`.",
        )
