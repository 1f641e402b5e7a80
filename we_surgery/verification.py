"""Running an excited model and its stripped file side by side."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from we_surgery.checkpoint import Architecture, cast
from we_surgery.errors import SurgeryError
from we_surgery.jobs import random_inputs
from we_surgery.proof import RELATIVE_TOLERANCE, check_outputs, largest_differences, run_in_eval

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""What a strip can cast to, by the names of the command line."""

OUTPUT_TOLERANCE = {
    torch.float32: RELATIVE_TOLERANCE,
    torch.float16: 0.02,
    torch.bfloat16: 0.15,
}
"""How far rounding all weights may move the outputs, over the larger of 1 and the largest."""


def compare_outputs(
    excited: nn.Module, vanilla: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None
) -> tuple[float, float]:
    """The largest absolute and relative difference of two models' outputs in eval mode.

    Args:
        excited: the model as it was trained.
        vanilla: the stripped one.
        shape: of the random inputs.
        dtype: what the stripped one was cast to, if it was. Both compute in float32 then, so
            that only the rounding of the weights shows; both models are changed.

    Raises:
        InputError: a model fails on such inputs.
        SurgeryError: the relative difference is over 1e-5, or over that of
            :data:`OUTPUT_TOLERANCE` for a half precision.
    """
    if dtype is not None:
        excited, vanilla = excited.float(), vanilla.float()
    inputs = inputs_for(excited, shape)
    before, after = run_in_eval(excited, inputs), run_in_eval(vanilla, inputs)
    if dtype is None or OUTPUT_TOLERANCE[dtype] == RELATIVE_TOLERANCE:
        return check_outputs(before, after)
    absolute, relative = largest_differences(before, after)
    if not relative <= OUTPUT_TOLERANCE[dtype]:
        raise SurgeryError(
            f"rounding all weights to {str(dtype).removeprefix('torch.')} moves the outputs by "
            f"{absolute:.3g} ({relative:.3g} relative, over {OUTPUT_TOLERANCE[dtype]:g})",
            "Choose a dtype of more digits; or measure what the rounding costs on real data, and "
            "leave out --verify and --input-shape: the weights are compared in any case.",
        )
    return absolute, relative


def inputs_for(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Random inputs, always the same, in the dtype of the model's first parameter."""
    inputs = random_inputs(shape)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), inputs)
    return inputs.to(parameter.dtype)


def input_shape_of(
    model: nn.Module, architecture: Architecture | None
) -> tuple[tuple[int, ...], list[str]]:
    """The shape of one input of the model, and a sentence on where it is from.

    timm's models say it themselves (``default_cfg``), torchvision's by the transforms of their
    weights; for others 3 channels of 224 x 224 are tried.
    """
    config = getattr(model, "default_cfg", None) or {}
    size = config.get("input_size") if hasattr(config, "get") else None
    where = "as timm's configuration of the model says"
    if size is None and architecture is not None and architecture.name.startswith("torchvision:"):
        crop = _torchvision_crop(architecture.name.partition(":")[2])
        size, where = (3, crop, crop), "as torchvision's transforms for the model say"
    if size is None:
        size, where = (3, 224, 224), "because the model does not say what it takes"
    shape = (1, *size)
    sizes = "x".join(map(str, shape))
    return shape, [f"compared on random inputs of {sizes}, {where} (--input-shape overrides)"]


def cast_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts a model's floating-point parameters and buffers, in place.

    Raises:
        SurgeryError: a value is beyond the numbers of ``dtype``.
    """
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            cast(name, tensor, dtype)
    model.to(dtype)


def is_half(value: object) -> bool:
    """Whether this is a tensor of float16 or bfloat16."""
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def _torchvision_crop(name: str) -> int:
    from torchvision.models import get_model_weights

    try:
        transforms = get_model_weights(name).DEFAULT.transforms()
        return int(transforms.crop_size[0])
    except (ValueError, AttributeError, IndexError, TypeError):
        return 224  # detectors and segmentation take any size
