"""A weight that the forward writes to is left alone: what is written into a result is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import we_surgery as ws
from we_surgery.excitations import Stages


class Masked(nn.Conv2d):
    """PixelCNN's."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)
        mask = torch.ones(3, 3)
        mask[1, 1:] = mask[2] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.get_buffer("mask")
        return super().forward(x)


class MaxNorm(nn.Conv2d):
    """EEGNet's."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1)
        return super().forward(x)


class ClampedAfterwards(nn.Linear):
    def __init__(self) -> None:
        super().__init__(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        with torch.no_grad():
            self.weight[0].clamp_(-1, 1)
        return out


class Plain(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 4, 3)


class ByAnotherName(Plain):
    """Max-norm as it is often written."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.data
        weight.copy_(torch.renorm(weight, p=2, dim=0, maxnorm=1))
        return super().forward(x)


class ThroughAView(Plain):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.view(-1)[0] = 0
        return super().forward(x)


class Out(Plain):
    def forward(self, x: Tensor) -> Tensor:
        torch.mul(self.weight.data, 0.5, out=self.weight.data)
        return super().forward(x)


class Initialized(Plain):
    def forward(self, x: Tensor) -> Tensor:
        nn.init.zeros_(self.weight[0])
        return super().forward(x)


class ByAFunction(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        clamp(self.weight)
        return super().forward(x)


def clamp(weight: Tensor) -> None:
    weight.data.clamp_(-0.1, 0.1)


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)


class Parent(Holds):
    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight.data.mul_(0.5)
        out: Tensor = self.conv(x)
        return out


class ScalesInPlace(Holds):
    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight.data *= 0.5
        out: Tensor = self.conv(x)
        return out


class Assigns(Holds):
    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight.data = self.conv.weight.data * 0.5
        out: Tensor = self.conv(x)
        return out


class NamesIt(Holds):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight.data
        weight *= 0.5
        weight[0] = 0
        out: Tensor = self.conv(x)
        return out


class InAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        self.convs[0].weight.data[0] = 0
        out: Tensor = self.convs[0](x)
        return out


class ParentByAFunction(Holds):
    def forward(self, x: Tensor) -> Tensor:
        clamp(self.conv.weight)
        out: Tensor = self.conv(x)
        return out


class ReadsOnly(nn.Conv2d):
    """It masks a copy, and writes to a tensor that is none of its weight's."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        masked = self.weight.clone()
        masked[:, :, 2] = 0
        masked.mul_(self.weight)
        return self._conv_forward(x, masked, self.bias).relu_()


LAYERS = [
    *(Masked, MaxNorm, ClampedAfterwards),
    *(ByAnotherName, ThroughAView, Out, Initialized),
]


def _reason(plan: ws.Plan) -> str:
    (row,) = plan.decisions
    assert not row.excitation
    return row.reason


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_writes_to_its_weight_is_left_alone(layer: type[nn.Module]) -> None:
    model, x = nn.Sequential(layer()), torch.randn(2, 3, 5, 5)
    assert "written to in its layer's own forward" in _reason(ws.plan(model, "we"))
    assert "written to" in _reason(ws.plan(model, "we", example_inputs=x))


@pytest.mark.parametrize("model", [nn.Sequential(ByAFunction()), ParentByAFunction()])
def test_other_writes_are_seen_where_the_forward_is_recorded(model: nn.Module) -> None:
    x = torch.randn(2, 3, 5, 5)
    assert "written to in the forward pass, by" in _reason(ws.plan(model, "we", example_inputs=x))


@pytest.mark.parametrize("kind", [Parent, ScalesInPlace, Assigns, NamesIt, InAList])
def test_a_write_by_a_parent_is_seen_in_its_source(kind: type[nn.Module]) -> None:
    assert "written to in the forward pass of" in _reason(ws.plan(kind(), "we"))


def test_what_a_weight_of_a_written_model_is_stays_equal_in_every_form() -> None:
    model, x = nn.Sequential(Masked(), nn.Conv2d(4, 2, 1)), torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        converted = ws.convert(model, "lwe").eval()
        out = converted(x)
        stripped = ws.strip(converted)
        assert torch.equal(stripped(x), out)
    folded = ws.strip_state_dict(converted.state_dict())
    assert all(torch.equal(folded[k], v) for k, v in stripped.state_dict().items())


@pytest.mark.parametrize("inputs", [None, torch.randn(2, 3, 5, 5)])
def test_a_layer_that_writes_elsewhere_is_excited(inputs: Tensor | None) -> None:
    plan = ws.plan(nn.Sequential(ReadsOnly()), "lwe", example_inputs=inputs)
    assert len(plan.excited) == 1


def test_a_write_into_an_excited_weight_fails_the_proof() -> None:
    model, x = ParentByAFunction(), torch.randn(2, 3, 5, 5)
    (row,) = ws.plan(model, "lwe").decisions
    blind = ws.plan(nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3)}), "lwe")
    assert row.layer == blind.excited[0].layer
    with pytest.raises(ws.SurgeryError, match="writes into the weight"):
        ws.convert(model, plan=blind, example_inputs=x)


class Distilled(nn.Module):
    """A student, a teacher that gets no gradient, and a part under a checkpoint, which does."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher, self.checkpointed = (nn.Conv2d(3, 3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        x = x.requires_grad_() if self.training else x
        shown = checkpoint(self.checkpointed, x, use_reentrant=True)
        return (self.student(x) - target) * shown


def test_a_teacher_that_gets_no_gradient_is_left_alone() -> None:
    plan = ws.plan(Distilled(), "lwe", example_inputs=torch.randn(1, 3, 6, 6))
    excited: dict[str, Stages] = {row.module: row.excitation for row in plan.decisions}
    assert [name for name, stages in excited.items() if stages] == ["student", "checkpointed"]
    assert "gets no gradient" in plan.decisions[1].reason


def test_a_rule_excites_a_teacher_all_the_same() -> None:
    rules = [ws.Rule("teacher", "lwe")]
    plan = ws.plan(Distilled(), "lwe", rules=rules, example_inputs=torch.randn(1, 3, 6, 6))
    assert len(plan.excited) == 3
