"""PEFT: its adapters around a text model, a vision transformer and a conv network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
from torch import nn
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel
from zoo_models import Candidate

from zoo_libraries.filling import by_name, noise, whole

_TEXT = ["query", "value"]
_CONV = r".*layer\.\d\.convolution"
_BASES: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertModel(
        BertConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                   intermediate_size=64)
    ),
    "vit": lambda: ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                  image_size=64, patch_size=16)
    ),
    "resnet": lambda: ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
}  # fmt: skip
_ADAPTERS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 4},
    "LoraConfig/dora": {"r": 4, "use_dora": True},
    "LoraConfig/whole": {"r": 4, "modules_to_save": ["pooler"]},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "IA3Config": {"feedforward_modules": []},
    "OFTConfig": {"oft_block_size": 8},
    "BOFTConfig": {"boft_block_size": 4},
    "VeraConfig": {"r": 4},
    "HRAConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 8},
    "RandLoraConfig": {"r": 4},
    "LNTuningConfig": {"target_modules": ["LayerNorm", "layernorm_after"]},
    "AdaLoraConfig": {"total_step": 10},
    "C3AConfig": {"block_size": 8},
    "MissConfig": {"r": 4},
}
_FOR_CONVS = ("LoraConfig", "LoraConfig/dora", "LoHaConfig", "LoKrConfig", "OFTConfig")


def names() -> list[str]:
    """``bert/LoraConfig``: what is adapted, and by what."""
    pairs = [f"{base}/{adapter}" for base in ("bert", "vit") for adapter in _ADAPTERS]
    return pairs + [f"resnet/{adapter}" for adapter in _FOR_CONVS]


def build(name: str) -> nn.Module:
    """The adapted model."""
    base, _, adapter = name.partition("/")
    options: dict[str, Any] = {"target_modules": _CONV if base == "resnet" else _targets(base)}
    config = getattr(peft, adapter.partition("/")[0])(**(options | _ADAPTERS[adapter]))
    model: nn.Module = peft.get_peft_model(_BASES[base](), config)
    return model


def _targets(base: str) -> list[str]:
    return _TEXT if base == "bert" else ["q_proj", "v_proj", "query", "value"]


def candidates(name: str, model: nn.Module) -> Iterator[Candidate]:
    """Two texts or two pictures."""
    if name.startswith("bert"):
        yield by_name(input_ids=whole(128, 2, 10))
    else:
        yield by_name(pixel_values=noise(2, 3, 64, 64))
