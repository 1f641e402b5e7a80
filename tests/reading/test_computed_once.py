"""That each excited weight is computed once a forward is proven before training starts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

import we_surgery as ws
from we_surgery.converted.bypass import prove_excited
from we_surgery.converted.layer import ExcitedLayer
from we_surgery.excitations import MWE
from we_surgery.reading.recorded_facts import record_both_modes


class ReadTwice(nn.Module):
    """Reads a child's weight twice in a forward; what lies between is for subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight())
        self.between()
        return F.linear(x, self.weight())

    def weight(self) -> Tensor:
        return self.linear.weight

    def between(self) -> None:
        """Nothing: the two reads share one computation."""


class AsksItsDtype(ReadTwice):
    """A read that nobody keeps: in training the second one computes again, the first time."""

    def weight(self) -> Tensor:
        return self.linear.weight.to(self.linear.weight.dtype) * 1.0


class InHalfPrecision(ReadTwice):
    """What is kept for the backward pass is a cast copy of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class WritesBetween(ReadTwice):
    """The second read is of another weight."""

    def between(self) -> None:
        with torch.no_grad():
            getattr(self.linear, "raw_weight", self.linear.weight).add_(1)


class CallsTheExcitation(ReadTwice):
    """Computes the weight by itself."""

    def weight(self) -> Tensor:
        if isinstance(self.linear, ExcitedLayer):
            return self.linear.excitation(self.linear.raw_weight)  # type: ignore[no-any-return]
        return self.linear.weight


class SwitchesModes(ReadTwice):
    """Switching a layer's mode forgets what it kept."""

    def between(self) -> None:
        self.linear.train(self.training)


@pytest.mark.parametrize("module", [ReadTwice, AsksItsDtype, InHalfPrecision, WritesBetween])
def test_reads_that_share_or_may_not_share_are_no_alarm(module: type[nn.Module]) -> None:
    x = torch.randn(2, 4)
    model = ws.convert(module(), "lwe+mwe")  # inputs would show that one writes to its weight
    assert prove_excited(model, x, ran_in_both=True) == 1


@pytest.mark.parametrize("module", [CallsTheExcitation, SwitchesModes])
def test_a_weight_that_is_computed_twice_is_refused_and_leaves_the_model_as_it_was(
    module: type[nn.Module],
) -> None:
    model = module()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ws.SurgeryError, match=r"'linear\.excitation' is computed 2 times"):
        ws.convert(model, example_inputs=torch.randn(2, 4), inplace=True)
    assert not isinstance(model.get_submodule("linear"), ExcitedLayer)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_on_real_tensors_too() -> None:
    class Decides(CallsTheExcitation):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.abs().sum().item() > 0 else x

    with pytest.raises(ws.SurgeryError, match="computed 2 times"):
        ws.convert(Decides(), example_inputs=torch.randn(2, 4))


def test_the_attention_of_a_transformer_computes_its_weights_once() -> None:
    x = torch.randn(1, 3, 32, 32)
    model = torchvision.models.vit_b_16(image_size=32)
    model.encoder.layers = model.encoder.layers[:2]
    model = ws.convert(model, "we", example_inputs=x)
    # It asks its projection for a dtype first: the first training step computes that one twice.
    first, _ = record_both_modes(model, x)
    assert [max(r.computations.values()) for r in first] == [1, 2]
    later, _ = record_both_modes(model, x, after_a_step=True)
    assert [max(r.computations.values()) for r in later] == [1, 1]


def test_the_model_on_the_meta_device_is_counted_as_well() -> None:
    with torch.device("meta"):
        model, x = CallsTheExcitation(), torch.randn(2, 4)
    with pytest.raises(ws.SurgeryError, match="computed 2 times"):
        ws.convert(model, example_inputs=x)


def test_stages_whose_graph_serves_one_backward_pass_are_no_alarm() -> None:
    class Slow(MWE):
        """No closed form knows it."""

    x = torch.randn(2, 4)
    model = ws.convert(ReadTwice(), "mwe")
    excitation = model.linear.excitation
    slow = Slow()
    excitation.mwe = slow
    assert prove_excited(model, x) == 1
    paused = ws.convert(ReadTwice(), "mwe", start="paused", example_inputs=x)
    assert prove_excited(paused, x) == 1


def test_a_graph_shows_each_of_its_computations() -> None:
    x = torch.randn(2, 4)
    model = ws.convert(fx.symbolic_trace(ReadTwice()), "mwe", example_inputs=x)
    assert prove_excited(model, x) == 1
