"""Muon trains only matrices: a companion optimizer trains what else an excitation has."""

import copy

import pytest
import torch
from torch import nn

import we_surgery as ws

CONFIG = {"mode": "lwe", "linear": "lwe"}
pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.8 has no Muon")


def linears():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 5, bias=False))


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    return model(torch.randn(7, 6, generator=generator)).square().mean()


def trained(model, optimizers, schedules, steps):
    losses = []
    for step in steps:
        loss = loss_of(model, step)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
        losses.append(loss.item())
    return losses


def attached(seed=1):
    model = linears()
    muon = torch.optim.Muon(model.parameters(), 0.05, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(muon, 0.5)
    torch.manual_seed(seed)
    return model, muon, schedule, ws.attach(model, muon, config=CONFIG)


def test_it_trains_as_the_converted_form_with_an_adamw_beside():
    model = linears()
    torch.manual_seed(1)
    ws.convert(model, config=CONFIG, inplace=True)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim != 2]
    muon = torch.optim.Muon(matrices, 0.05, weight_decay=0.1)
    adamw = torch.optim.AdamW(biases, 0.05, weight_decay=0)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (muon, adamw)]
    expected = trained(model, [muon, adamw], schedules, range(4))

    twin, muon, schedule, _ = attached()
    assert trained(twin, [muon], [schedule], range(4)) == expected
    for name, value in ws.strip(model).state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    assert [list(map(id, g["params"])) for g in muon.param_groups] == [
        list(map(id, twin.parameters()))
    ]


def test_its_state_is_saved_and_resumes_to_the_bit():
    model, muon, schedule, _ = attached()
    trained(model, [muon], [schedule], range(2))
    saved = copy.deepcopy([each.state_dict() for each in (model, muon, schedule)])
    expected = trained(model, [muon], [schedule], range(2, 4))
    kept = saved[1]["state"]["we_surgery"]["optimizer"]
    assert all("exp_avg" in states[0] for name, states in kept.items() if name.endswith("bias"))

    model, muon, schedule, _ = attached(seed=9)
    for each, state in zip((model, muon, schedule), saved, strict=True):
        each.load_state_dict(state)
    assert trained(model, [muon], [schedule], range(2, 4)) == expected


def test_groups_that_all_train_by_muon_have_the_companion_as_well():
    class Mixed(torch.optim.SGD):
        """As optimizers whose groups with ``use_muon`` take matrices alone."""

        def step(self, closure=None):
            assert all(p.ndim > 1 for group in self.param_groups for p in group["params"])
            return super().step(closure)

    model = linears()
    optimizer = Mixed([{"params": list(model.parameters()), "use_muon": True}], 0.1)
    excitation = ws.attach(model, optimizer, config=CONFIG)
    biases = [p for p in excitation.parameters() if p.ndim == 1]
    before = [p.detach().clone() for p in biases]
    loss_of(model, 0).backward()
    optimizer.step()
    assert any(not torch.equal(p, was) for p, was in zip(biases, before, strict=True))
