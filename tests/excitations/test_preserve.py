"""Excitations that start so that a pretrained weight stays what it is."""

import pytest
import torch
from torch import Tensor

from we_surgery.excitations import (
    LWE,
    Composition,
    Excitation,
    Rescale,
    WeightLayout,
    build_excitation,
    rebuild_excitation,
)

STAGES = [
    "standardize",
    "lwe",
    "mwe",
    "standardize+lwe",
    "standardize+mwe",
    "lwe+mwe",
    "standardize+lwe+mwe",
]
LAYOUTS = {
    "conv2d": WeightLayout((8, 6, 3, 3)),
    "conv3d": WeightLayout((4, 3, 1, 3, 3)),
    "grouped": WeightLayout((8, 2, 3, 3), groups=4),
    "depthwise": WeightLayout((8, 1, 3, 3), groups=8),
    "fan-in of 1": WeightLayout((8, 1, 1, 1), groups=8),
    "transposed": WeightLayout((6, 4, 3, 3), groups=2, transposed=True),
    "linear": WeightLayout((5, 7)),
}
all_stages = pytest.mark.parametrize("stages", STAGES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def build(stages: str, layout: WeightLayout, dtype: torch.dtype = torch.float32) -> Composition:
    torch.manual_seed(0)
    return build_excitation([{name: {}} for name in stages.split("+")], layout, dtype=dtype)


def pretrained(layout: WeightLayout, dtype: torch.dtype = torch.float32) -> Tensor:
    """Filters of quite different scales, one of them constant, some weights zero."""
    weight = torch.randn(layout.shape) * torch.logspace(-3, 0, layout.shape[0]).view(
        -1, *[1] * (len(layout.shape) - 1)
    )
    weight[1] = 0.3
    weight[2].flatten()[::2] = 0
    return weight.to(dtype)


@every_layout
@all_stages
def test_the_excited_weight_is_the_pretrained_one(stages: str, layout: WeightLayout) -> None:
    weight = pretrained(layout)
    excitation = build(stages, layout)
    raw = excitation.preserve(weight)
    assert raw.shape == weight.shape
    assert raw.dtype == weight.dtype
    for compute in (excitation, lambda w: Excitation.forward(excitation, w)):
        excited = compute(raw)
        torch.testing.assert_close(excited, weight, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("layout", [LAYOUTS["conv2d"], LAYOUTS["transposed"]])
@all_stages
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_a_half_precision_weight_stays_within_its_rounding(
    stages: str, layout: WeightLayout, dtype: torch.dtype, rounding: float
) -> None:
    weight = pretrained(layout, dtype)
    excitation = build(stages, layout, dtype)
    excited = excitation(excitation.preserve(weight))
    assert excited.dtype == dtype
    # The curve is up to 5.8 times as steep as a line, and what it is given was rounded before.
    steepness = 6.8 if "mwe" in stages else 1.0
    error = (excited.double() - weight.double()).abs()
    assert (error <= steepness * rounding * weight.double().abs() + 1e-6).all()


@every_layout
@pytest.mark.parametrize("stages", ["lwe", "standardize+lwe+mwe"])
def test_every_parameter_learns_within_three_steps(stages: str, layout: WeightLayout) -> None:
    excitation = build(stages, layout)
    raw = torch.nn.Parameter(excitation.preserve(pretrained(layout)))
    parameters = [raw, *excitation.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.1)
    learned = [False] * len(parameters)
    for _ in range(3):
        optimizer.zero_grad()
        (excitation(raw) * torch.randn(layout.shape)).sum().backward()
        learned = [
            known or bool(p.grad is not None and p.grad.any())
            for known, p in zip(learned, parameters, strict=True)
        ]
        optimizer.step()
    assert all(learned)


def test_a_hidden_unit_that_is_off_for_all_filters_is_mirrored() -> None:
    lwe = LWE(4, reduction=4)
    weight = torch.rand(6, 4, 3, 3)
    with torch.no_grad():
        lwe.fc1.weight.fill_(-1.0)
        lwe.fc1.bias.fill_(-0.1)
    lwe.start_constant(weight)
    assert (lwe.fc1.weight == 1).all()
    assert lwe.fc1.bias.item() == pytest.approx(0.1)


@all_stages
def test_a_state_dict_rebuilds_the_start(stages: str) -> None:
    layout = LAYOUTS["grouped"]
    excitation = build(stages, layout)
    raw = excitation.preserve(pretrained(layout))
    state = excitation.state_dict()
    rebuilt = rebuild_excitation(dict(sorted(state.items())))
    assert [type(stage) for stage in rebuilt.stages] == [type(s) for s in excitation.stages]
    assert torch.equal(rebuilt(raw), excitation(raw))
    assert ("rescale.gain" in state) == ("standardize" in stages)


def test_casting_a_layer_does_not_round_what_was_given_back() -> None:
    excitation = build("standardize+lwe", LAYOUTS["conv2d"])
    excitation.preserve(pretrained(LAYOUTS["conv2d"]))
    gain = excitation.rescale.gain.clone()
    assert torch.equal(excitation.half().float().rescale.gain, gain)


def test_a_rescaling_is_undone_by_its_inverse() -> None:
    rescale = Rescale(torch.rand(4) + 0.5, torch.randn(4))
    weight = torch.randn(4, 3, 3)
    torch.testing.assert_close(rescale.right_inverse(rescale(weight)), weight)


def test_a_stage_that_cannot_start_so_is_named() -> None:
    class Unknown(LWE):
        start_affine = Excitation.start_affine

    with pytest.raises(NotImplementedError, match="lwe cannot start"):
        Composition([Unknown(4)]).preserve(torch.randn(2, 4, 3, 3))
