"""Excitations that join an optimizer in the middle of training."""

import copy
import warnings

import pytest
import torch
from timm.optim import Lookahead
from torch import nn
from toys import EVERYTHING, ConvNet

import we_surgery as ws
from we_surgery.converted.graphs import excited_weights

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "adam tensor lr": lambda p: torch.optim.Adam(p, torch.tensor(1e-2), capturable=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, initial_accumulator_value=0.1),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, 1e-2, fused=True),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
    "radam": lambda p: torch.optim.RAdam(p, 1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "lookahead": lambda p: Lookahead(torch.optim.AdamW(p, 1e-2), k=2),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    optimizer.zero_grad()
    loss = (model(x) - 1).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def excitations(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if "excitation." in n}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_each_optimizer_goes_on_and_trains_the_excitations_too(make):
    model = ConvNet()
    optimizer = make(list(model.parameters()))
    step(model, optimizer)
    step(model, optimizer)
    order = [id(p) for p in optimizer.param_groups[0]["params"]]
    before = copy.deepcopy(optimizer.state_dict()["state"])
    ws.convert(model, config=EVERYTHING, inplace=True)
    added = ws.add_to_optimizer(optimizer, model)
    assert set(added) == excitations(model).keys()
    assert [id(p) for p in optimizer.param_groups[0]["params"]][: len(order)] == order
    after = optimizer.state_dict()["state"]
    for index, state in before.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(after[index][key]), torch.as_tensor(value))
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        step(model, optimizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.isfinite().all()
            moved = not torch.equal(parameter, values[name])
            # A ReLU of a narrow gate may be closed for all of a layer's filters.
            assert moved or parameter.grad.abs().max() == 0, name
    # What it saves is what it loads.
    twin = make(list(p for g in optimizer.param_groups for p in g["params"]))
    twin.load_state_dict(optimizer.state_dict())


def test_each_class_of_torch_is_tested_or_refused():
    classes = {
        value
        for value in vars(torch.optim).values()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    tested = {type(make([nn.Parameter(torch.zeros(1))])) for make in OPTIMIZERS.values()}
    others = {kind.__name__ for kind in classes - tested}
    # LBFGS and Muon (of torch 2.9 and newer) are refused; sparse gradients do not occur.
    assert others - {"Muon"} == {"Optimizer", "SparseAdam", "LBFGS"}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_each_optimizer_goes_on_after_a_strip_as_a_vanilla_ones(make):
    model = ws.convert(ConvNet(), config=EVERYTHING)
    optimizer = make(list(model.parameters()))
    step(model, optimizer)
    step(model, optimizer)
    raws = {id(weight.raw) for weight in excited_weights(model)}
    norms = {id(p): copy.deepcopy(optimizer.state.get(p)) for p in model.parameters()}
    before = step(copy.deepcopy(model), torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1))
    expected = excitations(model).keys()
    assert set(ws.remove_from_optimizer(optimizer, model)) == expected
    assert ws.remove_from_optimizer(optimizer, model) == []
    ws.strip(model, inplace=True)
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    for parameter in model.parameters():
        kept = optimizer.state.get(parameter) or {}
        if id(parameter) in raws:
            assert not any(torch.as_tensor(v).any() for k, v in kept.items() if k != "sum")
        else:
            assert kept.keys() == (norms[id(parameter)] or {}).keys()
            for key, value in kept.items():
                was = torch.as_tensor(norms[id(parameter)][key])
                assert torch.equal(torch.as_tensor(value), was), key
    twin_model = copy.deepcopy(model)
    twin = make(list(twin_model.parameters()))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    losses = [step(model, optimizer) for _ in range(3)]
    assert losses[0] == pytest.approx(before, rel=1e-5)
    assert len(set(losses)) == 3
    assert [step(twin_model, twin) for _ in range(3)] == losses


def test_a_stripped_models_optimizer_saves_what_one_of_the_vanilla_model_loads():
    model = ws.convert(ConvNet(), config=EVERYTHING)
    optimizer = torch.optim.AdamW(ws.param_groups(model, 0.1, excitation_lr=0.5), 1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step(model, optimizer)
    ws.remove_from_optimizer(optimizer, model)
    ws.strip(model, inplace=True)
    anew = torch.optim.AdamW(ws.param_groups(model, 0.1), 1e-2)
    groups = [g["params"] for g in optimizer.param_groups if g["params"]]
    assert [[id(p) for p in g] for g in groups] == [
        [id(p) for p in g["params"]] for g in anew.param_groups
    ]
    step(model, optimizer)
    schedule.step()
    named = torch.optim.SGD(ws.convert(model, inplace=True).named_parameters(), 0.1)
    ws.remove_from_optimizer(named, model)
    assert named.param_groups[0]["param_names"] == [
        name for name, _ in model.named_parameters() if "excitation." not in name
    ]


def test_an_optimizer_that_can_give_nothing_away_or_is_anothers_is_refused():
    model = ws.convert(ConvNet())
    with pytest.raises(ws.InputError, match=r"LBFGS .* no parameter can join or leave"):
        ws.remove_from_optimizer(torch.optim.LBFGS(model.parameters()), model)
    with pytest.raises(ws.InputError, match="none of the model's parameters"):
        ws.remove_from_optimizer(torch.optim.SGD(ConvNet().parameters(), 0.1), model)


def test_it_takes_the_steps_of_an_optimizer_that_knew_them_from_the_start():
    model = ws.convert(ConvNet(), config=EVERYTHING)
    late = ws.strip(model)  # only for its structure
    late.load_state_dict({k: v for k, v in ConvNet().state_dict().items()})
    torch.manual_seed(3)
    ws.convert(late, config=EVERYTHING, inplace=True)
    early = copy.deepcopy(late)
    vanilla_first = [p for n, p in early.named_parameters() if "excitation." not in n]
    late_optimizer = torch.optim.AdamW(
        [p for n, p in late.named_parameters() if "excitation." not in n], 1e-2
    )
    ws.add_to_optimizer(late_optimizer, late)
    early_optimizer = torch.optim.AdamW([*vanilla_first, *excitations(early).values()], 1e-2)
    for _ in range(3):
        assert step(late, late_optimizer) == step(early, early_optimizer)
    assert all(map(torch.equal, late.state_dict().values(), early.state_dict().values()))


def test_what_an_optimizer_makes_when_it_is_built_is_there_at_once():
    model = ConvNet()
    optimizer = torch.optim.Adagrad(model.parameters(), initial_accumulator_value=0.1)
    ws.convert(model, inplace=True)
    for name in ws.add_to_optimizer(optimizer, model):
        state = optimizer.state[model.get_parameter(name)]
        assert torch.equal(state["sum"], torch.full_like(state["sum"], 0.1))
        assert state["step"] == 0


def test_a_second_call_changes_nothing():
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ws.convert(model, inplace=True)
    assert ws.add_to_optimizer(optimizer, model)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    assert ws.add_to_optimizer(optimizer, model) == []
    assert [len(group["params"]) for group in optimizer.param_groups] == sizes


def test_each_joins_its_layers_group_and_a_schedule_goes_on():
    model = ConvNet()
    backbone = [p for n, p in model.named_parameters() if not n.startswith("head")]
    groups = [
        {"params": backbone, "lr": 0.1, "weight_decay": 0.1},
        {"params": model.head.parameters(), "lr": 1.0, "weight_decay": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 1.0], total_steps=9)
    step(model, optimizer)
    schedule.step()
    ws.convert(model, config=EVERYTHING, inplace=True)
    ws.add_to_optimizer(optimizer, model)
    first, second = ({id(p) for p in g["params"]} for g in optimizer.param_groups)
    for name, parameter in excitations(model).items():
        assert id(parameter) in (second if name.startswith("head") else first)
    for _ in range(5):
        step(model, optimizer)
        schedule.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(10 * optimizer.param_groups[0]["lr"])


def test_biases_join_the_group_without_decay_where_there_is_one():
    model = ConvNet()
    optimizer = torch.optim.AdamW(ws.param_groups(model, 0.1), 1e-3)
    ws.convert(model, config=EVERYTHING, inplace=True)
    ws.add_to_optimizer(optimizer, model)
    anew = torch.optim.AdamW(ws.param_groups(model, 0.1), 1e-3)
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == [
        [id(p) for p in g["params"]] for g in anew.param_groups
    ]


def test_training_resumes_from_what_was_saved_after_the_conversion():
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = ConvNet()
        return model, torch.optim.AdamW(ws.param_groups(model), 1e-2)

    model, optimizer = start()
    step(model, optimizer)
    ws.convert(model, inplace=True)
    ws.add_to_optimizer(optimizer, model)
    step(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses = [step(model, optimizer) for _ in range(2)]

    again, resumed = start()
    ws.convert(again, inplace=True)
    ws.add_to_optimizer(resumed, again)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert [step(again, resumed) for _ in range(2)] == losses


def test_names_are_added_to_an_optimizer_that_keeps_them():
    model = ConvNet()
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    ws.convert(model, inplace=True)
    added = ws.add_to_optimizer(optimizer, model)
    assert optimizer.param_groups[0]["param_names"][-len(added) :] == added
    optimizer.load_state_dict(optimizer.state_dict())


def test_layers_that_are_not_trained_stay_out():
    model = ConvNet()
    optimizer = torch.optim.SGD(model.head.parameters(), 0.1)
    ws.convert(model, config=EVERYTHING, inplace=True)
    added = ws.add_to_optimizer(optimizer, model)
    assert added
    assert all(name.startswith("head.") for name in added)


def test_what_layers_share_joins_with_the_first_of_them_that_is_trained():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3))
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    config = {"conv": "lwe", "lwe": {"attention": "global"}}
    ws.convert(model, config=config, inplace=True)
    added = ws.add_to_optimizer(optimizer, model)
    own = {n: p for n, p in model.named_parameters() if ".net." in n}
    assert own.keys() <= set(added)
    assert not any(name.startswith("0.") for name in set(added) - own.keys())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held for p in own.values())
    assert set(ws.remove_from_optimizer(optimizer, model)) == set(added)


def test_lbfgs_refuses_and_stays_as_it_was():
    model = ConvNet()
    optimizer = torch.optim.LBFGS(model.parameters())
    size = len(optimizer.param_groups[0]["params"])
    ws.convert(model, inplace=True)
    with pytest.raises(ws.InputError, match="LBFGS keeps one flat history"):
        ws.add_to_optimizer(optimizer, model)
    assert len(optimizer.param_groups[0]["params"]) == size


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.8 has no Muon")
def test_muon_refuses_and_stays_as_it_was():
    linear = nn.Sequential(nn.Linear(4, 4, bias=False))
    muon = torch.optim.Muon(linear.parameters())
    ws.convert(linear, config={"mode": "lwe", "linear": "lwe"}, inplace=True)
    with pytest.raises(ws.InputError, match=r"only matrices.*bias"):
        ws.add_to_optimizer(muon, linear)
    assert len(muon.param_groups[0]["params"]) == 1


def test_a_copys_optimizer_is_refused():
    vanilla = ConvNet()
    optimizer = torch.optim.SGD(vanilla.parameters(), 0.1)
    converted = ws.convert(vanilla)
    with pytest.raises(ws.InputError, match="none of the model's parameters") as caught:
        ws.add_to_optimizer(optimizer, converted)
    assert "inplace=True" in caught.value.cure


def test_replaced_parameters_are_warned_of_and_strangers_are_not():
    model = ConvNet()
    critic = nn.Linear(7, 7)
    optimizer = torch.optim.SGD([*model.parameters(), *critic.parameters()], 0.1)
    ws.convert(model, inplace=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ws.add_to_optimizer(optimizer, model)
    model.norm = nn.BatchNorm2d(8)
    with pytest.warns(ws.StaleOptimizerWarning, match=r"lacks 2 parameters .* 'norm.weight'"):
        ws.add_to_optimizer(optimizer, model)
