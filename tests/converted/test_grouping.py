"""Weights that are excited together are what they are when each is excited by itself."""

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import we_surgery as ws
from we_surgery.converted import grouping
from we_surgery.converted.layer import excited_layers
from we_surgery.excitations.compute.terms import Terms


class Net(nn.Module):
    """Layers of several sorts, one of them called only when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 3, groups=2)
        self.side = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)
        self.tied = nn.Linear(6, 4)
        self.tied.weight = self.head.weight
        self.calls_side = True

    def features(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.norm(self.stem(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if self.calls_side:
            x = x + self.side(x)
        x = x.mean((2, 3))
        return self.head(x) * self.tied(x)


CONFIG = {"mode": "lwe+mwe", "linear": "mwe", "standardize": "on"}
WEIGHTS = 4
"""The tied layers share one."""


def build(grouped: bool = True, **options: Any) -> Net:
    torch.manual_seed(0)
    model = ws.convert(Net(), config=CONFIG, **options)
    assert len({id(layer.excitation) for _, layer in excited_layers(model)}) == WEIGHTS
    ws.set_grouped(model, grouped)
    return model


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights were computed together, each time that some were."""
    sizes: list[int] = []
    original = grouping.excite_together

    def counted(weights: Sequence[tuple[Tensor, Terms]], backend: Any) -> tuple[Tensor, ...]:
        sizes.append(len(weights))
        return original(weights, backend)

    monkeypatch.setattr(grouping, "excite_together", counted)
    return sizes


# The same numbers, in every way of training


def backward(model: nn.Module, x: Tensor) -> Tensor:
    loss = model(x).square().sum()
    loss.backward()
    return loss.detach()


def steps(model: Net) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, images(seed))
        optimizer.step()


def accumulated(model: Net) -> None:
    for seed in range(2):
        backward(model, images(seed))


def two_passes(model: Net) -> None:
    (model(images(1)).square().sum() + model(images(2)).sum()).backward()


def two_losses(model: Net) -> None:
    output = model(images())
    others = model(images(2))
    output.square().sum().backward()
    others.sum().backward()


def a_layer_not_called(model: Net) -> None:
    model.calls_side = False
    steps(model)
    assert model.side.raw_weight.grad is None
    assert all(parameter.grad is None for parameter in model.side.excitation.parameters())


def frozen_layers(model: Net) -> None:
    model.stem.requires_grad_(False)
    model.side.raw_weight.requires_grad_(False)
    steps(model)


def under_autocast(model: Net) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        steps(model)


def half(model: Net) -> None:
    model.bfloat16()
    model(images().bfloat16()).sum().backward()


def checkpointed(model: Net) -> None:
    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(model.features, x, use_reentrant=False)
            x = x + checkpoint(model.side, x, use_reentrant=False)
            return model.head(x.mean((2, 3)))

    for seed in range(2):
        backward(Checkpointed(), images(seed))
        torch.optim.SGD(model.parameters(), 0.01).step()


def checkpointed_reentrant(model: Net) -> None:
    x = checkpoint(model.features, images().requires_grad_(), use_reentrant=True)
    model.side(x).square().sum().backward()


def all_checkpointed_reentrant(model: Net) -> None:
    checkpoint(model, images().requires_grad_(), use_reentrant=True).square().sum().backward()


def recomputed(model: Net) -> None:
    ws.set_recompute(model.up)
    steps(model)


def a_part_alone(model: Net) -> None:
    model.features(images()).square().sum().backward()


def differentiated_twice(model: Net) -> None:
    inputs = [model.stem.raw_weight, model.stem.excitation.lwe.fc1.weight]
    gradients = torch.autograd.grad(model(images()).sum(), inputs, create_graph=True)
    sum(gradient.square().sum() for gradient in gradients).backward()  # type: ignore[union-attr]


def changed_by_hand(model: Net) -> None:
    backward(model, images())
    with torch.no_grad():
        model.side.raw_weight.mul_(1.5)
    backward(model, images(2))


SCENARIOS: dict[Callable[[Net], None], list[int]] = {
    steps: [WEIGHTS] * 3,
    accumulated: [WEIGHTS] * 2,
    two_passes: [WEIGHTS],
    two_losses: [WEIGHTS],
    a_layer_not_called: [WEIGHTS] * 3,
    frozen_layers: [WEIGHTS - 1] * 3,
    under_autocast: [WEIGHTS] * 3,
    half: [WEIGHTS],
    checkpointed: [WEIGHTS] * 2,
    checkpointed_reentrant: [WEIGHTS],
    all_checkpointed_reentrant: [],
    recomputed: [WEIGHTS - 1] * 3,
    a_part_alone: [WEIGHTS],
    differentiated_twice: [WEIGHTS],
    changed_by_hand: [WEIGHTS] * 2,
}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_group_trains_bit_for_bit_as_layers_do(
    scenario: Callable[[Net], None], groups: list[int]
) -> None:
    plain, grouped = build(grouped=False), build()
    scenario(plain)
    assert not groups
    scenario(grouped)
    assert groups == SCENARIOS[scenario]
    for (name, one), other in zip(grouped.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name


def test_a_pass_without_gradients_computes_one_by_one_and_once(groups: list[int]) -> None:
    model = build()
    with torch.no_grad():
        model(images())
    model.eval()
    with torch.inference_mode():
        outputs = [model(images()) for _ in range(2)]
    assert torch.equal(*outputs)
    assert not groups
    assert model.stem.excitation.kept.held is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_computes_layer_by_layer(groups: list[int]) -> None:
    torch.compiler.reset()
    plain, grouped = build(grouped=False), build()
    expected = backward(plain, images())
    found = backward(torch.compile(grouped, backend="aot_eager"), images())  # type: ignore[arg-type]
    torch.compiler.reset()
    assert not groups
    torch.testing.assert_close(found, expected)
    for one, other in zip(grouped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_layers_on_several_devices_have_a_group_each(groups: list[int]) -> None:
    layers = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(4)]
    model = ws.convert(nn.Sequential(*layers), "lwe")
    model[2:].to("meta")
    ws.set_grouped(model)
    assert model[0][0].weight.device.type == "cpu"
    assert groups == [2, 2]
    assert model[3][0].weight.device.type == "meta"
    assert groups == [2, 2]


def test_each_backend_has_a_group_of_its_own(groups: list[int]) -> None:
    model = build()
    ws.set_backend(model.stem, "eager")
    ws.set_backend(model.side, "eager")
    backward(model, images())
    assert groups == [2, 2]


# What stays behind


def held(model: nn.Module) -> list[str]:
    """The layers whose excited weight is held by nobody else."""
    names = []
    for name, layer in excited_layers(model):
        kept = layer.excitation.kept
        if kept is not None and kept.held is not None:
            names.append(name)
    return names


def test_a_weight_is_held_until_its_layer_has_read_it_or_the_pass_is_over() -> None:
    model = build()
    model.calls_side = False
    features = model.features(images())
    assert held(model) == ["side", "head", "tied"]
    output = model.head(features.mean((2, 3)))
    assert held(model) == ["side"]
    output.sum().backward()
    assert not held(model)


def test_an_exception_in_the_forward_pass_disturbs_no_later_one(groups: list[int]) -> None:
    plain, grouped = build(grouped=False), build()
    for model in (plain, grouped):
        with pytest.raises(RuntimeError):
            model(torch.zeros(2, 3, 6, 6)[:, :2])
        steps(model)
    assert groups == [WEIGHTS] * 3
    assert not held(grouped)
    for one, other in zip(grouped.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError):
        grouped(torch.zeros(2, 3, 6, 6)[:, :2])
    grouped.eval()
    assert not held(grouped)


def test_a_copy_and_a_pickle_are_not_grouped_and_keep_nothing(groups: list[int]) -> None:
    model = build()
    model.features(images())
    kept = set(model.stem.excitation.__dict__)
    assert {"kept", "group"} <= kept
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ):
        assert set(copied.stem.excitation.__dict__) == kept - {"kept", "group"}
        groups.clear()
        backward(copied, images())
        assert not groups
    assert set(model.state_dict()) == set(build(grouped=False).state_dict())


@pytest.mark.parametrize("inplace", [True, False])
def test_strip_ends_it(inplace: bool, groups: list[int]) -> None:
    model = build()
    x = images()
    backward(model, x)
    stripped = ws.strip(model, inplace=inplace, example_inputs=x)
    groups.clear()
    backward(stripped, x)
    assert not groups
    assert type(stripped.stem) is nn.Conv2d
    if not inplace:
        model.train()
        backward(model, x)
        assert groups == [WEIGHTS]


def test_a_layer_that_is_stripped_or_gone_is_left_out(groups: list[int]) -> None:
    model = build()
    model.side = ws.strip(model.side)
    ws.strip(model.up, inplace=True)
    backward(model, images())
    assert groups == [2]


def test_it_can_be_ended(groups: list[int]) -> None:
    model = build()
    ws.set_grouped(model, False)
    backward(model, images())
    assert not groups


def test_the_layer_at_fault_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    model.side.excitation.lwe.fc1.weight = nn.Parameter(torch.zeros(1, 7))
    features = model.features(images())
    assert "are computed one by one" in caplog.text
    with pytest.raises(RuntimeError) as raised:
        model.side(features)
    assert "'side' (Conv2d)" in str(raised.value.__notes__)


def test_a_changed_weight_is_refused_in_the_backward_pass_where_it_matters() -> None:
    model = build()
    stem, side = model.stem.weight, model.side.weight
    with torch.no_grad():
        model.side.raw_weight.add_(1)
    stem.sum().backward()  # the side's gradient is not asked for
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        side.sum().backward()


# On kernels


def test_kernels_are_launched_by_model_and_not_by_layer(launches: list[str]) -> None:
    eager, each, grouped = (
        build(grouped=False, backend="eager"),
        build(grouped=False, backend="triton"),
        build(backend="triton"),
    )
    counts = []
    for model in (eager, each, grouped):
        launches.clear()
        steps(model)
        counts.append(len(launches))
    # Convs have all stages, the head its curve alone; tied layers are one.
    assert counts == [0, 3 * (3 * 7 + 3), 3 * (7 + 3)]
    for one, other, same in zip(
        grouped.parameters(), eager.parameters(), each.parameters(), strict=True
    ):
        assert torch.equal(one, same)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
