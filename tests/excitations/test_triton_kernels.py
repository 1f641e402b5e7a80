"""Triton's kernels, interpreted on the CPU, give the numbers of eager in few launches."""

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from computed_alike import assert_agreement, compose, results
from torch import Tensor

from we_surgery.excitations import (
    LWE,
    MWE,
    Composition,
    Excitation,
    Standardize,
)
from we_surgery.excitations.compute.closed_form import excite_together

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("stages", "count"),
    [("s", 5), ("l", 6), ("m", 3), ("sl", 6), ("sm", 6), ("slm", 7), ("slrm", 7), ("r", 2)],
)
def test_kernels_give_what_eager_gives_in_few_launches(
    stages: str, count: int, launches: list[str]
) -> None:
    # More filters and channels than a tile has, and not a whole number of tiles.
    weight = torch.randn(20, 38, 1, 3)
    assert_agreement(compose(stages, (20, 38)), weight, "triton")
    assert len(launches) == count <= 7


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((7, 5), torch.contiguous_format),
        ((5, 6, 3), torch.contiguous_format),
        ((18, 3, 3, 3), torch.channels_last),
        ((4, 34, 1, 1), torch.channels_last),
        ((3, 4, 2, 1, 3), torch.channels_last_3d),
    ],
)
def test_kernels_read_every_shape_and_memory_format(
    shape: tuple[int, ...], memory_format: torch.memory_format, launches: list[str]
) -> None:
    weight = torch.randn(shape).contiguous(memory_format=memory_format)
    assert_agreement(compose("slm", shape), weight, "triton")
    assert launches


def test_kernels_take_any_number_of_hidden_channels(launches: list[str]) -> None:
    composition = Composition([Standardize(), LWE(70, reduction=1)])
    assert_agreement(composition, torch.randn(5, 70, 2), "triton")
    assert launches


SHAPES = ((20, 38, 3), (3, 5), (17, 8, 3, 3), (16, 32))


def test_layers_together_give_what_each_gives_alone(launches: list[str]) -> None:
    compositions = [compose("slm", shape) for shape in SHAPES]
    weights = [torch.randn(shape, requires_grad=True) for shape in SHAPES]
    weights[2] = weights[2].detach().to(memory_format=torch.channels_last).requires_grad_()
    weights[0].requires_grad_(False)
    compositions[1].requires_grad_(False)
    alone: list[Any] = []
    for composition, weight in zip(compositions, weights, strict=True):
        composition.backend = "triton"
        leaves = [t for t in (weight, *composition.parameters()) if t.requires_grad]
        excited = composition(weight)
        alone.append((excited, leaves, torch.autograd.grad(excited.square().sum(), leaves)))
    launches.clear()
    pairs = [(w, c._terms(w)) for c, w in zip(compositions, weights, strict=True)]
    together = excite_together(pairs, "triton")  # type: ignore[arg-type]
    assert launches == ["summarize", "multiply", "amplify"]
    for one, (other, _, _) in zip(together, alone, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    launches.clear()
    # The last layer gets no gradient.
    sum(excited.square().sum() for excited in together[:3]).backward()  # type: ignore[union-attr]
    assert launches == ["sum_tiles", "sum_filters", "by_weight", "by_fcs"]
    for _, leaves, gradients in alone[:3]:
        assert all(torch.equal(leaf.grad, g) for leaf, g in zip(leaves, gradients, strict=True))
    assert not any(leaf.grad is not None for leaf in alone[3][1])
    assert weights[0].grad is None


def test_layers_of_other_stages_are_launched_apart(launches: list[str]) -> None:
    stages = ("sl", "m", "sl", "m")
    pairs = []
    for name, shape in zip(stages, SHAPES, strict=True):
        weight = torch.randn(shape, requires_grad=True)
        pairs.append((weight, compose(name, shape)._terms(weight)))
    together = excite_together(pairs, "triton")  # type: ignore[arg-type]
    torch.autograd.grad([e.sum() for e in together], [weight for weight, _ in pairs])
    assert launches == [
        *("summarize", "multiply", "multiply", "amplify"),
        *("sum_tiles", "sum_filters", "by_weight", "by_fcs", "by_weight"),
    ]


@torch.no_grad()
def test_a_table_is_made_again_only_when_a_layer_has_moved(kernels: Any) -> None:
    weight = torch.randn(6, 5)
    composition = compose("sl", (6, 5))
    composition.backend = "triton"
    kernels._table.cache_clear()
    for _ in range(10):
        torch.testing.assert_close(composition(weight), composition.excite(weight))
        weight.mul_(1.1)
    assert kernels._table.cache_info()[:2] == (9, 1)
    moved = weight.clone()
    torch.testing.assert_close(composition(moved), composition.excite(moved))
    assert kernels._table.cache_info()[:2] == (9, 2)


def test_kernels_read_a_weight_of_any_strides_and_a_transposed_one(launches: list[str]) -> None:
    weight = torch.randn(3, 3, 6, 5).permute(3, 2, 0, 1)
    composition = compose("slm", weight.shape)
    composition.backend = "triton"
    torch.testing.assert_close(composition(weight), composition.excite(weight))
    assert_agreement(compose("slm", (6, 4), groups=2), torch.randn(6, 4, 2, 2), "triton")
    assert launches


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_compute_half_precision_in_float32(dtype: torch.dtype, launches: list[str]) -> None:
    weight = torch.randn(6, 5, 3, 3, dtype=dtype)
    assert_agreement(compose("slm", (6, 5), dtype=dtype), weight, "triton", 2e-3)
    assert launches


@pytest.mark.parametrize("case", ["zeros", "a constant filter", "tiny", "a large mean"])
def test_kernels_keep_the_rules_of_numerics(case: str, launches: list[str]) -> None:
    weight = torch.randn(4, 5, 3, 3)
    if case == "zeros":
        weight.zero_()
    elif case == "a constant filter":
        weight[1] = 0.3
    elif case == "tiny":
        weight *= 1e-8
    else:
        weight += 100
    stages = "m" if case in ("zeros", "tiny") else "slm"
    upstream = torch.randn(weight.shape)
    composition = compose(stages, (4, 5))
    composition.backend = "triton"
    found = results(composition, weight, upstream)
    double = copy.deepcopy(composition).double()
    expected = results(double, weight.double(), upstream.double())
    for one, other in zip(found, expected, strict=True):
        scale = max(other.abs().max().item(), 1e-30)
        assert (one.double() - other).abs().max() <= 3e-4 * scale
    assert launches


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_kernels_make_zeros_of_a_constant_filter(value: float, launches: list[str]) -> None:
    composition = compose("s", (2, 43))
    composition.backend = "triton"
    # A mean that is not corrected is off by its rounding, over a deviation of next to nothing.
    assert composition(torch.full((2, 43, 3, 3), value)).abs().max() < 1e-6
    assert launches


@pytest.mark.parametrize(
    ("stages", "weight"),
    [
        ([MWE(detach_max=False)], torch.randn(3, 4)),
        ([MWE(dtype=torch.float64)], torch.randn(3, 4, dtype=torch.float64)),
    ],
)
def test_eager_computes_what_kernels_do_not(
    stages: list[Excitation], weight: Tensor, launches: list[str]
) -> None:
    composition = Composition(stages)
    composition.backend = "triton"
    torch.testing.assert_close(composition(weight), composition.excite(weight))
    assert not launches


def test_a_frozen_weight_and_frozen_layers_get_no_gradient(launches: list[str]) -> None:
    composition = compose("sl", (6, 5))
    composition.backend = "triton"
    weight = torch.randn(6, 5, requires_grad=True)
    composition(weight.detach()).sum().backward()
    assert "by_weight" not in launches
    composition.requires_grad_(False)
    launches.clear()
    composition(weight).sum().backward()
    assert weight.grad is not None
    assert "by_fcs" not in launches


KERNELS = ("summarize", "multiply", "amplify", "sum_tiles", "sum_filters", "by_weight", "by_fcs")


@pytest.mark.filterwarnings("ignore")  # Triton announces a change of a default of its own
def test_kernels_compile_for_a_gpu() -> None:
    """In a process of its own, where they are not interpreted; no GPU is needed for it."""
    program = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from we_surgery.excitations.compute import triton_backend
from we_surgery.excitations.compute import triton_backward
from we_surgery.excitations.compute import triton_forward

everything = triton_backend._Stages(None, *[True] * 4).constants()
curve_alone = triton_backend._Stages(None, False, False, False, True).constants()
for name, stages, layers, capability in (
    *((name, everything, 64, 90) for name in NAMES),
    *((name, everything, 1, 80) for name in NAMES[:2]),
    ("multiply", curve_alone, 1, 80),
    ("by_weight", curve_alone, 2, 90),
):
    kernel = getattr(triton_forward, name, None) or getattr(triton_backward, name)
    given = stages | {"LAYERS": layers}
    constants = {name: given[name] for name in kernel.arg_names if name in given}
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(constants, "constexpr")
    types["table"] = "*i64"
    source = ASTSource(kernel, types, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(built.asm["cubin"]) > 1000
""".replace("NAMES", repr(KERNELS))
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
