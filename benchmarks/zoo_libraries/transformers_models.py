"""The base model of each model type of transformers, from a configuration made small.

A configuration is made small by the names of its numbers: widths, depths, heads, vocabularies and
sizes have a few names each. What a name cannot tell is left as it is, and where the result does
not run, the next, milder way to shrink is tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PretrainedConfig
from zoo_models import Candidate, seeded

_WIDTH, _LAYERS, _HEADS, _WORDS = 32, 2, 4, 128

# What each number becomes, by its name.
_LENGTHS: dict[str, Any] = dict.fromkeys(
    """
    num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers e_layers
    num_encoder_layers num_decoder_layers depth num_blocks encoder_num_hidden_layers
    num_block_records l_layers x_layers r_layers decoder_num_hidden_layers
    """.split(),
    _LAYERS,
)
_HEAD_COUNTS: dict[str, Any] = dict.fromkeys(
    """
    num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
    encoder_num_attention_heads decoder_num_attention_heads
    """.split(),
    _HEADS,
)
_WIDTHS: dict[str, Any] = {
    **dict.fromkeys(
        """
        hidden_size d_model n_embd dim hidden_dim embed_dim embedding_size d_embed emb_dim
        projection_dim encoder_hidden_dim decoder_hidden_size q_hidden_size hidden_channels
        word_embed_proj_dim text_embed_dim output_dim decoder_hidden_dim
        """.split(),
        _WIDTH,
    ),
    **dict.fromkeys(
        """
        intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner d_inner
        ffn_hidden_size dim_feedforward decoder_intermediate_size moe_intermediate_size
        mlp_dim feed_forward_size shared_expert_intermediate_size
        """.split(),
        2 * _WIDTH,
    ),
    "head_dim": _WIDTH // _HEADS,
    "d_kv": _WIDTH // _HEADS,
    "attention_head_size": _WIDTH // _HEADS,
    "num_key_value_heads": 2,
}
_SIZES: dict[str, Any] = {
    "vocab_size": _WORDS,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_queries": 8,
    "image_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_STAGE_WIDTHS = {"hidden_sizes", "embed_dims"}
_WIDTHS |= dict.fromkeys(_STAGE_WIDTHS)
_WAYS = (
    {**_SIZES, **_LENGTHS, **_WIDTHS, **_HEAD_COUNTS},
    {**_SIZES, **_LENGTHS, **_WIDTHS},
    {**_SIZES, **_LENGTHS},
    {**_LENGTHS},
)
_MOST = 40_000_000
"""Parameters that a model may have."""


def names() -> list[str]:
    """The model types that have a base model."""
    return sorted(kind for kind in CONFIG_MAPPING if CONFIG_MAPPING[kind] in MODEL_MAPPING)


def build(name: str) -> nn.Module:
    """The base model of a type, as small as it runs."""
    kind, _, way = name.partition("/")
    config = CONFIG_MAPPING[kind]()
    _shrink(config, _WAYS[int(way or 0)])
    model: nn.Module = transformers.AutoModel.from_config(config)
    return model


def variants(name: str) -> Iterator[str]:
    """The names under which a type may be listed, the smallest first."""
    for index in range(len(_WAYS)):
        yield name if not index else f"{name}/{index}"


def _shrink(config: Any, values: dict[str, Any]) -> None:
    for key, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _shrink(value, values)
        elif isinstance(value, int) and not isinstance(value, bool) and key in values:
            if value > values[key] or key.endswith("token_id"):
                setattr(config, key, values[key])
        elif isinstance(value, list | tuple) and key in ("depths", "layers"):
            setattr(config, key, type(value)(1 for _ in value))
        elif isinstance(value, list | tuple) and key in _STAGE_WIDTHS & values.keys():
            setattr(config, key, type(value)(16 * 2**i for i in range(len(value))))
    config.use_cache = False


def candidates(name: str, model: nn.Module) -> Iterator[Candidate]:
    """Inputs by the names of the forward's arguments."""
    asked = signature(model.forward).parameters
    config: Any = model.config
    texts = _texts(config)
    if "pixel_values" in asked and "input_ids" not in asked:
        for shape in _pictures(config):
            picture = torch.randn(shape, generator=seeded())
            yield Candidate({"pixel_values": picture}, shape)
    if "pixel_values" in asked and "input_ids" in asked:
        for shape in _pictures(config):
            picture = torch.randn(shape, generator=seeded())
            yield Candidate({"pixel_values": picture, **texts}, shape)
    if "pixel_values_videos" in asked and "input_ids" not in asked:
        for frames, size in ((4, 64), (16, 64), (16, 224)):
            clip = torch.randn(1, frames, 3, size, size, generator=seeded())
            yield Candidate({"pixel_values_videos": clip}, tuple(clip.shape))
    for key in ("input_values", "input_features", "past_values"):
        if key in asked:
            for shape in _sounds(config):
                yield Candidate({key: torch.randn(shape, generator=seeded())}, shape)
    if "inputs_embeds" in asked and "input_ids" not in asked:
        embeds = torch.randn(2, 12, _WIDTH, generator=seeded())
        yield Candidate({"inputs_embeds": embeds}, tuple(embeds.shape))
    if "input_ids" in asked:
        words = {key: value for key, value in texts.items() if key in asked}
        if "decoder_input_ids" in asked:
            yield Candidate({**words, "decoder_input_ids": words["input_ids"]}, (2, 12))
        yield Candidate(words, (2, 12))


def _texts(config: Any) -> dict[str, Tensor]:
    words = getattr(config.get_text_config(), "vocab_size", _WORDS) or _WORDS
    ids = torch.randint(3, max(4, min(words, _WORDS)), (2, 12), generator=seeded())
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pictures(config: Any) -> Iterator[tuple[int, ...]]:
    vision = getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", 3) or 3
    size = getattr(vision, "image_size", 64)
    size = size if isinstance(size, int) else (size or [64])[0]
    frames = getattr(vision, "num_frames", None)
    for side in dict.fromkeys((size, 64, 128, 224)):
        if frames:
            yield (1, frames, channels, side, side)
        yield (2, channels, side, side)


def _sounds(config: Any) -> Iterator[tuple[int, ...]]:
    bins = getattr(config, "num_mel_bins", 80) or 80
    yield (2, 4000)
    yield (2, 1, 4000)
    for frames in (64, 256, 1024, 3000):
        yield (2, bins, frames)
        yield (2, frames, bins)
