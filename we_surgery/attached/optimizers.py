"""Where an excitation's parameter goes in an optimizer, and the state it starts with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from we_surgery.attached.wrappers import with_wrapped


def group_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """All of a parameter group but its parameters and their names."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def same_options(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two groups train alike; a learning rate may be a tensor."""
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
    groups: Iterable[dict[str, Any]], home: dict[str, Any], parameter: nn.Parameter
) -> dict[str, Any]:
    """The group an excitation's parameter joins.

    That of its weight; for biases the one with the same options and no weight decay, if there is
    one.
    """
    if parameter.ndim > 1 or not home.get("weight_decay"):
        return home
    undecayed = {**group_options(home), "weight_decay": 0}
    return next((group for group in groups if same_options(group_options(group), undecayed)), home)


def start_early_state(optimizer: Optimizer, parameter: nn.Parameter, group: Any) -> None:
    """Gives the parameter the state that its optimizer would not make for it when stepping."""
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
