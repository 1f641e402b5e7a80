"""When DDP's buckets are full: how much of the gradients can be sent during the backward pass.

    python benchmarks/ddp_overlap.py

A bucket is sent when all of its gradients have arrived, while others are still computed; what is
full only at the end is sent when nothing is left to hide it behind. A communication hook notes
when each is full, as a share of the backward pass: of the vanilla network, of the excited one, and
of the excited one after ``set_grouped``. One process with gloo on a CPU: it shows the order in
which gradients arrive, and no network's speed. Writes ``ddp_overlap.json`` and ``ddp_overlap.md``
into ``benchmarks/results``.
"""

# DDP reads the annotations of a hook: no `from __future__ import annotations` here.

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from measuring import build_network, describe_machine, machine_line, note, table, write_results
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import we_surgery as ws

MODELS = ("vanilla", "excited", "grouped")


def build(kind: str, network: str) -> nn.Module:
    """The network as it is, excited, or excited in a group."""
    torch.manual_seed(0)
    model = build_network(network)
    if kind == "vanilla":
        return model
    model = ws.convert(model, "lwe", inplace=True)
    ws.set_grouped(model, kind == "grouped")
    return model


class Run:
    """A wrapped model, and when its buckets were full."""

    def __init__(self, kind: str, options: argparse.Namespace) -> None:
        self.model = DistributedDataParallel(build(kind, options.network))
        self.full: list[tuple[float, int]] = []
        self.model.register_comm_hook(None, self._note)
        self.images = torch.randn(options.batch, 3, options.pixels, options.pixels)
        self.labels = torch.randint(1000, (options.batch,))

    def _note(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.full.append((time.perf_counter(), bucket.buffer().nbytes))
        return allreduce_hook(dist.group.WORLD, bucket)

    def shares(self) -> list[tuple[float, int]]:
        """Of one backward pass: the share of its time at which each bucket was full, and bytes."""
        self.model.zero_grad()
        loss = F.cross_entropy(self.model(self.images), self.labels)
        self.full.clear()
        start = time.perf_counter()
        loss.backward()
        took = time.perf_counter() - start
        return [((moment - start) / took, size) for moment, size in self.full]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The medians of some rounds, model after model in turns."""
    runs = {kind: Run(kind, options) for kind in MODELS}
    found: dict[str, list[list[tuple[float, int]]]] = {kind: [] for kind in MODELS}
    for turn in range(options.rounds + 2):  # DDP arranges its buckets anew after the first pass
        for kind, run in runs.items():
            shares = run.shares()
            note(kind, *(f"{share:.2f}" for share, _ in shares))
            if turn > 1:
                found[kind].append(shares)
    return [summary(kind, rounds) for kind, rounds in found.items()]


def summary(kind: str, rounds: list[list[tuple[float, int]]]) -> dict[str, Any]:
    """What one model's rounds have in common."""

    def median_share(moment: float) -> float:
        shares = (
            sum(size for share, size in full if share < moment) / sum(size for _, size in full)
            for full in rounds
        )
        return statistics.median(shares)

    return {
        "model": kind,
        "buckets": len(rounds[0]),
        "first_full": statistics.median(full[0][0] for full in rounds),
        "sent_by_half": median_share(0.5),
        "sent_by_nine_tenths": median_share(0.9),
    }


def as_markdown(found: Mapping[str, Any]) -> str:
    """The shares as a table."""
    rows = [
        (
            row["model"],
            row["buckets"],
            *(f"{row[key]:.0%}" for key in ("first_full", "sent_by_half", "sent_by_nine_tenths")),
        )
        for row in found["models"]
    ]
    columns = (
        "model",
        "buckets",
        "the first is full after",
        "bytes full after half",
        "bytes full after 90 %",
    )
    return "\n".join(
        [
            "# DDP's overlap\n",
            "Written by `benchmarks/ddp_overlap.py`: when DDP's buckets are full, as a share of "
            f"the backward pass's time. {found['network']}, mode `lwe`, batch {found['batch']}, "
            f"{found['pixels']} px, one process, gloo on a CPU, eager formulas; medians of "
            f"{found['rounds']} rounds.\n",
            machine_line(found["machine"]),
            table(columns, rows),
        ]
    )


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        address = (Path(folder) / "rendezvous").as_uri()
        dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
        try:
            found = {"machine": describe_machine(), **vars(options), "models": measure(options)}
        finally:
            dist.destroy_process_group()
    write_results("ddp_overlap", found, as_markdown(found))


if __name__ == "__main__":
    main()
