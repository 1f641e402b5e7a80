"""The normalizations of a weight against torch's own, and by their formulas."""

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import we_surgery as ws
from we_surgery.excitations import SpectralNorm, WeightAlign, WeightLayout, WeightNorm

LAYERS = {
    "conv1d": lambda: nn.Conv1d(6, 8, 5),
    "conv2d": lambda: nn.Conv2d(6, 8, 3),
    "grouped": lambda: nn.Conv2d(6, 8, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "conv3d": lambda: nn.Conv3d(3, 4, (1, 3, 3)),
    "linear": lambda: nn.Linear(7, 5),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 3),
}
INPUTS = {
    "conv1d": (2, 6, 9),
    "conv3d": (2, 3, 4, 5, 5),
    "linear": (2, 7),
    "transposed": (2, 8, 4, 4),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def pair(name: str, stage: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The same layer with torch's parametrization and with ours, and an input."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    config = {"conv": stage, "depthwise": stage, "linear": stage}
    ours = ws.convert(layer, config=config)
    per_filter = 1 if name == "transposed" else 0
    if stage == "weight_norm":
        theirs = parametrizations.weight_norm(layer, dim=per_filter)
    else:
        theirs = parametrizations.spectral_norm(layer)
        norm = theirs.parametrizations.weight[0]
        norm._u.copy_(ours.excitation.spectral_norm.u)
        norm._v.copy_(ours.excitation.spectral_norm.v)
    return theirs, ours, torch.randn(INPUTS.get(name, (2, 6, 6, 6)))


@each_layer
@pytest.mark.parametrize("stage", ["weight_norm", "spectral_norm"])
def test_three_steps_of_training_give_what_torch_gives(name: str, stage: str) -> None:
    theirs, ours, x = pair(name, stage)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (theirs, ours)]
    for _ in range(3):
        outputs = []
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(model(x))
            outputs[-1].square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=2e-6, atol=2e-6)
    theirs.eval()
    ours.eval()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=1e-6)
    stripped = ws.strip(ours)
    torch.testing.assert_close(stripped.weight, theirs.weight, rtol=1e-6, atol=1e-6)
    assert torch.equal(stripped(x), ours(x))


@each_layer
def test_weight_norm_changes_nothing_at_the_conversion(name: str) -> None:
    layer = LAYERS[name]()
    model = ws.convert(layer, config=dict.fromkeys(("conv", "depthwise", "linear"), "weight_norm"))
    torch.testing.assert_close(model.weight, layer.weight, rtol=1e-6, atol=1e-7)


def test_spectral_norm_moves_in_training_only_and_not_at_strip() -> None:
    _, model, x = pair("conv2d", "spectral_norm")
    norm = model.excitation.spectral_norm
    before = norm.u.clone()
    model.eval()(x).sum().backward()
    assert torch.equal(norm.u, before)
    model.train()
    folded = ws.strip(model).weight
    assert torch.equal(norm.u, before)
    assert torch.equal(folded, model.eval().weight)
    model.train()(x)
    assert not torch.equal(norm.u, before)


def test_spectral_norm_ends_at_the_largest_singular_value() -> None:
    _, model, x = pair("linear", "spectral_norm")
    for _ in range(50):
        model(x)
    assert torch.linalg.matrix_norm(model.eval().weight, 2).item() == pytest.approx(1, abs=1e-5)


def test_weight_align_has_the_variance_of_he_initialization() -> None:
    weight = torch.randn(4, 50, 3, 3, dtype=torch.float64) * 7 + 3
    aligned = WeightAlign(4, dtype=torch.float64)(weight)
    for found, one in zip(aligned, weight, strict=True):
        scale = (one.numel() / 2 * one.var(correction=0)).sqrt()
        torch.testing.assert_close(found, (one - one.mean()) / scale, rtol=1e-5, atol=1e-8)
        assert found.var(correction=0).item() == pytest.approx(2 / 450, rel=1e-5)


@pytest.mark.parametrize("kind", [WeightNorm, SpectralNorm, WeightAlign])
def test_a_weight_of_zeros_stays_one(kind: type[ws.Excitation]) -> None:
    layout = WeightLayout((3, 4, 2, 2))
    stage = kind.for_layout(layout, device=None, dtype=None)
    weight = torch.zeros(layout.shape, requires_grad=True)
    stage.prepare(weight.detach())
    excited = stage(weight)
    excited.sum().backward()
    assert torch.equal(excited, torch.zeros(layout.shape))
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize(("stage", "added"), [("weight_norm", 26_560), ("spectral_norm", 0)])
def test_resnet50_gains_the_parameters_of_the_specification(stage: str, added: int) -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    assert ws.plan(model, config={"conv": stage, "linear": "skip"}).added_parameters == added


def test_two_normalizations_exclude_each_other_and_none_is_added_to_one() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(ws.InputError, match="exclude each other"):
        ws.plan(model, config={"conv": "standardize+weight_norm"})
    for on in ("auto", "on"):
        plan = ws.plan(model, config={"conv": "weight_norm+lwe", "standardize": on})
        assert plan.decisions[0].stages == ("weight_norm", "lwe")


def test_a_vanilla_checkpoint_starts_a_norm_anew() -> None:
    layer = nn.Conv2d(4, 8, 3)
    model = ws.convert(layer, config={"conv": "weight_norm"})
    other = copy.deepcopy(layer)
    nn.init.normal_(other.weight, std=3.0)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.weight, other.weight)


def test_standardization_that_is_asked_for_comes_before_any_stage_but_another_normalization() -> (
    None
):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))

    def stages(conv: str, standardize: str) -> tuple[str, ...]:
        return ws.plan(model, config={"conv": conv, "standardize": standardize}).decisions[0].stages

    assert stages("dynamic_sparse", "auto") == ("dynamic_sparse",)
    assert stages("dynamic_sparse", "on") == ("standardize", "dynamic_sparse")
    assert stages("weight_norm", "on") == ("weight_norm",)
