"""An excited weight is computed once, and never one read too few."""

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from weight_changes import CHANGES, excited_conv

import we_surgery as ws
from we_surgery.converted import compute_once
from we_surgery.converted.layer import WEConv2d
from we_surgery.converted.watching import Sources
from we_surgery.excitations.compute import backends
from we_surgery.excitations.compute.terms import Kept, Terms


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all weights that were excited, in order."""
    shapes: list[tuple[int, ...]] = []
    eager = backends.EAGER

    def counted(weights: Sequence[tuple[Tensor, Terms]]) -> list[tuple[Tensor, Kept]]:
        shapes.extend(tuple(filters.shape) for filters, _ in weights)
        return eager.excite(weights)

    monkeypatch.setattr(backends, "EAGER", eager._replace(excite=counted))
    return shapes


class Recurrent(nn.Module):
    """One conv called three times in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.relu(self.norm(self.conv(x)))
        return x


@torch.no_grad()
def expected(conv: nn.Module) -> Tensor:
    """The weight a fresh copy of the layer computes."""
    weight: Tensor = copy.deepcopy(conv).weight
    return weight


# Eval mode


def test_in_eval_mode_a_weight_is_computed_once(computed: list[tuple[int, ...]]) -> None:
    conv = excited_conv()
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        outputs = [conv(x) for _ in range(3)]
    with torch.inference_mode():
        outputs.append(conv(x).clone())
    assert len(computed) == 1
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_a_change_is_seen_by_the_next_read(
    change: Callable[[WEConv2d], None], mode: Callable[[], torch.no_grad]
) -> None:
    conv = excited_conv()
    for _ in range(2):
        with mode():
            conv.weight  # noqa: B018
        change(conv)
        with mode():
            found = conv.weight.clone()
        torch.testing.assert_close(found, expected(conv), rtol=0, atol=0)


def test_memory_that_is_given_out_again_is_not_taken_for_the_same() -> None:
    """An allocator gives this size out again after some fifty tensors."""
    layer = nn.Linear(400, 250)
    sources = Sources.of(layer)
    for _ in range(200):
        layer.weight.data = layer.weight.data * 0.9 + 0.1
        assert sources.have_moved()


def test_a_write_into_the_excited_weight_does_not_stay() -> None:
    conv = excited_conv()
    with torch.no_grad():
        conv.weight.zero_()
        torch.testing.assert_close(conv.weight, expected(conv), rtol=0, atol=0)


def test_a_read_that_needs_a_gradient_has_one() -> None:
    conv = excited_conv()
    with torch.no_grad():
        assert not conv.weight.requires_grad
    conv.weight.sum().backward()
    assert conv.raw_weight.grad is not None
    with torch.no_grad():
        assert not conv.weight.requires_grad


def test_what_was_read_in_inference_mode_can_be_saved_for_a_gradient() -> None:
    conv = excited_conv().requires_grad_(False)
    with torch.inference_mode():
        conv.weight  # noqa: B018
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad is not None


def test_freezing_and_unfreezing_are_seen(computed: list[tuple[int, ...]]) -> None:
    conv = excited_conv().requires_grad_(False)
    x = torch.randn(1, 4, 5, 5)
    conv(x), conv(x)
    assert len(computed) == 1
    conv.requires_grad_(True)
    conv(x).sum().backward()
    assert conv.raw_weight.grad is not None


@pytest.mark.parametrize("is_frozen_first", [True, False])
def test_one_tensor_that_is_frozen_or_unfrozen_is_seen(is_frozen_first: bool) -> None:
    conv = excited_conv().train()
    raw, x = conv.raw_weight, torch.randn(1, 4, 5, 5)
    raw.requires_grad_(not is_frozen_first)
    first = conv(x).sum()
    raw.requires_grad_(is_frozen_first)
    second = conv(x).square().sum()
    raw.requires_grad_(True)
    (first + second).backward()

    expected = copy.deepcopy(conv)
    expected.zero_grad()
    output = expected(x)
    (output.square() if is_frozen_first else output).sum().backward()
    torch.testing.assert_close(raw.grad, expected.raw_weight.grad)


def test_a_step_through_data_is_seen_although_the_graph_lives() -> None:
    conv = excited_conv().train()
    x = torch.randn(1, 4, 5, 5)
    loss = conv(x).square().sum()
    loss.backward(retain_graph=True)
    for parameter in conv.parameters():
        parameter.data.sub_(parameter.grad, alpha=0.1)
    torch.testing.assert_close(conv.weight, expected(conv), rtol=0, atol=0)


def test_another_thread_may_forget_what_was_just_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = compute_once.keep

    def keep_and_forget(watched: Any, excited: Tensor, **how: Any) -> Any:
        kept = keep(watched, excited, **how)
        watched.excitation.forget()
        return kept

    monkeypatch.setattr(compute_once, "keep", keep_and_forget)
    conv = excited_conv().train()
    torch.testing.assert_close(conv.weight, expected(conv), rtol=0, atol=0)


def test_parameters_made_in_inference_mode_are_excited_each_time() -> None:
    with torch.inference_mode():
        conv = excited_conv()
        before = conv.weight.clone()
        conv.raw_weight.mul_(2).add_(0.1)  # unversioned
        assert not torch.equal(conv.weight, before)
        torch.testing.assert_close(conv.weight, expected(conv), rtol=0, atol=0)


def test_memory_that_another_process_may_write_to_is_excited_each_time(
    computed: list[tuple[int, ...]],
) -> None:
    conv = excited_conv()
    conv.share_memory()
    with torch.no_grad():
        conv.weight, conv.weight  # noqa: B018
    assert len(computed) == 2


def test_a_hook_on_the_excitation_sees_each_read() -> None:
    conv = excited_conv()
    seen: list[Tensor] = []
    with torch.no_grad():
        conv.weight  # noqa: B018
        conv.excitation.register_forward_hook(lambda module, args, output: seen.append(output))
        conv.weight, conv.weight  # noqa: B018
    assert len(seen) == 2


def test_the_parameters_of_a_functional_call_are_those_given() -> None:
    conv = excited_conv()
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        before = conv(x)
        doubled = {name: 2 * value + 0.1 for name, value in conv.named_parameters()}
        within = functional_call(conv, doubled, (x,))
        assert torch.equal(conv(x), before)
        conv.load_state_dict(doubled, strict=False)
        assert torch.equal(conv(x), within)


def test_ema_weights_are_excited_by_themselves() -> None:
    model = ws.convert(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), "lwe+mwe").eval()
    ema = ModelEmaV3(model, decay=0.5)
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        model(x), ema.module(x)
        for _ in range(2):
            model[0].raw_weight.uniform_()
            ema.update(model)
            ema.module.eval()
            assert torch.equal(ema.module[0].weight, expected(ema.module[0]))
            assert not torch.equal(ema.module[0].weight, model[0].weight)


def test_nothing_kept_enters_a_copy_a_pickle_or_a_state_dict() -> None:
    conv = excited_conv()
    keys, fresh = list(conv.state_dict()), len(pickle.dumps(conv))
    with torch.no_grad():
        conv(torch.randn(1, 4, 5, 5))
    assert conv.excitation.kept is not None
    assert list(conv.state_dict()) == keys
    assert len(pickle.dumps(conv)) == fresh
    file = io.BytesIO()
    torch.save(conv, file)
    for copied in (
        copy.deepcopy(conv),
        copy.copy(conv.excitation),
        pickle.loads(pickle.dumps(conv)),
    ):
        assert all(getattr(module, "kept", None) is None for module in copied.modules())


# With gradients


def gradients(model: nn.Module) -> list[Tensor]:
    return [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    assert gradients(one)
    torch.testing.assert_close(gradients(one), gradients(other))


def test_a_weight_used_three_times_is_computed_once(computed: list[tuple[int, ...]]) -> None:
    model = ws.convert(Recurrent(), "lwe+mwe")
    for passes in range(1, 4):
        model(torch.randn(2, 4, 6, 6)).sum().backward()
        assert len(computed) == passes


def test_under_autocast_too_from_the_second_pass_on(computed: list[tuple[int, ...]]) -> None:
    model = ws.convert(Recurrent(), "lwe+mwe")
    counts = []
    for _ in range(3):
        computed.clear()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(2, 4, 6, 6)).float().sum()
        loss.backward()
        counts.append(len(computed))
    assert counts[1:] == [1, 1]
    assert model.conv.excitation.kept.held is None  # let go with the gradient


@pytest.mark.parametrize("name", ["resnetv2_50", "vit_tiny_patch16_224"])
def test_layers_that_read_their_weight_often_compute_it_once(
    name: str, computed: list[tuple[int, ...]]
) -> None:
    options = {"img_size": 32} if name.startswith("vit") else {"layers": (1, 1, 1, 1)}
    model = ws.convert(timm.create_model(name, **options), "we")
    excited = sum(1 for _ in model.modules() if hasattr(_, "excited_parameters"))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(computed) == excited > 5


def test_two_losses_may_share_a_weight() -> None:
    torch.manual_seed(0)
    model = ws.convert(Recurrent().double(), "lwe+mwe").eval()
    other = copy.deepcopy(model)
    images = torch.randn(2, 2, 4, 6, 6).double()
    losses = [model(image).sum() for image in images]
    for loss in losses:
        loss.backward()  # one after the other, no graph retained
    (other(images[0]).sum() + other(images[1]).sum()).backward()
    assert_same_gradients(model, other)


def test_gradients_accumulate_over_passes(computed: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model = ws.convert(Recurrent().double(), "lwe").eval()
    other = copy.deepcopy(model)
    images = torch.randn(3, 2, 4, 6, 6).double()
    for image in images:
        model(image).sum().backward()
    assert len(computed) == 3
    torch.stack([other(image).sum() for image in images]).sum().backward()
    assert_same_gradients(model, other)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("mode", ["lwe", "lwe+mwe"])
def test_activation_checkpointing_gives_the_same_gradients(mode: str, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    model = ws.convert(Recurrent().double(), mode).eval()
    other = copy.deepcopy(model)
    x = torch.randn(2, 4, 6, 6).double().requires_grad_()
    # The first call leaves a weight that the checkpointed one finds.
    (model(x) + checkpoint(model, x, use_reentrant=use_reentrant)).sum().backward()
    (2 * other(x)).sum().backward()
    assert_same_gradients(model, other)


def test_a_step_between_two_passes_is_seen() -> None:
    model = ws.convert(Recurrent(), "lwe+mwe")
    x = torch.randn(2, 4, 6, 6)
    waiting = model(x)  # its graph keeps the excited weight alive
    with torch.no_grad():
        model.conv.raw_weight.mul_(2).add_(0.1)
    torch.testing.assert_close(model.conv.weight.detach(), expected(model.conv), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        waiting.sum().backward()


@pytest.mark.parametrize("inplace", [True, False])
def test_a_fold_is_computed_from_what_the_weight_is_now(inplace: bool) -> None:
    conv = excited_conv()
    model = nn.Sequential(conv)
    with torch.no_grad():
        conv.weight  # noqa: B018
        conv.raw_weight.data.uniform_()  # unversioned
    weight = expected(conv)
    fused = conv.fuse()
    assert torch.equal(fused.weight, weight)
    assert torch.equal(ws.strip(model, inplace=inplace)[0].weight, weight)


def test_a_fold_has_memory_of_its_own() -> None:
    conv = excited_conv()
    with torch.no_grad():
        kept = conv.weight
        fused = conv.fuse()
        fused.weight.zero_()
        assert torch.equal(conv.weight, kept)
        assert kept.any()
