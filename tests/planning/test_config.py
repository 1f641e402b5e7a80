"""Configs: YAML and mappings, and what is unknown in them."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import we_surgery as ws
from we_surgery import MODES, InputError, Policy, Rule, make_policy


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_a_config_with_that_name(mode: str) -> None:
    assert make_policy(mode) == make_policy(config={"mode": mode})
    assert make_policy(mode).cells == MODES[mode].cells


def test_nothing_said_means_lwe() -> None:
    assert make_policy() == make_policy("lwe") == Policy()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mod": "lwe"}, "the config has an unknown key 'mod'; did you mean 'mode'"),
        ({"mode": "lwr"}, "no mode called 'lwr'; did you mean 'lwe'"),
        ({"mode": ["lwe"]}, "no mode called"),
        ({"conv": "lwee"}, "no excitation called 'lwee'; did you mean 'lwe'"),
        ({"conv": ["lwe", "mwe"]}, "conv in the config: .* is not a list of stages"),
        ({"conv": "mwe+lwe"}, "Write lwe\\+mwe"),
        ({"lwe": {"reductions": 2}}, "lwe has no option 'reductions'; did you mean 'reduction'"),
        ({"mwe": 0.1}, "the options of mwe must be a mapping, not 0.1"),
        ({"standardize": "allways"}, "standardize cannot be 'allways'"),
        ({"standardize": {"wen": "on"}}, "standardize has no option 'wen'"),
        ({"rules": "head"}, "rules in the config is not a list"),
        ({"rules": {"match": "head"}}, "rules in the config is not a list"),
        ({"rules": [{"excite": "mwe"}]}, "a rule in the config has no `match`"),
        ({"rules": [{"match": 3}]}, "has no `match`"),
        ({"rules": ["head"]}, "has no `match`"),
        ({"rules": [{"match": "a", "exite": "mwe"}]}, "unknown key 'exite'.* mean 'excite'"),
        ({"rules": [{"match": "a", "excite": "mew"}]}, "no excitation called 'mew'"),
        ({"rules": [{"match": "a", "mwe": {"eps": 1}}]}, "no option 'eps'.* mean 'epsilon'"),
        ({"rules": [{"match": "a", "standardize": "n"}]}, "standardize cannot be 'n'"),
        ([1], "the config is not a mapping but list"),
    ],
)
def test_whatever_is_unknown_is_an_error_that_suggests(config: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_policy(config=config)


def test_no_rules_and_no_transplants_may_be_given_as_none() -> None:
    assert make_policy(rules=None, transplants=None) == make_policy()
    model = nn.Sequential(nn.Linear(2, 2))
    assert ws.plan(model, rules=None, transplants=None) == ws.plan(model)
    ws.convert(model, rules=None, transplants=None)


@pytest.mark.parametrize("rules", [Rule("a", "skip"), "a=skip", [{"match": "a"}], 3])
def test_what_is_no_list_of_rules_is_refused(rules: Any) -> None:
    with pytest.raises(InputError, match="rules must be a list of rules"):
        make_policy(rules=rules)


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "mode: we\nliner: skip\n")
    with pytest.raises(InputError, match=r"config\.yaml has an unknown key 'liner'.* 'linear'"):
        make_policy(config=path)


@pytest.mark.parametrize("text", ["a: [", "mode: \x00"])
def test_a_file_that_is_no_yaml_is_an_input_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.yaml cannot be read"):
        make_policy(config=write(tmp_path, text))


def test_a_file_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml cannot be read"):
        make_policy(config=str(tmp_path / "none.yaml"))


def test_a_file_that_is_no_mapping_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a mapping but str"):
        make_policy("we", write(tmp_path, "lwe"))


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    assert make_policy(config=write(tmp_path, "# nothing\n")) == Policy()


@pytest.mark.parametrize(
    ("text", "standardize"),
    [
        ("standardize: on", "on"),
        ("standardize: off", "off"),
        ("standardize: yes", "on"),
        ("standardize: 'on'", "on"),
        ("standardize: auto", "auto"),
        ("standardize: {when: off, epsilon: 0.001}", "off"),
        ("standardize: {epsilon: 0.001}", "auto"),
    ],
)
def test_yaml_booleans_mean_on_and_off(text: str, standardize: str, tmp_path: Path) -> None:
    policy = make_policy(config=write(tmp_path, text))
    assert policy.standardize == standardize
    assert policy.options == ({"standardize": {"epsilon": 0.001}} if "epsilon" in text else {})


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_yaml_numbers_may_be_written_as_people_write_them(text: str, tmp_path: Path) -> None:
    policy = make_policy(config=write(tmp_path, f"mwe: {{epsilon: {text}}}"))
    assert policy.options == {"mwe": {"epsilon": 0.001}}


def test_a_whole_file_becomes_a_policy(tmp_path: Path) -> None:
    text = """
    mode: we
    linear: skip
    shift: lwe + mwe
    mwe: {epsilon: 0.2, detach_max: off}
    rules:
      - match: layer4.*
        excite: lwe+mwe
        standardize: on
        mwe: {epsilon: 0.05}
      - match: type:StdConv2d
        excite: skip
    """
    policy = make_policy(config=write(tmp_path, text))
    assert policy.mode == "we"
    assert policy.cells == {**MODES["we"].cells, "linear": "skip", "shift": "lwe + mwe"}
    assert policy.options == {"mwe": {"epsilon": 0.2, "detach_max": False}}
    assert policy.rules == (
        Rule("layer4.*", "lwe+mwe", "on", {"mwe": {"epsilon": 0.05}}),
        Rule("type:StdConv2d", "skip"),
    )


def test_rules_of_the_call_come_after_those_of_the_config() -> None:
    policy = make_policy(config={"rules": [{"match": "a"}]}, rules=[Rule("b")])
    assert [rule.pattern for rule in policy.rules] == ["a", "b"]
    assert make_policy(config=policy, rules=[Rule("c")]).rules[2].pattern == "c"


@pytest.mark.parametrize("as_file", [False, True])
def test_a_mode_beside_a_config_must_not_contradict_it(as_file: bool, tmp_path: Path) -> None:
    def config(text: str, mapping: dict[str, str]) -> Any:
        return write(tmp_path, text) if as_file else mapping

    assert make_policy("we", config("linear: skip", {"linear": "skip"})).mode == "we"
    assert make_policy("we", config("mode: we", {"mode": "we"})).mode == "we"
    with pytest.raises(InputError, match=r"the mode 'we' contradicts .*, which says 'lwe'"):
        make_policy("we", config("mode: lwe", {"mode": "lwe"}))


def test_a_mode_beside_a_ready_policy_is_refused() -> None:
    with pytest.raises(InputError, match="both a mode and a ready-made policy"):
        make_policy("we", Policy())


@pytest.mark.parametrize("value", ["0.1", [1], None, 2])
def test_a_wrong_value_of_an_option_is_an_input_error_of_the_plan(value: Any) -> None:
    with pytest.raises(InputError, match="mwe: epsilon must lie between"):
        ws.plan(nn.Linear(3, 3), config={"mwe": {"epsilon": value}})


CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))


MIXER, VIT = "mixer_s16_224", "vit_tiny_patch16_224"
MADE_FOR = {"mixer": MIXER, "mixer-channels": MIXER, "vit": VIT}
"""The timm models whose layers a config names."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_that_ships_can_be_read(path: Path) -> None:
    model: nn.Module = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4))
    if path.stem in MADE_FOR:
        with torch.device("meta"):
            model = timm.create_model(MADE_FOR[path.stem])
    assert ws.plan(model, config=path).excited


@pytest.mark.parametrize(("config", "tokens"), [("mixer", 16), ("mixer-channels", 0)])
def test_token_mixing_can_be_chosen(config: str, tokens: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(MIXER)
    plan = ws.plan(model, config=CONFIGS[0].with_name(f"{config}.yaml"))
    assert all(row.stages == ("mwe",) for row in plan.excited)
    assert sum("mlp_tokens" in row.layer for row in plan.excited) == tokens
    assert sum(row.kind == "linear" for row in plan.excited) == 17 + tokens


def test_the_four_sorts_of_layers_of_a_vit_can_be_chosen() -> None:
    with torch.device("meta"):
        model = timm.create_model(VIT)
    plan = ws.plan(model, config=CONFIGS[0].with_name("vit.yaml"))
    assert plan.pattern_matches == {
        "*.attn.qkv": 12,
        "*.attn.proj": 12,
        "*.mlp.fc*": 24,
        "head": 1,
    }
    assert len(plan.excited) == 49
