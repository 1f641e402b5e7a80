"""The closed form against the stages run one by one, in every direction and transformation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from closed_forms import (
    F64,
    SMALL,
    STAGES,
    as_function,
    assert_agreement,
    assert_close,
    compose,
    conv_net,
    gradients,
    staged,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import we_surgery as ws
from we_surgery.excitations import (
    MWE,
    Composition,
    Standardize,
)
from we_surgery.excitations.compute import closed_form

# Derivatives


@pytest.mark.parametrize(
    ("stages", "shape"),
    [*((stages, SMALL["2d"]) for stages in STAGES), *(("slrm", s) for s in SMALL.values())],
)
def test_the_gradient_is_that_of_the_function(stages: str, shape: tuple[int, ...]) -> None:
    function, parameters = as_function(compose(stages, shape, detach_max=False))
    weight = torch.randn(shape, dtype=F64, requires_grad=True)
    assert gradcheck(function, (weight, *parameters))


@pytest.mark.parametrize("stages", ["m", "slrm"])
def test_the_gradient_can_be_differentiated(stages: str) -> None:
    function, parameters = as_function(compose(stages, (3, 2, 2), detach_max=False))
    weight = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)
    assert gradgradcheck(function, (weight, *parameters))


@pytest.mark.parametrize("stages", ["m", "slm"])
def test_the_gradient_of_a_penalty_on_gradients_is_that_of_the_stages(stages: str) -> None:
    composition = compose(stages, (4, 3, 3, 3))
    inputs = [torch.randn(4, 3, 3, 3, dtype=F64, requires_grad=True), *composition.parameters()]
    penalties = []
    for excited in (composition(inputs[0]), staged(composition, inputs[0])):
        firsts = torch.autograd.grad(excited.square().sum(), inputs, create_graph=True)
        penalty = sum(first.square().sum() for first in firsts)
        penalties.append(gradients(penalty, inputs, torch.ones_like(penalty)))
    assert_close(*penalties, 1e-12)


Layer = tuple[tuple[int, ...], int, bool]
"""Shape, groups, whether transposed."""
LAYERS: list[Layer] = [
    *((shape, 1, False) for shape in SMALL.values()),
    ((6, 1, 3, 3), 6, False),
    ((8, 2, 3, 3), 4, False),
    ((6, 4, 1, 7), 1, False),
    ((6, 4, 2), 1, True),
    ((6, 4, 3, 3), 2, True),
    ((4, 1, 2, 3, 2), 4, True),
]


@pytest.mark.parametrize(
    ("stages", "layer", "detach_max"),
    [
        *((stages, (SMALL["2d"], 1, False), True) for stages in STAGES),
        *((stages, ((6, 4, 3, 3), 2, True), True) for stages in STAGES),
        *(("slrm", layer, True) for layer in LAYERS),
        *((stages, layer, False) for stages in ("m", "slm") for layer in LAYERS[:5]),
    ],
)
def test_values_and_gradients_are_those_of_the_stages(
    stages: str, layer: Layer, detach_max: bool
) -> None:
    shape, groups, transposed = layer
    composition = compose(
        stages, shape, groups=groups, transposed=transposed, detach_max=detach_max
    )
    weight = torch.randn(shape, dtype=F64) * 0.3 + 0.1
    assert_agreement(composition, weight, 1e-12)
    if len(shape) > 3:
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        assert_agreement(composition, weight.contiguous(memory_format=memory_format), 1e-12)


@pytest.mark.parametrize(
    ("stages", "shape"),
    [
        *((stages, (64, 48, 3, 3)) for stages in STAGES),
        *(("slm", shape) for shape in ((96, 128, 1, 1), (64, 256))),
    ],
)
def test_values_in_float32_are_those_of_the_stages_to_a_millionth(
    stages: str, shape: tuple[int, ...]
) -> None:
    composition = compose(stages, shape, dtype=torch.float32)
    assert_close(
        [composition(weight := torch.randn(shape) * 0.05)], [staged(composition, weight)], 1e-6
    )
    assert_agreement(composition, weight, 2e-6)


@pytest.mark.parametrize("frozen", ["raw", "fc1", "fc2", "fc1.weight", "bias", "raw fc1"])
@pytest.mark.parametrize("stages", ["l", "slm"])
@pytest.mark.parametrize("shape", [(5, 8, 3, 3), (5, 8)])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(
    stages: str, frozen: str, shape: tuple[int, ...]
) -> None:
    composition = compose(stages, shape)
    weight = torch.randn(shape, dtype=F64, requires_grad="raw" not in frozen)
    for name, parameter in composition.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen.split()))
    inputs = [i for i in (weight, *composition.parameters()) if i.requires_grad]
    upstream = torch.randn(shape, dtype=F64)
    closed, reference = composition(weight), staged(composition, weight)
    closed.backward(upstream, retain_graph=True)
    found, expected = (gradients(e, inputs, upstream) for e in (closed, reference))
    assert_close(found, expected, 1e-12)
    assert all((p.grad is not None) == p.requires_grad for p in (weight, *composition.parameters()))


def test_equally_large_weights_share_the_gradient_of_an_undetached_maximum() -> None:
    composition = compose("m", (2, 2), detach_max=False)
    weight = torch.tensor([[1.0, -1.0], [0.5, 0.1]], dtype=F64, requires_grad=True)
    composition(weight).sum().backward()
    reference = weight.detach().clone().requires_grad_()
    staged(composition, reference).sum().backward()
    torch.testing.assert_close(weight.grad, reference.grad)


# Numerics


@pytest.mark.parametrize(
    ("stages", "dtype"),
    [*((stages, torch.bfloat16) for stages in STAGES), ("slrm", torch.float16)],
)
def test_half_precision_is_computed_in_float32_in_both_directions(
    stages: str, dtype: torch.dtype
) -> None:
    composition = compose(stages, (8, 16, 3, 3), dtype=dtype)
    weight = (torch.randn(8, 16, 3, 3) * 0.02).to(dtype)
    full = compose(stages, (8, 16, 3, 3), dtype=torch.float32)
    full.load_state_dict({k: v.float() for k, v in composition.state_dict().items()})
    upstream = torch.randn_like(weight)
    found, expected = [], []
    for excitation, results in ((composition, found), (full, expected)):
        raw = weight.to(dtype if excitation is composition else torch.float32)
        inputs = [raw.requires_grad_(), *excitation.parameters()]
        excited = excitation(raw)
        assert excited.dtype == raw.dtype
        results += [excited, *gradients(excited, inputs, upstream.to(raw.dtype))]
    assert all(
        torch.equal(one, other.to(dtype)) for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("stages", ["s", "sl", "sm", "slm"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_constant_filters_have_a_finite_gradient(stages: str, dtype: torch.dtype) -> None:
    composition = compose(stages, (4, 3, 3, 3), dtype=dtype)
    weight = torch.randn(4, 3, 3, 3, dtype=dtype)
    weight[1], weight[2] = 0.3, 0.0
    inputs = [weight.requires_grad_(), *composition.parameters()]
    excited = composition(weight)
    assert excited[1].abs().max() < 1e-10
    assert excited[2].abs().max() == 0
    upstream = torch.randn_like(excited)
    found = gradients(excited, inputs, upstream)
    assert all(gradient.isfinite().all() for gradient in found)
    assert_close(found, gradients(staged(composition, weight), inputs, upstream), 1e-5)


@pytest.mark.parametrize("shape", [(4, 3, 3), (4, 1, 1), (1, 1)])
@pytest.mark.parametrize("stages", [stages for stages in STAGES if "r" not in stages])
def test_a_weight_of_zeros_is_excited_without_dividing_by_zero(
    stages: str, shape: tuple[int, ...]
) -> None:
    composition = compose(stages, shape)
    weight = torch.zeros(shape, dtype=F64, requires_grad=True)
    excited = composition(weight)
    assert torch.equal(excited, torch.zeros_like(excited))
    (gradient,) = torch.autograd.grad(excited.sum(), weight)
    assert gradient.isfinite().all()


def test_a_filter_of_one_weight_is_not_standardized() -> None:
    weight = torch.randn(4, 1, 1, 1, dtype=F64, requires_grad=True)
    assert compose("s", weight.shape)(weight) is weight
    assert_agreement(compose("sm", weight.shape), weight, 1e-12)


@pytest.mark.parametrize("mean", [1.0, 100.0, 1000.0])
def test_a_mean_far_from_zero_costs_no_more_than_its_rounding(mean: float) -> None:
    """In float32 a mean of 1000 has a spacing of 6e-5; one-pass formulas lose 7 %."""
    composition = compose("sl", (6, 16, 3, 3), dtype=torch.float32)
    weight = torch.randn(6, 16, 3, 3) + mean
    double = compose("sl", (6, 16, 3, 3))
    double.load_state_dict(composition.state_dict())
    upstream = torch.randn_like(weight)
    results = []
    for excitation, raw in ((composition, weight), (double, weight.double())):
        inputs = [raw.requires_grad_(), *excitation.parameters()]
        excited = excitation(raw)
        results.append([excited, *gradients(excited, inputs, upstream.to(raw.dtype))])
    found, expected = results
    assert_close([one.double() for one in found], expected, 2e-7 * max(mean, 5))


def test_autocast_changes_neither_direction() -> None:
    composition = compose("slm", (8, 16, 3, 3), dtype=torch.float32)
    weight = torch.randn(8, 16, 3, 3, requires_grad=True)
    upstream = torch.randn_like(weight)
    inputs = [weight, *composition.parameters()]
    plain = composition(weight)
    expected = [plain, *gradients(plain, inputs, upstream)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = composition(weight)
        found = [cast, *gradients(cast, inputs, upstream)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_autocast_changes_no_second_derivative_and_no_vmap() -> None:
    composition = compose("sl", (8, 16, 3, 3), dtype=torch.float32)
    weight = torch.randn(8, 16, 3, 3, requires_grad=True)
    upstream, excited = torch.randn_like(weight), composition(weight)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (first,) = torch.autograd.grad(excited, weight, upstream, create_graph=True)
            results.append([first.detach(), torch.func.vmap(composition)(weight[None]).detach()])
    assert_close(*results, 1e-5)


def test_gradients_may_come_in_batches() -> None:
    composition = compose("slm", (4, 6, 3, 3))
    weight = torch.randn(4, 6, 3, 3, dtype=F64, requires_grad=True)
    excited, upstreams = composition(weight), torch.randn(3, 4, 6, 3, 3, dtype=F64)
    (batched,) = torch.autograd.grad(
        excited, weight, upstreams, is_grads_batched=True, retain_graph=True
    )
    one_by_one = [
        torch.autograd.grad(excited, weight, one, retain_graph=True)[0] for one in upstreams
    ]
    assert_close([batched], [torch.stack(one_by_one)], 1e-12)


# Layout and memory


@pytest.mark.parametrize("stages", ["m", "sl", "slrm"])
@pytest.mark.parametrize(
    ("shape", "memory_format", "transposed"),
    [
        ((6, 4, 3, 3), torch.channels_last, False),
        ((6, 4, 1, 1), torch.channels_last, False),
        ((6, 4, 3, 3), torch.channels_last, True),
        ((6, 4, 3, 3, 3), torch.channels_last_3d, False),
        ((6, 4, 3, 3), torch.contiguous_format, False),
    ],
)
def test_the_strides_are_kept(
    stages: str, shape: tuple[int, ...], memory_format: torch.memory_format, transposed: bool
) -> None:
    weight = torch.randn(shape, dtype=F64).contiguous(memory_format=memory_format)
    weight.requires_grad_()
    excited = compose(stages, shape, transposed=transposed)(weight)
    assert excited.stride() == weight.stride()
    excited.square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.stride() == weight.stride()


@contextmanager
def saved_bytes(modules: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts what autograd keeps for a backward pass, parameters and buffers aside."""
    known = {t.untyped_storage().data_ptr() for t in (*modules.parameters(), *modules.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("mode", ["lwe", "mwe", "lwe+mwe"])
@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 1.05), (torch.bfloat16, 1.1)])
def test_little_but_the_excited_weight_is_kept_for_the_backward_pass(
    mode: str, dtype: torch.dtype, multiple: float
) -> None:
    """What is kept beside it is float32, and so weighs double for a half-precision weight."""
    vanilla = conv_net().to(dtype)
    excited = ws.convert(vanilla, mode)
    x = torch.randn(2, 32, 6, 6, dtype=dtype)
    kept = {}
    for name, model in (("vanilla", vanilla), ("excited", excited)):
        with saved_bytes(model) as total:
            output = model(x)
            kept[name] = total()
        output.float().sum().backward()
    convs = [m for m in vanilla.modules() if isinstance(m, nn.Conv2d)]
    weights = sum(conv.weight.nbytes for conv in convs)
    assert kept["excited"] - kept["vanilla"] <= multiple * weights


def test_a_weight_changed_between_the_passes_is_noticed() -> None:
    composition = compose("sl", (4, 3, 3, 3))
    weight = torch.randn(4, 3, 3, 3, dtype=F64, requires_grad=True)
    excited = composition(weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        excited.sum().backward()


def test_gain_and_shift_may_be_written_between_the_passes() -> None:
    """As DDP does, which broadcasts buffers before each forward pass."""
    composition = compose("slr", (4, 3, 3, 3))
    weight = torch.randn(4, 3, 3, 3, dtype=F64, requires_grad=True)
    upstream = torch.randn_like(weight)
    expected = gradients(composition(weight), [weight], upstream)
    excited = composition(weight)
    rescale = composition.get_submodule("rescale")
    for buffer in rescale.buffers():
        buffer.mul_(2)
    assert_close(gradients(excited, [weight], upstream), expected, 0)


# In a model


@pytest.mark.parametrize("mode", ["lwe", "mwe", "we", "lwe+mwe"])
def test_a_stripped_layer_computes_the_very_bits_of_the_trained_one(mode: str) -> None:
    model = ws.convert(conv_net(), mode)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(2, 32, 6, 6)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    model.eval()
    # With and without gradients the same function computes the excited weight.
    assert torch.equal(model(x), ws.strip(model)(x))


class DoubledMWE(MWE):
    """A stage the closed form does not know."""

    def excite(self, weight: Tensor) -> Tensor:
        return 2 * super().excite(weight)


def test_stages_of_other_classes_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("the closed form was used")

    monkeypatch.setattr(closed_form.ClosedFormExcitation, "apply", refuse)
    composition = Composition([Standardize(), DoubledMWE(dtype=F64)])
    weight = torch.randn(4, 3, dtype=F64)
    expected = 2 * compose("sm", (4, 3)).excite(weight)
    torch.testing.assert_close(composition(weight), expected)
