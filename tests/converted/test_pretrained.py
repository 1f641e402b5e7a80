"""Pretrained models that compute after their conversion what they computed before."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, fx, nn

import we_surgery as ws
from tests.toys import EVERYTHING, EXCITING_MODES, ConvNet
from we_surgery.cli.convert import convert_command
from we_surgery.converted.layer import excited_layers
from we_surgery.converted.proof import largest_differences, run_in_eval
from we_surgery.excitations import Composition


def pretrained() -> nn.Module:
    """A network with statistics, scales and means of its own."""
    torch.manual_seed(0)
    model = ConvNet().train()
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5).add_(0.05)
    return model.eval()


def difference(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    return largest_differences(run_in_eval(model, x), run_in_eval(other, x))[1]


@pytest.mark.parametrize("standardize", ["auto", "on", "off"])
@pytest.mark.parametrize("mode", EXCITING_MODES)
def test_the_outputs_stay_what_they_were(mode: str, standardize: str) -> None:
    model, x = pretrained(), torch.randn(2, 3, 8, 8)
    config = {"mode": mode, "standardize": standardize}
    converted = ws.convert(model, config=config, init="preserve")
    assert difference(model, converted, x) <= 1e-5
    assert difference(model, ws.convert(model, config=config), x) > 1e-2
    assert difference(model, ws.strip(converted, example_inputs=x), x) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", EXCITING_MODES)
def test_a_model_of_half_precision_stays_within_its_rounding(mode: str, dtype: torch.dtype) -> None:
    model, x = pretrained().to(dtype), torch.randn(2, 3, 8, 8, dtype=dtype)
    rounding = torch.finfo(dtype).eps
    assert difference(model, ws.convert(model, mode, init="preserve"), x) <= 4 * rounding
    assert difference(model, ws.convert(model, mode), x) > 16 * rounding


def test_every_parameter_has_had_a_gradient_after_three_steps() -> None:
    model = ws.convert(pretrained(), config=EVERYTHING, init="preserve").train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    waiting = {name for name, _ in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        waiting -= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert not waiting


def test_tied_weights_start_as_what_they_were() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    converted = ws.convert(model, "lwe+mwe", init="preserve")
    assert converted[0].raw_weight is converted[2].raw_weight
    assert difference(model, converted, torch.randn(3, 6)) <= 1e-5


def test_in_place_the_parameters_stay_the_same_objects() -> None:
    model = pretrained()
    before = {id(parameter) for parameter in model.parameters()}
    weight = model.head.weight.detach().clone()
    ws.convert(model, "mwe", init="preserve", inplace=True)
    assert before <= {id(parameter) for parameter in model.parameters()}
    assert not torch.equal(model.head.raw_weight, weight)
    torch.testing.assert_close(model.head.weight, weight)


def test_a_graph_module_stays_what_it_was() -> None:
    model, x = fx.symbolic_trace(pretrained()), torch.randn(2, 3, 8, 8)
    assert difference(model, ws.convert(model, "lwe+mwe", init="preserve"), x) <= 1e-5


def test_a_saved_start_loads_again(tmp_path: Path) -> None:
    model, x = pretrained(), torch.randn(2, 3, 8, 8)
    converted = ws.convert(model, config=EVERYTHING, init="preserve")
    stripped = ws.strip_state_dict(converted.state_dict())
    assert list(stripped) == list(model.state_dict())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(stripped[key], value, rtol=1e-5, atol=1e-6)
    torch.save(converted, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert difference(converted, loaded, x) == 0


def test_on_the_meta_device_the_same_tensors_are_made() -> None:
    config = {"config": EVERYTHING, "init": "preserve"}
    converted = ws.convert(pretrained().to("meta"), **config)
    shapes = {key: value.shape for key, value in converted.state_dict().items()}
    real = ws.convert(pretrained(), **config).state_dict()
    assert shapes == {key: value.shape for key, value in real.items()}


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(ws.InputError, match="did you mean 'preserve'"):
        ws.convert(pretrained(), init="preserved")


def test_a_start_that_is_not_what_the_weight_was_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Composition, "preserve", lambda self, weight: weight.clone())
    model = pretrained()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ws.SurgeryError, match=r"layer 'stem' would start .* away"):
        ws.convert(model, init="preserve", inplace=True)
    assert not list(excited_layers(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_command_line_offers_it_for_weights_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), path)
    runner, x = CliRunner(), torch.randn(1, 3, 6, 6)
    model = torch.load(path, weights_only=False)

    result = runner.invoke(convert_command, [str(path), "--json"], catch_exceptions=False)
    assert "--init preserve" in " ".join(json.loads(result.stdout)["notes"])
    changed = torch.load(tmp_path / "model.we.pt", weights_only=False)
    assert difference(model, changed, x) > 1e-2

    arguments = [str(path), "--json", "--force", "--init", "preserve"]
    result = runner.invoke(convert_command, arguments, catch_exceptions=False)
    assert "--init" not in " ".join(json.loads(result.stdout)["notes"])
    kept = torch.load(tmp_path / "model.we.pt", weights_only=False)
    assert difference(model, kept, x) <= 1e-5


def test_new_weights_are_not_warned_of(tmp_path: Path) -> None:
    arguments = ["torchvision:squeezenet1_1", "-o", str(tmp_path / "model.we.pt"), "--json"]
    result = CliRunner().invoke(convert_command, arguments, catch_exceptions=False)
    assert json.loads(result.stdout)["notes"] == []
