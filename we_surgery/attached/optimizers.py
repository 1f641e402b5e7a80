"""Which optimizers are supported; where an excitation's parameter goes in one, and its state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from we_surgery.attached.wrappers import unwrapped, with_wrapped
from we_surgery.errors import InputError

SHARDED_OR_FLAT = {
    "ZeroRedundancyOptimizer": "shards its parameters",
    "DeepSpeedZeroOptimizer": "keeps flat copies of the parameters",
    "DeepSpeedZeroOptimizer_Stage3": "keeps flat copies of the parameters",
    "DeepSpeedOptimizerWrapper": "keeps flat copies of the parameters",
    "FP16_Optimizer": "keeps flat copies of the parameters",
    "BF16_Optimizer": "keeps flat copies of the parameters",
}


def group_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a parameter group, without its parameters and their names."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def same_options(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two groups have the same options; a learning rate may be a tensor."""
    if first.keys() != second.keys():
        return False
    for key, value in first.items():
        other = second[key]
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            if not torch.equal(value, other):
                return False
        elif value is not other and value != other:
            return False
    return True


def group_for(
    optimizer: Any, home: dict[str, Any], parameter: nn.Parameter
) -> dict[str, Any] | None:
    """The group an excitation's parameter joins; None if no group can take it.

    That of its weight; for biases the one with the same options and no weight decay, if there is
    one. Muon takes matrices alone: biases then join the group without it that is most alike.
    """
    groups = optimizer.param_groups
    muon = getattr(torch.optim, "Muon", ())  # which torch 2.8 does not have
    if parameter.ndim != 2 and any(isinstance(layer, muon) for layer in with_wrapped(optimizer)):
        return None
    if parameter.ndim > 1:
        return home
    wanted = group_options(home)
    if home.get("weight_decay"):
        wanted["weight_decay"] = 0
    if home.get("use_muon"):
        others = [group for group in groups if not group.get("use_muon")]
        return max(others, key=lambda group: _options_in_common(group, wanted), default=None)
    return next((group for group in groups if same_options(group_options(group), wanted)), home)


def _options_in_common(group: Mapping[str, Any], wanted: Mapping[str, Any]) -> int:
    return sum(
        key in group and same_options({key: group[key]}, {key: value})
        for key, value in wanted.items()
    )


def new_companion() -> torch.optim.AdamW:
    """Makes the optimizer for parameters that no group can take; it gets its groups per step."""
    companion = torch.optim.AdamW([torch.zeros(())])
    companion.param_groups.clear()
    return companion


def companion_group(
    companion: Optimizer, home: Mapping[str, Any], parameter: nn.Parameter
) -> dict[str, Any]:
    """A group of the companion for one parameter, with the options of its weight's group now."""
    group = {**companion.defaults, "params": [parameter]}
    group |= {key: home[key] for key in ("lr", "weight_decay", "maximize") if key in home}
    if parameter.ndim < 2:
        group["weight_decay"] = 0.0
    return group


def start_early_state(optimizer: Optimizer, parameter: nn.Parameter, group: Any) -> None:
    """Makes the state of a parameter that its optimizer would not make in a step."""
    for layer in with_wrapped(optimizer):
        if isinstance(layer, torch.optim.Adagrad):
            # Older versions of torch make it when the optimizer is built, and only then.
            start = group["initial_accumulator_value"]
            options = [{**group_options(group), "params": [parameter]}]
            twin = torch.optim.Adagrad(options, initial_accumulator_value=start)
            layer.state[parameter] = twin.state[parameter]
        elif isinstance(layer, torch.optim.SGD) and group["fused"] and group["momentum"]:
            # Its kernel takes a momentum for all of a group or for none of it.
            others = (layer.state.get(other, {}) for other in group["params"])
            if any("momentum_buffer" in state for state in others):
                layer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.detach())


def supported_optimizers(given: Any) -> list[Any]:
    """Unwraps optimizers, and refuses those that are not supported."""
    several = given.values() if isinstance(given, Mapping) else given
    found = [unwrapped(each) for each in (several if isinstance(several, Iterable) else [given])]
    if not found:
        raise InputError("no optimizer was given", "Give the optimizer that trains the model.")
    for each in found:
        for layer in with_wrapped(each):
            name = type(layer).__name__
            if name in SHARDED_OR_FLAT or name.startswith("DeepSpeed"):
                reason = SHARDED_OR_FLAT.get(name, "keeps flat copies of the parameters")
                raise InputError(
                    f"{name} is not supported: it {reason}",
                    "Convert the model instead (`we_surgery.convert`), before it is wrapped.",
                )
            if getattr(layer, "is_second_order", False):
                raise InputError(
                    f"{name} differentiates through the gradients, which attach does not support",
                    "Convert the model instead (`we_surgery.convert`).",
                )
        if not hasattr(each, "param_groups") or not hasattr(each, "state"):
            raise InputError(
                f"{type(each).__name__} is not a torch optimizer",
                "Give the optimizer whose `step` trains the model.",
            )
    return found
