"""Convs with one weight per kernel as a shift and a 1x1 conv, exactly."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from click.testing import CliRunner
from torch import Tensor, fx, nn

import we_surgery as ws
from we_surgery.cli import strip_command
from we_surgery.transplants.shift import Shift, ShiftConv2d, shared_positions


def one_weight_a_kernel(conv: nn.Conv2d) -> nn.Conv2d:
    """The conv with all but one weight of each kernel at zero, at shared places."""
    channels, *kernel_size = conv.weight.shape[1:]
    positions = torch.randint(kernel_size[0] * kernel_size[1], (channels,))
    mask = F.one_hot(positions, kernel_size[0] * kernel_size[1]).view(1, channels, *kernel_size)
    with torch.no_grad():
        conv.weight.mul_(mask)
    return conv


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 5, "padding": 2, "bias": False},
        {"kernel_size": (3, 5), "padding": (0, 1), "stride": (2, 1)},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 3},
        {"kernel_size": 2, "padding": "valid"},
        {"kernel_size": 3, "padding": "same", "dilation": (1, 3)},
    ],
    ids=str,
)
def test_it_computes_what_the_dense_conv_computes(options: dict) -> None:
    torch.manual_seed(0)
    conv = one_weight_a_kernel(nn.Conv2d(24, 16, **options)).double()
    converted = ShiftConv2d.from_conv(conv)
    x = torch.randn(2, 24, 11, 14, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(converted(x), conv(x))
    (gradient,) = torch.autograd.grad(converted(x).square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(conv(x).square().sum(), x)[0])
    assert torch.equal(converted.dense_weight(), conv.weight)


def test_each_channel_moves_by_its_position() -> None:
    shift = Shift(2, (3, 3), (1, 1))
    shift.positions.copy_(torch.tensor([0, 5]))
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3).repeat(1, 2, 1, 1)
    assert shift(x)[0, 0].tolist() == [[0, 0, 0], [0, 1, 2], [0, 4, 5]]
    assert shift(x)[0, 1].tolist() == [[2, 3, 0], [5, 6, 0], [8, 9, 0]]
    x[0, 1, 0, 0] = torch.inf  # moved out of the picture
    assert shift(x)[0, 1].isfinite().all()


def test_positions_are_found_and_an_empty_channel_has_any() -> None:
    weight = torch.zeros(2, 3, 3, 3)
    weight[:, 0, 1, 2] = 1.0
    weight[1, 1, 2, 0] = -1.0
    positions = shared_positions(weight)
    assert positions is not None
    assert positions.tolist() == [5, 6, 0]
    weight[0, 1, 2, 1] = 1.0  # another filter's place
    assert shared_positions(weight) is None


class Small(nn.Module):
    """Convs of each sort that shift tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(3, 8, 3, padding=1)
        self.first = one_weight_a_kernel(nn.Conv2d(8, 8, 3, padding=1, bias=False))
        self.norm = nn.BatchNorm2d(8)
        self.second = one_weight_a_kernel(nn.Conv2d(8, 12, 3, padding=1, stride=2))
        self.grouped = nn.Conv2d(12, 12, 3, groups=3)
        self.mirrored = nn.Conv2d(12, 12, 3, padding=1, padding_mode="reflect")
        self.pointwise = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(self.dense(x))).relu()
        return self.pointwise(self.mirrored(self.grouped(self.second(x))))


def test_the_plan_says_which_convs_are_shifts_and_why_others_are_not() -> None:
    model = Small().eval()
    plan = ws.plan(model, "none", transplants=["shift"])
    assert {row.place: row.reason for row in plan.transplants if not row.attach} == {
        "dense": "has kernels with several weights, or at different places in its filters",
        "grouped": "has groups",
        "mirrored": "pads with 'reflect'",
    }
    converted = ws.convert(model, plan=plan)
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-6)
    removed = model.first.weight.numel() + model.second.weight.numel() - 8 * 8 - 12 * 8
    assert plan.added_parameters == plan.kept_parameters == -removed
    data = plan.to_dict()
    data["transplants"][0] |= {"place": "grouped", "attach": True}
    with pytest.raises(ws.InputError, match="shift replaces a conv"):
        ws.convert(model, plan=ws.Plan.from_dict(data))


def test_a_folded_model_deploys_as_shifts() -> None:
    model = ws.convert(Small().eval(), "none", rules=[ws.Rule("pointwise", "mwe")])
    inputs = torch.randn(2, 3, 9, 9)
    stripped, report = ws.strip_with_report(model, example_inputs=inputs, deploy="shift")
    assert (report.layers, report.deployed) == (1, 2)
    assert isinstance(stripped.first, ShiftConv2d)
    assert isinstance(stripped.second, ShiftConv2d)
    assert isinstance(stripped.dense, nn.Conv2d)
    assert report.parameters == sum(p.numel() for p in stripped.parameters())
    dense, report = ws.strip_with_report(model, example_inputs=inputs)
    assert report.deployed == 0
    assert torch.equal(dense.first.weight, stripped.first.dense_weight())
    # The authors' accounting: a word a weight, four bits a position.
    assert stripped.second.stored_words == 12 * 8 + 8 * 4 / 32


def test_what_cannot_be_a_shift_is_said_and_the_model_stays() -> None:
    model = ws.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "lwe")
    before = repr(model)
    with pytest.raises(ws.InputError, match="shift fits nowhere in the model"):
        ws.strip(model, deploy="shift", inplace=True)
    assert repr(model) == before
    assert ws.strip(model, inplace=True) is model
    with pytest.raises(ws.InputError, match="no deploy form 'shifts'; did you mean 'shift'"):
        ws.strip(model, deploy="shifts")


def test_the_command_line_deploys_shifts(tmp_path) -> None:
    path = tmp_path / "small.pt"
    block = torchvision.models.resnet.BasicBlock
    model = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=3)
    one_weight_a_kernel(model.layer1[0].conv1)
    ws.save(ws.convert(model, config={"mode": "none", "linear": "mwe"}), path)
    arguments = [str(path), "--deploy", "shift", "--input-shape", "1,3,32,32"]
    result = CliRunner().invoke(strip_command, arguments)
    assert result.exit_code == 0, result.output
    assert "1 layers replaced by their deploy form" in result.output
    assert isinstance(ws.load(tmp_path / "small.stripped.pt").layer1[0].conv1, ShiftConv2d)


@pytest.mark.parametrize("extension", ["pt", "safetensors"])
def test_files_of_shifts_load_again(tmp_path, extension) -> None:
    architecture = ws.Architecture.parse("torchvision:resnet18", {"num_classes": 3})
    vanilla = architecture.build()
    one_weight_a_kernel(vanilla.layer1[0].conv1)
    one_weight_a_kernel(vanilla.layer2[0].conv1)
    model = ws.convert(vanilla, config={"mode": "none", "linear": "mwe"}).eval()
    inputs = torch.randn(1, 3, 32, 32)
    stripped = ws.strip(model, example_inputs=inputs, deploy="shift")
    path = tmp_path / f"deploy.{extension}"
    ws.save(stripped, path, architecture=architecture)
    assert torch.equal(ws.load(path).eval()(inputs), stripped(inputs))
    whole = tmp_path / "whole.pt"
    ws.save(copy.deepcopy(stripped), whole)
    assert torch.equal(ws.load(whole)(inputs), stripped(inputs))


def test_it_can_be_traced_and_compiled() -> None:
    conv = one_weight_a_kernel(nn.Conv2d(8, 8, 3, padding=1, stride=2))
    module = ShiftConv2d.from_conv(conv).eval()
    x = torch.randn(1, 8, 7, 7)
    torch.testing.assert_close(fx.symbolic_trace(module)(x), conv(x))
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), conv(x))


def test_a_failing_proof_puts_the_convs_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ws.SurgeryError("they differ", "nothing")

    model = ws.convert(Small().eval(), "none", rules=[ws.Rule("pointwise", "mwe")])
    before = repr(model)
    monkeypatch.setattr("we_surgery.converted.strip.check_outputs", fail)
    with pytest.raises(ws.SurgeryError, match="they differ"):
        ws.strip(model, example_inputs=torch.randn(1, 3, 9, 9), deploy="shift", inplace=True)
    assert repr(model) == before


def hardened(shared: bool) -> nn.Module:
    """A small ResNet with hardened shift attention in the 3x3 convs of its blocks."""
    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock
    model = ws.convert(
        torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=3),
        "none",
        rules=[ws.Rule("re:layer.*conv[12]", f"shift_attention(shared={str(shared).lower()})")],
    )
    ws.harden(model)
    return model.eval()


def test_hardened_shared_shift_attention_deploys_as_shifts() -> None:
    model = hardened(shared=True)
    words = ws.shift_attention_words(model)
    inputs = torch.randn(2, 3, 32, 32)
    stripped, report = ws.strip_with_report(model, example_inputs=inputs, deploy="shift")
    assert report.deployed == report.layers == 8
    shifts = [m for m in stripped.modules() if isinstance(m, ShiftConv2d)]
    others = sum(p.numel() for p in stripped.parameters()) - sum(
        m.pointwise.weight.numel() for m in shifts
    )
    assert sum(m.stored_words for m in shifts) + others == words
    dense = ws.strip(model, example_inputs=inputs)
    assert torch.equal(dense.layer2[0].conv1.weight, stripped.layer2[0].conv1.dense_weight())


def test_positions_of_each_filter_own_are_no_shift() -> None:
    with pytest.raises(ws.InputError, match="several weights, or at different places"):
        ws.strip(hardened(shared=False), deploy="shift")
