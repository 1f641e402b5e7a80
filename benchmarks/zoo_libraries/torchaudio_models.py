"""torchaudio: each of its models with few and narrow layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torchaudio import models
from zoo_models import Candidate

from zoo_libraries.filling import noise, on, whole

_FULL = torch.tensor([40, 40])


def _wav2vec2(mode: str, bias: bool) -> nn.Module:
    model: nn.Module = models.wav2vec2_model(
        extractor_mode=mode,
        extractor_conv_layer_config=[(16, 10, 5), (16, 3, 2), (16, 3, 2)],
        extractor_conv_bias=bias,
        encoder_embed_dim=32,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=16,
        encoder_pos_conv_groups=4,
        encoder_num_layers=2,
        encoder_num_heads=4,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=64,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=bias,
        encoder_layer_drop=0.0,
        aux_num_out=8,
    )
    return model


def _wavlm() -> nn.Module:
    model: nn.Module = models.wavlm_model(
        extractor_mode="group_norm",
        extractor_conv_layer_config=[(16, 10, 5), (16, 3, 2), (16, 3, 2)],
        extractor_conv_bias=False,
        encoder_embed_dim=32,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=16,
        encoder_pos_conv_groups=4,
        encoder_num_layers=2,
        encoder_num_heads=4,
        encoder_num_buckets=16,
        encoder_max_distance=32,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=64,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=False,
        encoder_layer_drop=0.0,
        aux_num_out=8,
    )
    return model


_MODELS: dict[str, tuple[Any, ...]] = {
    "Conformer": (lambda: models.Conformer(32, 4, 64, 2, 7), noise(2, 40, 32), _FULL),
    "Conformer-group_norm": (
        lambda: models.Conformer(32, 4, 64, 2, 7, use_group_norm=True, convolution_first=True),
        noise(2, 40, 32),
        _FULL,
    ),
    "ConvTasNet": (
        lambda: models.ConvTasNet(2, 16, 32, msk_num_feats=16, msk_num_hidden_feats=32,
                                  msk_num_layers=3, msk_num_stacks=2),
        noise(2, 1, 2000),
    ),
    "ConvTasNet-relu": (
        lambda: models.ConvTasNet(2, 16, 32, msk_num_feats=16, msk_num_hidden_feats=32,
                                  msk_num_layers=3, msk_num_stacks=2, msk_activate="relu"),
        noise(2, 1, 2000),
    ),
    "DeepSpeech": (lambda: models.DeepSpeech(16, 32, 10), noise(2, 1, 20, 16)),
    "Emformer": (lambda: models.Emformer(32, 4, 64, 2, 8, right_context_length=4),
                 noise(2, 44, 32), _FULL),
    "HDemucs": (lambda: models.HDemucs(["a", "b"], nfft=1024, channels=4, depth=5),
                noise(1, 2, 8192)),
    "Tacotron2": (
        lambda: models.Tacotron2(n_mels=8, n_symbol=20, symbol_embedding_dim=16,
                                 encoder_embedding_dim=16, encoder_n_convolution=2,
                                 attention_rnn_dim=16, attention_hidden_dim=16,
                                 decoder_rnn_dim=16, postnet_embedding_dim=16, prenet_dim=16),
        whole(20, 2, 10), torch.tensor([10, 10]), noise(2, 8, 12), torch.tensor([12, 12]),
    ),
    "Wav2Letter": (lambda: models.Wav2Letter(10, "mfcc", 16), noise(2, 16, 100)),
    "Wav2Letter-waveform": (lambda: models.Wav2Letter(10, "waveform", 1), noise(2, 1, 16000)),
    "Wav2Vec2-group_norm": (lambda: _wav2vec2("group_norm", False), noise(2, 4000)),
    "Wav2Vec2-layer_norm": (lambda: _wav2vec2("layer_norm", True), noise(2, 4000)),
    "WavLM": (_wavlm, noise(2, 4000)),
    "WaveRNN": (
        lambda: models.WaveRNN([2, 2], 8, 4, n_res_block=2, n_rnn=16, n_fc=16, kernel_size=3,
                               n_freq=8, n_hidden=8, n_output=8),
        noise(2, 1, 16), noise(2, 1, 8, 8),
    ),
    "SquimObjective": (
        lambda: models.squim_objective_model(16, 8, 16, 2, 16, 4),
        noise(2, 3000),
    ),
}  # fmt: skip


def names() -> list[str]:
    """All that are listed here."""
    return list(_MODELS)


def build(name: str) -> nn.Module:
    """The model."""
    model: nn.Module = _MODELS[name][0]()
    return model


def candidates(name: str, model: nn.Module) -> Iterator[Candidate]:
    """What it is listed with."""
    yield on(*_MODELS[name][1:])
