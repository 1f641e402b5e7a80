"""What an importance map costs with and without shared prefixes.

    python benchmarks/shared_prefixes.py            # some minutes of one core

The map of METHODS 6.2's size on real networks, on one small batch of random images: every conv
with a kernel larger than 1, 5 x 5 kernels each. Both ways run in one process, in turns, and their
results are compared bit for bit. Ratios are of process time, so that another program on the
machine weighs little.

Writes ``shared_prefixes.json`` and ``shared_prefixes.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchvision
from torch import nn

from we_surgery.analysis.importance import measure_locations

RESULTS = Path(__file__).parent / "results"
NETWORKS = ("resnet50", "vgg16_bn", "densenet121")


@dataclass
class Row:
    """One network.

    Attributes:
        name: of torchvision.
        evaluations: kernels measured.
        shared: how many of them started from a shared prefix.
        estimated: the wall time said before the first change, in seconds.
        seconds: wall time with shared prefixes, median of the rounds.
        ratio: process time with shared prefixes over that without, median of the rounds.
        same: whether both gave the same numbers, bit for bit.
    """

    name: str
    evaluations: int
    shared: int
    estimated: float
    seconds: float
    ratio: float
    same: bool


class Estimate:
    """Keeps what a monitor is told at the start."""

    def start(self, evaluations: int | None, seconds: float | None) -> None:
        self.seconds = seconds or 0.0

    def advance(self, evaluations: int) -> None: ...


def measure(name: str, samples: int, size: int, images: int, rounds: int) -> Row:
    """One network both ways, in turns."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name)
    batches = [(torch.randn(images, 3, size, size), torch.randint(1000, (images,)))]
    ratios, walls, estimates = [], [], []
    same, shared, evaluations = True, 0, 0
    for _ in range(rounds):
        seconds, found = {}, {}
        for share in (True, False):
            monitor, start, wall = Estimate(), time.process_time(), time.perf_counter()
            found[share], _ = measure_locations(
                model,
                batches,
                samples=(samples, samples),
                score="log_likelihood",
                monitor=monitor,
                share_prefixes=share,
            )
            seconds[share] = time.process_time() - start
            if share:
                walls.append(time.perf_counter() - wall)
                estimates.append(monitor.seconds)
        ratios.append(seconds[True] / seconds[False])
        same &= found[True].values == found[False].values
        shared, evaluations = found[True].shared, found[True].evaluations
    middle = statistics.median
    return Row(name, evaluations, shared, middle(estimates), middle(walls), middle(ratios), same)


def as_markdown(rows: list[Row], options: argparse.Namespace) -> str:
    """The table."""
    lines = [
        "# Importance maps with shared prefixes\n",
        f"Written by `benchmarks/shared_prefixes.py`: {options.images} images of "
        f"{options.size} px, {options.samples} x {options.samples} kernels a layer, "
        f"{options.rounds} rounds, one thread of a CPU.\n",
        "| network | evaluations | from a shared prefix | said before, s | took, s | "
        "time over full evaluations | same numbers |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.name} | {row.evaluations} | {row.shared} | {row.estimated:.0f} | "
        f"{row.seconds:.0f} | {row.ratio:.2f} | {'yes' if row.same else 'NO'} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="one network")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in [options.only] if options.only else NETWORKS:
        rows.append(measure(name, options.samples, options.size, options.images, options.rounds))
        sys.stderr.write(f"{rows[-1]}\n")
        sys.stderr.flush()
    options.output.mkdir(parents=True, exist_ok=True)
    found = [asdict(row) for row in rows]
    (options.output / "shared_prefixes.json").write_text(json.dumps(found, indent=1) + "\n")
    text = as_markdown(rows, options)
    (options.output / "shared_prefixes.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
