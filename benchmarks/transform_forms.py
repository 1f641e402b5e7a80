"""The forms of one mathematics that ``transform.py`` compares, and the layers they run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from measuring import (
    build_network,
)
from torch import Tensor, nn

from we_surgery.excitations import (
    LWE,
    Backend,
    Composition,
    Excitation,
    Stages,
    WeightLayout,
    build_excitation,
)
from we_surgery.excitations.compute.closed_form import excite_into, pull_back
from we_surgery.excitations.compute.inputs import Pullback

MEMORY_FORMATS = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}


Excite = Callable[[Composition, Tensor], Tensor]


@dataclass
class Layer:
    """A weight, what excites it, and the gradient that arrives at the excited weight."""

    weight: nn.Parameter
    excitation: Composition
    upstream: Tensor


def naive(composition: Composition, weight: Tensor) -> Tensor:
    """The obvious sequence of operations, each left to autograd.

    Standardized as published layers do it, the map from two 1x1 convs over the pooled kernels,
    MWE in its logarithmic form with the maximum in the graph. A linear layer is taken as a 1x1
    conv, and 1x1 kernels are not pooled.
    """
    if weight.ndim == 2:
        return naive(composition, weight[:, :, None, None])[:, :, 0, 0]
    stages = {stage.name: stage for stage in composition.stages}
    if "standardize" in stages:
        mean = weight.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
        weight = weight - mean
        std = weight.reshape(weight.shape[0], -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        weight = weight / std.expand_as(weight)
    lwe = stages.get("lwe")
    if isinstance(lwe, LWE):
        pooled = F.avg_pool2d(weight, weight.shape[2:]) if weight.shape[2] > 1 else weight
        hidden = F.relu(F.conv2d(pooled, lwe.fc1.weight[:, :, None, None], lwe.fc1.bias))
        mapped = F.conv2d(hidden, lwe.fc2.weight[:, :, None, None], lwe.fc2.bias)
        weight = weight * torch.sigmoid(mapped)
    if "mwe" in stages:
        limit = 1.1 * weight.abs().max()
        weight = limit * 0.5 * torch.log((1 + weight / limit) / (1 - weight / limit))
    return weight


def staged(composition: Composition, weight: Tensor) -> Tensor:
    """The stages one by one, under autograd."""
    return Excitation.forward(composition, weight)


def together(
    layers: Sequence[tuple[Composition, Tensor, Tensor]], backend: Backend
) -> list[Tensor]:
    """The attached step's way: every W' and every gradient, of all layers at once.

    Args:
        layers: each one's excitation, raw weight and upstream gradient.
        backend: what computes them.
    """
    jobs, asked = [], []
    for excitation, weight, _ in layers:
        inputs = excitation.closed_form(weight)
        assert inputs is not None
        jobs.append((weight, inputs, torch.empty_like(weight)))
    kept = excite_into(jobs, backend)
    for (weight, inputs, _), own, (_, _, upstream) in zip(jobs, kept, layers, strict=True):
        needed = (True, *[inputs.fc1_weight is not None] * 4)
        asked.append(Pullback(upstream.clone(), weight, inputs, own, needed))
    found = [tensor for gradients in pull_back(backend, asked) for tensor in gradients]
    return [excited for _, _, excited in jobs] + [t for t in found if t is not None]


FORMS: dict[str, Excite] = {
    "naive": naive,
    "staged": staged,
    "closed": Composition.forward,  # what an excited layer runs
}


def excitable_layouts(name: str) -> list[WeightLayout]:
    """Every conv that is not depthwise; in ConvNeXt, whose 1x1 convs are linear, those too."""
    layouts = []
    for module in build_network(name, device="meta").modules():
        if isinstance(module, nn.Conv2d) and module.in_channels > module.groups:
            layouts.append(WeightLayout(tuple(module.weight.shape), module.groups))
        elif isinstance(module, nn.Linear) and name == "convnext_tiny":
            layouts.append(WeightLayout(tuple(module.weight.shape)))
    return layouts


def make_layer(layout: WeightLayout, memory_format: torch.memory_format, mode: str) -> Layer:
    """A layer with random weights, excited as ``mode`` excites a conv."""
    weight = torch.randn(layout.shape) * 0.05
    if weight.ndim == 4:
        weight = weight.contiguous(memory_format=memory_format)
    stages: Stages = [{"standardize": {}}, *({name: {}} for name in mode.split("+"))]
    excitation = build_excitation(stages, layout)
    return Layer(nn.Parameter(weight), excitation, torch.randn_like(weight))
