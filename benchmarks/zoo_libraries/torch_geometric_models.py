"""PyTorch Geometric: each convolution whose arguments are plain, and its networks, on a graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from zoo_models import Candidate

from zoo_libraries.filling import by_name, fill, fitting, noise, whole

_NODES, _EDGES, _WIDTH = 12, 40, 8
_KINDS = ["cell", "tissue"], [("cell", "of", "tissue"), ("tissue", "has", "cell")]


def _perceptron(first: int, last: int) -> nn.Module:
    return nn.Sequential(nn.Linear(first, 16), nn.ReLU(), nn.Linear(16, last))


_VALUES: dict[str, Any] = {
    "in_channels": _WIDTH,
    "hidden_channels": 16,
    "out_channels": 6,
    "channels": _WIDTH,
    "num_layers": 2,
    "depth": 2,
    "alpha": 0.1,
    "K": 2,
    "edge_dim": 4,
    "num_relations": 3,
    "num_node_types": 2,
    "num_edge_types": 3,
    "edge_type_emb_dim": 4,
    "edge_attr_emb_dim": 4,
    "filter_size": 2,
    "first_aggr": True,
    "aggregators": ["mean", "max"],
    "scalers": ["identity"],
    "deg": torch.tensor([1, 3, 4, 2]),
    "num_nodes": _NODES,
    "space_dimensions": 3,
    "propagate_dimensions": 4,
    "k": 3,
    "metadata": _KINDS,
    "num_timesteps": 2,
    "num_blocks": 2,
    "num_bilinear": 4,
    "num_spherical": 3,
    "num_radial": 4,
    "int_emb_size": 8,
    "basis_emb_size": 4,
    "out_emb_channels": 8,
    "hidden_node_channels": 8,
    "hidden_edge_channels": 8,
    "embedding_dim": 8,
    "num_heads": 2,
    "heads": 2,
}
_OWN: dict[str, dict[str, Any]] = {
    "GMMConv": {"dim": 4, "kernel_size": 3},
    "NNConv": {"nn": _perceptron(4, _WIDTH * 6)},
    "GINConv": {"nn": _perceptron(_WIDTH, 6)},
    "GINEConv": {"nn": _perceptron(_WIDTH, 6), "edge_dim": 4},
    "EdgeConv": {"nn": _perceptron(2 * _WIDTH, 6)},
    "DynamicEdgeConv": {"nn": _perceptron(2 * _WIDTH, 6)},
    "CGConv": {"dim": 4},
    "PPFConv": {"local_nn": _perceptron(_WIDTH + 4, 6), "global_nn": _perceptron(6, 6)},
    "PointNetConv": {"local_nn": _perceptron(_WIDTH + 3, 6), "global_nn": _perceptron(6, 6)},
    "PointGNNConv": {
        "mlp_h": _perceptron(_WIDTH, 3),
        "mlp_f": _perceptron(3 + _WIDTH, _WIDTH),
        "mlp_g": _perceptron(_WIDTH, _WIDTH),
    },
    "SchNet": {"hidden_channels": 16, "num_filters": 16, "num_interactions": 2},
    "ViSNet": {"hidden_channels": 16, "num_layers": 2, "num_heads": 2},
    "GAT": {"out_channels": 8},
    "MLP": {"channel_list": [_WIDTH, 16, 6]},
    "XConv": {"dim": 3, "kernel_size": 3},
    "HGTConv": {"in_channels": _WIDTH, "out_channels": 8},
    "HANConv": {"in_channels": _WIDTH, "out_channels": 8},
    "EGConv": {"out_channels": 8, "num_heads": 4},
    "ClusterGCNConv": {},
}


def _inner(kind: str) -> nn.Module:
    inner: nn.Module = fill(getattr(pyg, kind), _VALUES | {"out_channels": _WIDTH})
    return inner


_NESTED: dict[str, Callable[[], nn.Module]] = {
    "GPSConv": lambda: pyg.GPSConv(_WIDTH, _inner("GCNConv"), heads=2),
    "DirGNNConv": lambda: pyg.DirGNNConv(_inner("SAGEConv")),
    "DeepGCNLayer": lambda: pyg.DeepGCNLayer(
        _inner("GENConv"), pyg.LayerNorm(_WIDTH), nn.ReLU(), block="res+"
    ),
    "GAE": lambda: pyg.GAE(pyg.GCN(_WIDTH, 16, 2)),
    "GCN-with-norms": lambda: pyg.GCN(_WIDTH, 16, 3, 6, norm="batch_norm"),
    "GAT-with-norms": lambda: pyg.GAT(_WIDTH, 16, 3, 6, norm="layer_norm", v2=True),
    "GraphSAGE-with-jumps": lambda: pyg.GraphSAGE(_WIDTH, 16, 3, 6, jk="cat"),
}


def names() -> list[str]:
    """Those that can be made of small numbers."""
    found = [name for name in dir(pyg) if name.endswith("Conv") and name not in _NESTED]
    found += [name for name in dir(pyg.models) if name[0].isupper() and hasattr(pyg, name)]
    kinds = {name: getattr(pyg, name) for name in found}
    return [n for n, kind in kinds.items() if inspect.isclass(kind) and n not in _NESTED] + [
        *_NESTED
    ]


def build(name: str) -> nn.Module:
    """The layer or network, its lazy weights made by a forward."""
    make = _NESTED.get(name) or partial(fill, getattr(pyg, name), _VALUES | _OWN.get(name, {}))
    model: nn.Module = make()
    return model


def candidates(name: str, model: nn.Module) -> Iterator[Candidate]:
    """A random graph, by the names of the forward's arguments."""
    edges = whole(_NODES, 2, _EDGES)
    x: Any = noise(_NODES, _WIDTH)
    values: dict[str, Any] = {
        "x": x,
        "x_0": x,
        "edge_index": edges,
        "edge_attr": noise(_EDGES, 4),
        "edge_weight": noise(_EDGES).abs(),
        "edge_type": whole(3, _EDGES),
        "node_type": whole(2, _NODES),
        "pos": noise(_NODES, 3),
        "normal": noise(_NODES, 3),
        "batch": torch.zeros(_NODES, dtype=torch.long),
        "z": whole(9, _NODES) + 1,
        "pos_edge_index": edges[:, :20],
        "neg_edge_index": edges[:, 20:],
        "hyperedge_index": edges,
        "x_dict": {kind: noise(_NODES, _WIDTH) for kind in _KINDS[0]},
        "edge_index_dict": {kind: whole(_NODES, 2, _EDGES) for kind in _KINDS[1]},
    }
    forward = model.forward
    if name in ("GAE", "DeepGCNLayer"):
        yield by_name(x=x, edge_index=edges)
    needed = _tried(forward, values)
    if needed is not None:
        yield by_name(**needed)
        asked = inspect.signature(forward).parameters
        for key in ("edge_type", "edge_attr", "edge_weight", "batch"):
            if key in asked and key not in needed:
                yield by_name(**needed, **{key: values[key]})


def _tried(forward: Callable[..., Any], values: dict[str, Any]) -> dict[str, Tensor] | None:
    try:
        return fitting(forward, values)
    except KeyError:
        return None
