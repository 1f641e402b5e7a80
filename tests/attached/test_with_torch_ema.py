"""Attached excitation beside torch_ema, which writes through ``data``."""

import pytest
import torch
from equal_forms import Net, batches, plain_step

import we_surgery as ws

torch_ema = pytest.importorskip("torch_ema")


def test_store_copy_to_and_restore():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    excitation = ws.attach(model, optimizer, "lwe+mwe")
    ema = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.5)
    for batch in batches(3):
        plain_step(optimizer, model, batch, 0)
        ema.update()
    trained = [p.detach().clone() for p in model.parameters()]
    ema.store()
    ema.copy_to()
    with torch.no_grad():
        averaged = model(batches(1)[0][0])
    ema.restore()
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), trained, strict=True))
    with ema.average_parameters(), torch.no_grad():
        assert torch.equal(model(batches(1)[0][0]), averaged)
    plain_step(optimizer, model, batches(1)[0], 0)
    assert excitation.steps == 4
    ema.copy_to()
    with pytest.raises(ws.AttachmentError, match="changed outside"):
        plain_step(optimizer, model, batches(1)[0], 0)
    excitation.adopt()
    plain_step(optimizer, model, batches(1)[0], 0)
