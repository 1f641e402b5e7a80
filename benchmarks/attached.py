"""What a training step costs with excitation attached and converted, over the vanilla step.

    python benchmarks/attached.py --minutes 6             # as many rows as fit, `lwe` first
    python benchmarks/attached.py --minutes 6 --resume    # goes on with the rows that are missing
    python benchmarks/attached.py --rounds 1 --networks resnet18 --output /tmp/rehearsal

A step is some forward and backward passes (micro-batches), then one SGD step. The three forms take
turns, and only ratios of one round are reported. Times are CPU seconds of one thread. Without
``--minutes`` all rows are measured, in a quarter of an hour.

Writes ``attached.json`` and ``attached.md`` into ``benchmarks/results``, after each row.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
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
ROWS = [
    (name, mode, micro_batches)
    for mode in ("lwe", "lwe+mwe")
    for name in NETWORKS
    for micro_batches in (1, 4)
    if mode == "lwe" or not name.startswith("vit")  # whose linear layers get MWE in both
]
FORMS = ("converted", "attached")
MAX_ROUNDS, MIN_ROUNDS, SECONDS = 11, 3, 40
"""A row has as many rounds as take some seconds."""


def network(name: str) -> nn.Module:
    """The network in the memory format that a CPU prefers."""
    model = timm.create_model(name) if name.startswith("vit") else build_network(name)
    return model.to(memory_format=torch.channels_last)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The papers' optimizer."""
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)


def attached(
    name: str, mode: str
) -> tuple[nn.Module, torch.optim.Optimizer, ws.AttachedExcitation]:
    """The network with excitation in the step of its optimizer."""
    model = network(name)
    optimizer = sgd(model)
    return model, optimizer, ws.attach(model, optimizer, mode)


def compare_steps(name: str, mode: str, micro_batches: int, rounds: int | None) -> dict[str, Any]:
    """Converted and attached over vanilla, as a row of the results."""
    batch, pixels = NETWORKS[name]
    torch.manual_seed(0)
    vanilla = network(name)
    converted = ws.convert(network(name), mode)
    forms = {
        "vanilla": (vanilla, sgd(vanilla)),
        "converted": (converted, sgd(converted)),
        "attached": attached(name, mode)[:2],
    }
    images = torch.randn(batch, 3, pixels, pixels).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,))

    def measure(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], float]:
        def step() -> None:
            optimizer.zero_grad()
            for _ in range(micro_batches):
                F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return lambda: seconds(step)

    measures = {form: measure(*pair) for form, pair in forms.items()}
    if rounds is None:
        once = sum(act() for act in measures.values())
        rounds = min(max(round(SECONDS / once), MIN_ROUNDS), MAX_ROUNDS)
    ratios = compare(measures, "vanilla", rounds)
    note(name, mode, micro_batches, {form: str(ratio) for form, ratio in ratios.items()})
    row = {"network": name, "mode": mode, "micro_batches": micro_batches, "rounds": rounds}
    return row | {form: asdict(ratio) for form, ratio in ratios.items()}


def excited_and_held(excitation: ws.AttachedExcitation) -> tuple[int, int]:
    """Bytes of the excited weights, and those that excitation holds between steps."""
    excited = {(row.module, row.parameter) for row in excitation.plan.excited}
    weights = {excitation.model.get_submodule(m).get_parameter(p) for m, p in excited}
    return sum(w.nbytes for w in weights), sum(p.nbytes for p in excitation.parameters())


def peak_bytes(act: Callable[[], object]) -> int:
    """The most memory that a call allocates beyond what there was, as the allocator counts it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        act()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


def memory(name: str, mode: str) -> dict[str, float]:
    """What excitation holds between steps, and a step takes beyond vanilla, over the weights."""
    model, optimizer, excitation = attached(name, mode)
    excited, held = excited_and_held(excitation)
    vanilla = network(name)
    peaks = []
    for own, stepped in ((vanilla, sgd(vanilla)), (model, optimizer)):
        for parameter in own.parameters():
            parameter.grad = torch.ones_like(parameter)
        stepped.step()  # makes its state
        peaks.append(peak_bytes(stepped.step))
    return {"held": held / excited, "step": (peaks[1] - peaks[0]) / excited}


def passes(name: str, mode: str) -> dict[str, Any]:
    """Bytes kept for the backward pass, and nodes of its graph, of vanilla and attached."""
    batch, pixels = NETWORKS[name]
    images = torch.randn(batch, 3, pixels, pixels).to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    vanilla, (model, *_) = network(name), attached(name, mode)
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


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run on this machine has measured; with --resume."""
    machine, path = describe_machine(), options.output / "attached.json"
    found: dict[str, Any] = {"machine": machine, "steps": [], "networks": {}}
    if options.resume and path.exists():
        earlier = json.loads(path.read_text())
        if earlier["machine"] == machine and "networks" in earlier:
            return earlier
        note("The results are of another machine or version: all is measured anew.")
    return found


def run(options: argparse.Namespace) -> None:
    """Measures what is missing, until the time is up; progress goes to stderr."""
    start, found = time.monotonic(), measured(options)
    for name in options.networks:
        if name not in found["networks"]:
            found["networks"][name] = passes(name, "lwe") | memory(name, "lwe")
            note(name, found["networks"][name])
    found["guards_ms"] = guards_milliseconds(101)
    note("guards", found["guards_ms"])
    known = {(row["network"], row["mode"], row["micro_batches"]) for row in found["steps"]}
    missing = [row for row in ROWS if row[0] in options.networks and row not in known]
    for place, row in enumerate(missing):
        if options.minutes is not None and time.monotonic() - start > options.minutes * 60:
            note(f"Time is up; {len(missing) - place} rows are missing. Go on with --resume.")
            break
        found["steps"].append(compare_steps(*row, options.rounds))
        found["steps"].sort(key=lambda own: list(NETWORKS).index(own["network"]))
        write_results("attached", found, as_markdown(found), options.output, echo=False)
    sys.stdout.write(as_markdown(found))


def as_markdown(found: Mapping[str, Any]) -> str:
    """The results as tables."""
    networks = found["networks"].items()
    return "\n".join(
        [
            "# A training step, attached and converted\n",
            "Written by `benchmarks/attached.py`. Ratios of CPU time within a round, one thread, "
            "channels_last: median (smallest to largest).\n",
            machine_line(found["machine"]),
            "## A step over the vanilla step (vanilla = 1)\n",
            table(
                ("network", "batch, pixels", "mode", "micro-batches", *FORMS, "rounds"),
                [
                    (
                        row["network"],
                        "{}, {}".format(*NETWORKS[row["network"]]),
                        row["mode"],
                        row["micro_batches"],
                        *(Spread(**row[form]) for form in FORMS),
                        row["rounds"],
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
                    for name, row in networks
                ],
            ),
            "## Memory, in multiples of the excited weights\n",
            "Raw weights and parameters of the excitations are held between steps. A step takes "
            "what one layer needs: the raw gradients lie in the memory of W'.\n",
            table(
                ("network", "held between steps", "in a step, more than vanilla"),
                [(name, f"{row['held']:.3f}", f"{row['step']:.3f}") for name, row in networks],
            ),
            f"Exchange, checks and copies take {found['guards_ms']:.2f} ms per step for 54 small "
            "weights with an identity E, on this machine.\n",
        ]
    )


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, help="per row (3 to 11, about 40 seconds)")
    parser.add_argument("--minutes", type=float, help="begin no row after that")
    parser.add_argument("--resume", action="store_true", help="keep rows of this machine")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run(options)


if __name__ == "__main__":
    main()
