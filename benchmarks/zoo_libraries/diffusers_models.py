"""diffusers: its networks and autoencoders with few and narrow layers.

What a transformer takes is told by the names of the arguments of its constructor and forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from torch import nn
from zoo_models import Candidate

from zoo_libraries.filling import by_name, fill, fitting, noise, whole

_WIDTHS = (8, 16)
_DOWN, _UP = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
_CROSS_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
_CROSS_UP = ("UpBlock2D", "CrossAttnUpBlock2D")
_BY_HEAD_DIM = {"num_attention_heads": None, "attention_head_dim": 8}
_VALUES: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 1,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "num_kv_heads": 2,
    "num_key_value_heads": 2,
    "attention_head_dim": 16,
    "head_dim": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "inner_dim": 32,
    "dim": 32,
    "ffn_dim": 64,
    "freq_dim": 16,
    "text_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 32,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "caption_channels": 32,
    "caption_projection_dim": 32,
    "text_embed_dim": 32,
    "time_embed_dim": 16,
    "encoder_hidden_size": 32,
    "cap_feat_dim": 32,
    "sample_size": 16,
    "sample_height": 16,
    "sample_width": 16,
    "sample_frames": 5,
    "max_text_seq_length": 12,
    "num_vector_embeds": 16,
    "block_out_channels": _WIDTHS,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "num_embeds_ada_norm": 10,
    "pos_embed_max_size": 16,
    "base_dim": 8,
    "z_dim": 4,
    "axes_dims_rope": (4, 6, 6),
    "rope_axes_dim": (4, 6, 6),
    "axes_dims": [4, 6, 6],
    "axes_lens": [32, 32, 32],
    "multiple_of": 16,
    "cond_size": 32,
    "embedding_dim": 32,
    "num_embeddings": 8,
    "additional_embeddings": 4,
}
_OWN: dict[str, dict[str, Any]] = {
    "UNet2DModel": {"in_channels": 3, "out_channels": 3, "down_block_types": _DOWN,
                    "up_block_types": _UP, "attention_head_dim": 8},
    "UNet2DModel/resnet": {"in_channels": 3, "out_channels": 3, "up_block_types": ("UpBlock2D",
                           "ResnetUpsampleBlock2D"), "attention_head_dim": 8,
                           "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
                           "resnet_time_scale_shift": "scale_shift"},
    "UNet2DConditionModel": {"down_block_types": _CROSS_DOWN, "up_block_types": _CROSS_UP,
                             **_BY_HEAD_DIM},
    "UNet2DConditionModel/linear": {"down_block_types": _CROSS_DOWN, "up_block_types": _CROSS_UP,
                                    **_BY_HEAD_DIM,
                                    "use_linear_projection": True, "only_cross_attention": True},
    "UNet2DConditionModel/simple": {
        **_BY_HEAD_DIM,
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")},
    "UNet3DConditionModel": {
        "num_attention_heads": None,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 8},
    "UNetMotionModel": {
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        "motion_num_attention_heads": 2},
    "UNetSpatioTemporalConditionModel": {
        "in_channels": 8, "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24},
    "UNet1DModel": {"in_channels": 2, "out_channels": 2, "block_out_channels": (32, 32, 64),
                    "sample_size": 64},
    "ControlNetModel": {"down_block_types": _CROSS_DOWN, "conditioning_embedding_out_channels":
                        (8, 8)},
    "AutoencoderKL": {"in_channels": 3, "out_channels": 3,
                      "down_block_types": ("DownEncoderBlock2D",) * 2,
                      "up_block_types": ("UpDecoderBlock2D",) * 2},
    "AsymmetricAutoencoderKL": {"in_channels": 3, "out_channels": 3},
    "AutoencoderKLTemporalDecoder": {"in_channels": 3, "out_channels": 3, "block_out_channels":
                                     (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2},
    "AutoencoderTiny": {"in_channels": 3, "out_channels": 3, "encoder_block_out_channels": (8,) * 4,
                        "decoder_block_out_channels": (8,) * 4},
    "AutoencoderDC": {"in_channels": 3, "encoder_block_out_channels": (8, 16),
                      "decoder_block_out_channels": (8, 16), "encoder_layers_per_block": (1, 1),
                      "decoder_layers_per_block": (1, 1), "attention_head_dim": 8,
                      "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
                      "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
                      "encoder_qkv_multiscales": ((), (5,)),
                      "decoder_qkv_multiscales": ((), (5,))},
    "AutoencoderKLWan": {"in_channels": 3, "out_channels": 3, "dim_mult": [1, 1, 1, 1],
                         "num_res_blocks": 1},
    "AutoencoderKLQwenImage": {"dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "AutoencoderKLCogVideoX": {
        "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8, 8, 8)},
    "AutoencoderKLHunyuanVideo": {
        "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8, 8, 8)},
    "AutoencoderKLMochi": {
        "in_channels": 15, "out_channels": 3, "encoder_block_out_channels": (32, 32, 32, 32),
        "decoder_block_out_channels": (32, 32, 32, 32), "layers_per_block": (1, 1, 1, 1, 1)},
    "AutoencoderKLAllegro": {"in_channels": 3, "out_channels": 3,
                             "block_out_channels": (8, 8, 8, 8)},
    "AutoencoderKLMagvit": {"in_channels": 3, "out_channels": 3,
                            "block_out_channels": (8, 8, 8, 8)},
    "AutoencoderKLLTXVideo": {"in_channels": 3, "out_channels": 3,
                              "block_out_channels": (8, 8, 8, 8), "layers_per_block": (1,) * 5,
                              "decoder_block_out_channels": (8, 8, 8, 8),
                              "decoder_layers_per_block": (1,) * 5},
    "AutoencoderOobleck": {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4],
                           "channel_multiples": [1, 2], "decoder_channels": 8,
                           "decoder_input_channels": 8, "audio_channels": 2},
    "VQModel": {"in_channels": 3, "out_channels": 3, "num_vq_embeddings": 16,
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2},
    "T2IAdapter": {"in_channels": 3, "channels": [8, 16], "num_res_blocks": 1,
                   "downscale_factor": 4},
    "DiTTransformer2DModel": {"sample_size": 8, "num_embeds_ada_norm": 10},
    "PixArtTransformer2DModel": {"sample_size": 8, "use_additional_conditions": False,
                                 "cross_attention_dim": 32},
    "StableAudioDiTModel": {"time_proj_dim": 16, "global_states_input_dim": 32,
                            "cross_attention_input_dim": 32, "num_key_value_attention_heads": 1,
                            "sample_size": 16, "attention_head_dim": 16},
    "Transformer2DModel/conv": {"in_channels": 32, "out_channels": None,
                                "num_embeds_ada_norm": None, "num_vector_embeds": None,
                                "sample_size": None, "cross_attention_dim": None},
    "TransformerTemporalModel": {"in_channels": 32, "out_channels": None,
                                 "cross_attention_dim": None},
    "FluxTransformer2DModel": {"in_channels": 16, "out_channels": 16, "guidance_embeds": False},
    "HunyuanVideoTransformer3DModel": {"guidance_embeds": False},
    "LuminaNextDiT2DModel": {"patch_size": 2, "sample_size": 16},
    "Kandinsky3UNet": {"block_out_channels": (16, 32), "groups": 4, "attention_head_dim": 8},
}  # fmt: skip


def names() -> list[str]:
    """All classes that these small numbers can make, and variants of some."""
    kinds = [
        name
        for name in diffusers._import_structure["models"]
        if inspect.isclass(getattr(diffusers, name))
        and issubclass(getattr(diffusers, name), nn.Module)
        and not name.startswith(("Multi", "AutoModel", "ModelMixin"))
        and "Multi" not in name
    ]
    return [*kinds, *(name for name in _OWN if "/" in name)]


def build(name: str) -> nn.Module:
    """The model with small numbers."""
    kind = getattr(diffusers, name.partition("/")[0])
    model: nn.Module = fill(kind.__init__.__wrapped__ and kind, _VALUES, **_OWN.get(name, {}))
    return model


def candidates(name: str, model: nn.Module) -> Iterator[Candidate]:
    """Latents, a time and a text; pictures, clips or sounds for autoencoders."""
    config: Any = model.config
    channels = config.get("in_channels") or config.get("input_channels") or 3
    text = noise(1, 12, 32)
    common = {
        "timestep": torch.tensor([1.0]),
        "t": torch.tensor([0.5]),
        "encoder_hidden_states": text,
        "encoder_attention_mask": torch.ones(1, 12),
        "encoder_mask": torch.ones(1, 12),
        "prompt_embeds": text,
        "pooled_projections": noise(1, 32),
        "txt_ids": torch.zeros(12, 3),
        "class_labels": whole(9, 1),
        "added_time_ids": noise(1, 3),
        "global_hidden_states": noise(1, 1, 32),
        "proj_embedding": noise(1, 32),
        "controlnet_cond": noise(1, 3, 32, 32),
        "image_rotary_emb": None,
        "timestep_cond": None,
    }
    for sample, extra in (
        (noise(1, channels, 16, 16), {}),
        (noise(1, channels, 5, 16, 16), {}),
        (noise(1, 5, channels, 16, 16), {}),
        (noise(1, channels, 9, 64, 64), {}),
        (noise(1, 16, channels), {"img_ids": torch.zeros(16, 3)}),
        (noise(1, 16, channels), {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(12, 3)}),
        (noise(1, channels, 64), {}),
        (noise(1, 2, 256), {}),
        (noise(4, channels, 16, 16), {}),
    ):
        values = common | {"sample": sample, "hidden_states": sample, "x": sample} | extra
        try:
            needed = fitting(model.forward, values)
        except KeyError:
            continue
        yield by_name(**needed)
        asked = inspect.signature(model.forward).parameters
        wanted = {k: v for k, v in values.items() if k in asked and v is not None}
        yield by_name(**needed | wanted)
