"""The variants of sweeps: models with other settings or initializations, or without norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from we_surgery.attached import AttachedExcitation
from we_surgery.converted.convert import convert
from we_surgery.converted.graphs import excited_weights
from we_surgery.errors import check_known
from we_surgery.excitations import Composition, Rescale
from we_surgery.excitations.names import excitation_name
from we_surgery.reading.kinds import is_norm

Variant = Callable[[nn.Module], nn.Module]
"""Changes a vanilla model, in place or not, before it is trained."""

Initialization = Literal["default", "xavier", "kaiming"]

Excited = TypeVar("Excited", bound=nn.Module | AttachedExcitation)


def epsilon_variants(
    epsilons: Sequence[float] = (1e-3, 0.1, 0.2), *, mode: str = "mwe"
) -> dict[str, Variant]:
    """MWE with several epsilons, against the vanilla model (WE paper, Table 5)."""
    variants: dict[str, Variant] = {"vanilla": unchanged}
    for epsilon in epsilons:
        variants[f"{mode}, epsilon {epsilon:g}"] = _converted(mode, mwe={"epsilon": epsilon})
    return variants


def reduction_variants(
    reductions: Sequence[int] = (16, 8), *, mode: str = "lwe"
) -> dict[str, Variant]:
    """LWE with several reduction ratios (WE paper, section 4.2: 8 gives +0.05 % over 16)."""
    variants: dict[str, Variant] = {"vanilla": unchanged}
    for reduction in reductions:
        variants[f"{mode}, reduction {reduction}"] = _converted(mode, lwe={"reduction": reduction})
    return variants


def initialization_variants(*, mode: str = "lwe") -> dict[str, Variant]:
    """LWE's layers in torch's default, Xavier's and Kaiming's initialization.

    Supplement, section 1: "similar" accuracy with Xavier's. Kaiming's normal one over
    ``fan_out`` is what the public code draws. Weights only; biases keep torch's default.
    """

    def started(initialization: Initialization) -> Variant:
        def variant(model: nn.Module) -> nn.Module:
            return initialize_excitations(convert(model, mode, inplace=True), initialization)

        return variant

    variants: dict[str, Variant] = {"vanilla": unchanged}
    names: tuple[Initialization, ...] = ("default", "xavier", "kaiming")
    return variants | {f"{mode}, {name} start": started(name) for name in names}


def initialize_excitations(model: Excited, initialization: Initialization) -> Excited:
    """Draws the weights of the excitations' linear layers anew, in place.

    ``default`` keeps torch's, ``xavier`` is uniform, ``kaiming`` is normal over ``fan_out``.
    """
    draw = {
        "default": None,
        "xavier": nn.init.xavier_uniform_,
        "kaiming": lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
    }
    check_known("initialization", initialization, draw)
    function = draw[initialization]
    if function is not None:
        for weight in _linear_weights(model):
            function(weight)
        if isinstance(model, AttachedExcitation):
            model.restore()  # the model's weights are those of the new excitations
    return model


def _linear_weights(model: nn.Module | AttachedExcitation) -> Iterator[Tensor]:
    if isinstance(model, AttachedExcitation):
        for name, parameter in model.named_parameters().items():
            if ":" in name and name.endswith(".weight") and parameter.ndim == 2:
                yield parameter
        return
    for excited in excited_weights(model):
        for module in excited.excitation.modules():
            if isinstance(module, nn.Linear):
                yield module.weight


def normalization_free_variants() -> dict[str, Variant]:
    """Training without any normalization layer (supplement, section 2).

    The paper's ResNet50-LWE still learns, its plain ResNet50 does not. The paper does not say which
    standardization it used. With that of the public code, filters of standard deviation 1 multiply
    the signal's scale by about ``sqrt(N) / 2`` per layer, with N the fan-in. Four forms are
    compared with the vanilla one: the paper's, none, and standardized filters times ``sqrt(1 / N)``
    and ``2 sqrt(2 / N)``. The last also compensates for a ReLU and for multipliers of one half.
    """

    def lwe(standardize: str, factor: float | None = None) -> Variant:
        def variant(model: nn.Module) -> nn.Module:
            bare = without_normalization(model)
            config = {"mode": "lwe", "linear": "skip", "standardize": standardize}
            converted = convert(bare, config=config, inplace=True)
            return converted if factor is None else scale_standardized(converted, factor)

        return variant

    return {
        "vanilla, no norm": without_normalization,
        "lwe, no norm, standardized": lwe("on"),
        "lwe, no norm, not standardized": lwe("off"),
        "lwe, no norm, standardized x sqrt(1/N)": lwe("on", 1.0),
        "lwe, no norm, standardized x 2 sqrt(2/N)": lwe("on", 2 * math.sqrt(2)),
    }


def without_normalization(model: nn.Module) -> nn.Module:
    """Replaces each normalization layer by an identity, in place."""
    for name, module in list(model.named_modules()):
        if name and is_norm(module):
            model.set_submodule(name, nn.Identity())
    return model


def scale_standardized(model: nn.Module, factor: float = 1.0) -> nn.Module:
    """Multiplies each standardized weight by ``factor * sqrt(1 / N)``, in place; N is the fan-in.

    This is a fixed stage after LWE. With a factor of 1 a layer's output has the scale of its
    input, apart from multipliers and activation.
    """
    made: dict[Composition, Composition] = {}  # tied layers share one
    for weight in excited_weights(model):
        excitation = weight.excitation
        names = [stage.name for stage in excitation.stages]
        if "standardize" not in names or Rescale.name in names:
            continue
        if excitation not in made:
            made[excitation] = _scaled(excitation, weight.raw, factor)
        setattr(weight.owner, excitation_name(weight.parameter), made[excitation])
    return model


def _scaled(excitation: Composition, raw: Tensor, factor: float) -> Composition:
    groups = excitation.transposed_groups
    outputs = raw.shape[0] if groups is None else raw.shape[1] * groups
    gain = torch.full((outputs,), factor * math.sqrt(outputs / raw.numel())).to(raw)
    stages = [*excitation.stages, Rescale(gain, torch.zeros_like(gain))]
    return Composition(stages, groups).to(raw.device)


def unchanged(model: nn.Module) -> nn.Module:
    """The variant that is the vanilla model."""
    return model


def _converted(mode: str, **options: Mapping[str, Any]) -> Variant:
    def variant(model: nn.Module) -> nn.Module:
        return convert(model, config={"mode": mode, **options}, inplace=True)

    return variant
