"""What surgery in place takes of memory, on a model of a billion parameters.

    python benchmarks/memory_in_place.py              # about two minutes, 9 GiB of memory
    python benchmarks/memory_in_place.py --layers 8   # an eighth of it

The model is a row of linear layers, 64 MiB each in float32. Each row of the table is the peak of
the process's resident memory, beyond what it had before the step; Linux alone tells it.

* *convert*: plan and conversion with ``inplace=True``, mode ``lwe`` for linear layers;
* *strip, layer by layer*: ``strip(model, inplace=True, layer_by_layer=True)``;
* *strip*: ``strip(model, inplace=True)``, which holds all folds until all are proven.

Writes ``memory_in_place.json`` and ``memory_in_place.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import torch
from measuring import describe_machine, machine_line, peak_mib, table, write_results
from torch import nn

import we_surgery as ws

FEATURES = 4096
CONFIG = {"mode": "lwe", "linear": "lwe"}


def build(layers: int) -> nn.Module:
    """A row of square linear layers without biases."""
    return nn.Sequential(*(nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(layers)))


def measure(layers: int) -> dict[str, Any]:
    """The peaks in MiB, beside the sizes of the model and of a layer."""
    # Whatever is loaded at first use is no part of what a layer costs.
    ws.strip(ws.convert(build(1), config=CONFIG), inplace=True, layer_by_layer=True)
    model = build(layers)
    size = sum(parameter.nbytes for parameter in model.parameters())
    found: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "model_mib": size / 2**20,
        "layer_mib": size / 2**20 / layers,
    }
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    found["convert"] = peak_mib(lambda: ws.convert(model, config=CONFIG, inplace=True))
    raw = [p for name, p in model.named_parameters() if name.endswith("raw_weight")]
    assert [parameter.data_ptr() for parameter in raw] == addresses
    added = sum(parameter.nbytes for parameter in model.parameters()) - size
    found["added_mib"] = added / 2**20
    found["strip, layer by layer"] = peak_mib(
        lambda: ws.strip(model, inplace=True, layer_by_layer=True)
    )
    ws.convert(model, config=CONFIG, inplace=True)
    found["strip"] = peak_mib(lambda: ws.strip(model, inplace=True))
    return found


def as_markdown(found: Mapping[str, Any]) -> str:
    """The results as a table."""
    steps = ("convert", "strip, layer by layer", "strip")
    return "\n".join(
        [
            "# Memory of surgery in place\n",
            "Written by `benchmarks/memory_in_place.py`, which tells what each row is.\n",
            machine_line(found["machine"]),
            f"{found['parameters']:,} parameters, {found['model_mib']:,.0f} MiB; a layer has "
            f"{found['layer_mib']:.0f} MiB. The excitations that convert adds have "
            f"{found['added_mib']:,.0f} MiB.\n",
            table(
                ("step", "peak memory beyond the model, MiB", "of the model"),
                [
                    (step, f"{found[step]:,.0f}", f"{found[step] / found['model_mib']:.3f}")
                    for step in steps
                ],
            ),
        ]
    )


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--layers", type=int, default=64, help="of 16.8 million parameters each")
    options = parser.parse_args()
    if sys.platform != "linux":
        parser.error("only Linux tells the peak of a part of a process's life")
    torch.manual_seed(0)
    found = {"machine": describe_machine(), **measure(options.layers)}
    write_results("memory_in_place", found, as_markdown(found))


if __name__ == "__main__":
    main()
