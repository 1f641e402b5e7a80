"""Functions that need the stages of a converted model say so for an attached excitation."""

import pytest
import torch
from torch import nn

import we_surgery as ws

CASES = {
    "sparsity_loss": (ws.sparsity_loss, "dynamic_sparse", {}),
    "average_location_nets": (
        ws.average_location_nets,
        "lwe",
        {"lwe": {"attention": "global", "averaged": True}},
    ),
    "harden": (ws.harden, "shift_attention", {}),
    "ShiftAttentionSchedule": (
        lambda model: ws.ShiftAttentionSchedule(model, steps=3),
        "shift_attention",
        {},
    ),
}


def attached(conv, options):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return model, optimizer, ws.attach(model, optimizer, config={"conv": conv, **options})


@pytest.mark.parametrize("name", CASES)
def test_an_attached_model_is_refused_with_what_to_do(name):
    function, conv, options = CASES[name]
    model, _optimizer, excitation = attached(conv, options)
    for given in (model, nn.DataParallel(model), excitation):
        with pytest.raises(ws.InputError, match=rf"{name} needs a converted model.*\n.*converted"):
            function(given)
    function(excitation.converted())


def test_hardening_the_converted_copy_gives_one_weight_per_kernel():
    _model, _optimizer, excitation = attached("shift_attention", {})
    twin = excitation.converted()
    ws.harden(twin)
    assert (ws.strip(twin)[0].weight != 0).flatten(2).sum(2).eq(1).all()


def test_a_detached_model_is_a_vanilla_one():
    model, _optimizer, excitation = attached("dynamic_sparse", {})
    excitation.detach()
    assert ws.sparsity_loss(model) == 0
