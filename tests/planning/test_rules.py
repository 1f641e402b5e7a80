"""Rules: what a pattern matches, what it gives, what it refuses."""

import functools
from typing import Any

import pytest
from torch import nn

from we_surgery import InputError, Rule, make_policy
from we_surgery.excitations import WeightLayout
from we_surgery.reading import LayerFacts


class Special(nn.Conv2d):
    """A subclass, for the rules that go by class."""


CONV, SPECIAL, LINEAR = nn.Conv2d(4, 4, 3), Special(4, 4, 3), nn.Linear(4, 4)


def wide(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and module.out_features > 2


@pytest.mark.parametrize(
    ("pattern", "module", "name", "matches"),
    [
        ("layer4.0.conv1", CONV, "layer4.0.conv1", True),
        ("layer4.*", CONV, "layer4.0.conv1", True),
        ("*.conv1", CONV, "layer4.0.conv1", True),
        ("layer4", CONV, "layer4.0.conv1", False),
        ("Layer4.*", CONV, "layer4.0.conv1", False),
        ("layer[34].*", CONV, "layer3.conv", True),
        ("*", CONV, "", True),
        ("re:layer[34]", CONV, "net.layer3.conv", True),
        ("re:^layer", CONV, "net.layer3.conv", False),
        ("re:conv1$", CONV, "layer.conv10", False),
        ("type:Conv2d", CONV, "a", True),
        ("type:Conv2d", SPECIAL, "a", True),
        ("type:Special", CONV, "a", False),
        ("type:torch.nn.modules.conv.Conv2d", SPECIAL, "a", True),
        ("type:Conv2d", LINEAR, "a", False),
        (nn.Conv2d, SPECIAL, "a", True),
        (Special, CONV, "a", False),
        (wide, LINEAR, "a", True),
        (wide, CONV, "a", False),
        (lambda module, name: name.startswith("a"), CONV, "a.b", True),
        (functools.partial(lambda module, name, start: name.startswith(start), start="b"),
         CONV, "a.b", False),
    ],
)  # fmt: skip
def test_a_pattern_matches_by_name_expression_class_or_function(
    pattern: Any, module: nn.Module, name: str, matches: bool
) -> None:
    assert Rule(pattern).matches(module, name) is matches


@pytest.mark.parametrize(
    ("pattern", "shown"),
    [
        ("head", "head"),
        ("re:a|b", "re:a|b"),
        (nn.Conv2d, "type:Conv2d"),
        (wide, "callable:wide"),
        (functools.partial(wide), "callable:partial"),
    ],
)
def test_a_pattern_can_be_shown(pattern: Any, shown: str) -> None:
    assert Rule(pattern).pattern == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"excite": "lew"}, "no excitation called 'lew'; did you mean 'lwe'"),
        ({"excite": ""}, "'' is not a list of stages"),
        ({"excite": "mwe+lwe"}, "out of order or repeated\nWrite lwe\\+mwe"),
        ({"excite": "lwe+lwe"}, "out of order or repeated\nWrite lwe:"),
        ({"excite": "lwe+"}, "no excitation called ''"),
        ({"standardize": "yes"}, "standardize cannot be 'yes'"),
        ({"options": {"lwe": {"reduce": 8}}}, "no option 'reduce'; did you mean 'reduction'"),
        ({"options": {"lew": {}}}, "no excitation called 'lew'"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_at_once(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Rule("head", **arguments)


def test_a_broken_regular_expression_is_named() -> None:
    with pytest.raises(InputError, match=r"'re:\(' is not a valid regular expression"):
        Rule("re:(")


def decide(*rules: Rule, mode: str = "lwe", **facts: Any) -> tuple[tuple[str, ...], str]:
    given: dict[str, Any] = {
        "module": "block.conv",
        "parameter": "weight",
        "kind": "conv2d",
        "type_name": "torch.nn.modules.conv.Conv2d",
        "layout": WeightLayout((4, 4, 3, 3)),
    } | facts
    stages, reason = make_policy(mode, rules=rules).decide(LayerFacts(**given), CONV)
    return tuple(name for stage in stages for name in stage), reason


def test_the_last_rule_that_matches_wins() -> None:
    rules = [Rule("block.*", "skip"), Rule("*.conv", "mwe"), Rule("other.*", "lwe")]
    assert decide(*rules) == (("mwe",), "rule '*.conv'; not standardized: no norm after it")


def test_a_rule_without_stages_keeps_those_of_the_mode() -> None:
    rule = Rule("*", options={"lwe": {"reduction": 2}, "mwe": {"epsilon": 0.2}})
    facts = LayerFacts("a", "weight", "conv2d", "", WeightLayout((4, 4, 3, 3)))
    stages, reason = make_policy("lwe", rules=[rule]).decide(facts, CONV)
    assert stages == [{"lwe": {"reduction": 2}}]
    assert reason.startswith("conv; options of rule '*'")


def test_the_options_of_a_rule_come_over_those_of_the_config() -> None:
    config = {"mwe": {"epsilon": 0.05, "detach_max": False}}
    rule = Rule("a", options={"mwe": {"epsilon": 0.2}})
    facts = LayerFacts("a", "weight", "linear", "", WeightLayout((4, 4)))
    stages, _ = make_policy(config=config, rules=[rule]).decide(facts, LINEAR)
    assert stages == [{"mwe": {"epsilon": 0.2, "detach_max": False}}]


@pytest.mark.parametrize(
    "facts",
    [
        {"gate": "SEModule at 'se'"},
        {"shift": "by TemporalShift"},
        {"frozen": True},
        {"layout": WeightLayout((4, 1, 3, 3), groups=4)},
    ],
    ids=["gate", "shift", "frozen", "depthwise"],
)
def test_a_rule_overrides_what_the_mode_leaves_alone(facts: dict[str, Any]) -> None:
    assert decide(**facts)[0] == ()
    assert decide(Rule("*", "mwe"), **facts)[0] == ("mwe",)


def test_a_frozen_layer_stays_alone_under_a_rule_that_gives_only_options() -> None:
    stages, reason = decide(Rule("*", options={"lwe": {"reduction": 2}}), frozen=True)
    assert stages == ()
    assert "frozen" in reason


def test_no_rule_overrides_what_cannot_be_excited() -> None:
    stages, reason = decide(Rule("block.*", "lwe"), obstacle="is lazy")
    assert stages == ()
    assert reason == "rule 'block.*' matches, but it is lazy"


@pytest.mark.parametrize("on", ["on", True])
@pytest.mark.parametrize("off", ["off", False])
def test_a_rule_can_say_whether_to_standardize(on: Any, off: Any) -> None:
    assert decide(Rule("*", standardize=on))[0] == ("standardize", "lwe")
    assert decide(Rule("*", standardize=off), followed_by_norm=True)[0] == ("lwe",)
    assert decide(followed_by_norm=True)[0] == ("standardize", "lwe")


def test_a_rule_can_name_the_standardization_as_a_stage() -> None:
    assert decide(Rule("*", "standardize+lwe")) == (("standardize", "lwe"), "rule '*'")
    assert decide(Rule("*", "standardize"))[0] == ("standardize",)


def test_a_rule_can_standardize_a_linear_layer() -> None:
    facts = {"kind": "linear", "layout": WeightLayout((4, 4))}
    assert decide(Rule("*", standardize="on"), **facts)[0] == ("standardize", "mwe")
    assert decide(**facts)[0] == ("mwe",)
