"""What a training step costs with excitation attached and converted, over the vanilla step.

    python benchmarks/attached.py            # five networks, about half an hour
    python benchmarks/attached.py --quick    # two networks, few rounds

A step is some forward and backward passes (micro-batches), then one SGD step. The three forms take
turns, and only ratios of one round are reported. Times are CPU seconds of one thread.

Writes ``attached.json`` and ``attached.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from measuring import (
    RESULTS,
    Spread,
    build_network,
    compare,
    describe_machine,
    machine_line,
    note,
    seconds,
    table,
    write_results,
)
from torch import Tensor, nn
from transform import kept_bytes

import we_surgery as ws

NETWORKS = {
    "resnet50": (8, 128),
    "mobilenet_v2": (8, 96),
    "resnet18": (8, 64),
    "convnext_tiny": (8, 64),
    "vit_small_patch16_224": (2, 224),
}
"""Batch and pixels: small, so that excitation weighs most."""
QUICK = ("resnet50", "mobilenet_v2")
MICRO_BATCHES = (1, 4)


def network(name: str) -> nn.Module:
    """The network in the memory format that a CPU prefers."""
    model = timm.create_model(name) if name.startswith("vit") else build_network(name)
    return model.to(memory_format=torch.channels_last)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The papers' optimizer."""
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)


def attached(name: str, mode: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network with excitation in the step of its optimizer."""
    model = network(name)
    optimizer = sgd(model)
    ws.attach(model, optimizer, mode)
    return model, optimizer


def compare_steps(name: str, mode: str, micro_batches: int, rounds: int) -> dict[str, Spread]:
    """Converted and attached over vanilla."""
    batch, pixels = NETWORKS[name]
    torch.manual_seed(0)
    vanilla = network(name)
    converted = ws.convert(network(name), mode)
    forms = {
        "vanilla": (vanilla, sgd(vanilla)),
        "converted": (converted, sgd(converted)),
        "attached": attached(name, mode),
    }
    images = torch.randn(batch, 3, pixels, pixels).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,))

    def measure(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], float]:
        def step() -> float:
            start = time.process_time()
            optimizer.zero_grad()
            for _ in range(micro_batches):
                F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            return time.process_time() - start

        return step

    measures = {form: measure(*pair) for form, pair in forms.items()}
    return compare(measures, "vanilla", rounds)


def passes_are_vanilla(name: str, mode: str) -> dict[str, Any]:
    """Bytes kept for the backward pass, and nodes of its graph, of vanilla and attached."""
    batch, pixels = NETWORKS[name]
    images = torch.randn(batch, 3, pixels, pixels).to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    vanilla, (model, _) = network(name), attached(name, mode)
    return {
        "bytes": [kept_bytes(each, images) for each in (vanilla, model)],
        "nodes": [graph_nodes(each(images)) for each in (vanilla, model)],
    }


def graph_nodes(output: Tensor) -> int:
    """How many nodes the graph of a forward pass has."""
    seen: set[Any] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return len(seen)


def guards_milliseconds(rounds: int) -> float:
    """What exchange and checks take per step of 54 small convs with an identity E."""
    layers = [nn.Conv2d(8, 8, 3) for _ in range(54)]
    vanilla, model = nn.Sequential(*layers), copy.deepcopy(nn.Sequential(*layers))
    optimizers = {"vanilla": sgd(vanilla), "attached": sgd(model)}
    ws.attach(model, optimizers["attached"], "mwe", start="paused")
    for parameter in (*vanilla.parameters(), *model.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    times: dict[str, list[float]] = {form: [] for form in optimizers}
    for _ in range(rounds):
        for form, optimizer in optimizers.items():
            times[form].append(seconds(optimizer.step) * 1000)
    return statistics.median(times["attached"]) - statistics.median(times["vanilla"])


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements as plain data; progress goes to stderr."""
    names = QUICK if options.quick else tuple(NETWORKS)
    rounds = options.rounds or (3 if options.quick else 11)
    found: dict[str, Any] = {"machine": describe_machine(), "rounds": rounds, "steps": []}
    for name in names:
        for mode in ("lwe",) if name.startswith("vit") else ("lwe", "lwe+mwe"):
            for micro_batches in MICRO_BATCHES:
                ratios = compare_steps(name, mode, micro_batches, rounds)
                note(name, mode, micro_batches, {form: str(r) for form, r in ratios.items()})
                row = {"network": name, "mode": mode, "micro_batches": micro_batches}
                found["steps"].append(row | {form: asdict(r) for form, r in ratios.items()})
    found["passes"] = {name: passes_are_vanilla(name, "lwe") for name in names}
    found["guards_ms"] = guards_milliseconds(101)
    note("guards", found["guards_ms"])
    return found


def as_markdown(found: Mapping[str, Any]) -> str:
    """The results as tables."""
    passes = found["passes"].items()
    return "\n".join(
        [
            "# A training step, attached and converted\n",
            "Written by `benchmarks/attached.py`. Ratios of CPU time within a round, one thread, "
            f"channels_last: median (smallest to largest) of {found['rounds']} rounds.\n",
            machine_line(found["machine"]),
            "## A step over the vanilla step (vanilla = 1)\n",
            table(
                ("network", "batch, pixels", "mode", "micro-batches", "converted", "attached"),
                [
                    (
                        row["network"],
                        "{}, {}".format(*NETWORKS[row["network"]]),
                        row["mode"],
                        row["micro_batches"],
                        Spread(**row["converted"]),
                        Spread(**row["attached"]),
                    )
                    for row in found["steps"]
                ],
            ),
            "## Forward and backward pass, vanilla and attached\n",
            table(
                ("network", "bytes kept for the backward pass", "nodes of its graph"),
                [
                    (
                        name,
                        " and ".join(f"{count:,}" for count in row["bytes"]),
                        " and ".join(f"{count:,}" for count in row["nodes"]),
                    )
                    for name, row in passes
                ],
            ),
            f"Exchange, checks and copies take {found['guards_ms']:.2f} ms per step for 54 small "
            "weights with an identity E, on this machine.\n",
        ]
    )


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two networks, three rounds")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (11; quick: 3)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = run(options)
    write_results("attached", found, as_markdown(found), options.output)


if __name__ == "__main__":
    main()
