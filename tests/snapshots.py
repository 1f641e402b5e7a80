"""All that a failed surgery must leave as it was."""

from typing import Any

from torch import nn


def snapshot(model: nn.Module) -> list[Any]:
    """All that a failed surgery must leave as it was: classes, keys, identities, flags, values."""
    modules = [
        # What is kept between two reads of an excited weight comes and goes.
        (n, type(m), id(m), m.training, [name for name in vars(m) if name != "kept"])
        for n, m in model.named_modules()
    ]
    parameters = [
        (name, id(p), p.data_ptr(), p.requires_grad, p.grad, p.detach().clone().tolist())
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    return [modules, parameters, list(model.state_dict())]
