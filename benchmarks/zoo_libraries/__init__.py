"""Models of other libraries for the zoo: a file each, with the same three functions.

``names()`` lists the models, ``build(name)`` makes one with few and narrow layers, random weights
and nothing downloaded, and ``candidates(name, model)`` yields inputs to try, as ``zoo_models`` does
for torchvision and timm. Which of the names are in the zoo is pinned in
``zoo_third_party.txt``.
"""

from __future__ import annotations

import gc
from functools import cache
from importlib import import_module
from typing import Any

LIBRARIES: dict[str, str] = {
    "transformers": "transformers",
    "smp": "segmentation_models_pytorch",
    "monai": "monai",
    "ultralytics": "ultralytics",
    "diffusers": "diffusers",
    "open_clip": "open_clip",
    "vit_pytorch": "vit_pytorch",
    "pytorchcv": "pytorchcv",
    "torch_geometric": "torch_geometric",
    "torchaudio": "torchaudio",
    "kornia": "kornia",
    "peft": "peft",
}
"""The package that each library is imported as, by the name its models begin with."""


@cache
def library(source: str) -> Any:
    """The module with the functions for a library; importing it imports the library."""
    module = import_module(f"zoo_libraries.{source}_models")
    gc.collect()
    gc.freeze()  # what it is made of need not be looked through after each model
    return module
