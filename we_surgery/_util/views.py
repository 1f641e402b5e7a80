"""A second tree of modules around the same tensors."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def view_of(
    module: nn.Module,
    class_of: Callable[[nn.Module], type[nn.Module]],
    adapt: Callable[[nn.Module, nn.Module], None],
    views: dict[int, nn.Module] | None = None,
) -> nn.Module:
    """The module as another class, with its own dictionaries, which ``adapt(module, view)`` edits.

    Nothing else is copied, so this works for sharded models, which cannot be deep-copied.
    """
    views = {} if views is None else views
    if id(module) in views:
        return views[id(module)]
    # Not the class's own __new__: a sharded module's builds a whole new module.
    view = views[id(module)] = object.__new__(class_of(module))
    view.__dict__.update(module.__dict__)
    view.__dict__["_parameters"] = dict(module._parameters.items())
    view.__dict__["_modules"] = dict(module._modules.items())
    adapt(module, view)
    for name, child in view._modules.items():
        if child is not None:
            view._modules[name] = view_of(child, class_of, adapt, views)
    return view
