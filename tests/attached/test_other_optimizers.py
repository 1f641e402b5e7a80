"""A second attach, other optimizers, copies, and failures within a step: never in silence."""

import copy
import pickle
import sys

import pytest
import torch
from attached_run import OUTSIDE, go_on, same, sgd, snapshot
from equal_forms import Net
from torch import nn

import we_surgery as ws


def test_a_second_attach_is_refused(run):
    model, optimizer, excitation = run
    with pytest.raises(ws.InputError, match="attached before"):
        ws.attach(model, optimizer)
    with pytest.raises(ws.InputError, match="attached before"):
        ws.attach(model, sgd(model))
    excitation.detach()
    ws.attach(model, optimizer, resume=False)
    go_on(model, optimizer)


def test_a_second_stage_moves_to_its_own_optimizer(run):
    model, first, excitation = run
    names = list(excitation.named_parameters())
    before = snapshot(model)
    raws = [p.detach().clone() for p in excitation.parameters()]
    second = torch.optim.AdamW(model.parameters(), 1e-2)
    excitation.move_to(second)
    assert same(before, model.state_dict())
    assert list(excitation.named_parameters()) == names
    now = excitation.parameters()
    assert all(torch.equal(one, other) for one, other in zip(raws, now, strict=True))
    assert not second.state
    assert "step" not in vars(first)
    steps = excitation.steps
    go_on(model, second)
    assert excitation.steps == steps + 1
    assert all(not torch.equal(one, p) for one, p in zip(raws, now, strict=True) if p.numel() > 9)
    states = second.state_dict()["state"]["we_surgery"]["optimizer"]
    assert all("exp_avg" in kept[0] for kept in states.values())
    with pytest.raises(ws.AttachmentError, match="attached to another optimizer"):
        go_on(model, first)


def test_a_changed_model_or_another_models_optimizer_is_not_moved(run):
    model, optimizer, excitation = run
    with pytest.raises(ws.InputError, match="does not hold the weight of layer 'stem'"):
        excitation.move_to(sgd(Net()))
    nn.init.normal_(model.stem.weight)
    with pytest.raises(ws.AttachmentError, match=OUTSIDE):
        excitation.move_to(sgd(model))
    excitation.restore()
    go_on(model, optimizer)


def test_an_excitation_that_is_gone_with_its_optimizer_is_in_nobodys_way():
    model = Net()
    ws.attach(model, sgd(model))
    optimizer = sgd(model)
    with pytest.raises(ws.AttachmentError, match="attached to another optimizer"):
        go_on(model, optimizer)
    ws.attach(model, optimizer)
    go_on(model, optimizer)


def test_a_second_optimizer_over_the_same_weights_is_refused_to_step(run):
    model, _, _ = run
    other = sgd(model)
    with pytest.raises(ws.AttachmentError, match="attached to another optimizer"):
        go_on(model, other)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
}


def test_the_hint_for_a_second_optimizer_works_as_it_is_written(run):
    model, _, excitation = run
    optimizer = sgd(model)
    with pytest.raises(ws.AttachmentError, match="another optimizer") as caught:
        go_on(model, optimizer)
    assert "`excitation.move_to(optimizer)`" in caught.value.cure
    excitation.move_to(optimizer)
    go_on(model, optimizer)


def test_the_hint_for_parameters_taken_from_the_optimizer_keeps_the_weights(run):
    model, optimizer, excitation = run
    del optimizer.param_groups[0]["params"][-2]  # of the head
    with pytest.raises(ws.InputError, match="'head'") as caught:
        go_on(model, optimizer)
    assert "detach()` before" in caught.value.cure
    assert 'init="preserve"' in caught.value.cure
    excitation.detach()
    before = snapshot(model)
    ws.attach(model, optimizer, "lwe+mwe", init="preserve")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-5)
    go_on(model, optimizer)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copied_optimizer_does_not_train_in_silence(run, copied):
    model, optimizer = copied(run[:2])
    before = snapshot(model)
    with pytest.raises(ws.AttachmentError, match="is a copy"):
        go_on(model, optimizer)
    assert same(before, model.state_dict())


def test_a_copied_model_is_vanilla_and_trains_by_itself(run):
    model = copy.deepcopy(run[0])
    assert same(model.state_dict(), run[0].state_dict())
    optimizer = sgd(model)
    go_on(model, optimizer)
    assert type(model.stem) is nn.Conv2d


def test_a_group_that_is_added_later_trains(run):
    model, optimizer, _ = run
    model.extra = nn.Linear(2, 2)
    optimizer.add_param_group({"params": list(model.extra.parameters()), "lr": 0.5})
    assert set(optimizer.param_groups[1]) == set(optimizer.param_groups[0])
    go_on(model, optimizer)


def test_an_exception_within_a_step_leaves_everything_in_its_place(run, monkeypatch):
    model, optimizer, _ = run
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    state = set(map(id, optimizer.state))

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["torch.optim.sgd"], "sgd", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            go_on(model, optimizer)
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == groups
    assert set(map(id, optimizer.state)) == state
    go_on(model, optimizer)


def test_an_exception_in_a_closure_leaves_everything_in_its_place(run):
    model, optimizer, _ = run
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]

    def closure():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == groups
    go_on(model, optimizer)


def test_outside_of_a_step_the_optimizer_is_the_vanilla_one(run):
    model, optimizer, _ = run
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == list(map(id, model.parameters()))
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
    assert all(type(module).__module__.startswith("torch.") for module in list(model.modules())[1:])
    assert model.stem.weight.grad is not None


def test_frozen_layers_are_left_alone_and_can_be_thawed():
    model = Net()
    model.stem.weight.requires_grad_(False)
    optimizer = sgd(model)
    excitation = ws.attach(model, optimizer, "lwe+mwe")
    assert "stem.weight" not in excitation.named_parameters()
    go_on(model, optimizer)
    model.stem.weight.requires_grad_(True)
    with pytest.warns(ws.ThawedLayerWarning, match="'stem'.*without excitation"):
        go_on(model, optimizer)
    assert excitation.extend() == 1
    assert excitation.extend() == 0
    before = excitation.named_parameters()["stem.weight"].detach().clone()
    go_on(model, optimizer)
    assert not torch.equal(excitation.named_parameters()["stem.weight"], before)


class MomentumEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = Net(), Net()
        self.key.requires_grad_(False)
        self.copy()

    def copy(self):
        self.key.load_state_dict(self.query.state_dict())


@pytest.mark.parametrize("init", [None, "preserve"])
def test_a_frozen_copy_that_is_left_behind_is_told_of(init, caplog):
    model = MomentumEncoder()
    ws.attach(model, sgd(model), "lwe+mwe", init=init)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.partition(",")[0] for text in told] == ([] if init else ["6 frozen weights"])


def test_layers_that_the_optimizer_gets_later_can_be_excited():
    model = Net()
    optimizer = sgd(model.head)
    excitation = ws.attach(model, optimizer, "lwe+mwe")
    assert [row.layer for row in excitation.plan.excited] == ["head"]
    go_on(model, optimizer)
    optimizer.add_param_group({"params": list(model.stem.parameters())})
    with pytest.warns(ws.ThawedLayerWarning, match="'stem'.*without excitation"):
        go_on(model, optimizer)
    assert excitation.extend() == 1
    assert [row.layer for row in excitation.plan.excited] == ["stem", "head"]
    go_on(model, optimizer)


def test_layers_that_the_model_gets_later_can_be_excited(run):
    model, optimizer, excitation = run
    excited = len(excitation.raw_weights())
    model.stem = nn.Sequential(model.stem, nn.Conv2d(8, 8, 1))
    optimizer.add_param_group({"params": list(model.stem[1].parameters())})
    assert excitation.extend() == 1
    assert len(excitation.raw_weights()) == excited + 1
    go_on(model, optimizer)


def test_detach_leaves_a_vanilla_run(run):
    model, optimizer, excitation = run
    before = snapshot(model)
    excitation.detach()
    assert same(before, model.state_dict())
    assert "step" not in vars(optimizer)
    assert type(optimizer.defaults) is dict
    assert not optimizer.state.get(model.stem.weight)
    assert optimizer.state[model.mix.bias]
    twin = copy.deepcopy(model)
    other = sgd(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert go_on(model, optimizer) == go_on(twin, other)
    assert same(model.state_dict(), twin.state_dict())


REFUSED = {
    "a model converted already": lambda m: (ws.convert(m), "is converted"),
    "an optimizer of another model": lambda m: (m, "holds none"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_changes(case):
    model, message = case(Net())
    other = Net()
    before = snapshot(model)
    optimizer = sgd(other)
    with pytest.raises(ws.InputError, match=message):
        ws.attach(model, optimizer)
    assert same(before, model.state_dict())
    assert "step" not in vars(optimizer)


def test_optimizers_that_divide_or_differentiate_are_refused_by_name():
    model = Net()

    class ZeroRedundancyOptimizer(torch.optim.SGD):
        pass

    with pytest.raises(ws.InputError, match="ZeroRedundancyOptimizer is not supported"):
        ws.attach(model, ZeroRedundancyOptimizer(model.parameters(), 0.1))
    from timm.optim import Adahessian

    with pytest.raises(ws.InputError, match="differentiates through"):
        ws.attach(model, Adahessian(model.parameters()))


def test_an_optimizer_that_has_stepped_is_not_excited_twice_in_silence():
    model = Net()
    optimizer = sgd(model)
    go_on(model, optimizer)
    with pytest.raises(ws.InputError, match="excited twice"):
        ws.attach(model, optimizer)
    ws.attach(model, optimizer, resume=False)
    go_on(model, optimizer)


def test_a_failure_while_attaching_leaves_model_and_optimizer_as_they_were(monkeypatch):
    model = Net()
    optimizer = sgd(model)
    before = snapshot(model)
    monkeypatch.setattr("we_surgery.attached.excitation.write", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ws.attach(model, optimizer)
    monkeypatch.undo()
    assert same(before, model.state_dict())
    assert "step" not in vars(optimizer)
    ws.attach(model, optimizer)


def test_biases_do_not_join_a_group_that_trains_by_muon():
    class Mixed(torch.optim.SGD):
        """As Ultralytics' MuSGD: groups with ``use_muon`` take matrices alone."""

        def step(self, closure=None):
            for group in self.param_groups:
                assert not group["use_muon"] or all(p.ndim > 1 for p in group["params"])
            return super().step(closure)

    torch.manual_seed(3)
    model = Net()
    weights = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    muon = {"params": weights, "use_muon": True, "weight_decay": 0.1}
    others = [{"params": [], "use_muon": False, "lr": 1.0}, {"params": rest, "use_muon": False}]
    optimizer = Mixed([dict(muon, params=weights), *others], 0.1)
    excitation = ws.attach(model, optimizer)
    biases = [p for p in excitation.parameters() if p.ndim == 1]
    before = [p.detach().clone() for p in biases]
    go_on(model, optimizer)
    assert any(not torch.equal(p, was) for p, was in zip(biases, before, strict=True))
    assert [len(group["params"]) for group in optimizer.param_groups][1] == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_the_optimizer_clears_in_its_step_are_cleared_in_the_model(set_to_none):
    class Clearing(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.zero_grad(set_to_none=set_to_none)

    model = Net()
    optimizer = Clearing(model.parameters(), 0.1)
    ws.attach(model, optimizer, "lwe+mwe")
    go_on(model, optimizer)
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(g is None if set_to_none else not g.any() for g in gradients)
