"""Attached excitation in PyG, whose Linear saves its state in a way of its own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import we_surgery as ws

pytest.importorskip("torch_geometric")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Graph(nn.Module):
    def __init__(self, lazy=False) -> None:
        super().__init__()
        from torch_geometric.nn import GATConv, GCNConv, Linear

        self.first = GCNConv(-1 if lazy else 6, 8)
        self.second = GATConv(8, 4, heads=2)
        self.head = Linear(8, 3)

    def forward(self, x, edges):
        x = F.relu(self.first(x, edges))
        return self.head(F.relu(self.second(x, edges)))


X = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
EDGES = torch.stack([torch.arange(10), torch.arange(10).roll(1)])
Y = torch.arange(10) % 3


def trained(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X, EDGES), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def started(**options):
    torch.manual_seed(0)
    model = Graph(**options)
    if options:
        model(X, EDGES)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    # PyG's Linear is a class of its own: what it is shows when it runs.
    config = {"mode": "lwe", "linear": "lwe+mwe"}
    excitation = ws.attach(model, optimizer, config=config, example_inputs=(X, EDGES))
    return model, optimizer, excitation


@pytest.mark.parametrize("options", [{}, {"lazy": True}], ids=["built", "lazy"])
def test_it_trains_and_resumes_to_the_bit(options):
    model, optimizer, excitation = started(**options)
    raws = [name for name in excitation.named_parameters() if ":" not in name]
    assert raws == ["first.lin.weight", "second.lin.weight", "head.weight"]
    trained(model, optimizer, 3)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    rest = trained(model, optimizer, 3)
    torch.manual_seed(9)
    model, optimizer, _ = started(**options)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert trained(model, optimizer, 3) == rest
    plain = Graph()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(X, EDGES), model(X, EDGES))
