"""How many operations or kernels the excitation of a layer launches; no GPU is needed for it.

    python benchmarks/launches.py

On a GPU each costs a launch of some microseconds, whatever the layer's size. Operations of torch
are counted as they are dispatched, forward and backward, without those that only look at memory
(views, allocations); ``kernels`` are those of Triton, which the attached form launches for all
layers together. The sums into ``.grad`` are not counted, nor is the copy of a table to the GPU,
which kernels need again only when a weight has moved. Writes
``launches.json`` and ``launches.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

# Before Triton is imported: without a GPU its kernels exist as interpreted ones alone.
os.environ["TRITON_INTERPRET"] = "1"

import torch
from measuring import TABLE_1, build_network, describe_machine, machine_line, table, write_results
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transform_forms import naive, staged, together

import we_surgery as ws
from we_surgery.converted.layer import excited_layers
from we_surgery.excitations import Composition
from we_surgery.excitations.compute import triton_backend

FREE = ("empty", "detach", "alias", "as_strided", "is_same_size", "new_empty")
FORMS: dict[str, Callable[[Composition, Tensor], Tensor]] = {
    "naive": naive,
    "staged": staged,
    "eager": Composition.forward,
}


class Count(TorchDispatchMode):
    """Counts the operations that do arithmetic or move data."""

    def __init__(self) -> None:
        super().__init__()
        self.launched = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if not func.is_view and not name.startswith(FREE):
            self.launched += 1
        return func(*args, **(kwargs or {}))


def launches(composition: Composition, weight: Tensor, form: str) -> int:
    """Of one weight, forward and backward."""
    leaf = weight.detach().clone().requires_grad_()
    inputs = [leaf, *composition.parameters()]
    with Count() as count:
        excited = FORMS[form](composition, leaf)
        torch.autograd.grad(excited, inputs, torch.ones_like(leaf), allow_unused=True)
    return count.launched


def launches_of_kernels(layers: Sequence[tuple[Composition, Tensor]]) -> int:
    """Of all weights together; counted and not run, as an interpreter would take hours."""
    with mock.patch.object(triton_backend, "launch", mock.Mock()) as kernels:
        together([(e, w.detach(), torch.ones_like(w)) for e, w in layers], "triton")
    return int(kernels.call_count)


def count_network(name: str, mode: str) -> dict[str, Any]:
    """Launches per layer, and of all excited convs."""
    model: nn.Module = build_network(name)
    excited = ws.convert(model, config={"mode": mode, "linear": "skip"}, inplace=True)
    layers = [layer for _, layer in excited_layers(excited)]
    row: dict[str, Any] = {"network": name, "mode": mode, "layers": len(layers)}
    known: dict[Any, int] = {}
    for form in FORMS:
        counts = []
        for layer in layers:
            stages = tuple(stage.name for stage in layer.excitation.stages)
            key = (form, layer.raw_weight.shape, stages)
            if key not in known:
                known[key] = launches(layer.excitation, layer.raw_weight, form)
            counts.append(known[key])
        row[form] = {"most_a_layer": max(counts), "in_all": sum(counts)}
    row["kernels"] = launches_of_kernels([(lay.excitation, lay.raw_weight) for lay in layers])
    return row


def as_markdown(found: Mapping[str, Any]) -> str:
    """The counts as a table."""
    rows = []
    for row in found["networks"]:
        counts = [f"{row[form]['most_a_layer']} ({row[form]['in_all']})" for form in FORMS]
        rows.append((row["network"], row["mode"], row["layers"], *counts, row["kernels"]))
    return "\n".join(
        [
            "# Launches\n",
            "Written by `benchmarks/launches.py`: operations and kernels of the excitation, "
            "forward and backward together, the most of one layer (all layers of the network). "
            "`kernels` are those of the attached form, for the whole network. Counted on a CPU.\n",
            machine_line(found["machine"]),
            table(("network", "mode", "layers", *FORMS, "kernels"), rows),
        ]
    )


def main() -> None:
    """Counts and writes the results."""
    argparse.ArgumentParser(description=str(__doc__).partition("\n")[0]).parse_args()
    torch.set_num_threads(1)
    networks = [count_network(name, mode) for name in TABLE_1 for mode in ("lwe", "lwe+mwe")]
    found = {"machine": describe_machine(), "networks": networks}
    write_results("launches", found, as_markdown(found))


if __name__ == "__main__":
    main()
