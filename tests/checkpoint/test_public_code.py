"""Checkpoints in the layout of the WE paper's public code fold to what that code computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import we_surgery as ws
from we_surgery.checkpoint import read, strip_state_dict_with_report
from we_surgery.checkpoint.unwrap import VERSIONS
from we_surgery.errors import InputError


class PublicLWE(nn.Conv2d):
    """An LWE conv with the formula, the parameter names and the shapes of the public code."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        hidden = max(self.in_channels // 16, 1)
        channels = self.in_channels // self.groups
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        centred = self.weight - mean
        standard = centred.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5
        weight = centred / standard
        pooled = F.avg_pool2d(weight, weight.shape[2])
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(pooled))))
        return self._conv_forward(x, weight * gate, self.bias)


class Net(nn.Module):
    def __init__(self, conv: type[nn.Conv2d]) -> None:
        super().__init__()
        self.conv1 = conv(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.grouped = conv(32, 8, 1, groups=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.grouped(x))).mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("parallel", [False, True])
def test_it_folds_to_what_the_code_computes(dtype, parallel, tmp_path):
    model = Net(PublicLWE).to(dtype)
    saved = nn.DataParallel(model) if parallel else model
    torch.save({"epoch": 3, "state_dict": saved.state_dict()}, tmp_path / "checkpoint.pth.tar")
    state, report = strip_state_dict_with_report(torch.load(tmp_path / "checkpoint.pth.tar"))
    assert report.layers == 2
    assert "public code, standardized: conv1, grouped" in report.notes[-1]
    vanilla = Net(nn.Conv2d).to(dtype)
    assert list(state) == list(vanilla.state_dict())
    assert getattr(state, VERSIONS) == getattr(vanilla.state_dict(), VERSIONS)
    vanilla.load_state_dict(state)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    torch.testing.assert_close(vanilla.eval()(x), model.eval()(x))
    assert read(tmp_path / "checkpoint.pth.tar").notes[-1] == report.notes[-1]


def test_the_gates_of_the_readers_model_are_left_alone():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.fc1 = nn.Conv2d(4, 1, 1)
            self.fc2 = nn.Conv2d(1, 4, 1)

    model = nn.Sequential(Gated())
    with pytest.warns(ws.NothingToStripWarning):
        assert list(ws.strip_state_dict(model.state_dict())) == list(model.state_dict())


def test_a_gate_of_further_layers_is_another_method():
    model = Net(PublicLWE)
    model.conv1.fc1.fc1 = nn.Conv2d(3, 1, 1)
    state, report = strip_state_dict_with_report(model.state_dict())
    assert report.layers == 1
    assert "conv1.fc1.fc1.weight" in state


def test_a_kernel_that_is_not_square_is_refused():
    model = nn.Sequential(PublicLWE(16, 4, (1, 7)))
    with pytest.raises(InputError, match=r"kernel of \(1, 7\)"):
        ws.strip_state_dict(model.state_dict())
