"""A converted model as its vanilla self, for code that goes by parameter names."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

from torch import nn

from we_surgery._util.views import view_of
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
    stands under its vanilla name, and no excitation is there.
    """
    excited: dict[int, list[str]] = {}
    for weight in excited_weights(model):
        excited.setdefault(id(weight.owner), []).append(weight.parameter)

    def class_of(module: nn.Module) -> type[nn.Module]:
        return module.vanilla_class if isinstance(module, ExcitedLayer) else type(module)

    def adapt(module: nn.Module, view: nn.Module) -> None:
        for name in excited.get(id(module), []):
            rename_parameter(view, raw_name(name), name)
            view._modules.pop(excitation_name(name), None)

    return view_of(model, class_of, adapt)
