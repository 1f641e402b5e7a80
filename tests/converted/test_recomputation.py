"""Excited weights that are computed again in the backward pass instead of being kept."""

import copy
import pickle
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import we_surgery as ws
from tests.toys import EVERYTHING
from we_surgery.converted.layer import excited_layers


class EachLayer(nn.Module):
    """Each sort of layer that computes with its own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(8, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        tokens = self.up(F.relu(self.depthwise(x))).flatten(2).transpose(1, 2)
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))


def excited(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return ws.convert(model, config=EVERYTHING)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """All memory a forward pass has allocated and not given back, as the allocator counts it."""
    model(x).sum().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = model(x)
    allocated = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    del output
    return allocated


@pytest.mark.parametrize("autocast", [False, True])
def test_the_gradients_are_the_same(autocast: bool) -> None:
    model = excited(EachLayer())
    other = copy.deepcopy(model)
    ws.set_recompute(other)
    assert all(layer.recompute for _, layer in excited_layers(other))
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = gradients(other, x), gradients(model, x)
    assert list(found) == list(expected)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("name", ["resnetv2_50", "swin_tiny_patch4_window7_224"])
def test_real_models_train_the_same(name: str) -> None:
    small = {"layers": (1, 1, 1, 1)} if name.startswith("resnet") else {"depths": (2, 2, 2, 2)}
    size = {} if name.startswith("resnet") else {"img_size": 64, "drop_path_rate": 0.0}
    model = excited(timm.create_model(name, **small, **size))
    other = copy.deepcopy(model)
    ws.set_recompute(other)
    x = torch.randn(1, 3, 64, 64)
    found, expected = gradients(other, x), gradients(model, x)
    assert found.keys() == expected.keys()
    for parameter, gradient in found.items():
        assert torch.equal(gradient, expected[parameter]), parameter


@pytest.mark.parametrize("mode", ["lwe", "lwe+mwe"])
def test_hardly_anything_is_kept_for_the_backward_pass(mode: str) -> None:
    vanilla = nn.Sequential(
        nn.Conv2d(32, 64, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.Conv2d(64, 256, 3, groups=4, bias=False),
        nn.BatchNorm2d(256),
    )
    weights = sum(layer.weight.nbytes for layer in vanilla if isinstance(layer, nn.Conv2d))
    model = ws.convert(vanilla, mode)
    x = torch.randn(2, 32, 6, 6)
    before = kept_bytes(vanilla, x)
    assert 1 < (kept_bytes(model, x) - before) / weights <= 1.08
    ws.set_recompute(model)
    assert (kept_bytes(model, x) - before) / weights <= 0.08
    ws.set_recompute(model, False)
    assert (kept_bytes(model, x) - before) / weights > 1


def test_a_layer_called_often_keeps_nothing_either() -> None:
    conv = nn.Conv2d(32, 32, 3, padding=1)
    model = ws.convert(nn.Sequential(conv, conv, conv), config={"mode": "lwe"})
    ws.set_recompute(model)
    x = torch.randn(2, 32, 6, 6)
    for _ in range(3):
        y = model(x)
        assert model[0].excitation.kept.excited() is None
        y.sum().backward()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_weight_changed_between_the_passes_is_noticed(requires_grad: bool) -> None:
    model = ws.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "lwe+mwe")
    model[0].requires_grad_(requires_grad)
    ws.set_recompute(model)
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    loss = model(x).square().sum()
    with torch.no_grad():
        model[0].raw_weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_it_goes_together_with_activation_checkpointing(use_reentrant: bool) -> None:
    model = excited(EachLayer())
    other = copy.deepcopy(model)
    ws.set_recompute(other)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    expected = gradients(model, x)
    checkpoint(other, x, use_reentrant=use_reentrant).square().sum().backward()
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_a_failing_forward_pass_leaves_no_weight_behind() -> None:
    model = ws.convert(nn.Sequential(nn.Conv2d(3, 8, 3)), "lwe")
    ws.set_recompute(model)
    before = set(model[0].__dict__)
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(1, 4, 5, 5))
    assert set(model[0].__dict__) == before


def test_a_weight_is_handed_to_the_thread_that_computed_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One thread under autocast, which is handed a bfloat16 weight, and one without."""
    conv = ws.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "lwe")[0]
    ws.set_recompute(conv)
    before = set(conv.__dict__)
    both_are_in, forward = threading.Barrier(2, timeout=60), nn.Conv2d.forward
    seen: dict[bool, torch.dtype] = {}

    def meeting(layer: nn.Conv2d, x: Tensor) -> Tensor:
        both_are_in.wait()
        seen[torch.is_autocast_enabled("cpu")] = layer.weight.dtype
        both_are_in.wait()
        return forward(layer, x)

    def run(autocast: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            conv(torch.randn(1, 3, 5, 5))

    monkeypatch.setattr(nn.Conv2d, "forward", meeting)
    threads = [threading.Thread(target=run, args=(autocast,)) for autocast in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {True: torch.bfloat16, False: torch.float32}
    assert set(conv.__dict__) == before


@pytest.mark.parametrize("recompute", [True, False])
def test_an_excitation_may_be_frozen_between_the_passes(recompute: bool) -> None:
    model = ws.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "lwe")
    ws.set_recompute(model, recompute)
    loss = model(torch.randn(1, 3, 5, 5)).square().sum()
    model[0].excitation.requires_grad_(False)
    loss.backward()
    assert model[0].raw_weight.grad is not None


def test_it_survives_copies_and_pickles_and_ends_with_strip() -> None:
    model = excited(EachLayer())
    ws.set_recompute(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer.recompute for _, layer in excited_layers(copied))
    assert not any(hasattr(layer, "recompute") for layer in ws.strip(model).modules())
    assert not hasattr(model.stem.fuse(), "recompute")


def test_compiled_models_train_the_same() -> None:
    model = ws.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "lwe+mwe")
    other = copy.deepcopy(model)
    ws.set_recompute(other)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 6, 6)
    expected = gradients(model, x)
    compiled(x).square().sum().backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
