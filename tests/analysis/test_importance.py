"""Importance by magnitude and by location against the definition, written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_data import Residual, batches, bytes_of, converted, likelihood
from torch import nn

import we_surgery as ws
from we_surgery.analysis import Ablation, location_maps, magnitude_curve
from we_surgery.analysis.measuring import _zeroed
from we_surgery.analysis.weights import equidistant, kernel_mask
from we_surgery.excitations import WeightLayout


def convs(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def test_the_curve_zeroes_one_weight_of_each_conv_by_rank() -> None:
    model = Residual()
    curve = magnitude_curve(model, batches(), positions=[1, 37, 100], score="log_likelihood")
    baseline = likelihood(model)
    assert curve.baseline == pytest.approx(baseline, rel=1e-6)
    assert [row["percentile"] for row in curve.rows] == [1, 37, 100]
    for row in curve.rows:
        by_hand = copy.deepcopy(model)
        for conv in convs(by_hand):
            flat = conv.weight.data.view(-1)
            order = flat.abs().argsort()
            flat[order[math.ceil(row["percentile"] * len(flat) / 100) - 1]] = 0
        assert row["drop"] == pytest.approx(baseline - likelihood(by_hand), abs=1e-6)


def test_the_hundredth_percentile_is_the_largest_weight() -> None:
    model, seen = nn.Sequential(nn.Conv2d(2, 3, 1)), []

    def metric(measured: nn.Module) -> float:
        measured(torch.zeros(1, 2, 1, 1))
        seen.append(measured[0].weight.detach().clone())
        return 0.0

    magnitude_curve(model, metric, positions=[1, 100])
    order = model[0].weight.detach().flatten().abs().argsort()
    assert [(w == 0).flatten().nonzero().flatten().tolist() for w in seen] == [
        [],
        [order[0]],
        [order[-1]],
    ]


def test_a_map_zeroes_one_kernel_at_a_time() -> None:
    model = Residual()
    maps = location_maps(model, batches(), samples=(3, 2), score="log_likelihood")
    arranged = maps.kernel_maps()
    assert list(arranged) == ["stem", "first", "second", "last.0"]
    assert arranged["stem"].out_channels == [0, 4, 7]
    assert arranged["second"].in_channels == [0, 3]  # of four a group
    baseline = likelihood(model)
    for row in maps.rows:
        by_hand = copy.deepcopy(model)
        kernel = row["out_channel"], row["in_channel"]
        by_hand.get_submodule(row["layer"]).weight.data[kernel] = 0
        assert row["drop"] == pytest.approx(baseline - likelihood(by_hand), abs=1e-6)
    stem = [row["drop"] for row in maps.rows if row["layer"] == "stem"]
    assert [drop for drops in arranged["stem"].drops for drop in drops] == stem


def test_a_function_and_a_loader_agree() -> None:
    by_loader = location_maps(Residual(), batches(), samples=(2, 2), score="log_likelihood")
    torch.manual_seed(0)
    by_function = location_maps(Residual(), likelihood, samples=(2, 2))
    torch.manual_seed(0)
    by_loader = location_maps(Residual(), batches(), samples=(2, 2), score="log_likelihood")
    for one, other in zip(by_function.rows, by_loader.rows, strict=True):
        assert one["drop"] == pytest.approx(other["drop"], abs=1e-6)


@pytest.mark.parametrize("make", [Residual, converted])
def test_a_model_is_left_bit_for_bit_as_it_was(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    model.get_submodule("norm").eval()
    before, flags = bytes_of(model), [module.training for module in model.modules()]
    location_maps(model, batches(), samples=(2, 2))
    magnitude_curve(model, batches(), positions=[50])
    assert bytes_of(model) == before
    assert [module.training for module in model.modules()] == flags
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_fault_in_the_middle_leaves_the_model_as_it_was() -> None:
    model, calls = Residual(), []
    before = bytes_of(model)

    def failing(measured: nn.Module) -> float:
        calls.append(bytes_of(measured) == before)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return likelihood(measured)

    with pytest.raises(KeyboardInterrupt):
        location_maps(model, failing, samples=(4, 4))
    assert calls == [True, False, False]
    assert bytes_of(model) == before
    assert model.training


def test_every_bit_of_the_measured_copy_comes_back() -> None:
    odd = torch.tensor([-0.0, 1e-45, float("nan"), float("-inf"), 3.0, -1.5, 0.25, 2.0])
    weights = {
        "plain": nn.Parameter(odd.reshape(2, 4)),
        "channels last": nn.Parameter(
            torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        ),
        "half": nn.Parameter(torch.randn(5, 2).bfloat16()),
    }
    for weight in weights.values():
        before = weight.detach().clone()
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        mask[0] = True
        with _zeroed({weight: mask}):
            assert torch.equal(weight.detach() == 0, mask | (before == 0))
        bits = [tensor.detach().contiguous().view(torch.uint8) for tensor in (weight, before)]
        assert torch.equal(*bits)


def test_a_converted_model_is_measured_as_deployed() -> None:
    model = converted()
    found = location_maps(model, batches(), samples=(2, 2), score="log_likelihood")
    stripped = location_maps(ws.strip(model), batches(), samples=(2, 2), score="log_likelihood")
    assert found == stripped


def test_a_model_that_cannot_be_copied_is_refused_with_the_reason() -> None:
    model = Residual()
    model.batches = (number for number in range(3))  # type: ignore[assignment]
    with pytest.raises(ws.SurgeryError, match=r"cannot be copied: .*generator.*\n.*deepcopy"):
        location_maps(model, batches())


def test_a_kernel_of_a_transposed_grouped_conv_is_one_of_a_filter() -> None:
    layout = WeightLayout((4, 3, 2, 2), groups=2, transposed=True)
    chosen = torch.zeros(6, 2, dtype=torch.bool)
    chosen[4, 1] = True  # group 1, its output 1, its input 1
    expected = torch.zeros(4, 3, 2, 2, dtype=torch.bool)
    expected[3, 1] = True
    assert torch.equal(kernel_mask(layout, chosen), expected)


def test_indices_are_equidistant_with_both_ends() -> None:
    assert equidistant(64, 5) == [0, 16, 32, 47, 63]
    assert equidistant(3, 5) == [0, 1, 2]
    assert equidistant(1, 5) == [0]


def test_the_layers_can_be_chosen() -> None:
    maps = location_maps(Residual(), batches(1), samples=(1, 1), layers=["branch", "last.*"])
    assert maps.layers == ["branch", "last.0"]
    with pytest.raises(ws.InputError, match="did you mean 'branch'"):
        location_maps(Residual(), batches(1), layers=["branches"])


def test_maps_come_back_from_json() -> None:
    maps = location_maps(Residual(), batches(1), samples=(2, 2))
    assert Ablation.read_location_maps(maps.to_dict()) == maps
    with pytest.raises(ws.InputError, match="does not hold importance maps"):
        Ablation.read_location_maps({"analysis": "prune"})


@pytest.mark.parametrize(
    ("metric", "cause"),
    [
        (lambda model: 1.0, "did not run the model"),
        (lambda model: likelihood(model) and "good", "not a number"),
        ([torch.zeros(1, 3, 8, 8)], "must be a pair of inputs and labels"),
        ([], "no batch"),
        (3.0, "not a function or a loader"),
    ],
)
def test_a_metric_that_cannot_be_used_is_refused(metric: Any, cause: str) -> None:
    with pytest.raises(ws.InputError, match=cause):
        magnitude_curve(Residual(), metric, positions=[1])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ws.InputError, match="got 0"):
        magnitude_curve(Residual(), batches(), positions=[0])
    with pytest.raises(ws.InputError, match="did you mean 'accuracy'"):
        magnitude_curve(Residual(), batches(), score="acuracy")
    with pytest.raises(ws.InputError, match="no conv weight"):
        magnitude_curve(nn.Linear(2, 2), batches())
    small = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, groups=3))
    with pytest.raises(ws.InputError, match="kernel larger than 1 and several input channels"):
        location_maps(small, batches())


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    model, path, calls = Residual(), tmp_path / "progress.jsonl", []

    def counting(limit: int) -> Callable[[nn.Module], float]:
        def metric(measured: nn.Module) -> float:
            calls.append(None)
            if len(calls) > limit:
                raise KeyboardInterrupt
            return likelihood(measured)

        return metric

    whole = location_maps(model, likelihood, samples=(2, 2))
    with pytest.raises(KeyboardInterrupt):
        location_maps(model, counting(7), samples=(2, 2), progress_file=path)
    # As a process that is killed while it writes leaves it.
    path.write_bytes(path.read_bytes() + b'["first[0,')
    calls.clear()
    resumed = location_maps(model, counting(99), samples=(2, 2), progress_file=path)
    assert resumed == whole
    assert len(calls) == 1 + 16 - 6
    assert not path.exists()


def test_a_run_over_batches_goes_on(tmp_path: Path) -> None:
    path, model = tmp_path / "progress.jsonl", Residual()

    def stopping(data: list[Any]) -> Any:
        yield data[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        location_maps(model, stopping(batches()), samples=(2, 2), progress_file=path)
    seen: list[tuple[int, int]] = []
    other = batches()
    with pytest.raises(ws.InputError, match="batch 0 differs"):
        location_maps(model, other[::-1], samples=(2, 2), progress_file=path)
    resumed = location_maps(
        model,
        other,
        samples=(2, 2),
        progress_file=path,
        progress=lambda *numbers: seen.append(numbers),
    )
    assert resumed == location_maps(model, batches(), samples=(2, 2))
    assert seen == [(done, 16) for done in range(17)]  # the second batch
    assert not path.exists()


def test_the_progress_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"

    def start(model: nn.Module) -> None:
        calls: list[None] = []

        def metric(measured: nn.Module) -> float:
            calls.append(None)
            if len(calls) > 1:
                raise KeyboardInterrupt
            return likelihood(measured)

        with pytest.raises(KeyboardInterrupt):
            location_maps(model, metric, progress_file=path)

    model = Residual()
    start(model)
    start(model)  # the same again is no error
    with torch.no_grad():
        model.head.bias.add_(1)
    with pytest.raises(ws.InputError, match="model differ"):
        location_maps(model, likelihood, progress_file=path)
    path.write_text("something of mine\n")
    with pytest.raises(ws.InputError, match="not a progress file"):
        location_maps(model, likelihood, progress_file=path)
    assert path.read_text() == "something of mine\n"


def test_progress_is_told_from_the_first_change_on() -> None:
    seen: list[tuple[int, int]] = []
    location_maps(
        Residual(), iter(batches()), samples=(1, 1), progress=lambda *numbers: seen.append(numbers)
    )
    assert seen == [(done, 0) for done in range(9)]  # an iterator has no length
