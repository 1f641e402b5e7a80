"""A training step on a GPU: time, peak memory and kernel launches, excited over vanilla.

    python benchmarks/gpu.py                       # ResNet50, batch 256, 224 px: some minutes
    python benchmarks/gpu.py --networks resnet18 resnet152 --forms attached --rounds 30
    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu --networks toy   # a rehearsal

First the kernels are checked against eager on the device, on each weight of ResNet50, for each
composition and for all of them mixed; a difference above 1e-3 ends the run. Then training steps
are measured: bf16 autocast, channels_last, SGD with momentum; forward, loss, backward, step.
Models take turns and only ratios of one round are reported: median (smallest to largest). Times
are those of CUDA events; the peak is ``torch.cuda.max_memory_allocated`` of one step; launches
are the kernels that torch's profiler saw in one step, excited minus vanilla. ``converted`` is the
converted form, and ``attached`` is :func:`we_surgery.attach` with the kernels.

Writes ``gpu.json`` and ``gpu.md`` into ``benchmarks/results``, or, for a rehearsal, nothing: the
figures of a CPU say nothing of a GPU. A rehearsal takes the interpreter and small layers.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from measuring import (
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
from transform_forms import excitable_layouts, make_layer, together

import we_surgery as ws
from we_surgery.excitations import Backend, WeightLayout

FORMS = ("attached", "converted")
COMPOSITIONS = ("lwe", "mwe", "lwe+mwe")
MIXED = "mixed"
BACKENDS: tuple[Backend, ...] = ("eager", "triton")


def network(name: str) -> nn.Module:
    """One of torchvision's, or a few layers that an interpreter can train."""
    if name != "toy":
        return build_network(name)
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return nn.Sequential(nn.Conv2d(3, 20, 2), nn.ReLU(), nn.Conv2d(20, 8, 2), *pooled)


class Step:
    """A model with its optimizer and one batch, ready to train on."""

    def __init__(
        self, model: nn.Module, options: argparse.Namespace, attached: str | None = None
    ) -> None:
        self.device = torch.device(options.device)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        self.excitation = None
        if attached is not None:
            self.excitation = ws.attach(self.model, self.optimizer, attached, backend="triton")
        shape = (options.batch, 3, options.pixels, options.pixels)
        images = torch.randn(shape, device=self.device)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (options.batch,), device=self.device)

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
        if self.excitation is not None:
            tensors += self.excitation.parameters()
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


def check_kernels(device: torch.device) -> dict[str, float]:
    """The largest relative difference of the kernels from eager, by composition.

    On a CPU, where Triton interprets them, a few small layers stand for those of ResNet50.
    """
    layouts = excitable_layouts("resnet50")
    if device.type != "cuda":
        layouts = [WeightLayout(shape) for shape in ((20, 34, 2), (8, 40), (12, 6, 2))]
    found = {}
    for mode in (*COMPOSITIONS, MIXED):
        torch.manual_seed(0)
        modes = itertools.cycle(COMPOSITIONS if mode == MIXED else [mode])
        layers = [
            make_layer(layout, torch.contiguous_format, own)
            for layout, own in zip(layouts, modes, strict=False)
        ]
        results: list[list[torch.Tensor]] = []
        for backend in BACKENDS:
            given = [
                (e.to(device), w.detach().to(device), upstream.to(device))
                for e, w, upstream in ((x.excitation, x.weight, x.upstream) for x in layers)
            ]
            results.append(together(given, backend))
        found[mode] = max(
            float((one - other).abs().max() / one.abs().max())
            for one, other in zip(*results, strict=True)
        )
        if not found[mode] < 1e-3:
            sys.exit(f"The kernels differ from eager by {found[mode]:.1e} for {mode}.")
    return found


def measure(name: str, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every form over vanilla, for one network."""
    torch.manual_seed(0)
    vanilla = network(name)
    steps = {"vanilla": Step(vanilla, options)}
    for form in options.forms:
        if form == "attached":
            steps[form] = Step(copy.deepcopy(vanilla), options, attached=mode)
        else:
            steps[form] = Step(ws.convert(vanilla, mode), options)
    for step in steps.values():
        step.run()  # compiles, and makes the optimizer's state

    def timed(step: Step) -> Callable[[], float]:
        return step.seconds

    ratios = compare({k: timed(s) for k, s in steps.items()}, "vanilla", options.rounds)
    peaks = {key: step.peak() for key, step in steps.items()}
    launches = {key: step.launches() for key, step in steps.items()}
    row: dict[str, Any] = {"network": name, "mode": mode, "peaks": peaks, "launches": launches}
    for form in options.forms:
        row[form] = {
            "time": asdict(ratios[form]),
            "memory": peaks[form] / peaks["vanilla"] if peaks["vanilla"] else None,
            "launches": launches[form] - launches["vanilla"],
        }
        note(name, mode, form, str(ratios[form]), row[form])
    return row


def as_markdown(found: Mapping[str, Any]) -> str:
    """The results as a table."""
    rows = [
        (
            row["network"],
            row["mode"],
            form,
            Spread(**row[form]["time"]),
            "not measured" if row[form]["memory"] is None else f"{row[form]['memory']:.3f}",
            row[form]["launches"],
        )
        for row in found["networks"]
        for form in found["forms"]
    ]
    columns = ("network", "mode", "form", "step time", "peak memory", "further launches")
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
    parser.add_argument("--networks", nargs="+", default=("resnet50",))
    parser.add_argument("--modes", nargs="+", default=("lwe", "lwe+mwe"))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "There is no GPU here.\nRehearse with `TRITON_INTERPRET=1 ... --device cpu --networks "
            "toy`."
        )
    if options.device == "cpu":
        options.batch, options.pixels, options.rounds = 2, 16, 1
    checked = check_kernels(torch.device(options.device))
    note("kernels agree with eager", {name: f"{value:.1e}" for name, value in checked.items()})
    rows = [measure(name, mode, options) for name in options.networks for mode in options.modes]
    name = torch.cuda.get_device_name() if options.device == "cuda" else "a CPU (a rehearsal)"
    found = {"machine": describe_machine(), "gpu": name, "networks": rows}
    found["kernels"] = checked
    found |= {key: getattr(options, key) for key in ("forms", "batch", "pixels", "rounds")}
    if options.device == "cuda":
        write_results("gpu", found, as_markdown(found))
    else:
        sys.stdout.write(as_markdown(found))
        note("A rehearsal: nothing was written.")


if __name__ == "__main__":
    main()
