"""GraphModules of every origin, and how tests look at them."""

from typing import Any

import torch
import torch.nn.functional as F
from snapshots import snapshot
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx


class Functional(nn.Module):
    """Weights without layers: plain, depthwise, transposed, used twice, and in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(8))
        self.stem_weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.depthwise = nn.Parameter(torch.randn(8, 1, 3, 3))
        self.up = nn.Module()
        self.up.weight = nn.Parameter(torch.randn(8, 3, 2, 2))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(F.conv2d(x, self.stem_weight, self.bias, padding=1)))
        x = F.relu(F.conv2d(x, self.twice, padding=1)) + F.conv2d(x, self.twice, padding=1)
        x = F.relu(F.conv2d(x, self.depthwise, padding=1, groups=8))
        x = F.conv_transpose2d(x, self.up.weight, stride=2, groups=2)
        return self.head(x.mean((2, 3)))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def traced() -> fx.GraphModule:
    return fx.symbolic_trace(Functional())


def exported() -> Any:
    return torch.export.export(Functional(), (X,)).module()


def decomposed() -> Any:
    return torch.export.export(Functional().eval(), (X,)).run_decompositions().module()


def dispatched() -> Any:
    return make_fx(Functional().eval())(X)


SOURCES = {"traced": traced, "exported": exported, "decomposed": decomposed, "make_fx": dispatched}


def nodes_of(graph_module: fx.GraphModule) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in graph_module.graph.nodes]


def everything_of(graph_module: fx.GraphModule) -> list[Any]:
    return [nodes_of(graph_module), graph_module.code, snapshot(graph_module)]


def find(graph_module: fx.GraphModule, target: str) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.target == target]


def train_a_little(graph_module: nn.Module) -> None:
    optimizer = torch.optim.SGD(graph_module.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        graph_module(X).square().mean().backward()
        optimizer.step()
