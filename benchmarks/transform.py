"""What weight excitation costs: time of the transform, bytes kept, time of a training step.

    python benchmarks/transform.py            # everything, about a quarter of an hour
    python benchmarks/transform.py --quick    # two networks, few rounds
    python benchmarks/transform.py --compile  # also torch.compile, on some layers of ResNet50

Three forms of the same mathematics are compared: *naive*, the obvious sequence of operations,
written out in ``transform_forms.py``; *staged*, this package's stages one by one under autograd;
and *closed*, the closed form that layers use. They are measured in turns, and only ratios of one
round are ever reported, as median, smallest and largest, because a machine is rarely quiet. Times
are CPU seconds of one thread.

Writes ``transform.json`` and ``transform.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

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
    table,
    write_results,
)
from torch import Tensor, nn
from transform_forms import (
    FORMS,
    MEMORY_FORMATS,
    Excite,
    Layer,
    excitable_layouts,
    make_layer,
)

import we_surgery as ws
from we_surgery.excitations import (
    LWE,
    Composition,
    WeightLayout,
)

NETWORKS = ("resnet50", "mobilenet_v2", "resnext50_32x4d", "convnext_tiny")
QUICK_NETWORKS = ("resnet50", "mobilenet_v2")
PRODUCTS = "products alone"
COMPILED_SHAPES = ((64, 64, 3, 3), (256, 64, 1, 1), (512, 512, 3, 3), (2048, 512, 1, 1))


def seconds_of_a_pass(layers: Sequence[Layer], excite: Excite) -> float:
    """CPU seconds for the forward passes of all layers, then all backward passes."""
    start = time.process_time()
    excited = [excite(layer.excitation, layer.weight) for layer in layers]
    for layer in reversed(layers):
        excited.pop().backward(layer.upstream)
    seconds = time.process_time() - start
    for layer in layers:
        layer.weight.grad = None
        layer.excitation.zero_grad()
    return seconds


@torch.no_grad()
def seconds_of_products(layers: Sequence[Layer]) -> float:
    """CPU seconds for the six products that no form of LWE and its gradient goes without.

    They are those with fc1 and fc2 in the forward pass, and those with either operand of both in
    the backward pass.
    """
    total = 0.0
    for layer in layers:
        lwe = layer.excitation.get_submodule("lwe")
        assert isinstance(lwe, LWE)
        values = layer.weight.flatten(2)[..., 0] if layer.weight.ndim > 2 else layer.weight
        values = values.contiguous()
        start = time.process_time()
        hidden = torch.mm(values, lwe.fc1.weight.t())
        mapped = torch.mm(hidden, lwe.fc2.weight.t())
        torch.mm(hidden.t(), mapped)
        torch.mm(mapped, lwe.fc2.weight)
        torch.mm(hidden.t(), values)
        torch.mm(hidden, lwe.fc1.weight)
        total += time.process_time() - start
    return total


def compare_transforms(name: str, mode: str, memory_format: str, rounds: int) -> dict[str, Spread]:
    """Staged, closed and its matrix products over naive, weights only, forward and backward."""
    torch.manual_seed(0)
    layers = [
        make_layer(layout, MEMORY_FORMATS[memory_format], mode)
        for layout in excitable_layouts(name)
    ]

    def measure(excite: Excite) -> Callable[[], float]:
        return lambda: seconds_of_a_pass(layers, excite)

    measures = {form: measure(excite) for form, excite in FORMS.items()}
    measures[PRODUCTS] = lambda: seconds_of_products(layers)
    return compare(measures, "naive", rounds)


def compare_compiled(memory_format: str, rounds: int) -> dict[str, Spread]:
    """All forms and the compiled ones over naive, on some shapes: compiling takes minutes."""
    torch._dynamo.reset()  # which refuses to compile a function for too many shapes
    torch.manual_seed(0)
    layers = [
        make_layer(WeightLayout(shape), MEMORY_FORMATS[memory_format], "lwe")
        for shape in COMPILED_SHAPES
    ]
    forms = dict(FORMS)
    for form in ("staged", "closed"):
        forms[f"{form}, compiled"] = torch.compile(FORMS[form], fullgraph=True, dynamic=False)

    def measure(excite: Excite) -> Callable[[], float]:
        return lambda: seconds_of_a_pass(layers, excite)

    return compare({form: measure(excite) for form, excite in forms.items()}, "naive", rounds)


@contextlib.contextmanager
def layers_run(excite: Excite) -> Iterator[None]:
    """Makes excited layers run this form."""
    with mock.patch.object(Composition, "forward", lambda self, weight: excite(self, weight)):
        yield


def kept_bytes(model: nn.Module, images: Tensor) -> int:
    """All memory a forward pass allocates and does not give back, as the allocator counts it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        output = model(images)
    kept = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    del output
    return kept


def kept_over_weights(name: str, mode: str) -> dict[str, float]:
    """Bytes kept for the backward pass beyond vanilla, as multiples of the convs' weights."""
    torch.manual_seed(0)
    vanilla = build_network(name).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    weights = sum(m.weight.nbytes for m in vanilla.modules() if isinstance(m, nn.Conv2d))
    before = kept_bytes(vanilla, images)
    excited = ws.convert(vanilla, config={"mode": mode, "linear": "skip"})
    kept = {}
    for form, excite in FORMS.items():
        with layers_run(excite):
            kept[form] = (kept_bytes(excited, images) - before) / weights
    return kept


def compare_training_steps(rounds: int, batch: int = 8, pixels: int = 128) -> dict[str, Spread]:
    """A whole step of ResNet50, excited over vanilla: forward, loss, backward, SGD."""
    torch.manual_seed(0)
    vanilla = build_network("resnet50").to(memory_format=torch.channels_last)
    excited = ws.convert(vanilla, "lwe")
    images = torch.randn(batch, 3, pixels, pixels).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,))

    def measure(model: nn.Module, excite: Excite) -> Callable[[], float]:
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)

        def step() -> float:
            start = time.process_time()
            with layers_run(excite):
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
            return time.process_time() - start

        return step

    measures = {"vanilla": measure(vanilla, Composition.forward)}
    measures |= {form: measure(excited, excite) for form, excite in FORMS.items()}
    return compare(measures, "vanilla", rounds)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, as plain data; progress goes to stderr."""
    networks = QUICK_NETWORKS if options.quick else NETWORKS
    rounds = options.rounds or (3 if options.quick else 11)
    found: dict[str, Any] = {"machine": describe_machine(), "rounds": rounds}

    found["transform"] = []
    for name in networks:
        for mode in ("lwe", "lwe+mwe"):
            for memory_format in MEMORY_FORMATS:
                ratios = compare_transforms(name, mode, memory_format, rounds)
                note(name, mode, memory_format, {form: str(r) for form, r in ratios.items()})
                row = {"network": name, "mode": mode, "memory_format": memory_format}
                found["transform"].append(
                    row | {form: asdict(ratio) for form, ratio in ratios.items()}
                )
    found["kept"] = []
    for name in ("resnet50", "mobilenet_v2"):
        for mode in ("lwe", "lwe+mwe"):
            kept = kept_over_weights(name, mode)
            note(name, mode, kept)
            found["kept"].append({"network": name, "mode": mode} | kept)
    steps = compare_training_steps(min(rounds, 7))
    note("step", {form: str(ratio) for form, ratio in steps.items()})
    found["step"] = {form: asdict(ratio) for form, ratio in steps.items()}
    if options.compile:
        found["compiled"] = []
        for memory_format in MEMORY_FORMATS:
            ratios = compare_compiled(memory_format, rounds)
            note("compiled", memory_format, {form: str(r) for form, r in ratios.items()})
            row = {"memory_format": memory_format}
            found["compiled"].append(row | {form: asdict(r) for form, r in ratios.items()})
    return found


def as_markdown(found: Mapping[str, Any]) -> str:
    """The results as tables."""
    forms = ("staged", "closed", PRODUCTS)
    parts = [
        "# What weight excitation costs\n",
        "Written by `benchmarks/transform.py`. Ratios of CPU time within a round, one thread: "
        f"median (smallest to largest) of {found['rounds']} rounds at most.\n",
        machine_line(found["machine"]),
        "## The transform, weights only, forward and backward (naive = 1)\n",
        "*Products alone* are the six matrix products with fc1 and fc2 that every form has to "
        "compute; the naive one computes them too.\n",
        table(
            ("network", "mode", "memory format", *forms),
            [
                [row[key] for key in ("network", "mode", "memory_format")]
                + [Spread(**row[form]) for form in forms]
                for row in found["transform"]
            ],
        ),
        "## Bytes kept for the backward pass beyond vanilla (all conv weights = 1)\n",
        "1.0 of it is the excited weight itself, which the conv keeps. Linear layers are left "
        "alone here.\n",
        table(
            ("network", "mode", *FORMS),
            [
                (
                    row["network"],
                    row["mode"],
                    *tuple(f"{row[form]:.2f}" for form in FORMS),
                )
                for row in found["kept"]
            ],
        ),
        "## A training step of ResNet50, batch 8, 128 px, channels_last, mode lwe (vanilla = 1)\n",
        table(tuple(found["step"]), [[Spread(**spread) for spread in found["step"].values()]]),
    ]
    if "compiled" in found:
        compiled = [form for form in found["compiled"][0] if form != "memory_format"]
        shapes = ", ".join("x".join(map(str, shape)) for shape in COMPILED_SHAPES)
        parts += [
            f"## With torch.compile, on weights of {shapes}, mode lwe (naive = 1)\n",
            table(
                ("memory format", *compiled),
                [
                    (row["memory_format"], *(Spread(**row[form]) for form in compiled))
                    for row in found["compiled"]
                ],
            ),
        ]
    return "\n".join(parts)


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two networks, three rounds")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (11; quick: 3)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = run(options)
    write_results("transform", found, as_markdown(found), options.output)


if __name__ == "__main__":
    main()
