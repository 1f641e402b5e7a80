"""What conversion, inference and stripping cost beside a plain model.

    python benchmarks/deployment.py            # three networks, about four minutes
    python benchmarks/deployment.py --quick    # one network, few rounds

Ratios of CPU time of interleaved rounds, one thread: median (smallest to largest).

* *inference*: an excited model in eval mode after its first batch, over the vanilla one;
* *convert*: in place, over the bare swap of classes and the initialization of the new parameters;
* *fold*: all excited weights computed once, over a clone of all parameters;
* *strip*: in place, over that clone. It computes each weight a second time, as its proof, and holds
  all folds until all are proven, so that a failure leaves the model as it was;
* *peak memory*: of that strip beyond the model, over all parameters, a second set of weights
  therefore; and of one with ``layer_by_layer``, over the largest weight.

Writes ``deployment.json`` and ``deployment.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from measuring import (
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
from torch import nn

import we_surgery as ws
from we_surgery.converted.layer import excited_layers
from we_surgery.converted.views import folded_parameters
from we_surgery.excitations import build_excitation

NETWORKS = ("mobilenet_v2", "resnet50", "resnet152")


def inference(name: str, mode: str, rounds: int) -> Spread:
    """Eval mode, batch 4, 128 px, without gradients."""
    vanilla = build_network(name).eval().to(memory_format=torch.channels_last)
    excited = ws.convert(vanilla, mode).eval()
    images = torch.randn(4, 3, 128, 128).to(memory_format=torch.channels_last)

    def measure(model: nn.Module) -> Callable[[], float]:
        def run() -> float:
            with torch.inference_mode():
                return seconds(lambda: model(images))

        return run

    measures = {"vanilla": measure(vanilla), "excited": measure(excited)}
    return compare(measures, "vanilla", rounds)["excited"]


def conversion(name: str, mode: str, rounds: int) -> dict[str, Spread]:
    """Convert, fold and strip of one network, each over its yardstick."""
    vanilla = build_network(name)
    plan = ws.plan(vanilla, mode)
    excited = ws.convert(vanilla, plan=plan)
    parameters = list(vanilla.parameters())

    def swap_and_initialize() -> float:
        modules = dict(copy.deepcopy(vanilla).named_modules())

        def act() -> None:
            for row in plan.excited:
                module = modules[row.module]
                module.add_module("excitation", build_excitation(row.excitation, row.layout))
                module.__class__ = type("Swapped", (type(module),), {})

        return seconds(act)

    def convert() -> float:
        model = copy.deepcopy(vanilla)
        return seconds(lambda: ws.convert(model, plan=plan, inplace=True))

    def convert_with_plan() -> float:
        model = copy.deepcopy(vanilla)
        return seconds(lambda: ws.convert(model, mode, inplace=True))

    def clone() -> float:
        return seconds(lambda: [parameter.detach().clone() for parameter in parameters])

    def fold() -> float:
        layers = [layer for _, layer in excited_layers(excited)]
        return seconds(lambda: [folded_parameters(layer) for layer in layers])

    def strip() -> float:
        model = copy.deepcopy(excited)
        return seconds(lambda: ws.strip(model, inplace=True))

    converted = compare(
        {
            "swap": swap_and_initialize,
            "convert by a plan": convert,
            "plan and convert": convert_with_plan,
        },
        "swap",
        rounds,
    )
    folded = compare({"clone": clone, "fold": fold, "strip": strip}, "clone", rounds)
    return converted | folded


def peak_of_strip(name: str, mode: str, *, layer_by_layer: bool) -> int:
    """The most bytes that a strip in place takes at once beyond the model."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    # From the model's own memory on: what a profiler has not seen made it does not see freed.
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        model = ws.convert(build_network(name), mode, inplace=True)
        with torch.profiler.record_function("strip"):
            ws.strip(model, inplace=True, layer_by_layer=layer_by_layer)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    (start,) = (event.start_ns() for event in events if event.name() == "strip")
    held = before = most = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            if event.start_ns() < start:
                before = most = held
            most = max(most, held)
    return most - before


def as_markdown(found: Mapping[str, Any]) -> str:
    """The results as tables."""
    columns = [key for key in found["networks"][0] if key not in ("network", "mode")]
    rows = [
        (
            row["network"],
            row["mode"],
            *(Spread(**row[key]) if isinstance(row[key], dict) else row[key] for key in columns),
        )
        for row in found["networks"]
    ]
    return "\n".join(
        [
            "# Conversion, inference and strip beside a plain model\n",
            "Written by `benchmarks/deployment.py`, which tells what each column is over. Ratios "
            "of CPU time within a round, one thread: median (smallest to largest) of "
            f"{found['rounds']} rounds. Peak memory is that of a strip in place beyond the model: "
            "over all its parameters, and of one layer by layer over its largest weight.\n",
            machine_line(found["machine"]),
            table(("network", "mode", *columns), rows),
        ]
    )


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one network, three rounds")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (7; quick: 3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds = options.rounds or (3 if options.quick else 7)
    found: dict[str, Any] = {"machine": describe_machine(), "rounds": rounds, "networks": []}
    for name in NETWORKS[:1] if options.quick else NETWORKS:
        for mode in ("lwe", "lwe+mwe"):
            ratios = {"inference": inference(name, mode, rounds)}
            ratios |= conversion(name, mode, rounds)
            row = {"network": name, "mode": mode}
            row |= {key: asdict(ratio) for key, ratio in ratios.items()}
            network = build_network(name, device="meta")
            sizes = [parameter.nbytes for parameter in network.parameters()]
            peak = peak_of_strip(name, mode, layer_by_layer=False)
            row["peak memory"] = round(peak / sum(sizes), 2)
            peak = peak_of_strip(name, mode, layer_by_layer=True)
            row["peak, layer by layer"] = round(peak / max(sizes), 2)
            note(name, mode, {key: str(r) for key, r in ratios.items()}, row["peak memory"], peak)
            found["networks"].append(row)
    write_results("deployment", found, as_markdown(found))


if __name__ == "__main__":
    main()
