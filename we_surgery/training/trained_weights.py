"""The weights of conv and linear layers that a model trains, in either form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from we_surgery.attached.registry import excitation_of
from we_surgery.converted.graphs import ExcitedWeight, excited_weights
from we_surgery.reading.kinds import CONV_KINDS
from we_surgery.training.vanilla_view import inside_wrappers

_LAYERS: tuple[type[nn.Module], ...] = (*CONV_KINDS, nn.Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class TrainedWeight:
    """One weight: the Parameter of a layer, or the raw weight of an excited one."""

    layer: str
    owner: nn.Module
    parameter: nn.Parameter
    excited: ExcitedWeight | None = None

    @property
    def is_of_layer(self) -> bool:
        """Whether a conv or linear layer has it; attentions and graphs have others."""
        return isinstance(self.owner, _LAYERS)

    @property
    def is_attached(self) -> bool:
        """Whether an optimizer's step excites it, and it holds the excited values."""
        return excitation_of(self.parameter) is not None

    @property
    def transposed_groups(self) -> int | None:
        """As :func:`~we_surgery.excitations.layout.to_filters` takes them."""
        return self.owner.groups if isinstance(self.owner, _TRANSPOSED) else None

    def computed(self) -> Tensor:
        """What the layer computes with."""
        if self.excited is None:
            return self.parameter
        return self.excited.excitation(self.parameter)  # type: ignore[no-any-return]


def trained_weights(model: nn.Module) -> Iterator[TrainedWeight]:
    """Each trained weight once, those of converted layers first; none of an excitation's own."""
    model = inside_wrappers(model)
    seen: set[int] = set()
    excitations: set[nn.Module] = set()
    found = []
    for weight in excited_weights(model):
        excitations.update(weight.excitation.modules())
        found.append(TrainedWeight(weight.name, weight.owner, weight.raw, weight))
    for name, module in model.named_modules():
        own = module._parameters.get("weight") if isinstance(module, _LAYERS) else None
        if own is not None and module not in excitations:
            found.append(TrainedWeight(name, module, own))
    for one in found:
        if one.parameter.requires_grad and id(one.parameter) not in seen:
            seen.add(id(one.parameter))
            yield one
