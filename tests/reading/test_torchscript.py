"""TorchScript within a model is left alone with a reason; a whole model of it is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import we_surgery as ws


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8))


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop it
        return torch.jit.script(module)


def traced(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module.eval(), torch.randn(2, 8, 6, 6))


IMAGES = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("inputs", [None, IMAGES], ids=["symbolic", "recorded"])
@pytest.mark.parametrize("compiled", [scripted, traced])
def test_only_the_rest_of_a_partly_scripted_model_is_converted(
    compiled: Callable[[nn.Module], nn.Module], inputs: Tensor | None
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), compiled(block()))
    plan = ws.plan(model, "lwe", example_inputs=inputs)
    first, inner = plan.decisions
    assert (first.layer, first.stages) == ("0", ("standardize", "lwe"))
    assert (inner.layer, inner.kind, inner.stages) == ("2.0", "conv2d", ())
    assert "TorchScript" in inner.reason

    keys = list(model.state_dict())
    converted = ws.convert(model, plan=plan, example_inputs=inputs)
    stripped = ws.strip(converted, example_inputs=IMAGES)
    assert list(stripped.state_dict()) == keys
    assert isinstance(stripped[2], torch.jit.ScriptModule)


def test_a_scripted_model_has_a_plan_that_says_why_and_is_not_converted() -> None:
    model = scripted(block())
    (row,) = ws.plan(model, "lwe").decisions
    assert "TorchScript" in row.reason
    with pytest.raises(ws.InputError, match="TorchScript"):
        ws.convert(model, "lwe")


def test_lazy_layers_must_have_run_before_a_conversion_with_inputs() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.BatchNorm2d(8))
    with pytest.raises(ws.InputError, match=r"'0' is lazy.*\n.*forward"):
        ws.convert(model, "lwe", example_inputs=IMAGES)
    model(IMAGES)
    assert ws.plan(model, "lwe", example_inputs=IMAGES).excited
