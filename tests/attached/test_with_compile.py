"""Attached excitation of compiled models, and of models that run blocks again in backward."""

import pytest
import torch
from equal_forms import Net, batches, loss_of, plain_step
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import we_surgery as ws


@pytest.mark.parametrize("attach_first", [True, False])
def test_one_whole_graph_and_no_recompilation(attach_first):
    torch._dynamo.reset()
    counter = CompileCounter()
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    if attach_first:
        torch.manual_seed(1)
        ws.attach(model, optimizer, "lwe+mwe")
    else:
        loss_of(compiled, batches(1)[0]).backward()
        optimizer.zero_grad()
        torch.manual_seed(1)
        ws.attach(compiled, optimizer, "lwe+mwe")
    losses = [plain_step(optimizer, compiled, batch, 0) for batch in batches(4)]
    assert counter.frame_count == 1

    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    torch.manual_seed(1)
    ws.attach(model, optimizer, "lwe+mwe")
    assert [plain_step(optimizer, model, batch, 0) for batch in batches(4)] == losses


class Again(Net):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_activation_checkpointing_changes_nothing():
    runs = []
    for kind in (Net, Again):
        torch.manual_seed(0)
        model = kind()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        torch.manual_seed(1)
        ws.attach(model, optimizer, "lwe+mwe")
        runs.append([plain_step(optimizer, model, batch, 0) for batch in batches(4)])
    assert runs[0] == runs[1]
