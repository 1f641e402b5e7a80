"""A large weight is computed block by block: in the layer and in the fold with the same bits."""

import pytest
import torch
from closed_forms import STAGES, assert_close, compose, gradients, staged
from torch import Tensor

import we_surgery as ws
from we_surgery.excitations import Composition
from we_surgery.excitations.compute import formulas

SHAPES = {
    "linear": (70, 40),
    "1x1": (70, 40, 1, 1),
    "2d": (70, 12, 3, 3),
    "transposed": (12, 35, 7),
}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture
def small_blocks(monkeypatch):
    """Five blocks of the weights above, the last one smaller; what each was is returned."""
    monkeypatch.setattr(formulas, "_BLOCK", 800)
    seen: list[int] = []
    before_curve = formulas._before_curve

    def watch(filters: Tensor, *rest):
        seen.append(filters.shape[0])
        return before_curve(filters, *rest)

    monkeypatch.setattr(formulas, "_before_curve", watch)
    return seen


def large(stages: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Composition, Tensor]:
    torch.manual_seed(0)
    shape = SHAPES[kind]
    is_transposed = kind == "transposed"
    composition = compose(
        stages, shape, groups=2 if is_transposed else 1, transposed=is_transposed, dtype=dtype
    )
    return composition, torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("stages", "kind", "dtype"),
    [
        *((stages, "2d", torch.float32) for stages in STAGES),
        *(("slrm", kind, dtype) for kind in SHAPES for dtype in DTYPES),
    ],
    ids=str,
)
def test_in_its_own_place_a_weight_becomes_what_the_layer_computes(
    stages, kind, dtype, small_blocks
):
    composition, weight = large(stages, kind, dtype)
    with torch.no_grad():
        expected = composition(weight)
    assert small_blocks == [16, 16, 16, 16, 6]
    found = composition.excite_in_place(weight)
    assert found.data_ptr() == weight.data_ptr()
    assert torch.equal(found, expected)
    assert set(small_blocks) == {16, 6}


@pytest.mark.parametrize(
    ("stages", "kind"),
    [*((stages, "2d") for stages in STAGES), *(("slrm", kind) for kind in SHAPES)],
)
def test_blocks_give_the_stages_weight_and_gradients(stages, kind, small_blocks, monkeypatch):
    backward: list[int] = []
    differentiate = formulas._differentiate

    def watch(g: Tensor, *rest):
        backward.append(g.shape[0])
        return differentiate(g, *rest)

    monkeypatch.setattr(formulas, "_differentiate", watch)
    composition, weight = large(stages, kind, torch.float64)
    inputs = [weight.requires_grad_(), *composition.parameters()]
    excited, expected = composition(weight), staged(composition, weight)
    assert len(small_blocks) == 5
    upstream = torch.randn_like(excited)
    assert_close([excited], [expected], 1e-12)
    assert_close(gradients(excited, inputs, upstream), gradients(expected, inputs, upstream), 1e-10)
    assert backward == small_blocks


def test_a_memory_format_is_kept(small_blocks):
    composition, weight = large("slm", "2d")
    weight = weight.to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = composition(weight)
    assert len(small_blocks) == 5
    assert expected.stride() == weight.stride()
    assert torch.equal(composition.excite_in_place(weight), expected)


def test_a_compiler_sees_the_whole(small_blocks):
    composition, weight = large("slm", "2d")
    compiled = torch.compile(composition, backend="eager", fullgraph=True)
    with torch.no_grad():
        excited = compiled(weight)
    assert small_blocks == [70]
    assert_close([excited], [composition(weight)], 1e-6)


def test_what_has_no_closed_form_leaves_the_weight_alone():
    weight = torch.randn(6, 8, 3, 3)
    before = weight.clone()
    layer = torch.nn.Conv2d(8, 6, 3)
    composition = ws.convert(layer, config={"conv": "weight_align"}).excitation
    with torch.no_grad():
        expected = composition(weight)
    found = composition.excite_in_place(weight)
    assert torch.equal(found, expected)
    assert found is not weight
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4096, 4096), torch.bfloat16), ((2048, 1024, 3, 3), torch.float32)]
)
def test_in_place_little_memory_is_needed(shape, dtype):
    """A few blocks of 2 MiB; the weights have 64 and 72 MiB in float32."""
    composition = compose("slm", shape, dtype=torch.float32)
    weight = torch.empty(shape, dtype=dtype).fill_(0.5)
    weight[::2, ::3] = -1
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        composition.excite_in_place(weight)
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 2**20 <= most < 12 * 2**20
