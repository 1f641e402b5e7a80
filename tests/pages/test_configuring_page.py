"""docs/configuring.md names the options, values and keys that the code has."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import we_surgery as ws
from we_surgery.excitations import LWE
from we_surgery.excitations.functions import ACTIVATIONS
from we_surgery.excitations.gain import ATTENTIONS as GAIN_ATTENTIONS
from we_surgery.excitations.lwe_global import RESIZINGS
from we_surgery.excitations.lwe_heads import LAYERS
from we_surgery.excitations.mwe import _LEARNABLE, CURVES
from we_surgery.excitations.mwe_scheduled import SHAPES
from we_surgery.planning.config import make_policy
from we_surgery.planning.policy import CELLS
from we_surgery.planning.rules import STANDARDIZE_CHOICES
from we_surgery.transplants.bam import FORMS

PAGE = (Path(__file__).parents[2] / "docs" / "configuring.md").read_text(encoding="utf-8")
FLAG = ("true", "false")
INTEGER = "an integer from 1 on"

NAMED_VALUES: dict[str, tuple[str, ...]] = {
    "lwe.attention": tuple(LWE.attentions),
    "lwe.skip": (*FLAG, "null"),
    "lwe.activation": tuple(ACTIVATIONS),
    "lwe.gate": tuple(ACTIVATIONS),
    "lwe.inner": ("null", "+"),
    "lwe.kernel": ("null",),
    "lwe.separate": FLAG,
    "lwe.rank": ("null",),
    "lwe.resize": RESIZINGS,
    "lwe.averaged": FLAG,
    "lwe.layer": LAYERS,
    "lwe.hidden": ("null",),
    "lwe.then": ("null",),
    "mwe.detach_max": FLAG,
    "mwe.curve": tuple(CURVES),
    "mwe.rescale": FLAG,
    "mwe.learn": _LEARNABLE,
    "mwe.relative": FLAG,
    "mwe.maximum": ("tensor", "filter"),
    "dynamic_sparse.kernels": FLAG,
    "shift_attention.shared": FLAG,
    "gain.attention": GAIN_ATTENTIONS,
    "weight_compander.learn": FLAG,
    "lwe_gradient.lwe": ("null", "lwe"),
    "mwe_scheduled.shape": SHAPES,
    "bam.form": FORMS,
    "max_dropout.rate": ("null",),
    "max_dropout.always_on": FLAG,
    "max_dropout.insert": FLAG,
}
"""What stands in code in the column of values; all others are ranges."""

EPSILON = ("a number from 1e-6 to 1", (1e-6, 1), (9e-7, 1.01))
POSITIVE = ("a finite number over 0", (1e-9,), (0, float("inf")))
NULL_OR_POSITIVE = (f"`null`, {POSITIVE[0]}", *POSITIVE[1:])
# A range in words, a value on each of its ends that is taken, and one beyond each that is not.
RANGES: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "standardize.epsilon": ("a finite number from 0 on", (0, 5), (-1e-9, float("inf"))),
    "lwe.reduction": (INTEGER, (1,), (0, 1.5)),
    "lwe.repeat": (INTEGER, (1, 2), (0, 1.5)),
    "mwe.epsilon": EPSILON,
    "mwe_gradient.epsilon": EPSILON,
    "mwe_scheduled.epsilon": EPSILON,
    "mwe_scheduled.final": EPSILON,
    "mwe_scheduled.steps": (INTEGER, (1,), (0, 1.5)),
    "mwe.maximum": ("`tensor`, `filter`, a number between 0 and 1", (0.01, 0.99), (0, 1)),
    "shift_attention.inverse_temperature": POSITIVE,
    "scaled_standardize.gamma": POSITIVE,
    "expand.rate": ("an integer from 2 on", (2,), (1, 2.5)),
    "weight_compander.a": NULL_OR_POSITIVE,
    "weight_compander.b": NULL_OR_POSITIVE,
    "se.reduction": (INTEGER, (1,), (0, 1.5)),
    "cbam.reduction": (INTEGER, (1,), (0, 1.5)),
    "bam.reduction": (INTEGER, (1,), (0, 1.5)),
    "max_dropout.rate": ("`null`, a number from 0 to 1", (0, 1), (-0.1, 1.1)),
}


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> dict[str, list[str]]:
    """The cells of a section's tables by the code in their first column."""
    lines = [line for line in section(title).splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


def codes(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", text))


EXCITATION_ROWS = rows("Options of the excitations")
TRANSPLANT_ROWS = rows("Options of the transplants")
# Other tests register excitations of their own.
OURS = {n: stage for n, stage in ws.EXCITATIONS.items() if stage.__module__.startswith("we_surg")}
OPTIONS: dict[str, Any] = {
    f"{name}.{option}": default
    for name, stage in OURS.items()
    for option, default in stage.options().items()
}
TRANSPLANT_OPTIONS: dict[str, Any] = {
    f"{name}.{field.name}": field.default
    for name, transplant in ws.TRANSPLANTS.items()
    for field in fields(transplant)
    if field.name != "match"
}
ALL_ROWS = EXCITATION_ROWS | TRANSPLANT_ROWS


def test_the_page_has_exactly_the_options_that_the_registries_have() -> None:
    assert list(EXCITATION_ROWS) == list(OPTIONS)
    assert list(TRANSPLANT_ROWS) == list(TRANSPLANT_OPTIONS)


@pytest.mark.parametrize("option", [*OPTIONS, *TRANSPLANT_OPTIONS])
def test_the_defaults_are_those_of_the_code(option: str) -> None:
    shown = yaml.safe_load(ALL_ROWS[option][0].strip("`"))
    assert shown == (OPTIONS | TRANSPLANT_OPTIONS)[option]


@pytest.mark.parametrize("option", NAMED_VALUES)
def test_the_page_has_exactly_the_values_that_an_option_takes(option: str) -> None:
    assert codes(ALL_ROWS[option][1]) == NAMED_VALUES[option]


@pytest.mark.parametrize("option", RANGES)
def test_ranges_are_as_wide_as_the_page_says(option: str) -> None:
    words, inside, outside = RANGES[option]
    assert ALL_ROWS[option][1] == words
    for value in inside:
        convert_with(option, value)
    for value in outside:
        with pytest.raises(ws.InputError):
            convert_with(option, value)


def convert_with(option: str, value: float) -> None:
    stage, name = option.split(".")
    if option in TRANSPLANT_OPTIONS:
        make_policy("none", transplants=[{stage: {name: value}}])
    else:
        config = {"conv": stage, "linear": "skip", stage: {name: value}}
        ws.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), config=config)


def test_an_option_without_named_values_has_a_range() -> None:
    # What torch can make a conv of, and what divides the layer.
    free = {"cbam.kernel_size", "bam.dilation", "lwe.heads"}
    assert set(ALL_ROWS) == set(NAMED_VALUES) | set(RANGES) | free


def test_the_page_says_which_excitations_have_no_options() -> None:
    without = [name for name in OURS if not OURS[name].options()]
    sentence = re.search(r"\n\n([^|]*) have no options\.", section("Options of the excitations"))
    assert sentence is not None
    assert list(codes(sentence[1])) == without


@pytest.mark.parametrize("attention", LWE.attentions)
def test_the_page_says_what_an_attention_does_not_take(attention: str) -> None:
    lacks = {
        "se": set(),
        "bam": set(),
        "cbam": set(),
        "global": {"inner"},
        "triplet": {"reduction", "activation", "inner"},
        "direct": {"reduction", "activation", "gate", "inner"},
        "heads": set(),
        "position": {"reduction"},
    }
    assert set(LWE.takes) - set(LWE.attentions[attention].takes) == lacks[attention]
    text = " ".join(section("Options of the excitations").split())
    if lacks[attention]:
        said = re.search(rf"`{attention}` takes (?:no|none of) ([^;.]*)[;.]", text)
        assert said is not None
        assert set(codes(said[1])) == lacks[attention]


def test_the_keys_of_a_config_are_those_that_are_read() -> None:
    table = rows("The config file")
    named = {key for row in PAGE.splitlines() if row.startswith("| `conv`") for key in codes(row)}
    assert set(CELLS) <= named
    assert set(ws.MODES) == set(codes(table["mode"][0]))
    assert set(STANDARDIZE_CHOICES) < set(codes(table["standardize"][0]))
    with pytest.raises(ws.InputError) as caught:
        make_policy(config={"nothing": 1})
    known = set(re.findall(r"\w+", caught.value.cure.partition(":")[2])) - set(ws.EXCITATIONS)
    assert known == {"mode", *CELLS, "rules", "transplants"}


def test_rules_are_not_added_up() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    rules = [ws.Rule("0", options={"lwe": {"reduction": 2}}), ws.Rule("*", standardize="off")]
    (row,) = ws.plan(model, "lwe", rules=rules).decisions
    assert row.excitation == [{"lwe": {}}]


def test_the_formulas_are_those_of_the_stages() -> None:
    torch.manual_seed(0)
    model = ws.convert(nn.Sequential(nn.Conv2d(32, 4, 3)), "lwe")
    raw, lwe = model[0].raw_weight, model[0].excitation.lwe
    multiplier = lwe.fc2(lwe.fc1(raw.mean((2, 3))).relu()).sigmoid()
    torch.testing.assert_close(model[0].weight, multiplier[:, :, None, None] * raw)
    assert lwe.fc1.out_features == 32 // 16

    model = ws.convert(nn.Sequential(nn.Linear(8, 4)), "mwe")
    raw = model[0].raw_weight
    limit = 1.1 * raw.abs().max()
    torch.testing.assert_close(model[0].weight, limit * torch.atanh(raw / limit))
