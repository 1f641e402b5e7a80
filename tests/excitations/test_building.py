"""Recipes that cannot be built, and what their errors say."""

import inspect
from typing import Any

import pytest
import torch

from we_surgery.errors import InputError
from we_surgery.excitations import (
    EXCITATIONS,
    LWE,
    MWE,
    Composition,
    Standardize,
    WeightLayout,
    build_excitation,
)

LAYOUT = WeightLayout((6, 8, 3, 3))
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"lew": {}}], "no excitation called 'lew'; did you mean 'lwe'"),
        ([{"composition": {}}], "no excitation called 'composition'"),
        ([{3: {}}], "no excitation called 3"),
        ([{"lwe": {"reductoin": 8}}], "lwe has no option 'reductoin'; did you mean 'reduction'"),
        ([{"lwe": {"layout": 8}}], "lwe has no option 'layout'"),
        ([{"mwe": {"reduction": 8}}], "mwe has no option 'reduction'"),
        ([{"mwe": 0.1}], "options of mwe must be a mapping"),
        ([{"mwe": {}}, {"mwe": {}}], "each stage once"),
        ([], "at least one stage"),
    ],
)
def test_stages_that_cannot_be_built_say_why(stages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_excitation(stages, LAYOUT)


@pytest.mark.parametrize("value", [0, -1, 2.0, "8", True, None])
def test_a_reduction_must_be_a_positive_integer(value: Any) -> None:
    with pytest.raises(InputError, match="lwe: reduction must be an integer of at least 1"):
        build_excitation([{"lwe": {"reduction": value}}], LAYOUT)


@pytest.mark.parametrize("value", [0, -0.1, 1e-7, 1.01, NAN, INFINITY, "0.1", None])
def test_mwe_refuses_an_epsilon_out_of_range(value: Any) -> None:
    with pytest.raises(InputError, match="mwe: epsilon must lie between 1e-06 and 1"):
        build_excitation([{"mwe": {"epsilon": value}}], LAYOUT)


@pytest.mark.parametrize("value", [-1e-9, NAN, INFINITY, "1e-5", None])
def test_standardization_refuses_an_epsilon_out_of_range(value: Any) -> None:
    with pytest.raises(InputError, match="standardize: epsilon must be finite and at least 0"):
        build_excitation([{"standardize": {"epsilon": value}}], LAYOUT)


@pytest.mark.parametrize("epsilon", [1e-6, 1])
def test_the_bounds_of_epsilon_survive_their_rounding_to_float32(epsilon: float) -> None:
    stored = torch.tensor(epsilon, dtype=torch.float32).item()
    assert MWE(stored).epsilon == stored


@pytest.mark.parametrize("value", ["no", 1, None])
def test_detach_max_must_be_true_or_false(value: Any) -> None:
    with pytest.raises(InputError, match="mwe: detach_max must be true or false"):
        build_excitation([{"mwe": {"detach_max": value}}], LAYOUT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "in_channels"), ((8, 0), "groups must"), ((8, 3), "3 groups do not divide 8")],
)
def test_lwe_refuses_widths_that_do_not_fit(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LWE(*arguments)


def test_a_stage_cannot_be_named_twice_in_a_composition() -> None:
    with pytest.raises(ValueError, match="each stage once, not mwe, mwe"):
        Composition([MWE(), MWE()])


def test_the_defaults_are_those_of_the_papers() -> None:
    defaults = {name: cls.options() for name, cls in EXCITATIONS.items()}
    assert defaults["standardize"] == {"epsilon": 1e-5}
    assert defaults["lwe"] | {"attention": "se", "reduction": 16, "skip": None} == defaults["lwe"]
    assert defaults["lwe"] | {"activation": "relu", "gate": "sigmoid"} == defaults["lwe"]
    assert defaults["mwe"] | {"epsilon": 0.1, "detach_max": True} == defaults["mwe"]


@pytest.mark.parametrize("name", EXCITATIONS)
def test_the_constructors_have_the_same_defaults_as_stages(name: str) -> None:
    parameters = inspect.signature(EXCITATIONS[name].__init__).parameters
    for option, default in EXCITATIONS[name].options().items():
        if option in parameters and parameters[option].default is not inspect.Parameter.empty:
            assert parameters[option].default == default


def test_stages_take_device_and_dtype_of_their_layer() -> None:
    stages = [{name: {}} for name in ("standardize", "lwe", "mwe")]
    built = build_excitation(stages, LAYOUT, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in built.parameters()} == {("meta", torch.bfloat16)}


def test_the_representation_shows_the_hyperparameters() -> None:
    shown = repr(Composition([Standardize(1e-4), MWE(0.2, detach_max=False)]))
    assert "Standardize(epsilon=0.0001)" in shown
    assert "MWE(epsilon=0.2, detach_max=False)" in shown
