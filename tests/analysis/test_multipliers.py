"""What LWE learned, D_L and D_H, and pruning by it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from analysis_data import Residual, batches, bytes_of, converted, likelihood
from torch import Tensor, nn
from torch.nn.utils import prune

import we_surgery as ws
from we_surgery.analysis import (
    Ablation,
    apply_masks,
    location_maps,
    multiplier_map,
    multiplier_maps,
    multiplier_masks,
    multiplier_validity,
    pruning_curve,
    rank_correlations,
)
from we_surgery.analysis.removal import GRANULARITIES
from we_surgery.excitations import LWE, MWE, Composition, Excitation, Standardize


def test_the_map_is_what_the_stripped_weight_was_multiplied_by() -> None:
    model = converted()
    maps = multiplier_maps(model)
    assert set(maps) == {"stem", "first", "second", "branch", "last.0"}
    for name, multipliers in maps.items():
        layer = model.get_submodule(name)
        fed = layer.raw_weight.detach()
        if "standardize" in dict(layer.excitation.named_children()):
            fed = layer.excitation.standardize.excite(fed)
        expected = layer.weight.detach() / fed
        assert torch.allclose(expected.flatten(2).mean(2), multipliers, rtol=1e-4)


def test_the_map_of_a_transposed_conv_is_in_filters() -> None:
    torch.manual_seed(0)
    model = ws.convert(nn.ConvTranspose2d(4, 6, 2, groups=2), "lwe")
    assert multiplier_maps(model)[""].shape == (6, 2)


def spearman(a: list[float], b: list[float]) -> float:
    """By hand: the correlation of the ranks, of which equal values share the mean."""

    def ranks(values: list[float]) -> list[float]:
        below = [sum(other < value for other in values) for value in values]
        return [
            low + (values.count(value) + 1) / 2 for low, value in zip(below, values, strict=True)
        ]

    left, right = ranks(a), ranks(b)
    mean = (len(a) + 1) / 2
    both = sum((x - mean) * (y - mean) for x, y in zip(left, right, strict=True))
    squares = [sum((x - mean) ** 2 for x in one) for one in (left, right)]
    return both / (squares[0] * squares[1]) ** 0.5


def test_multipliers_are_ranked_against_the_importance_of_their_kernels() -> None:
    torch.manual_seed(0)
    multipliers = {"conv": torch.rand(8, 6), "other": torch.rand(2, 2)}
    drops = [[0.3, -0.1, 0.0], [0.0, 0.0, 0.7]]
    kernels = [(o, i) for o in (0, 7) for i in (1, 3, 5)]
    rows = [
        {"layer": "conv", "out_channel": output, "in_channel": channel, "drop": drop}
        for (output, channel), drop in zip(kernels, drops[0] + drops[1], strict=True)
    ]
    maps = Ablation(analysis="location", rows=rows, score="accuracy", baseline=0.9, layers=["conv"])
    sampled = [multipliers["conv"][kernel].item() for kernel in kernels]
    expected = spearman(sampled, drops[0] + drops[1])
    assert rank_correlations(maps, multipliers) == {"conv": pytest.approx(expected)}
    with pytest.raises(ws.InputError, match="no layer has both"):
        rank_correlations(maps, {"other": multipliers["other"]})


def test_the_layers_of_both_have_the_same_names() -> None:
    model = converted()
    maps = location_maps(model, batches(1), samples=(2, 2), score="log_likelihood")
    assert set(rank_correlations(maps, multiplier_maps(model))) == set(maps.layers)


class PerFilter(Excitation):
    """A stage with one number a filter, and one of nine numbers a kernel."""

    name, order = "per_filter", 5

    def multiplier(self, weight: Tensor) -> Tensor:
        return torch.arange(1.0, 1 + weight.shape[0]).reshape(-1, 1, 1, 1)

    def excite(self, weight: Tensor) -> Tensor:
        return weight * self.multiplier(weight)


def test_stages_of_other_makes_count_by_their_multiplier() -> None:
    lwe = LWE(4)
    weight = torch.randn(3, 4, 2, 2)
    found = multiplier_map(Composition([lwe, PerFilter()]), weight)
    scale = torch.arange(1.0, 4).reshape(-1, 1)
    expected = scale * lwe.multiplier(weight * scale.reshape(-1, 1, 1, 1))
    assert torch.allclose(found, expected)
    assert multiplier_map(Composition([Standardize(), MWE()]), weight) is None


def test_paused_excitation_has_no_multipliers() -> None:
    model = ws.convert(Residual(), "lwe", start="paused")
    with pytest.raises(ws.InputError, match="no excited weight with multipliers"):
        multiplier_maps(model)


def by_hand(model: nn.Module, granularity: str, highest: bool) -> float:
    stripped = ws.strip(model)
    for name, multipliers in multiplier_maps(model).items():
        ranks = -multipliers if highest else multipliers
        weight = stripped.get_submodule(name).weight.data
        if granularity == "kernel":
            at = int(ranks.argmin())
            weight[at // ranks.shape[1], at % ranks.shape[1]] = 0
        elif granularity == "channel_per_filter":
            for filter_index, channel in enumerate(ranks.argmin(1)):
                weight[filter_index, channel] = 0
        else:
            weight[:, ranks.mean(0).argmin()] = 0
    return likelihood(stripped)


def test_each_granularity_removes_what_it_says() -> None:
    model = converted()
    before = bytes_of(model)
    found = multiplier_validity(model, batches(), score="log_likelihood", random_draws=2)
    assert found.baseline == pytest.approx(likelihood(model), abs=1e-6)
    for granularity in GRANULARITIES:
        for end in ("lowest", "highest"):
            expected = likelihood(model) - by_hand(model, granularity, end == "highest")
            assert found.mean_drop(granularity=granularity, end=end) == pytest.approx(
                expected, abs=1e-5
            )
    kernels = {(r["granularity"], r["end"], r["draw"]): r["sparsity"] for r in found.rows}
    assert len(kernels) == 12
    for granularity in GRANULARITIES:  # as many at random as at the ends
        sizes = {size for (name, *_), size in kernels.items() if name == granularity}
        assert len(sizes) == 1
    assert bytes_of(model) == before
    assert found == multiplier_validity(model, batches(), score="log_likelihood", random_draws=2)


def test_random_channels_are_whole_channels() -> None:
    seen: list[Tensor] = []

    def metric(model: nn.Module) -> float:
        likelihood(model)
        seen.append((model.get_submodule("first").weight == 0).flatten(2).all(2))
        return 0.0

    multiplier_validity(converted(), metric, granularities=["channel"], random_draws=1, share=0.5)
    random = seen[-1]
    assert torch.equal(random, random[:1].expand_as(random))
    assert random[0].sum() == 4


def test_pruning_removes_the_share_of_each_layer() -> None:
    model = converted()
    curve = pruning_curve(model, batches(), shares=[0, 0.25, 1], score="log_likelihood")
    rows = {(row["criterion"], row["share"]): row for row in curve.rows}
    stripped = ws.strip(model)
    total = sum(p.numel() for p in stripped.parameters())
    convs = [m.weight for m in stripped.modules() if isinstance(m, nn.Conv2d)]
    conv_total = sum(weight.numel() for weight in convs)
    for criterion in ("multiplier", "magnitude", "random"):
        assert rows[criterion, 0]["drop"] == pytest.approx(0, abs=1e-12)
        assert rows[criterion, 0.25]["sparsity"] == pytest.approx(0.25, abs=0.01)
        assert rows[criterion, 1]["sparsity"] == 1
        assert rows[criterion, 1]["model_sparsity"] == pytest.approx(conv_total / total)
    magnitude = copy.deepcopy(stripped)
    for module in magnitude.modules():
        if isinstance(module, nn.Conv2d):
            kernels = module.weight.data.abs().flatten(2).mean(2).flatten()
            gone = kernels.argsort()[: round(0.25 * len(kernels))]
            module.weight.data.flatten(0, 1)[gone] = 0
    assert rows["magnitude", 0.25]["metric"] == pytest.approx(likelihood(magnitude), abs=1e-6)


def test_masks_are_those_of_torchs_prune() -> None:
    model = converted()
    masks = multiplier_masks(model, 0.25)
    curve = pruning_curve(
        model, batches(), shares=[0.25], criteria=["multiplier"], score="log_likelihood"
    )
    pruned = apply_masks(ws.strip(model), masks)
    assert prune.is_pruned(pruned)
    assert curve.rows[0]["metric"] == pytest.approx(likelihood(pruned), abs=1e-6)
    for name, mask in masks.items():
        assert torch.equal(pruned.get_submodule(name).weight == 0, mask == 0)
    # Pruned weights stay zero while the model is trained on.
    pruned(batches()[0][0]).sum().backward()
    torch.optim.SGD(pruned.parameters(), 0.1).step()
    pruned(batches()[0][0])
    for name, mask in masks.items():
        module = pruned.get_submodule(name)
        assert torch.equal(module.weight == 0, mask == 0)
        prune.remove(module, "weight")
    assert pruned.state_dict().keys() == ws.strip(model).state_dict().keys()


def test_tied_layers_are_pruned_together() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    model = ws.convert(model, "lwe")
    pruned = apply_masks(ws.strip(model), multiplier_masks(model, 0.5))
    assert torch.equal(pruned[0].weight, pruned[1].weight)
    assert (pruned[1].weight == 0).sum() == 8 * 9


@pytest.mark.parametrize(
    ("call", "cause"),
    [
        (lambda: multiplier_maps(Residual()), "no excited weight with multipliers"),
        (lambda: multiplier_masks(converted(), 1.5), r"must be in \[0, 1\]"),
        (lambda: apply_masks(converted(), {}), "still converted"),
        (lambda: apply_masks(Residual(), {"stm": torch.ones(1)}), "did you mean 'stem'"),
        (lambda: apply_masks(Residual(), {"stem": torch.ones(1)}), r"the mask of 'stem' is \(1,\)"),
        (lambda: pruning_curve(converted(), batches(), criteria=["luck"]), "no criterion 'luck'"),
        (lambda: pruning_curve(converted(), batches(), shares=[2]), r"must be in \[0, 1\]"),
        (
            lambda: multiplier_validity(converted(), batches(), granularities=["kernels"]),
            "did you mean 'kernel'",
        ),
        (
            lambda: multiplier_validity(converted(), batches(), layers=["head"]),
            "none of the named layers",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(call: Any, cause: str) -> None:
    with pytest.raises(ws.InputError, match=cause):
        call()
