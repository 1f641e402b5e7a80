"""A recording costs what the model's own operations cost, and leaves nothing behind."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import we_surgery as ws
from we_surgery.reading.fakes import Fakes
from we_surgery.reading.graph import EXCITATION
from we_surgery.reading.recorded import record, record_both_modes
from we_surgery.reading.weights import weight_reads


def test_an_excitation_is_one_operation_and_its_result_is_still_computed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    converted = ws.convert(model, "lwe+mwe")
    recording = record(converted, torch.randn(2, 3, 8, 8), fakes=Fakes())
    (node,) = (node for node in recording.graph.nodes if node.meta.get(EXCITATION))
    assert node.op == "call_function"
    assert recording.calls["0.excitation"] == 1
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(model.eval()(x), converted.eval()(x))


def test_both_recordings_share_their_fake_tensors() -> None:
    model, x, fakes = nn.Linear(3, 2), torch.randn(4, 3), Fakes()
    assert fakes(model.weight) is fakes(model.weight)
    for training in (False, True):
        record(model, x, training=training, fakes=fakes)
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was_also_after_a_failure(enabled: bool) -> None:
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        record(nn.Linear(3, 2), torch.randn(1, 3), fakes=Fakes())
        assert gc.isenabled() == enabled
        with pytest.raises(RuntimeError):
            record(nn.Linear(3, 2), torch.randn(1, 4), fakes=Fakes())
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


class Offset(nn.Module):
    """A conv and a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.offset = torch.randn(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.offset


def test_a_tensor_that_is_no_buffer_takes_part() -> None:
    model, x = Offset(), torch.randn(1, 3, 6, 6)
    recordings, notes = record_both_modes(model, x)
    assert [recording.training for recording in recordings] == [False, True]
    assert not notes


class Attention(nn.Module):
    """A projection before torch's fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


def test_a_proof_takes_the_path_that_the_real_device_takes() -> None:
    model, x = Attention(), torch.randn(2, 4, 5, 8)
    real = record(model, x)
    faked = record_both_modes(model, x)[0][0]
    fused = [
        {str(n.target) for n in recording.graph.nodes if "attention" in str(n.target)}
        for recording in (real, faked)
    ]
    assert fused[0] == fused[1] != set()


@pytest.mark.parametrize("model", [Attention(), Offset(), nn.Sequential(nn.Conv2d(2, 4, 3))])
def test_the_same_weights_are_read_on_stand_ins_and_on_real_tensors(model: nn.Module) -> None:
    x = torch.randn(2, 2 if isinstance(model, nn.Sequential) else 3, 6, 8)
    found = [
        Counter(read.parameter for read in weight_reads(recording[0]))
        for recording in (record_both_modes(model, x)[0], [record(model, x)])
    ]
    assert found[0] == found[1] != {}


class ShiftIntoNewMemory(nn.Module):
    """A temporal shift that asks the input for its device to make memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        clips = x.view(-1, 4, *x.shape[1:])
        shifted = torch.zeros(clips.shape, device=x.device, dtype=x.dtype)
        shifted[:, :-1, :2] = clips[:, 1:, :2]
        shifted[:, 1:, 2:4] = clips[:, :-1, 2:4]
        shifted[:, :, 4:] = clips[:, :, 4:]
        return self.conv(shifted.view(x.shape))


def test_memory_that_is_made_on_the_meta_device_is_made_anew_for_a_replay() -> None:
    (row,) = ws.plan(ShiftIntoNewMemory(), "we", example_inputs=torch.randn(4, 8, 6, 6)).decisions
    assert "shift-fed" in row.reason


class Alias(nn.Conv2d):
    """A conv that computes with another tensor over its weight's memory."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)
        self.alias = self.weight.data

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.alias, self.bias)


def test_a_layer_that_runs_without_its_weight_fails_the_proof() -> None:
    model, x = nn.Sequential(Alias(), nn.BatchNorm2d(4)), torch.randn(2, 3, 6, 6)
    assert not ws.plan(model, example_inputs=x).excited
    plan = ws.plan(model)
    assert plan.excited  # its dataflow is inside a leaf
    with pytest.raises(ws.SurgeryError, match="module '0' runs, but nothing reads its 'weight'"):
        ws.convert(model, plan=plan, example_inputs=x, inplace=True)
    assert type(model[0]) is Alias


class Unconvertible(nn.Module):
    """Trains only as long as its conv has an ordinary weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and "weight" not in self.conv._parameters:
            raise RuntimeError("no weight")
        return self.conv(x)


def test_a_mode_that_only_the_vanilla_model_runs_in_fails_the_proof() -> None:
    with pytest.raises(ws.SurgeryError, match=r"does not run in train mode: .*no weight"):
        ws.convert(Unconvertible(), example_inputs=torch.randn(1, 3, 6, 6))


class Recurrent(nn.Module):
    """Recurrent layers before a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.cell = nn.GRUCell(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.lstm(x)[0][:, -1]))


def test_recurrent_layers_are_left_alone() -> None:
    x = torch.randn(2, 5, 4)
    plan = ws.plan(Recurrent(), "mwe", example_inputs=x)
    assert [decision.layer for decision in plan.excited] == ["head"]
    left = [decision for decision in plan.decisions if not decision.excitation]
    assert all("recurrent layer" in decision.reason for decision in left)
    converted = ws.convert(Recurrent(), plan=plan, example_inputs=x)
    ws.strip(converted, example_inputs=x)


class FrozenNorm(nn.Module):
    """Keeps its norm in eval mode by a ``train`` that returns nothing, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def test_a_train_method_that_returns_nothing_is_recorded() -> None:
    x = torch.randn(2, 3, 6, 6)
    plan = ws.plan(FrozenNorm(), example_inputs=x)
    assert (plan.read_by, plan.read_by_reason) == ("recorded", "")
    ws.strip(ws.convert(FrozenNorm(), example_inputs=x), example_inputs=x)


class WritesItsWeight(nn.Linear):
    """Keeps its weight in bounds, after a look at the data."""

    def __init__(self, write: Callable[[nn.Parameter], None]) -> None:
        super().__init__(4, 4)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        if x.sum().item() < 0:
            x = -x
        with torch.no_grad():
            self.write(self.weight)
        x.sub_(1)
        return super().forward(x)


def clamp(weight: nn.Parameter) -> None:
    weight.clamp_(-0.1, 0.1)


def normalize(weight: nn.Parameter) -> None:
    weight.data = F.normalize(weight.data)


@pytest.mark.parametrize("write", [clamp, normalize])
def test_a_recording_on_real_tensors_leaves_weights_and_inputs_as_they_are(
    write: Callable[[nn.Parameter], None],
) -> None:
    model, x = nn.Sequential(WritesItsWeight(write)), torch.randn(2, 4)
    weight, values, inputs = model[0].weight, model[0].weight.detach().clone(), x.clone()
    assert ws.plan(model, "mwe", example_inputs=x).read_by == "recorded"
    assert model[0].weight is weight
    assert torch.equal(weight, values)
    assert torch.equal(x, inputs)


class Nested(nn.Module):
    """A layer over sequences of several lengths in one nested tensor, which has no one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.project = nn.Linear(4, 4)

    def forward(self, long: Tensor, short: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor([long, short])
        mixed = self.project(self.norm(nested))
        return torch.stack([sequence.mean(0) for sequence in mixed.unbind()])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_forward_on_nested_tensors_is_recorded() -> None:
    x = torch.randn(5, 4), torch.randn(3, 4)
    plan = ws.plan(Nested(), "mwe", example_inputs=x)
    assert (plan.read_by, plan.read_by_reason) == ("recorded", "")
    converted = ws.convert(Nested(), "mwe", example_inputs=x)
    ws.strip(converted, example_inputs=x)
