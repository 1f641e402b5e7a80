"""Running a model on example inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Calls ``model`` on a tensor, on positional arguments, or on a mapping of keyword ones."""
    # A graph module's own way of being called prints its code when it fails.
    run = partial(nn.Module.__call__, model) if isinstance(model, fx.GraphModule) else model
    if isinstance(example_inputs, Mapping):
        return run(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return run(*example_inputs)
    return run(example_inputs)


@contextlib.contextmanager
def fixed_seed(model: nn.Module) -> Iterator[None]:
    """Seeds the CPU and the model's own GPUs, no other, and gives them their state back."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        for generator in (
            torch.default_generator,
            *(torch.cuda.default_generators[index] for index in devices),
        ):
            generator.manual_seed(0)
        yield
