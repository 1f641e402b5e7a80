"""A run that has begun."""

from __future__ import annotations

import pytest
import torch
from attached_run import sgd
from equal_forms import Net, batches, plain_step
from torch import nn

import we_surgery as ws


@pytest.fixture
def run() -> tuple[nn.Module, torch.optim.Optimizer, ws.AttachedExcitation]:
    torch.manual_seed(0)
    model = Net()
    optimizer = sgd(model)
    excitation = ws.attach(model, optimizer, "lwe+mwe")
    plain_step(optimizer, model, batches(1)[0], 0)
    return model, optimizer, excitation
