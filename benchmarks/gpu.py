"""A training step on a GPU: time, peak memory and kernel launches, excited over vanilla.

    python benchmarks/gpu.py                       # the networks of Table 1, batch 256, 224 px
    python benchmarks/gpu.py --networks resnet50 --backends eager triton --rounds 30
    python benchmarks/gpu.py --device cpu --batch 2 --pixels 64 --rounds 1   # a rehearsal

bf16 autocast, channels_last, SGD with momentum; forward, loss, backward, step. Models take turns
and only ratios of one round are reported: median (smallest to largest). Times are those of CUDA
events; the peak is ``torch.cuda.max_memory_allocated`` of one step; launches are the kernels that
torch's profiler saw in one step, excited minus vanilla, over the excited layers. ``inductor``
compiles for some minutes first; ``grouped`` is ``triton`` after ``set_grouped``. Writes
``gpu.json`` and ``gpu.md`` into ``benchmarks/results``, or, for a rehearsal, nothing: a CPU's
figures say nothing of a GPU's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from measuring import (
    TABLE_1,
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

import we_surgery as ws
from we_surgery.layers import excited_layers

BACKENDS = ("eager", "inductor", "triton", "grouped")


class Step:
    """A model with its optimizer and one batch, ready to train on."""

    def __init__(self, model: nn.Module, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        shape = (options.batch, 3, options.pixels, options.pixels)
        images = torch.randn(shape, device=self.device)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.randint(1000, (options.batch,), device=self.device)

    def run(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()

    def seconds(self) -> float:
        if self.device.type != "cuda":
            start = time.process_time()
            self.run()
            return time.process_time() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        self.run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def peak(self) -> int:
        """Bytes beyond what all models of the comparison hold between steps."""
        if self.device.type != "cuda":
            return 0
        self.optimizer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before + self.held()

    def held(self) -> int:
        """Bytes of the model and of its optimizer's state."""
        states = self.optimizer.state.values()
        momenta = [v for state in states for v in state.values() if isinstance(v, torch.Tensor)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *momenta]
        return sum(tensor.nbytes for tensor in tensors)

    def launches(self) -> int:
        """Kernels of one step."""
        if self.device.type != "cuda":
            return 0
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            self.run()
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        return sum(event.device_type == on_device for event in profiler.events())


def excited(vanilla: nn.Module, mode: str, backend: str) -> nn.Module:
    """The network, excited by a backend."""
    is_grouped = backend == "grouped"
    model = ws.convert(vanilla, mode, backend="triton" if is_grouped else backend)  # type: ignore[arg-type]
    ws.set_grouped(model, is_grouped)
    return model


def measure(name: str, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every backend over vanilla, for one network."""
    torch.manual_seed(0)
    vanilla = build_network(name)
    steps = {"vanilla": Step(vanilla, options)}
    for backend in options.backends:
        steps[backend] = Step(excited(vanilla, mode, backend), options)
    for step in steps.values():
        step.run()  # compiles, and makes the optimizer's state

    def timed(step: Step) -> Callable[[], float]:
        return step.seconds

    ratios = compare({k: timed(s) for k, s in steps.items()}, "vanilla", options.rounds)
    peaks = {key: step.peak() for key, step in steps.items()}
    launches = {key: step.launches() for key, step in steps.items()}
    row: dict[str, Any] = {"network": name, "mode": mode, "peaks": peaks, "launches": launches}
    for backend in options.backends:
        layers = sum(1 for _ in excited_layers(steps[backend].model))
        row[backend] = {
            "time": asdict(ratios[backend]),
            "memory": peaks[backend] / peaks["vanilla"] if peaks["vanilla"] else None,
            "launches_a_layer": (launches[backend] - launches["vanilla"]) / layers,
        }
        note(name, mode, backend, str(ratios[backend]), row[backend])
    return row


def as_markdown(found: Mapping[str, Any]) -> str:
    """The results as a table."""
    rows = [
        (
            row["network"],
            row["mode"],
            backend,
            Spread(**row[backend]["time"]),
            f"{row[backend]['memory']:.3f}",
            f"{row[backend]['launches_a_layer']:.1f}",
        )
        for row in found["networks"]
        for backend in found["backends"]
    ]
    columns = ("network", "mode", "backend", "step time", "peak memory", "launches a layer")
    return "\n".join(
        [
            "# A training step on a GPU (vanilla = 1)\n",
            f"Written by `benchmarks/gpu.py` on {found['gpu']}: batch {found['batch']}, "
            f"{found['pixels']} px, bf16 autocast, channels_last; {found['rounds']} rounds.\n",
            machine_line(found["machine"]),
            table(columns, rows),
        ]
    )


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=TABLE_1)
    parser.add_argument("--modes", nargs="+", default=("lwe", "lwe+mwe"))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no GPU here.\nRehearse with `--device cpu --batch 2 --pixels 64`.")
    rows = [measure(name, mode, options) for name in options.networks for mode in options.modes]
    if options.device != "cuda":
        note("A rehearsal: nothing was written.")
        return
    found = {"machine": describe_machine(), "gpu": torch.cuda.get_device_name(), "networks": rows}
    found |= {key: getattr(options, key) for key in ("backends", "batch", "pixels", "rounds")}
    write_results("gpu", found, as_markdown(found))


if __name__ == "__main__":
    main()
