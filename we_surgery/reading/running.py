"""Running a model on example inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from we_surgery._util.copies import drawing_nothing, gpus_of


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Calls ``model`` on a tensor, on positional arguments, or on a mapping of keyword ones."""
    # A graph module's own way of being called prints its code when it fails.
    run = partial(nn.Module.__call__, model) if isinstance(model, fx.GraphModule) else model
    if isinstance(example_inputs, Mapping):
        return run(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return run(*example_inputs)
    return run(example_inputs)


def with_tensors(example_inputs: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """The example inputs with each tensor in them replaced."""
    if isinstance(example_inputs, Mapping):  # some that torch does not know for one, too
        example_inputs = dict(example_inputs)
    return tree_map_only(Tensor, replace, example_inputs)


def copied(tensor: Tensor) -> Tensor:
    """A copy for a forward to write to."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def fixed_seed(model: nn.Module) -> Iterator[None]:
    """Seeds torch on the CPU and the model's own GPUs; all generators get their state back."""
    with drawing_nothing(model):
        for generator in (
            torch.default_generator,
            *(torch.cuda.default_generators[index] for index in gpus_of(model)),
        ):
            generator.manual_seed(0)
        yield
