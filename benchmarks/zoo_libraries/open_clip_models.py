"""OpenCLIP: its configurations with fewer and narrower layers, and no tower from elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import open_clip
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from torch import nn
from zoo_models import Candidate

from zoo_libraries.filling import noise, on, whole


def names() -> list[str]:
    """The configurations that differ in more than their numbers."""
    found: dict[str, str] = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        if "timm_model_name" in vision or "hf_model_name" in text:
            continue
        shape = str(sorted(_shape(config).items()))
        found.setdefault(shape, name)
    return list(found.values())


def _shape(config: dict[str, Any]) -> dict[str, Any]:
    shape = _smaller(config)
    return {"quick": shape.get("quick_gelu"), "custom": shape.get("custom_text")} | {
        f"{tower}.{key}": str(value)
        for tower in ("vision_cfg", "text_cfg", "multimodal_cfg")
        for key, value in shape.get(tower, {}).items()
        if key not in ("patch_size", "vocab_size", "context_length")
    }


def _smaller(config: dict[str, Any]) -> dict[str, Any]:
    small = copy.deepcopy(config)
    layers = small["vision_cfg"].get("layers")
    small["vision_cfg"] |= {
        "layers": [1, 1, 1, 1] if isinstance(layers, list) else 2,
        "width": 16 if isinstance(layers, list) else 64,
        "head_width": 16,
        "image_size": 64,
        "patch_size": None if isinstance(layers, list) else 16,
    }
    for tower in ("text_cfg", "multimodal_cfg"):
        if tower in small:
            small[tower] |= {"layers": 2, "width": 64, "heads": 4, "vocab_size": 128}
    small["text_cfg"]["context_length"] = 16
    if "multimodal_cfg" in small:
        small["multimodal_cfg"] |= {"context_length": 16, "dim_head": 16, "heads": 4}
    small["embed_dim"] = 64
    small["text_cfg"].pop("hf_tokenizer_name", None)
    return small


def build(name: str) -> nn.Module:
    """The model of a configuration made small."""
    config = _smaller(open_clip.get_model_config(name))
    config.pop("custom_text", None)
    is_custom = open_clip.get_model_config(name).get("custom_text", False)
    if "multimodal_cfg" in config:
        return CoCa(**config)  # type: ignore[no-any-return]
    return (CustomTextCLIP if is_custom else CLIP)(**config)  # type: ignore[no-any-return]


def candidates(name: str, model: nn.Module) -> Iterator[Candidate]:
    """Two pictures with two texts."""
    yield on(noise(2, 3, 64, 64), whole(127, 2, 16) + 1)
