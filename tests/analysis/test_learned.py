"""What is said of an excitation, and the criterion of having learned nothing."""

from __future__ import annotations

import math

import pytest
import torch
from analysis_data import Residual
from torch import nn

import we_surgery as ws
from we_surgery.analysis.learned import Start, learned_nothing, weight_statistics
from we_surgery.excitations import LWE, MWE, Composition, Standardize


def composition(channels: int = 64) -> tuple[Composition, torch.Tensor]:
    torch.manual_seed(0)
    return Composition([Standardize(), LWE(channels)]), torch.randn(32, channels, 3, 3) * 0.1


def test_multipliers_are_counted() -> None:
    excitation, raw = composition()
    multipliers = excitation.lwe.multiplier(excitation.standardize.excite(raw)).detach()
    found = weight_statistics(excitation, raw).multiplier
    assert found is not None
    assert found.minimum == pytest.approx(multipliers.min().item())
    assert found.maximum == pytest.approx(multipliers.max().item())
    assert found.mean == pytest.approx(multipliers.mean().item())
    assert found.deviation == pytest.approx(multipliers.std().item())
    assert sum(found.histogram) == multipliers.numel()
    third = ((multipliers >= 0.1) & (multipliers < 0.15)).sum().item()
    assert found.histogram[2] == third
    assert (found.low, found.high) == (0, 1)


def test_shares_near_zero_and_one() -> None:
    excitation, raw = composition()
    with torch.no_grad():
        excitation.lwe.fc2.weight.zero_()
        excitation.lwe.fc2.bias.fill_(-10)
        excitation.lwe.fc2.bias[:16] = 10
    found = weight_statistics(excitation, raw).multiplier
    assert found is not None
    assert (found.near_zero, found.near_one) == (0.75, 0.25)


def test_multipliers_beyond_one_widen_the_histogram() -> None:
    torch.manual_seed(0)
    excitation = Composition([LWE(8, skip=True)])
    found = weight_statistics(excitation, torch.randn(4, 8, 3, 3)).multiplier
    assert found is not None
    assert found.high == found.maximum > 1
    assert sum(found.histogram) == 32


def test_gains_are_the_slopes_of_the_curve() -> None:
    weight = torch.tensor([[1.0, -0.5, 0.25, 0.1]])
    found = weight_statistics(Composition([MWE(0.1)]), weight).gain
    assert found is not None
    expected = torch.tensor([5.7619047619, 1.2604166667, 1.0544662309, 1.0083333333])
    assert found.maximum == pytest.approx(5.7619047619, rel=1e-5)
    assert found.minimum == pytest.approx(1.0083333333, rel=1e-5)
    assert found.mean == pytest.approx(expected.mean().item(), rel=1e-5)
    assert found.percentile_99 == found.maximum
    assert weight_statistics(composition()[0], composition()[1]).gain is None


def test_the_gain_is_taken_where_mwe_stands() -> None:
    torch.manual_seed(0)
    excitation = Composition([Standardize(), MWE(0.1)])
    raw = torch.randn(4, 3, 3, 3) * 5 + 2
    found = weight_statistics(excitation, raw).gain
    fed = excitation.standardize.excite(raw)
    limit = 1.1 * fed.abs().max()
    slopes = limit**2 / (limit**2 - fed**2)
    assert found is not None
    assert found.mean == pytest.approx(slopes.mean().item(), rel=1e-4)


def test_norms_and_work() -> None:
    excitation, raw = composition()
    found = weight_statistics(excitation, raw)
    assert found.raw_norm == pytest.approx(raw.norm().item())
    assert found.excited_norm == pytest.approx(excitation(raw).norm().item())
    assert found.multiply_adds == 32 * 2 * 64 * 4


@pytest.mark.parametrize("channels", [3, 64, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_excitation_has_learned_nothing(channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    verdicts = []
    for _ in range(20):
        excitation = Composition([LWE(channels)]).to(dtype)
        raw = torch.randn(16, channels, 3, 3, dtype=dtype)
        verdicts.append(weight_statistics(excitation, raw).verdict)
    assert verdicts.count("untrained") >= 19  # three standard errors


def test_a_step_of_training_is_noticed() -> None:
    excitation, raw = composition()
    optimizer = torch.optim.SGD(excitation.parameters(), 0.5)
    excitation(raw).square().sum().backward()
    optimizer.step()
    assert weight_statistics(excitation, raw).verdict == "learned"


def test_shrunk_parameters_are_not_as_drawn() -> None:
    excitation, raw = composition()
    with torch.no_grad():
        for parameter in excitation.parameters():
            parameter.mul_(0.5)
    assert weight_statistics(excitation, raw).verdict == "learned"


def test_one_number_for_all_kernels_is_nothing() -> None:
    model = ws.convert(Residual().eval(), "lwe", init="preserve")
    layer = model.get_submodule("first")
    found = weight_statistics(layer.excitation, layer.raw_weight)
    assert found.verdict == "constant"


def test_paused_and_parameterless_excitation() -> None:
    paused = ws.convert(Residual(), "lwe", start="paused").get_submodule("first")
    assert weight_statistics(paused.excitation, paused.raw_weight).verdict == "paused"
    mwe = Composition([MWE()])
    assert weight_statistics(mwe, torch.randn(2, 3)).verdict == "nothing to learn"


def test_a_known_start_tells_the_distance() -> None:
    excitation, raw = composition()
    start = Start(raw, {name: p.detach().clone() for name, p in excitation.named_parameters()})
    same = weight_statistics(excitation, raw, start)
    assert (same.raw_distance, same.excitation_distance) == (0, 0)
    assert same.verdict == "unchanged"
    with torch.no_grad():
        for parameter in excitation.parameters():
            parameter.mul_(1.1)
    moved = weight_statistics(excitation, raw * 1.5, start)
    assert moved.raw_distance == pytest.approx(0.5, rel=1e-4)
    assert moved.excitation_distance == pytest.approx(0.1, rel=1e-4)
    assert moved.verdict == "learned"
    vanilla = weight_statistics(excitation, raw, Start(raw, None))
    assert (vanilla.raw_distance, vanilla.excitation_distance) == (0, None)


def test_transposed_convs_are_measured_in_filters() -> None:
    torch.manual_seed(0)
    layer = ws.convert(nn.ConvTranspose2d(8, 6, 3, groups=2), "lwe+mwe")
    found = weight_statistics(layer.excitation, layer.raw_weight)
    assert found.multiplier is not None
    assert sum(found.multiplier.histogram) == 6 * 4
    assert found.gain is not None
    assert math.isfinite(found.gain.maximum)


def test_a_model_has_learned_nothing_when_all_that_could_did_not() -> None:
    assert learned_nothing(["untrained", "constant", "nothing to learn"])
    assert not learned_nothing(["untrained", "learned"])
    assert not learned_nothing(["nothing to learn"])
    assert not learned_nothing([])
