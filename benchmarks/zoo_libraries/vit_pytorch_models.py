"""vit-pytorch: the vision transformer of each of its files."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import vit_pytorch
from torch import nn
from zoo_models import Candidate

from zoo_libraries.filling import fill, noise, on

_VALUES: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 16,
    "image_patch_size": 16,
    "frame_patch_size": 2,
    "freq_patch_size": 16,
    "frames": 4,
    "max_frames": 4,
    "num_classes": 10,
    "dim": 32,
    "depth": 2,
    "spatial_depth": 2,
    "temporal_depth": 2,
    "cls_depth": 1,
    "heads": 2,
    "dim_head": 16,
    "mlp_dim": 64,
    "num_residual_streams": 2,
    "max_tokens_per_depth": (8, 4),
    "patch_merge_layer": 1,
    "patch_merge_num_tokens": 4,
    "seq_len": 64,
    "ndim": 2,
    "input_shape": (64, 64),
    "window_size": 2,
    "pre_loop_depth": 1,
    "num_looped_blocks": 1,
    "post_loop_depth": 1,
    "loop_depth": 2,
}
# What the numbers of a staged network are.
_STAGED: dict[str, dict[str, Any]] = {
    "crossformer": {
        "dim": (16, 32, 32, 64),
        "depth": (1, 1, 1, 1),
        "global_window_size": (8, 4, 2, 1),
        "local_window_size": 7,
    },
    "regionvit": {"dim": (16, 32, 32, 64), "depth": (1, 1, 1, 1), "window_size": 7},
    "scalable_vit": {
        "dim": 16,
        "heads": (1, 2, 2, 4),
        "depth": (1, 1, 1, 1),
        "reduction_factor": (8, 4, 2, 1),
        "window_size": (64, 32, None, None),
    },
    "sep_vit": {"dim": 16, "heads": (1, 2, 2, 4), "depth": (1, 1, 1, 1), "window_size": 7},
    "max_vit": {"dim_conv_stem": 16, "dim": 16, "depth": (1, 1, 1, 1), "window_size": 7},
    "max_vit_with_registers": {"dim_conv_stem": 16, "dim": 16, "depth": (1, 1), "window_size": 7},
    "levit": {"image_size": 64, "dim": (16, 32, 64), "depth": 1, "heads": 2, "mlp_mult": 2},
    "pit": {"depth": (1, 1), "dim": 16},
    "nest": {"patch_size": 4, "num_hierarchies": 3, "block_repeats": (1, 1, 1), "dim": 16},
    "local_vit": {"patch_size": 4},
    "mobile_vit": {
        "image_size": (64, 64),
        "dims": [16, 24, 32],
        "channels": [8, 8, 16, 16, 16, 16, 24, 24, 32, 32, 64],
    },
    "t2t": {"t2t_layers": ((7, 4), (3, 2)), "mlp_dim": 64},
    "cvt": {"s1_emb_dim": 16, "s2_emb_dim": 32, "s3_emb_dim": 32, "s3_depth": 1},
    "twins_svt": {"s1_emb_dim": 16, "s2_emb_dim": 16, "s3_emb_dim": 32, "s4_emb_dim": 32},
    "na_vit_nested_tensor": {"token_dropout_prob": 0.1},
    "na_vit_nested_tensor_3d": {"token_dropout_prob": 0.1},
    "look_vit": {"patch_size": 16, "highres_patch_size": 8},
    "cct": {"img_size": 64, "embedding_dim": 32, "num_layers": 2, "num_heads": 2, "mlp_ratio": 2.0},
    "cross_vit": {"sm_dim": 16, "lg_dim": 32, "sm_patch_size": 8, "lg_patch_size": 16},
    "cct_3d": {
        "img_size": 32,
        "num_frames": 4,
        "embedding_dim": 32,
        "num_layers": 2,
        "num_heads": 2,
    },
}


def names() -> list[str]:
    """``vit/ViT``: a file, and the class in it."""
    found = []
    for file in pkgutil.iter_modules(vit_pytorch.__path__):
        try:
            module = import_module(f"vit_pytorch.{file.name}")
        except ImportError:  # it wants a library that is not here
            continue
        for name, value in vars(module).items():
            is_own = inspect.isclass(value) and value.__module__ == module.__name__
            if is_own and issubclass(value, nn.Module) and _is_network(name):
                found.append(f"{file.name}/{name}")
    return found


def _is_network(name: str) -> bool:
    return ("ViT" in name or name in ("CvT", "CCT", "NesT", "CaiT", "PiT", "TwinsSVT")) and (
        not name.startswith("Distillable")
        and not name.endswith(("Wrapper", "Block", "Trainer", "Attention"))
    )


def build(name: str) -> nn.Module:
    """The class with small numbers."""
    file, _, kind = name.partition("/")
    maker = getattr(import_module(f"vit_pytorch.{file}"), kind)
    model: nn.Module = fill(maker, _VALUES, **_STAGED.get(file, {}))
    return model


def candidates(name: str, model: nn.Module) -> Iterator[Candidate]:
    """A picture, a clip or a series, or a list of pictures."""
    first = next(iter(inspect.signature(model.forward).parameters))
    if first in ("batched_images", "images") and "na_vit" in name:
        yield on([noise(3, 64, 64), noise(3, 32, 64)])
    elif first == "volumes":
        yield on([noise(3, 4, 64, 64), noise(3, 2, 32, 64)])
    elif first == "series":
        yield on(noise(2, 3, 64))
    else:
        yield from (on(noise(2, 3, size, size)) for size in (64, 224, 256))
        yield from (on(noise(2, 3, 4, size, size)) for size in (64, 32))
        yield on(noise(2, 4, 3, 64, 64))
