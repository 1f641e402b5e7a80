"""Shift attention: its formula, its schedule, hardening, what it strips to and what it takes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import we_surgery as ws
from we_surgery.excitations import ShiftAttention, WeightLayout, rebuild_excitation

NAME = "shift_attention"
CONFIG = {"conv": NAME, "linear": "skip"}


def stage(shared: bool = False, temperature: float = 3.0) -> ShiftAttention:
    torch.manual_seed(0)
    return ShiftAttention(4, 5, (3, 3), shared, temperature)


@pytest.mark.parametrize("shared", [False, True])
def test_the_weight_is_multiplied_by_a_softmax_over_each_kernel(shared: bool) -> None:
    attention = stage(shared)
    weight = torch.randn(4, 5, 3, 3)
    excited = attention(weight)
    for o in range(4):
        for i in range(5):
            scores = attention.attention[0 if shared else o, i].flatten()
            softmax = (3.0 * scores / scores.std()).exp()
            expected = weight[o, i].flatten() * softmax / softmax.sum()
            torch.testing.assert_close(excited[o, i].flatten(), expected)


def test_the_scale_and_the_mean_of_the_attention_do_not_matter() -> None:
    first, second = stage(), stage()
    with torch.no_grad():
        second.attention.mul_(7).add_(3)
    torch.testing.assert_close(second.positions(), first.positions())


def test_an_attention_without_a_difference_weighs_alike() -> None:
    flat = stage()
    with torch.no_grad():
        flat.attention.fill_(0.5)
    weight = torch.randn(4, 5, 3, 3, requires_grad=True)
    flat(weight).sum().backward()
    torch.testing.assert_close(flat(weight), weight / 9)
    assert flat.attention.grad is not None
    assert flat.attention.grad.isfinite().all()


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.Flatten()
        )


def trained(shared: bool = False) -> nn.Module:
    torch.manual_seed(0)
    options = {"shared": shared, "inverse_temperature": 5}
    model = ws.convert(Net(), config={**CONFIG, "shift_attention": options})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 5, 5)).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_pointwise_convs_are_left_alone_with_the_reason() -> None:
    row = ws.plan(Net(), config=CONFIG).decisions[1]
    assert not row.excitation
    assert "not shift_attention: it has kernels of one position" in row.reason


@pytest.mark.parametrize("shared", [False, True])
def test_hardened_each_kernel_keeps_its_largest_position_and_the_whole_weight(
    shared: bool,
) -> None:
    model = trained(shared)
    raw, attention = model[0].raw_weight, model[0].excitation.shift_attention.attention
    ws.harden(model)
    weight = ws.strip(model, example_inputs=torch.randn(2, 3, 5, 5))[0].weight
    largest = attention.flatten(2).argmax(2).expand(6, 3)
    for o in range(6):
        for i in range(3):
            flat = weight[o, i].flatten()
            assert flat.count_nonzero() == 1
            assert flat[largest[o, i]] == raw[o, i].flatten()[largest[o, i]]
    assert torch.equal(ws.strip_state_dict(model.state_dict())["0.weight"], weight)


def test_shared_and_hardened_it_is_a_shift_and_a_pointwise_conv() -> None:
    model = trained(shared=True)
    ws.harden(model)
    weight = model[0].weight
    x = torch.randn(2, 3, 6, 6)
    padded = F.pad(x, (1, 1, 1, 1))
    shifted = torch.empty_like(x)
    for i, place in enumerate(model[0].excitation.shift_attention.attention.flatten(2)[0]):
        row, column = divmod(int(place.argmax()), 3)
        shifted[:, i] = padded[:, i, row : row + 6, column : column + 6]
    pointwise = F.conv2d(shifted, weight.sum((2, 3), keepdim=True), model[0].bias)
    torch.testing.assert_close(model[0](x), pointwise, rtol=1e-5, atol=1e-5)


def test_rounding_makes_undecided_kernels_zero_and_can_be_taken_back() -> None:
    model = trained()
    before = model[0].weight.clone()
    undecided = ws.harden(model, "round")
    weight = model[0].weight
    assert 0 < undecided < 18
    assert int((weight.flatten(2).count_nonzero(2) == 0).sum()) == undecided
    ws.harden(model, "soft")
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ws.InputError, match="there is no hardening 'hard'"):
        ws.harden(model, "hard")


@pytest.mark.parametrize("how", ["argmax", "round", "soft"])
def test_a_state_dict_says_how_it_is_hardened(how: str) -> None:
    model = trained()
    ws.harden(model, how)
    other = ws.convert(Net(), config=CONFIG).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[0].weight, model[0].weight)
    rebuilt = rebuild_excitation(model[0].excitation.state_dict())
    assert rebuilt.shift_attention.hardening == how
    assert torch.equal(copy.deepcopy(model)[0].weight, model[0].weight)


def test_training_goes_on_after_hardening_with_the_weights_that_are_left() -> None:
    model = trained().train()
    ws.harden(model)
    model.zero_grad()
    model(torch.randn(4, 3, 5, 5)).square().mean().backward()
    gradient: Tensor = model[0].raw_weight.grad
    assert ((gradient != 0).flatten(2).sum(2) <= 1).all()


def test_the_schedule_goes_from_start_to_end_and_stays() -> None:
    model = trained()
    layer = model[0].excitation.shift_attention
    schedule = ws.ShiftAttentionSchedule(model, steps=4, start=2, end=32)
    seen = [layer.inverse_temperature.item()]
    for _ in range(6):
        schedule.step()
        seen.append(layer.inverse_temperature.item())
    assert seen == pytest.approx([2, 4, 8, 16, 32, 32, 32])
    ws.ShiftAttentionSchedule(model, steps=4, start=2, end=32, resume=True)
    assert layer.inverse_temperature.item() == 32


def test_a_step_of_the_schedule_is_seen_by_what_is_kept_in_eval_mode() -> None:
    model = trained()
    schedule = ws.ShiftAttentionSchedule(model, steps=1)
    before = model[0].weight
    schedule.step()
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ws.ShiftAttentionSchedule(Net(), 4), "has no shift attention"),
        (lambda: ws.ShiftAttentionSchedule(trained(), 0), "`steps` must be at least 1"),
        (lambda: ws.ShiftAttentionSchedule(trained(), 2, 5, 3), "got 2, 5 and 3"),
        (lambda: ws.plan(Net(), config=CONFIG | {NAME: {"shared": 1}}), "shared"),
        (
            lambda: ws.plan(
                Net(), config={**CONFIG, "shift_attention": {"inverse_temperature": 0}}
            ),
            "inverse_temperature must be positive",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make: object, message: str) -> None:
    with pytest.raises(ws.InputError, match=message):
        make()


class ResNet20(nn.Module):
    """The convs, norms and last layer of the public code's ResNet20 of a given width."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, width, 3, bias=False), nn.Linear(4 * width, classes)
        norms, self.shortcuts = [nn.BatchNorm2d(width)], nn.ModuleList()
        blocks, inputs = [], width
        for stage_width in (width, 2 * width, 4 * width):
            for conv in range(6):
                inner = inputs if conv == 0 else stage_width
                blocks.append(nn.Conv2d(inner, stage_width, 3, bias=False))
                norms.append(nn.BatchNorm2d(stage_width))
            if inputs != stage_width:
                self.shortcuts.append(nn.Conv2d(inputs, stage_width, 1, bias=False))
                norms.append(nn.BatchNorm2d(stage_width))
            inputs = stage_width
        self.blocks, self.norms = nn.ModuleList(blocks), nn.ModuleList(norms)


@pytest.mark.parametrize(
    ("shared", "classes", "words"),
    [(False, 10, 981_609.5), (False, 100, 1_011_579.5), (True, 10, 882_123.625)],
)
def test_the_size_is_that_of_the_public_codes_accounting(
    shared: bool, classes: int, words: float
) -> None:
    model = ResNet20(83, classes)
    assert sum(p.numel() for p in ResNet20(83, 10).parameters()) == 7_274_711
    config = {**CONFIG, "shift_attention": {"shared": shared}}
    config["rules"] = [{"match": "stem", "excite": "skip"}]
    model = ws.convert(model, config=config)
    assert ws.shift_attention_words(model) == words


def test_training_holds_twice_the_weights_unshared() -> None:
    plan = ws.plan(nn.Conv2d(6, 8, 3), config=CONFIG)
    assert plan.added_parameters == 8 * 6 * 9
    assert ShiftAttention.unsupported_reason(WeightLayout((8, 6, 1, 1)), {}) is not None
