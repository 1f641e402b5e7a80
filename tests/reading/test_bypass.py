"""A converted weight that some operation reads raw is an error before training starts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import we_surgery as ws
from we_surgery.converted.bypass import prove_excited
from we_surgery.converted.layer import ExcitedLayer


class ByName(nn.Module):
    """Asks for the raw tensor by name once it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self.linear, "raw_weight", self.linear.weight))


class ByDictionary(ByName):
    """Walks the parameters instead of reading an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, next(self.linear.parameters()))


class Remembered(ByName):
    """Keeps the Parameter in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.linear.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kept[0].t()


class InTrainModeAlone(ByName):
    """Bypasses the excitation in one mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, next(self.linear.parameters())) if self.training else self.linear(x)


class ThroughAView(ByName):
    """Reads the raw weight through views and a cast."""

    def forward(self, x: Tensor) -> Tensor:
        raw = next(self.linear.parameters())
        return torch.mm(x, raw.detach().view(4, 4).transpose(0, 1).contiguous())


@pytest.mark.parametrize(
    "bypass", [ByName, ByDictionary, Remembered, InTrainModeAlone, ThroughAView]
)
def test_a_planted_bypass_is_refused_and_leaves_the_model_as_it_was(
    bypass: type[nn.Module],
) -> None:
    model = bypass()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ws.SurgeryError, match=r"reads 'linear\.raw_weight' itself"):
        ws.convert(model, example_inputs=torch.randn(2, 4), inplace=True)
    assert not isinstance(model.get_submodule("linear"), ExcitedLayer)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_good_conversions_raise_no_alarm_and_count_their_weights() -> None:
    x = torch.randn(1, 3, 32, 32)

    def swin() -> nn.Module:
        sizes = {"embed_dim": 12, "depths": [2, 2], "num_heads": [1, 2], "window_size": [4, 4]}
        return torchvision.models.SwinTransformer(patch_size=[4, 4], **sizes)

    for build in (torchvision.models.resnet18, swin):
        plan = ws.plan(build(), example_inputs=x)
        converted = ws.convert(build(), plan=plan, example_inputs=x)
        assert prove_excited(converted, x) == len(plan.excited)


class ReadTwice(nn.Module):
    """Reads a child's weight twice in a forward pass; what the second read is, subclasses say."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(F.linear(x, self.linear.weight))

    def again(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight)


class FirstWithoutGradients(ReadTwice):
    """Runs its layer without gradients, and then with them, as recurrent-depth models do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.linear(x)
        return self.again(x)


class CallsTheExcitation(ReadTwice):
    """Computes the weight by itself."""

    def again(self, x: Tensor) -> Tensor:
        if isinstance(self.linear, ExcitedLayer):
            return F.linear(x, self.linear.excitation(self.linear.raw_weight))
        return super().again(x)


class SwitchesModes(ReadTwice):
    """Switches its layer's mode between two reads."""

    def again(self, x: Tensor) -> Tensor:
        return super().again(F.linear(x, self.linear.train(self.training).weight))


@pytest.mark.parametrize(
    "module", [ReadTwice, FirstWithoutGradients, CallsTheExcitation, SwitchesModes]
)
def test_a_weight_may_be_excited_more_than_once_in_a_forward_pass(module: type[nn.Module]) -> None:
    x = torch.randn(2, 4)
    converted = ws.convert(module(), "lwe+mwe", example_inputs=x)
    assert isinstance(converted.linear, ExcitedLayer)
    assert prove_excited(converted, x, ran_in_both=True) == 1
