"""The plan: the modes' table, its reasons, its JSON, and that making it changes nothing."""

import copy
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from toys import EVERYTHING, ConvNet, Zoo

import we_surgery as ws
from we_surgery import Plan, Rule

TABLE = {
    "lwe": {
        "grey": "skip",
        "normed": "LWE (standardized)",
        "unnormed": "LWE",
        "depthwise": "skip",
        "gate.reduce": "skip",
        "gate.expand": "skip",
        "shifted.net": "skip",
        "attention.in_proj_weight": "MWE",
        "attention.out_proj": "MWE",
        "head": "MWE",
    },
    "mwe": {
        "grey": "MWE",
        "normed": "MWE (standardized)",
        "unnormed": "MWE",
        "depthwise": "MWE",
        "shifted.net": "MWE (standardized)",
    },
    "we": {
        "grey": "MWE",
        "normed": "LWE (standardized)",
        "unnormed": "LWE",
        "depthwise": "MWE",
        "shifted.net": "MWE (standardized)",
    },
    "lwe+mwe": {
        "grey": "MWE",
        "normed": "LWE+MWE (standardized)",
        "unnormed": "LWE+MWE",
        "depthwise": "MWE",
        "shifted.net": "MWE (standardized)",
    },
}


def verdicts(plan: Plan) -> dict[str, str]:
    return {row.layer: row.verdict for row in plan.decisions}


@pytest.mark.parametrize("mode", TABLE)
def test_each_mode_gives_each_sort_of_layer_what_the_table_says(mode: str) -> None:
    assert verdicts(ws.plan(Zoo(), mode)) == TABLE["lwe"] | TABLE[mode]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("grey", "a single input channel"),
        ("normed", "standardized: 'norm'"),
        ("unnormed", "not standardized: no norm after it"),
        ("depthwise", "depthwise: one input channel a group"),
        ("gate.reduce", "inside an attention gate"),
        ("shifted.net", "shift-fed"),
        ("head", "linear: no kernel locations"),
    ],
)
def test_each_row_says_why(layer: str, reason: str) -> None:
    rows = {row.layer: row for row in ws.plan(Zoo()).decisions}
    assert reason in rows[layer].reason


@pytest.mark.parametrize(
    ("standardize", "standardized"),
    [
        ("auto", {"normed", "shifted.net"}),
        ("on", {"normed", "unnormed", "shifted.net"}),
        ("off", set()),
    ],
)
def test_standardization_is_for_convs_and_by_default_for_those_before_a_norm(
    standardize: str, standardized: set[str]
) -> None:
    plan = ws.plan(Zoo(), config={"mode": "we", "standardize": standardize})
    assert {row.layer for row in plan.decisions if "standardize" in row.stages} == standardized


def test_a_conv_of_fan_in_1_is_never_standardized() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4))
    row = ws.plan(model, "mwe", rules=[Rule("0", standardize="on")]).decisions[0]
    assert row.stages == ("mwe",)
    assert "fan-in 1, not standardized" in row.reason


@pytest.mark.parametrize(
    ("cell", "layer"),
    [
        ("conv", "normed"),
        ("depthwise", "grey"),
        ("shift", "shifted.net"),
        ("linear", "head"),
        ("gate", "gate.expand"),
    ],
)
def test_each_cell_of_the_table_can_be_set(cell: str, layer: str) -> None:
    config = {"mode": "lwe", cell: "lwe+mwe", "standardize": "off"}
    assert verdicts(ws.plan(Zoo(), config=config))[layer] == "LWE+MWE"
    assert verdicts(ws.plan(Zoo(), config={"mode": "lwe+mwe", cell: "skip"}))[layer] == "skip"


def test_the_plan_counts_what_training_adds() -> None:
    vanilla = ConvNet()
    plan = ws.plan(vanilla, config=EVERYTHING)
    converted = ws.convert(vanilla, plan=plan)
    assert plan.model_parameters == sum(p.numel() for p in vanilla.parameters())
    total = sum(p.numel() for p in converted.parameters())
    assert plan.model_parameters + plan.added_parameters == total
    for row in plan.excited:
        layer = converted.get_submodule(row.module)
        assert row.added_parameters == sum(p.numel() for p in layer.excitation.parameters())


def test_the_plan_says_how_many_layers_each_pattern_matches() -> None:
    rules = [Rule("*", "mwe"), Rule("type:Conv2d", "lwe"), Rule("gate.*", "skip")]
    plan = ws.plan(Zoo(), rules=rules)
    assert plan.pattern_matches == {"*": 10, "type:Conv2d": 7, "gate.*": 2}
    assert "pattern 'gate.*' matched 2 layers" in str(plan)


@pytest.mark.parametrize(
    ("pattern", "suggestion"),
    [
        ("gate.expnad", "did you mean 'gate.expand'"),
        ("re:unormed$", "did you mean 'unnormed'"),
        ("zzz", "matches none of the 10 layers\n"),
        (nn.Conv3d, "'type:Conv3d' matches none"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_near_names(
    pattern: Any, suggestion: str
) -> None:
    with pytest.raises(ws.InputError, match=suggestion):
        ws.plan(Zoo(), rules=[Rule(pattern, "mwe")])


class Unplannable(nn.Module):
    """Draws random numbers and keeps what it sees, on the way of any tracer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        if torch.rand(()).item() < 2 and random.random() < 2:
            x = self.conv(x)
        return x


def test_planning_changes_nothing_at_all() -> None:
    model = nn.Sequential(Unplannable(), ConvNet().eval(), nn.Dropout())
    hooks: list[Any] = []
    for module in (model, model[0], model[1].stem):
        module.register_forward_hook(lambda *_: hooks.append(1))
        module.register_forward_pre_hook(lambda *_: hooks.append(1))
        module.register_full_backward_hook(lambda *_: hooks.append(1))
    identities = {name: id(value) for name, value in model.named_parameters()}
    contents = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    generators = torch.get_rng_state(), random.getstate(), torch.is_grad_enabled()
    ws.plan(model)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), torch.is_grad_enabled()) == generators[1:]
    assert {name: id(value) for name, value in model.named_parameters()} == identities
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == contents
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert not hooks
    assert not model[0].seen


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in use
        return torch.nn.utils.weight_norm(layer)


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


def with_attribute(layer: nn.Module) -> nn.Module:
    layer.excitation = "mine"
    return layer


def sparse(layer: nn.Module) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse())
    return layer


def with_parametrized_bias(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    return layer


OBSTACLES: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "parametrized": (parametrizations.weight_norm, "carries a torch.nn.utils.parametrize"),
    "parametrized bias": (with_parametrized_bias, "carries a torch.nn.utils.parametrize"),
    "orthogonal": (parametrizations.orthogonal, "carries a torch.nn.utils.parametrize"),
    "old weight norm": (old_weight_norm, "carries a torch.nn.utils.weight_norm hook"),
    "spectral norm": (parametrizations.spectral_norm, "carries a torch.nn.utils.parametrize"),
    "old spectral norm": (torch.nn.utils.spectral_norm, "carries a spectral_norm hook"),
    "pruned": (pruned, "or a pruning mask"),
    "complex": (lambda layer: layer.to(torch.complex64), "has a weight of dtype torch.complex64"),
    "float8": (lambda layer: layer.to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn"),
    "sparse": (sparse, "has a sparse weight"),
    "frozen": (lambda layer: layer.requires_grad_(False), "frozen"),
    "attribute": (with_attribute, "has an attribute 'excitation' of its own"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_a_layer_that_cannot_be_excited_is_left_alone_with_the_reason(obstacle: str) -> None:
    spoil, reason = OBSTACLES[obstacle]
    model = nn.Sequential(spoil(nn.Conv2d(4, 4, 3)), nn.Linear(4, 4))
    plan = ws.plan(model)
    assert not plan.decisions[0].excitation
    assert reason in plan.decisions[0].reason
    assert plan.decisions[-1].verdict == "MWE"
    before = type(model[0]), list(model[0].state_dict())
    ws.convert(model, plan=plan, inplace=True)
    assert (type(model[0]), list(model[0].state_dict())) == before


def test_a_lazy_layer_is_left_alone_with_the_reason() -> None:
    plan = ws.plan(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyLinear(4), nn.Linear(4, 4)))
    assert [row.verdict for row in plan.decisions] == ["skip", "skip", "MWE"]
    assert all("is lazy and has no shape" in row.reason for row in plan.decisions[:2])


class Doubled(nn.Linear):
    """A layer whose weight is a property already, over a parameter of another name."""

    @property
    def weight(self) -> Tensor:
        return 2 * self.base


def test_a_weight_that_is_computed_in_a_way_of_its_own_is_left_alone() -> None:
    layer = nn.Linear(3, 3)
    layer.base = layer._parameters.pop("weight")
    layer.__class__ = Doubled
    (row,) = ws.plan(layer).decisions
    assert not row.excitation
    assert "is computed by its module" in row.reason


def test_layers_of_an_excitation_are_no_layers_of_the_model() -> None:
    rows = ws.plan(ws.convert(ConvNet(), config=EVERYTHING)).decisions
    assert [row.layer for row in rows] == ["stem", "depthwise", "grouped", "head"]
    assert all(row.reason == "is excited already" for row in rows)


def test_a_plan_goes_through_json_unchanged(tmp_path: Path) -> None:
    rules = [Rule("head", "mwe", options={"mwe": {"epsilon": 0.05, "detach_max": False}})]
    plan = ws.plan(Zoo(), config=EVERYTHING, rules=rules)
    assert Plan.from_dict(plan.to_dict()) == plan
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json(), encoding="utf-8")
    assert Plan.from_file(path) == plan
    assert json.loads(plan.to_json()) == plan.to_dict()


def edited(model: nn.Module, edit: Callable[[dict[str, dict[str, Any]]], object]) -> Plan:
    """The model's plan after an edit of its JSON, rows by layer name."""
    data = json.loads(ws.plan(model).to_json())
    edit({row["module"]: row for row in data["layers"]})
    return Plan.from_dict(data)


def test_an_edited_plan_is_done_exactly() -> None:
    def edit(rows: dict[str, dict[str, Any]]) -> None:
        rows["stem"]["excitation"] = []
        rows["depthwise"]["excitation"] = [{"mwe": {"epsilon": 0.25}}]
        rows["grouped"]["excitation"] = [{"standardize": {}}, {"lwe": {"reduction": 2}}]

    plan = edited(ConvNet(), edit)
    converted = ws.convert(ConvNet(), plan=plan)
    assert type(converted.stem) is nn.Conv2d
    assert converted.depthwise.excitation.mwe.epsilon == 0.25
    assert [s.name for s in converted.grouped.excitation.stages] == ["standardize", "lwe"]
    assert converted.grouped.excitation.lwe.fc1.weight.shape == (4, 4)
    vanilla = sum(p.numel() for p in ConvNet().parameters())
    assert sum(p.numel() for p in converted.parameters()) == vanilla + plan.added_parameters


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "is not a plan: it has no list `layers`"),
        ({}, "is not a plan: it has no list `layers`"),
        ({"layers": []}, "has schema None; this version reads 1 and 2"),
        ({"layers": [], "schema": 99}, "has schema 99; this version reads 1 and 2"),
        ({"layers": [{}], "schema": 1}, "a row that cannot be read .*module"),
        ({"layers": ["conv"], "schema": 1}, "a row that cannot be read"),
    ],
)
def test_what_is_no_plan_is_an_input_error(data: Any, message: str) -> None:
    with pytest.raises(ws.InputError, match=message):
        Plan.from_dict(data)


def test_a_plan_file_that_is_broken_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(ws.InputError, match=r"plan\.json cannot be read"):
        Plan.from_file(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ws.InputError, match=r"plan\.json cannot be read"):
        Plan.from_file(path)


@pytest.mark.parametrize(
    ("excitation", "message"),
    [
        ([{"lew": {}}], "no excitation called 'lew'; did you mean 'lwe'"),
        ([{"lwe": {"reductoin": 2}}], "no option 'reductoin'; did you mean 'reduction'"),
        ([{"lwe": {"reduction": 0}}], "reduction must be an integer of at least 1"),
        ([{"lwe": {}}, {"lwe": {}}], "each stage once"),
        ("lwe", "a row that cannot be read"),
        (None, "a row that cannot be read"),
    ],
)
def test_a_row_whose_stages_cannot_be_built_is_an_input_error(
    excitation: Any, message: str
) -> None:
    with pytest.raises(ws.InputError, match=message):
        edited(ConvNet(), lambda rows: rows["stem"].update(excitation=excitation))


def test_a_plan_prints_as_a_table_with_names_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
    shown = str(ws.plan(model, rules=[Rule("re:[a-z]|0", "mwe")]))
    assert "rule 're:[a-z]|0'" in shown
    assert "2 of 2 weights excited" in shown
    assert "(the model itself)" in str(ws.plan(nn.Linear(3, 3)))


def test_a_model_that_is_one_layer_has_a_plan_of_one_row() -> None:
    plan = ws.plan(nn.Conv2d(3, 4, 3), rules=[Rule("*", "mwe")])
    assert [(row.module, row.layer, row.verdict) for row in plan.decisions] == [("", "", "MWE")]


class Draws(nn.Module):
    """Draws from every generator in its forward; data may decide on the path."""

    def __init__(self, decides: bool) -> None:
        super().__init__()
        self.conv, self.decides = nn.Conv2d(3, 4, 3), decides

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(()) * random.random() * np.random.rand()
        if self.decides and x.sum() > 1e9:
            return x
        out = nn.functional.dropout(self.conv(x), 0.5, training=True)
        return out + torch.rand_like(out) * noise


@pytest.mark.parametrize("inputs", [None, torch.randn(1, 3, 8, 8)])
@pytest.mark.parametrize("decides", [False, True])
def test_reading_a_model_that_draws_moves_no_generator(
    inputs: Tensor | None, decides: bool
) -> None:
    def states() -> list[Any]:
        _, keys, position, *rest = np.random.get_state()
        return [torch.get_rng_state().tolist(), random.getstate(), list(keys), position, rest]

    model = Draws(decides)
    before = states()
    plan = ws.plan(model, example_inputs=inputs)
    assert states() == before
    converted = ws.convert(model, plan=plan)
    before = states()
    ws.plan(converted, example_inputs=inputs)
    assert states() == before


class KeepsSome(nn.Module):
    """Chooses channels at random, which may be a shift, so that its choice is computed anew."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[:, torch.randn(8).topk(4).indices])


def test_reading_a_model_that_chooses_at_random_moves_no_generator() -> None:
    model, before = KeepsSome(), torch.get_rng_state()
    ws.plan(model, example_inputs=torch.ones(1, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("inputs", [None, torch.randn(1, 3, 8, 8)])
def test_a_parametrized_layer_has_one_row(inputs: Tensor | None) -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        parametrizations.orthogonal(nn.Linear(6, 6)),
    )
    rows = ws.plan(model, "lwe", example_inputs=inputs).decisions
    assert [row.layer for row in rows] == ["0", "1"]
    assert all("parametrization" in row.reason for row in rows)
