"""What the benchmarks of cost share: interleaved ratios, networks, the machine, the files."""

from __future__ import annotations

import contextlib
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

RESULTS = Path(__file__).parent / "results"
TABLE_1 = (
    "mobilenet_v2",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "resnet152",
)
"""The networks of the paper's Table 1, by torchvision's names."""


@dataclass
class Spread:
    """Ratios of interleaved measurements."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Spread:
        """The spread of one ratio a round."""
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.smallest:.2f} to {self.largest:.2f})"


def build_network(name: str, *, device: str = "cpu") -> nn.Module:
    """An untrained network: torchvision's, or timm's where torchvision writes its own layers."""
    with torch.device(device):
        if name == "convnext_tiny":
            return timm.create_model(name)
        return torchvision.models.get_model(name, weights=None)  # type: ignore[no-any-return]


def peak_mib(act: Callable[[], object]) -> float:
    """MiB of resident memory that an action takes at its peak, beyond what there was; on Linux."""

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    act()
    return status("VmHWM") - before


def seconds(act: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    act()
    return time.process_time() - start


def compare(
    measures: Mapping[str, Callable[[], float]], baseline: str, rounds: int
) -> dict[str, Spread]:
    """Each measure over the baseline's of the same round, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    names = list(measures)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds + 1):
            # Who goes first changes, so that nobody always finds the cache cold.
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(measures[name]())
    finally:
        gc.enable()
    measured = {name: values[1:] for name, values in seconds.items()}
    return {
        name: Spread.of([a / b for a, b in zip(values, measured[baseline], strict=True)])
        for name, values in measured.items()
        if name != baseline
    }


def describe_machine() -> dict[str, Any]:
    """Processor, software and threads."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "threads": torch.get_num_threads(),
    }


def note(*what: object) -> None:
    """Progress, on stderr."""
    sys.stderr.write(" ".join(map(str, what)) + "\n")
    sys.stderr.flush()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine in one sentence."""
    return "Machine: " + ", ".join(f"{key} {value}" for key, value in machine.items()) + ".\n"


def write_results(
    name: str, found: Mapping[str, Any], text: str, folder: Path = RESULTS, *, echo: bool = True
) -> None:
    """Writes ``name.json`` and ``name.md``, and the text to stdout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / f"{name}.md").write_text(text)
    if echo:
        sys.stdout.write(text)


def replace_section(page: Path, begin: str, end: str, body: str) -> None:
    """Writes ``body`` between two marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{body}\n{end}{after}", encoding="utf-8")
