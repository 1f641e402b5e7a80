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
    Composition,
    Stages,
    WeightLayout,
    build_excitation,
    rebuild_excitation,
)
from we_surgery.excitations.record import to_tensor

PLAIN = WeightLayout((6, 8, 3, 3))
GROUPED = WeightLayout((6, 4, 3, 3), groups=2)
TRANSPOSED = WeightLayout((8, 3, 3, 3), groups=2, transposed=True)
STAGES: list[Stages] = [
    [{"standardize": {}}],
    [{"standardize": {"epsilon": 1e-3}}, {"lwe": {"reduction": 2}}],
    [{"mwe": {"epsilon": 0.2, "detach_max": False}}],
    [{"standardize": {}}, {"lwe": {}}, {"mwe": {}}],
]


def as_saved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return safetensors.torch.load(safetensors.torch.save(state))


Order = Callable[[dict[str, Tensor]], dict[str, Tensor]]
PLACES: list[tuple[WeightLayout, Order, torch.dtype]] = [
    (PLAIN, dict, torch.float64),
    (GROUPED, as_saved, torch.bfloat16),
    (TRANSPOSED, lambda s: dict(reversed(s.items())), torch.float32),
]


@pytest.mark.parametrize(("layout", "order", "dtype"), PLACES, ids=["plain", "grouped", "transp"])
@pytest.mark.parametrize("stages", STAGES, ids=range(len(STAGES)))
def test_an_excitation_is_rebuilt_bit_equal_from_its_state_dict(
    stages: Stages, layout: WeightLayout, order: Order, dtype: torch.dtype
) -> None:
    built = build_excitation(stages, layout, dtype=dtype)
    rebuilt = rebuild_excitation(order(built.state_dict()))
    assert repr(rebuilt) == repr(built)
    assert list(rebuilt.state_dict()) == list(built.state_dict())
    for found, expected in zip(rebuilt.parameters(), built.parameters(), strict=True):
        assert found.dtype == expected.dtype
        assert found.requires_grad
    weight = torch.randn(layout.shape, dtype=dtype)
    assert torch.equal(rebuilt(weight), built(weight))


def test_rebuilding_draws_no_random_numbers() -> None:
    state = build_excitation(STAGES[3], PLAIN).state_dict()
    before = torch.get_rng_state()
    rebuild_excitation(state)
    assert torch.equal(torch.get_rng_state(), before)


def reworded(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    def damage(state: dict[str, Tensor]) -> None:
        text = bytes(state["_extra_state"].tolist()).decode()
        assert old in text
        state["_extra_state"] = torch.tensor(list(text.replace(old, new).encode()))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("_extra_state"), "has no record"),
        (lambda s: s.update({"_extra_state": torch.zeros(9)}), "cannot be read"),
        (lambda s: s.update({"_extra_state": to_tensor({"schema": 3})}), "has schema 3"),
        (reworded('"mwe"', '"lve"'), "did you mean"),
        (reworded('"gate": "sigmoid"', '"gate": "wide"'), "gate must be one of"),
        (reworded('"gate": "sigmoid", ', ""), "its record should be"),
        (reworded('"gate"', '"fence"'), "fence"),
        (reworded('"epsilon": 0.1', '"epsilon": NaN'), "epsilon must lie"),
        (reworded('"paused": false', '"paused": 0'), "unexpected content"),
        (reworded('"transposed_groups": null', '"transposed_groups": -1'), "unexpected content"),
        (reworded('{"lwe"', '{"lwe": {}, "mwe"'), "unexpected content"),
        (lambda s: s.pop("lwe.fc2.bias"), "fc2.bias"),
        (lambda s: s.pop("lwe.fc1.weight"), "fc1.weight"),
        (lambda s: s.update({"lwe.fc2.weight": torch.zeros(3, 3)}), "size mismatch"),
        (lambda s: s.update({"lve.fc1.weight": torch.zeros(3, 3)}), "lve.fc1.weight"),
        (lambda s: s.update({"mwe.epsilon": torch.tensor(0.1)}), "mwe.epsilon"),
        (lambda s: s.update({"stray": torch.zeros(1)}), "stray"),
    ],
)
def test_a_damaged_state_dict_is_an_error_that_says_what_is_wrong(
    damage: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    state = dict(build_excitation(STAGES[3], PLAIN).state_dict())
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
    stages: Stages = [{"standardize": {"epsilon": 0.1}}, {"mwe": {"detach_max": False}}]
    stages = [*stages, {"shift_attention": {"inverse_temperature": 0.1}}]
    before = build_excitation(stages, TRANSPOSED)
    after = CASTS[cast](copy.deepcopy(before))
    assert isinstance(after, Composition)
    assert after.record == before.record
    assert torch.equal(after.get_extra_state(), before.get_extra_state())
    for (name, found), expected in zip(after.named_buffers(), before.buffers(), strict=True):
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name


def test_a_model_on_the_meta_device_keeps_its_hyperparameters() -> None:
    excitation = build_excitation(STAGES[3], PLAIN, device="meta")
    assert all(parameter.is_meta for parameter in excitation.parameters())
    materialized = excitation.to_empty(device="cpu")
    assert [s.epsilon for s in materialized.stages if not isinstance(s, LWE)] == [1e-5, 0.1]
