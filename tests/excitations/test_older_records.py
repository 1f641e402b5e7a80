"""Records of before the present schema, which know fewer options."""

import json

import pytest
import torch
from torch import Tensor

from we_surgery.errors import InputError
from we_surgery.excitations import EXCITATIONS, WeightLayout, build_excitation, rebuild_excitation
from we_surgery.excitations.record import RECORD_KEY

LATER = (
    "further",
    "gamma",
    "kernel",
    "kernels",
    "maximum",
    "relative",
    "repeat",
    "separate",
    "then",
)
"""Options, and what is made of them, that the first schema does not know."""

LAYOUT = WeightLayout((6, 8, 3, 3))


def older(state: dict[str, Tensor], paused: bool = False) -> dict[str, Tensor]:
    record = json.loads(bytes(state[RECORD_KEY].tolist()))
    for stage in record["stages"]:
        for options in stage.values():
            options.pop("relative", None)
            options.pop("maximum", None)
    text = json.dumps(record | {"schema": 1, "paused": paused})
    return {**state, RECORD_KEY: torch.tensor(list(text.encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("paused", [True, False])
def test_they_are_read_with_the_defaults_of_what_they_lack(paused: bool) -> None:
    made = build_excitation([{"standardize": {}}, {"lwe": {}}, {"mwe": {"epsilon": 0.2}}], LAYOUT)
    state = older(made.state_dict(), paused)
    rebuilt = rebuild_excitation(state)
    assert rebuilt.is_paused is paused
    made.load_state_dict(state)
    made.set_paused("preserve" if paused else False)
    assert rebuilt.record == made.record
    weight = torch.randn(LAYOUT.shape)
    assert torch.equal(rebuilt(weight), made(weight))


def test_they_are_of_another_excitation_where_an_option_that_they_have_differs() -> None:
    state = older(build_excitation([{"mwe": {"curve": "tanh"}}], LAYOUT).state_dict())
    with pytest.raises(RuntimeError, match="curve='atanh' in the model and 'tanh'"):
        build_excitation([{"mwe": {}}], LAYOUT).load_state_dict(state)


def test_a_record_of_the_present_schema_says_all_options() -> None:
    state = older(build_excitation([{"mwe": {}}], LAYOUT).state_dict())
    text = bytes(state[RECORD_KEY].tolist()).decode().replace('"schema": 1', '"schema": 2')
    state[RECORD_KEY] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(InputError, match="its record should be"):
        rebuild_excitation(state)


@pytest.mark.parametrize("name", sorted(EXCITATIONS.keys() - {"mwe_scheduled"}))  # is not older
def test_a_pickle_without_the_options_is_read_with_their_defaults(name: str) -> None:
    made = build_excitation([{name: {}}], LAYOUT)
    (stage,) = made.stages
    older = made.__class__.__new__(made.__class__)
    state = {**made.__dict__, "_modules": dict(made._modules)}
    bare = {k: v for k, v in stage.__dict__.items() if k not in LATER}
    bare["_modules"] = {k: v for k, v in stage._modules.items() if k not in LATER}
    state["_modules"][name] = stage.__class__.__new__(stage.__class__)
    state["_modules"][name].__setstate__(bare)
    older.__setstate__(state)
    weight = torch.randn(LAYOUT.shape)
    assert older.record == made.record
    assert torch.equal(older.eval()(weight), made.eval()(weight))


@pytest.mark.parametrize("name", EXCITATIONS)
def test_a_record_without_the_options_is_read_with_their_defaults(name: str) -> None:
    made = build_excitation([{name: {}}], LAYOUT)
    state = made.state_dict()
    record = json.loads(bytes(state[RECORD_KEY].tolist()))
    (said,) = (options for stage in record["stages"] for options in stage.values())
    stages = [{name: {k: v for k, v in said.items() if k not in LATER}}]
    text = json.dumps(record | {"schema": 1, "stages": stages})
    state[RECORD_KEY] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    made.load_state_dict(state)
    assert rebuild_excitation(state).record == made.record
