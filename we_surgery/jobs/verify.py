"""Running an excited model and its stripped file side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from we_surgery.checkpoint import Architecture, cast
from we_surgery.converted.proof import check_outputs, largest_differences, run_in_eval, same_bits
from we_surgery.converted.strip import strip_with_report
from we_surgery.errors import SurgeryError
from we_surgery.jobs.convert import random_inputs

_HALF = (torch.float16, torch.bfloat16)


def compare_outputs(
    excited: nn.Module, vanilla: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None
) -> tuple[float, float]:
    """The largest absolute and relative difference of two models' outputs in eval mode.

    Rounding to half precision changes outputs by 4e-4 or by 0.2, depending on the model, so no
    tolerance separates a wrong weight from a rounded one. Two steps prove it without a tolerance
    for rounding: the excited model against its fold, both at least in float32, and the stripped
    model's values against the fold's, rounded once, to the bit.

    The stripped model is in ``dtype``, if given; both models are changed. The relative difference,
    for half precision the fold's, must not exceed 1e-5.
    """
    if dtype in _HALF:
        if any(is_half(tensor) for tensor in excited.state_dict().values()):
            excited = excited.float()
        folded, _ = strip_with_report(excited, example_inputs=inputs_for(excited, shape))
        _check_rounded(folded.state_dict(), vanilla.state_dict(), dtype)
        return rounding_effect(excited, vanilla, shape)
    if dtype is not None:
        excited, vanilla = excited.float(), vanilla.float()
    inputs = inputs_for(excited, shape)
    return check_outputs(run_in_eval(excited, inputs), run_in_eval(vanilla, inputs))


def rounding_effect(
    excited: nn.Module, rounded: nn.Module, shape: tuple[int, ...]
) -> tuple[float, float]:
    """The largest change of outputs by rounding all values, absolute and relative.

    Both models are changed, and compute in float32 to isolate the rounding.
    """
    excited, rounded = excited.float(), rounded.float()
    inputs = inputs_for(excited, shape)
    differences = largest_differences(run_in_eval(excited, inputs), run_in_eval(rounded, inputs))
    if not all(map(math.isfinite, differences)):
        raise SurgeryError(
            "the model's outputs are not finite after rounding its values",
            "Choose a dtype with more range or precision.",
        )
    return differences


def _check_rounded(
    folded: Mapping[str, Any], found: Mapping[str, Any], dtype: torch.dtype | None
) -> None:
    for name, value in folded.items():
        if not isinstance(value, Tensor):
            continue
        expected, other = cast(name, value, dtype), found.get(name)
        if not isinstance(other, Tensor) or not same_bits(other.to(expected.dtype), expected):
            raise SurgeryError(
                f"{name!r} of the stripped model differs from its folded value rounded once to "
                f"{str(expected.dtype).removeprefix('torch.')}",
                "The file, or the architecture that it was loaded into, changes its values.",
            )


def inputs_for(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Random inputs, always the same, in the dtype of the model's first parameter."""
    inputs = random_inputs(shape)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), inputs)
    return inputs.to(parameter.dtype)


def input_shape_of(
    model: nn.Module, architecture: Architecture | None
) -> tuple[tuple[int, ...], list[str]]:
    """The shape of one input of the model, and a sentence on its source.

    timm's models have it in ``default_cfg``, torchvision's in the transforms of their weights;
    others are tried with 3 channels of 224 x 224.
    """
    config = getattr(model, "default_cfg", None) or {}
    size = config.get("input_size") if hasattr(config, "get") else None
    where = "as timm's configuration of the model says"
    if size is None and architecture is not None and architecture.name.startswith("torchvision:"):
        crop = _torchvision_crop(architecture.name.partition(":")[2])
        size, where = (3, crop, crop), "as torchvision's transforms for the model say"
    if size is None:
        size, where = (3, 224, 224), "because the model does not name its input size"
    shape = (1, *size)
    sizes = "x".join(map(str, shape))
    return shape, [f"compared on random inputs of {sizes}, {where} (--input-shape overrides)"]


def cast_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts a model's floating-point parameters and buffers, in place."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            cast(name, tensor, dtype)
    model.to(dtype)


def is_half(value: object) -> bool:
    """Whether this is a tensor of float16 or bfloat16."""
    return isinstance(value, Tensor) and value.dtype in _HALF


def _torchvision_crop(name: str) -> int:
    from torchvision.models import get_model_weights

    try:
        transforms = get_model_weights(name).DEFAULT.transforms()
        return int(transforms.crop_size[0])
    except (ValueError, AttributeError, IndexError, TypeError):
        return 224  # detectors and segmentation take any size
