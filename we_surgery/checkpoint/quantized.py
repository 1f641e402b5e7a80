"""Tensors of quantized weights, which cannot be excited."""

from __future__ import annotations

import torch
from torch import Tensor

# Endings of the keys under which quantizers keep packed weights and their scales.
_PACKED = ("_packed_params", "qweight", "qzeros", "absmax", "weight_scale", "zero_point")


def is_quantized(name: str, value: Tensor) -> bool:
    """Whether an entry of a state dict is a quantized weight, or a scale of one."""
    return (
        value.is_quantized
        or (value.ndim > 1 and value.dtype in (torch.int8, torch.uint8))
        # Quantization-aware training keeps such scales beside float weights.
        or (name.endswith(_PACKED) and "fake_quant" not in name and "_process" not in name)
    )
