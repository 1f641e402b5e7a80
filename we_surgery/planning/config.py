"""A YAML file or a mapping -> a policy; unknown keys are errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from we_surgery._util import shipped
from we_surgery._util.settings import refuse_unknown
from we_surgery.errors import InputError, check_known
from we_surgery.excitations import EXCITATIONS, Standardize, check_stage, load_plugins
from we_surgery.excitations.stage_text import YAMLLoader, parse_stages
from we_surgery.planning.policy import CELLS, DEFAULT_MODE, MODES, Policy, merged_options
from we_surgery.planning.rules import Rule, check_standardize
from we_surgery.transplants import parse_transplants


def make_policy(
    mode: str | None = None,
    config: str | Path | Mapping[str, Any] | Policy | None = None,
    rules: Sequence[Rule] | None = (),
    transplants: Sequence[Any] | None = (),
) -> Policy:
    """The policy of a mode or of a config, with further rules and transplants.

    Args:
        mode: a mode's name, for a config that names none, or the same.
        config: a YAML file, the name of one that comes with the package (``lwe``), a mapping
            of the same shape, or a policy.
        rules: exceptions, added after the config's.
        transplants: as in :func:`we_surgery.convert`, added after the config's.

    Raises:
        InputError: something in them is unknown or does not fit together.
    """
    rules = _checked_rules(rules)
    if isinstance(config, Policy):
        if mode is not None:
            raise InputError(
                "both a mode and a ready-made policy were given", "Give one of the two."
            )
        return config.with_rules(rules).with_transplants(parse_transplants(transplants))
    settings: Any = config or {}
    source = "the config"
    if isinstance(config, str | Path):
        settings, source = read_yaml(shipped.find(config, shipped.CONFIGS)), str(config)
    if mode is not None and isinstance(settings, Mapping):
        settings = {"mode": mode, **settings}
    policy = policy_from_config(settings, source)
    if mode is not None and mode != policy.mode:
        raise InputError(
            f"the mode {mode!r} contradicts {source}, which says {policy.mode!r}",
            "Give only the config, or change its `mode`.",
        )
    return policy.with_rules(rules).with_transplants(parse_transplants(transplants))


def _checked_rules(rules: Any) -> tuple[Rule, ...]:
    if rules is None:
        return ()
    is_list = isinstance(rules, Sequence) and all(isinstance(rule, Rule) for rule in rules)
    if not is_list:
        raise InputError(
            f"rules must be a list of rules, got {rules!r}",
            'Write for example `rules=[ws.Rule("layer4.*", "skip")]`.',
        )
    return tuple(rules)


def policy_from_config(config: Mapping[str, Any], source: str = "the config") -> Policy:
    """A policy from a config mapping (see ``configs/``); unknown keys are errors."""
    if not isinstance(config, Mapping):
        raise InputError(
            f"{source} is not a mapping but {type(config).__name__}",
            "Write for example `mode: lwe`.",
        )
    load_plugins(config)
    known = ("mode", *CELLS, "standardize", *EXCITATIONS, "rules", "transplants")
    refuse_unknown(config, known, source)
    mode = check_known("mode called", config.get("mode", DEFAULT_MODE), MODES)
    cells = MODES[mode].cells
    for cell in CELLS:
        if cell in config:
            parse_stages(config[cell], f"{cell} in {source}")
            cells[cell] = config[cell]
    standardize, own_options = _split_options(config, source)
    rules = config.get("rules") or []
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise InputError(
            f"rules in {source} is not a list", "Write each rule as `- match: PATTERN`."
        )
    return Policy(
        mode=mode,
        cells=cells,
        standardize=standardize or "auto",
        options=merged_options(MODES[mode].options, own_options),
        rules=tuple(_rule_from_config(rule, source) for rule in rules),
        transplants=parse_transplants(config.get("transplants") or (), f"transplants in {source}"),
    )


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file; an empty mapping for an empty file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        config = yaml.load(text, YAMLLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())
        raise InputError(
            f"the config {path} cannot be read: {message}",
            f"Give a YAML file, or a name: {', '.join(shipped.names_in(shipped.CONFIGS))}.",
        ) from error
    return {} if config is None else config


def _split_options(
    config: Mapping[str, Any], where: str
) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """The ``standardize`` choice and the options by stage.

    ``standardize`` is both: a choice, or a mapping of its options with the choice as ``when``.
    """
    options: dict[str, dict[str, Any]] = {}
    for name in EXCITATIONS:
        value = config.get(name)
        if isinstance(value, Mapping):
            stage_options = dict(value)
            stage_options.pop("when", None) if name == Standardize.name else None
            check_stage(name, stage_options)
            options[name] = stage_options
        elif value is not None and name != Standardize.name:
            check_stage(name, value)
    choice = config.get(Standardize.name)
    if isinstance(choice, Mapping):
        choice = choice.get("when")
    return check_standardize(choice, where), options


def _rule_from_config(rule: object, source: str) -> Rule:
    where = f"a rule in {source}"
    if not isinstance(rule, Mapping) or not isinstance(rule.get("match"), str):
        raise InputError(
            f"{where} has no `match`: {rule!r}",
            "Write `- match: PATTERN` with a glob, `re:...` or `type:...`.",
        )
    load_plugins(rule)
    refuse_unknown(rule, ("match", "excite", Standardize.name, *EXCITATIONS), where)
    standardize, options = _split_options(rule, where)
    return Rule(rule["match"], rule.get("excite"), standardize, options)
