"""An excitation's state dict says all there is to say about it."""

import copy
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from we_surgery.errors import InputError
from we_surgery.excitations import (
    LWE,
    MWE,
    Composition,
    Recipe,
    Standardize,
    WeightLayout,
    build_excitation,
    rebuild_excitation,
)

PLAIN = WeightLayout((6, 8, 3, 3))
GROUPED = WeightLayout((6, 4, 3, 3), groups=2)
TRANSPOSED = WeightLayout((8, 3, 3, 3), groups=2, transposed=True)
RECIPES: list[Recipe] = [
    [{"standardize": {}}],
    [{"standardize": {"epsilon": 1e-3}}, {"lwe": {"reduction": 2}}],
    [{"mwe": {"epsilon": 0.2, "detach_max": False}}],
    [{"standardize": {}}, {"lwe": {}}, {"mwe": {}}],
]


def as_saved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return safetensors.torch.load(safetensors.torch.save(state))


@pytest.mark.parametrize(
    "order",
    [dict, as_saved, lambda s: dict(reversed(s.items()))],
    ids=["own", "safetensors", "rev"],
)
@pytest.mark.parametrize("layout", [PLAIN, GROUPED, TRANSPOSED], ids=["plain", "grouped", "transp"])
@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_excitation_is_rebuilt_bit_equal_from_its_state_dict(
    recipe: Recipe,
    layout: WeightLayout,
    order: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    built = build_excitation(recipe, layout, dtype=dtype)
    rebuilt = rebuild_excitation(order(built.state_dict()))
    assert repr(rebuilt) == repr(built)
    assert list(rebuilt.state_dict()) == list(built.state_dict())
    for found, expected in zip(rebuilt.parameters(), built.parameters(), strict=True):
        assert found.dtype == expected.dtype
        assert found.requires_grad
    weight = torch.randn(layout.shape, dtype=dtype)
    assert torch.equal(rebuilt(weight), built(weight))


def test_rebuilding_draws_no_random_numbers() -> None:
    state = build_excitation(RECIPES[3], PLAIN).state_dict()
    before = torch.get_rng_state()
    rebuild_excitation(state)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.update({"mwe.rest": s.pop("mwe.epsilon")}), "epsilon"),
        (lambda s: s.pop("lwe.fc2.bias"), "fc2.bias"),
        (lambda s: s.pop("lwe.fc1.weight"), "fc1.weight"),
        (lambda s: s.update({"lwe.fc2.weight": torch.zeros(3, 3)}), "size mismatch"),
        (lambda s: s.update({"mwe.epsilon": torch.tensor(float("nan"))}), "epsilon must lie"),
        (lambda s: s.update({"lve.fc1.weight": torch.zeros(3, 3)}), "did you mean 'lwe'"),
        (lambda s: s.update({"stray": torch.zeros(1)}), "stray"),
        (lambda s: s.clear(), "at least one stage"),
    ],
)
def test_a_damaged_state_dict_is_an_error_that_says_what_is_wrong(
    damage: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    state = dict(build_excitation(RECIPES[3], PLAIN).state_dict())
    damage(state)
    with pytest.raises(InputError, match=message):
        rebuild_excitation(state)


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "meta": lambda m: m.to("meta"),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "meta, to_empty": lambda m: m.to("meta").to_empty(device="cpu"),
    "deepcopy": copy.deepcopy,
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casting_and_moving_change_no_hyperparameter(cast: str) -> None:
    recipe: Recipe = [{"standardize": {"epsilon": 0.1}}, {"mwe": {"detach_max": False}}]
    before = build_excitation(recipe, TRANSPOSED)
    after = CASTS[cast](copy.deepcopy(before))
    assert isinstance(after, Composition)
    for (name, found), expected in zip(after.named_buffers(), before.buffers(), strict=True):
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name


def test_a_model_on_the_meta_device_keeps_its_hyperparameters() -> None:
    excitation = build_excitation(RECIPES[3], PLAIN, device="meta")
    assert all(parameter.is_meta for parameter in excitation.parameters())
    materialized = excitation.to_empty(device="cpu")
    assert [s.epsilon.item() for s in materialized.stages if not isinstance(s, LWE)] == [
        torch.tensor(1e-5).item(),
        torch.tensor(0.1).item(),
    ]


def test_a_float64_layer_keeps_its_epsilon_in_float64() -> None:
    assert MWE(0.1, dtype=torch.float64).epsilon.item() == 0.1
    assert Standardize(1e-5, dtype=torch.float64).epsilon.item() == 1e-5
