"""What excitation costs on several processes: a step under DDP, and E alone under FSDP2.

    python benchmarks/ranks.py              # about two minutes on two cores
    python benchmarks/ranks.py --rounds 1   # a rehearsal; writes as well, into --output

Under DDP two gloo processes take a step of ResNet18 together; vanilla, attached and converted take
turns, and the ratios of wall time of one round are reported. The converted form gives gradients of
raw weights, which are ready later than those of vanilla weights; attach leaves DDP's buckets and
their order alone, which a test shows. Under FSDP2 each rank excites its own rows: the CPU time of
E, forward and backward, in a step of ResNet18 on one, two and three ranks, of the slowest rank.
Writes ``ranks.json`` and ``ranks.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from measuring import (
    RESULTS,
    Spread,
    build_network,
    compare,
    describe_machine,
    machine_line,
    note,
    table,
    write_results,
)
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import we_surgery as ws
from we_surgery.attached import step as attached_step

NETWORK, BATCH, PIXELS = "resnet18", 8, 64
MODE = "lwe"
RANKS = (1, 2, 3)
FORMS = ("attached", "converted")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The papers' optimizer."""
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)


def ddp_steps(rounds: int) -> dict[str, Any]:
    """Wall time of a step over that of vanilla, as this rank sees it."""
    images, labels = torch.randn(BATCH, 3, PIXELS, PIXELS), torch.randint(1000, (BATCH,))

    def measure(form: str) -> Callable[[], float]:
        torch.manual_seed(0)
        model = build_network(NETWORK)
        if form == "converted":
            model = ws.convert(model, MODE)
        wrapped = DistributedDataParallel(model)
        optimizer = sgd(wrapped)
        if form == "attached":
            ws.attach(wrapped, optimizer, MODE)

        def step() -> float:
            dist.barrier()
            start = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(wrapped(images), labels).backward()
            optimizer.step()
            return time.perf_counter() - start

        step()  # after which DDP makes its buckets anew
        return step

    measures = {form: measure(form) for form in ("vanilla", *FORMS)}
    return {form: asdict(ratio) for form, ratio in compare(measures, "vanilla", rounds).items()}


def excitation_milliseconds(rounds: int) -> float:
    """CPU time of E in one step, on this rank's rows; without a forward pass of the model."""
    torch.manual_seed(0)
    model = fully_shard(build_network(NETWORK))
    optimizer = sgd(model)
    ws.attach(model, optimizer, MODE)
    spent = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            start = time.thread_time()
            result = function(*args, **kwargs)
            spent += time.thread_time() - start
            return result

        return run

    attached_step.write = timed(attached_step.write)
    attached_step.pull_back = timed(attached_step.pull_back)
    found = []
    for _ in range(rounds + 1):
        spent = 0.0
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        found.append(spent * 1000)
    return statistics.median(found[1:])


def on_a_rank(
    rank: int, ranks: int, folder: str, measure: Callable[[int], Any], rounds: int
) -> None:
    """One process; what it measured goes into a file."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    address = (Path(folder) / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    torch.save(measure(rounds), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def measured(measure: Callable[[int], Any], ranks: int, rounds: int) -> list[Any]:
    """What each rank has measured."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, measure, rounds)
        torch.multiprocessing.spawn(on_a_rank, arguments, nprocs=ranks)  # type: ignore[no-untyped-call]
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]


def as_markdown(found: Mapping[str, Any]) -> str:
    """The results as tables."""
    alone = found["fsdp2"][0]
    return "\n".join(
        [
            "# Excitation on several processes\n",
            f"Written by `benchmarks/ranks.py`: {NETWORK}, batch {BATCH} per rank, {PIXELS} px, "
            f"mode {MODE}, gloo on one machine, one thread per rank; {found['rounds']} rounds.\n",
            machine_line(found["machine"]),
            "## A step under DDP, two ranks (vanilla = 1)\n",
            table(FORMS, [[str(Spread(**found["ddp"][form])) for form in FORMS]]),
            "## E under FSDP2, the slowest rank\n",
            table(
                ("ranks", "ms of CPU time per step", "over one rank"),
                [
                    (ranks, f"{own:.1f}", f"{own / alone:.2f}")
                    for ranks, own in zip(RANKS, found["fsdp2"], strict=True)
                ],
            ),
        ]
    )


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (15)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": describe_machine(), "rounds": options.rounds}
    found["ddp"] = measured(ddp_steps, 2, options.rounds)[0]
    note("DDP", found["ddp"])
    found["fsdp2"] = []
    for ranks in RANKS:
        found["fsdp2"].append(max(measured(excitation_milliseconds, ranks, options.rounds)))
        note("FSDP2", ranks, found["fsdp2"][-1])
    write_results("ranks", found, as_markdown(found), options.output)


if __name__ == "__main__":
    main()
