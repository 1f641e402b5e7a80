"""A converted model as its vanilla self, for code that goes by parameter names."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

from torch import nn

from we_surgery.attached.wrappers import inside_wrappers as inside_wrappers
from we_surgery.converted.graphs import ExcitedWeight, excited_weights
from we_surgery.converted.layer import ExcitedLayer
from we_surgery.excitations.names import excitation_name, raw_name, rename_parameter


@dataclass(frozen=True)
class ExcitationParameters:
    """The trainable parameters of one raw weight's excitation, by their names in the model."""

    raw: nn.Parameter
    named: tuple[tuple[str, nn.Parameter], ...]


def excitation_parameters(
    model: nn.Module, trained: Container[int] = ()
) -> Iterator[ExcitationParameters]:
    """For each excited weight, in the model's order, what its excitation trains.

    Parameters that several excitations have in common are yielded with the first layer whose raw
    weight is among the ids ``trained``; with the first of all if none is.
    """
    weights = list(excited_weights(model))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    first: dict[int, ExcitedWeight] = {}
    for weight in sorted(weights, key=lambda weight: id(weight.raw) not in trained):
        for parameter in weight.excitation.parameters():
            first.setdefault(id(parameter), weight)
    for weight in weights:
        named = tuple(
            (names[id(parameter)], parameter)
            for parameter in weight.excitation.parameters()
            if parameter.requires_grad and first[id(parameter)] is weight
        )
        yield ExcitationParameters(weight.raw, named)


def vanilla_view(model: nn.Module) -> nn.Module:
    """The vanilla model around the very Parameters of ``model``: for reading names, not to run.

    Classes, names and order are those of the model before its conversion, each raw weight
    stands under its vanilla name, and no excitation is there. Nothing is copied but the
    modules' own dictionaries, so that a sharded model, which cannot be deep-copied, has one too.
    """
    excited: dict[int, list[str]] = {}
    for weight in excited_weights(model):
        excited.setdefault(id(weight.owner), []).append(weight.parameter)
    return _view(model, excited, {})


def _view(
    module: nn.Module, excited: dict[int, list[str]], views: dict[int, nn.Module]
) -> nn.Module:
    if id(module) in views:
        return views[id(module)]
    kind = module.vanilla_class if isinstance(module, ExcitedLayer) else type(module)
    # Not the class's own __new__: that of a sharded module builds a whole new module.
    view = views[id(module)] = object.__new__(kind)
    view.__dict__.update(module.__dict__)
    view.__dict__["_parameters"] = dict(module._parameters)
    names = excited.get(id(module), [])
    for name in names:
        rename_parameter(view, raw_name(name), name)
    gone = {excitation_name(name) for name in names}
    view.__dict__["_modules"] = {
        name: None if child is None else _view(child, excited, views)
        for name, child in module._modules.items()
        if name not in gone
    }
    return view
