"""Triton's kernels, interpreted on the CPU, give the numbers of eager in few launches."""

import os
import subprocess
import sys

import pytest
import torch
from computed_alike import assert_agreement, assert_close, compose, inputs_of, results
from torch import Tensor

from we_surgery.excitations import LWE, MWE, Composition, Excitation, Standardize
from we_surgery.excitations.compute.closed_form import excite_into, pull_back
from we_surgery.excitations.compute.inputs import Pullback

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("stages", "count"),
    [("s", 5), ("l", 6), ("m", 3), ("sl", 6), ("sm", 6), ("slm", 7), ("slrm", 7), ("r", 2)],
)
def test_kernels_give_what_eager_gives_in_few_launches(
    stages: str, count: int, launches: list[str]
) -> None:
    # More filters and channels than a tile has, and not a whole number of tiles.
    assert_agreement(compose(stages, (18, 34)), torch.randn(18, 34, 1, 2))
    assert len(launches) == count


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
    assert_agreement(
        compose("slm", shape), torch.randn(shape).contiguous(memory_format=memory_format)
    )
    assert launches


def test_kernels_take_any_number_of_hidden_channels(launches: list[str]) -> None:
    assert_agreement(Composition([Standardize(), LWE(70, reduction=1)]), torch.randn(5, 70, 2))
    assert launches


SHAPES = ((17, 33), (3, 5, 2), (2, 4, 1, 2), (4, 6))


def layers_of(stages: tuple[str, ...]) -> list[tuple[Composition, Tensor, Tensor]]:
    return [
        (compose(name, shape), torch.randn(shape), torch.randn(shape))
        for name, shape in zip(stages, SHAPES, strict=True)
    ]


def test_layers_together_give_what_each_gives_alone(launches: list[str]) -> None:
    layers = layers_of(("slm",) * 4)
    alone = [results([layer], "triton")[0] for layer in layers]
    launches.clear()
    together = results(layers, "triton")
    assert launches == [
        *("summarize", "multiply", "amplify"),
        *("sum_tiles", "sum_filters", "by_weight", "by_fcs"),
    ]
    for one, other in zip(together, alone, strict=True):
        assert_close(one, other, 0)


@pytest.mark.parametrize("stages", [("l", "m", "lm", "slrm"), ("sl", "rm", "s", "r")], ids="-".join)
def test_layers_of_other_stages_are_launched_with_them(
    stages: tuple[str, ...], launches: list[str]
) -> None:
    layers = layers_of(stages)
    found = results(layers, "triton")
    assert len(launches) == len(set(launches)) <= 7
    for one, other in zip(found, results(layers, "eager"), strict=True):
        assert_close(one, other, 1e-5)


def test_kernels_read_a_weight_of_any_strides_and_a_transposed_one(launches: list[str]) -> None:
    weight = torch.randn(3, 3, 6, 5).permute(3, 2, 0, 1)
    assert_agreement(compose("slm", weight.shape), weight)
    assert_agreement(compose("slm", (6, 4), groups=2), torch.randn(6, 4, 2, 2))
    assert launches


def test_kernels_go_on_from_what_eager_has_left(launches: list[str]) -> None:
    composition, weight = compose("sl", (18, 34)), torch.randn(18, 34, 2)
    inputs, upstream = inputs_of(composition, weight), torch.randn(18, 34, 2)
    (kept,) = excite_into([(weight, inputs, torch.empty_like(weight))], "eager")
    found, expected = (
        pull_back(backend, [Pullback(upstream.clone(), weight, inputs, kept, (True,) * 5)])[0]
        for backend in ("triton", "eager")
    )
    assert launches
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_write_into_half_precision(dtype: torch.dtype, launches: list[str]) -> None:
    composition, weight = compose("slm", (6, 5)), torch.randn(6, 5, 3, 3)
    targets = [torch.empty(weight.shape, dtype=dtype) for _ in range(2)]
    for target, backend in zip(targets, ("triton", "eager"), strict=True):
        excite_into([(weight, inputs_of(composition, weight), target)], backend)  # type: ignore[arg-type]
    torch.testing.assert_close(*targets, rtol=1e-2, atol=1e-3)
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
    composition = compose("m" if case in ("zeros", "tiny") else "slm", (4, 5))
    upstream = torch.randn(weight.shape)
    (found,) = results([(composition, weight, upstream)], "triton")
    assert launches
    double = (composition.double(), weight.double(), upstream.double())
    (expected,) = results([double], "triton")
    assert_close([None if one is None else one.double() for one in found], expected, 3e-4)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_kernels_make_zeros_of_a_constant_filter(value: float, launches: list[str]) -> None:
    weight = torch.full((2, 43, 3, 3), value)
    (found,) = results([(compose("s", (2, 43)), weight, torch.ones_like(weight))], "triton")
    # A mean that is not corrected is off by its rounding, over a deviation of next to nothing.
    assert found[0] is not None
    assert found[0].abs().max() < 1e-6
    assert launches


@pytest.mark.parametrize(
    ("stage", "weight"),
    [
        (MWE(detach_max=False), torch.randn(3, 4)),
        (MWE(dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)),
    ],
)
def test_eager_computes_what_kernels_do_not(
    stage: Excitation, weight: Tensor, launches: list[str]
) -> None:
    composition = Composition([stage])
    (found,) = results([(composition, weight, torch.ones_like(weight))], "triton")
    torch.testing.assert_close(found[0], composition.excite(weight))
    assert not launches


def test_a_frozen_weight_and_frozen_layers_get_no_gradient(launches: list[str]) -> None:
    weight = torch.randn(6, 5)
    layer = (compose("sl", (6, 5)), weight, torch.ones_like(weight))
    (found,) = results([layer], "triton", (True, False, False, False, False))
    assert found[1] is None
    assert found[2] is not None
    assert "by_weight" not in launches
    launches.clear()
    (found,) = results([layer], "triton", (False, True, True, True, True))
    assert found[1] is not None
    assert found[2:] == [None] * 4
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

everything = triton_backend._Stages(*[True] * 4).constants()
curve_alone = triton_backend._Stages(False, False, False, True).constants()
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
