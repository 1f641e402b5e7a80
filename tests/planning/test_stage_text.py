"""Stages as text: joined by +, options in parentheses."""

from typing import Any

import pytest

from we_surgery import InputError, Rule
from we_surgery.excitations.stage_text import parse_stages


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("skip", {}),
        ("mwe", {"mwe": {}}),
        ("lwe + mwe", {"lwe": {}, "mwe": {}}),
        ("lwe(reduction=8)", {"lwe": {"reduction": 8}}),
        (
            "standardize(epsilon=1e-3)+lwe( reduction = 8 )+mwe(epsilon=0.2, detach_max=false)",
            {
                "standardize": {"epsilon": 0.001},
                "lwe": {"reduction": 8},
                "mwe": {"epsilon": 0.2, "detach_max": False},
            },
        ),
        ("lwe()", {"lwe": {}}),
    ],
)
def test_a_text_is_stages_and_their_options(text: str, stages: dict[str, Any]) -> None:
    assert parse_stages(text, "here") == stages


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "here: '' is not a list of stages"),
        (3, "here: 3 is not a list of stages"),
        ("lwe+", "no excitation called ''"),
        ("lwe(reduction=8", "the options of .* cannot be read"),
        ("lwe(reductoin=8)", "lwe has no option 'reductoin'; did you mean 'reduction'"),
        ("lwe(reduction=[)", "the options of .* cannot be read"),
        ("mwe+lwe", "out of order or repeated"),
        ("mwe+mwe", "out of order or repeated"),
    ],
)
def test_a_text_that_is_not_a_list_of_stages_says_why(text: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_stages(text, "here")


def test_a_rule_takes_options_in_its_text_over_those_beside_it() -> None:
    beside = {"mwe": {"epsilon": 0.1, "detach_max": False}}
    rule = Rule("layer4.*", "lwe(reduction=8)+mwe(epsilon=0.2)", options=beside)
    assert rule == Rule(
        "layer4.*",
        "lwe+mwe",
        options={"lwe": {"reduction": 8}, "mwe": {"epsilon": 0.2, "detach_max": False}},
    )
