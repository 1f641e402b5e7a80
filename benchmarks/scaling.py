"""How the overhead of a training step changes with batch, width and depth, with plots.

    python benchmarks/scaling.py            # about four minutes
    python benchmarks/scaling.py --quick    # three points a curve, few rounds

A bottleneck ResNet on 64 px, channels_last: forward, loss, backward, SGD. What is plotted is the
CPU time of an excited step over that of a vanilla one of the same round, one thread: the median,
and the smallest and largest as a band. Excitation computes with weights alone, so its share falls
with the batch; width makes weights grow as the square and depth as layers do, and both do the
same to the convs. Needs the extra ``plot`` (matplotlib). Writes ``scaling.json``, ``scaling.md``
and ``scaling.svg`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from measuring import (
    RESULTS,
    Spread,
    compare,
    describe_machine,
    machine_line,
    note,
    seconds,
    table,
    write_results,
)
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

import we_surgery as ws

MODES = ("lwe", "lwe+mwe")
BATCH, WIDTH, DEPTH = 8, 64, 1
CURVES: dict[str, tuple[int, ...]] = {
    "batch": (2, 4, 8, 16, 32, 64),
    "width": (16, 32, 64, 96, 128),
    "depth": (1, 2, 3, 4),
}
LABELS = {
    "batch": "images a batch",
    "width": "channels of the first blocks",
    "depth": "blocks a stage",
}


def build(width: int, depth: int) -> nn.Module:
    """A ResNet whose four stages have ``depth`` bottlenecks each."""
    network = ResNet(Bottleneck, [depth] * 4, num_classes=10, width_per_group=width)
    return network.to(memory_format=torch.channels_last)


def compare_steps(batch: int, width: int, depth: int, rounds: int) -> dict[str, Spread]:
    """A training step of each mode over the vanilla one."""
    torch.manual_seed(0)
    vanilla = build(width, depth)
    images = torch.randn(batch, 3, 64, 64).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,))

    def measure(model: nn.Module) -> Callable[[], float]:
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return lambda: seconds(step)

    measures = {"vanilla": measure(vanilla)}
    measures |= {mode: measure(ws.convert(vanilla, mode)) for mode in MODES}
    return compare(measures, "vanilla", rounds)


def plot(found: Mapping[str, Any]) -> None:
    """The curves side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "we_surgery"  # the same file for the same figures
    figure, axes = plt.subplots(1, len(CURVES), figsize=(11, 3.4), sharey=True)
    for axis, curve in zip(axes, CURVES, strict=True):
        points = [point for point in found["points"] if point["curve"] == curve]
        places = [point["value"] for point in points]
        for mode in MODES:
            spreads = [point[mode] for point in points]
            axis.plot(places, [s["median"] for s in spreads], marker="o", label=mode)
            axis.fill_between(
                places,
                [s["smallest"] for s in spreads],
                [s["largest"] for s in spreads],
                alpha=0.2,
            )
        if curve == "batch":
            axis.set_xscale("log", base=2)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xlabel(LABELS[curve])
        axis.set_xticks(places, [str(place) for place in places])
    axes[0].set_ylabel("training step over vanilla")
    axes[0].legend()
    figure.tight_layout()
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / "scaling.svg", metadata={"Date": None})


def as_markdown(found: Mapping[str, Any]) -> str:
    """The results as a table under the plot."""
    return "\n".join(
        [
            "# Overhead against batch, width and depth\n",
            "Written by `benchmarks/scaling.py`: a training step of a bottleneck ResNet at 64 px "
            f"over the vanilla one. Where it does not vary, the batch is {BATCH}, the width "
            f"{WIDTH} and the depth {DEPTH}. Ratios of CPU time within a round, one thread: "
            f"median (smallest to largest) of {found['rounds']} rounds.\n",
            machine_line(found["machine"]),
            "![overhead against batch, width and depth](scaling.svg)\n",
            table(
                ("varied", "value", *MODES),
                [
                    (point["curve"], point["value"], *(Spread(**point[mode]) for mode in MODES))
                    for point in found["points"]
                ],
            ),
        ]
    )


def main() -> None:
    """Measures, plots and writes the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three points a curve, three rounds")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (7; quick: 3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = options.rounds or (3 if options.quick else 7)
    found: dict[str, Any] = {"machine": describe_machine(), "rounds": rounds, "points": []}
    for curve, values in CURVES.items():
        for value in values[:3] if options.quick else values:
            sizes = {"batch": BATCH, "width": WIDTH, "depth": DEPTH} | {curve: value}
            ratios = compare_steps(**sizes, rounds=rounds)
            note(curve, value, {mode: str(ratio) for mode, ratio in ratios.items()})
            spreads = {mode: asdict(ratio) for mode, ratio in ratios.items()}
            found["points"].append({"curve": curve, "value": value} | spreads)
    plot(found)
    write_results("scaling", found, as_markdown(found))


if __name__ == "__main__":
    main()
