"""The closed form under torch.compile, torch.func, tracing and export."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closed_forms import (
    F64,
    as_function,
    as_staged_function,
    assert_close,
    compose,
    conv_net,
    gradients,
    staged,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

import we_surgery as ws


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("default")  # the compiler warns of its own parts
@pytest.mark.parametrize(("stages", "dynamic"), [("m", None), ("slrm", None), ("slm", True)])
def test_it_compiles_without_a_graph_break(stages: str, dynamic: bool | None) -> None:
    composition = compose(stages, (6, 4, 3, 3))
    compiled = torch.compile(composition, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    weight = torch.randn(6, 4, 3, 3, dtype=F64).contiguous(memory_format=torch.channels_last)
    inputs = [weight.requires_grad_(), *composition.parameters()]
    upstream = torch.randn_like(weight)
    excited, expected = compiled(weight), staged(composition, weight)
    assert_close([excited], [expected], 1e-12)
    assert_close(gradients(excited, inputs, upstream), gradients(expected, inputs, upstream), 1e-12)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("default")
def test_a_compiled_model_trains_as_the_eager_one() -> None:
    model = ws.convert(conv_net(), "lwe+mwe").double()
    model[2].raw_weight.requires_grad_(False)
    x = torch.randn(2, 32, 6, 6, dtype=F64)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(x).square().mean().backward()
        results.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    assert_close(*results, 1e-10)


def test_a_transposed_conv_compiles_without_a_graph_break() -> None:
    model = ws.convert(
        nn.Sequential(nn.ConvTranspose2d(16, 8, 2, stride=2)), config={"conv": "lwe"}
    )
    x = torch.randn(2, 16, 4, 4)
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert_close(*gradients, 1e-5)


@pytest.fixture(params=["sl", "slm"])
def transformed(request: pytest.FixtureRequest) -> tuple[Any, Any, Tensor, list[Tensor]]:
    composition = compose(request.param, (4, 6, 2, 2))
    function, parameters = as_function(composition)
    weight = torch.randn(4, 6, 2, 2, dtype=F64)
    return function, as_staged_function(composition), weight, [p.detach() for p in parameters]


@pytest.mark.filterwarnings("default")  # torch.func warns of its own parts
def test_torch_func_takes_gradients_and_curvature(transformed: Any) -> None:
    function, reference, weight, parameters = transformed
    results = []
    for excite in (function, reference):

        def loss(weight: Tensor, *values: Tensor, excite: Any = excite) -> Tensor:
            return excite(weight, *values).square().sum()

        firsts = grad(loss, argnums=(0, 1, 4))(weight, *parameters)
        seconds = hessian(loss)(weight[:2, :, :1], *parameters)
        results.append([*firsts, seconds])
    assert_close(*results, 1e-12)


@pytest.mark.filterwarnings("default")
def test_torch_func_takes_forward_derivatives(transformed: Any) -> None:
    function, reference, weight, parameters = transformed
    primals = (weight, *parameters)
    tangents = tuple(torch.randn_like(primal) for primal in primals)
    assert_close(
        list(jvp(function, primals, tangents)), list(jvp(reference, primals, tangents)), 1e-12
    )


def test_vmap_runs_an_ensemble(transformed: Any) -> None:
    function, reference, weight, parameters = transformed
    weights = torch.stack([weight, 2 * weight, weight.flip(0)])
    stacked = [torch.stack([p, 2 * p, -p]) for p in parameters]
    expected = [reference(weights[i], *(p[i] for p in stacked)) for i in range(3)]
    assert_close([vmap(function)(weights, *stacked)], [torch.stack(expected)], 1e-12)
    one_weight = vmap(function, (None, *[0] * len(stacked)))(weight, *stacked)
    expected = [reference(weight, *(p[i] for p in stacked)) for i in range(3)]
    assert_close([one_weight], [torch.stack(expected)], 1e-12)


def test_autograd_differentiates_through_vmap(transformed: Any) -> None:
    function, reference, weight, parameters = transformed
    weights = torch.stack([weight, 2 * weight]).requires_grad_()
    over_weights = vmap(function, (0, *[None] * len(parameters)))(weights, *parameters)
    one_by_one = torch.stack([reference(one, *parameters) for one in weights])
    upstream = torch.randn_like(weights)
    assert_close(
        gradients(over_weights, [weights], upstream),
        gradients(one_by_one, [weights], upstream),
        1e-12,
    )


def test_per_sample_gradients_of_a_converted_model() -> None:
    layer = ws.convert(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), "lwe").double()[0]
    parameters = dict(layer.named_parameters())
    x = torch.randn(5, 4, 6, 6, dtype=F64)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(layer, parameters, (sample[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for index, sample in enumerate(x):
        layer.zero_grad()
        F.conv2d(sample[None], layer.weight, layer.bias).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[name][index], parameter.grad)


@pytest.mark.filterwarnings("default")
def test_forward_mode_outside_of_torch_func_is_refused() -> None:
    composition = compose("sl", (4, 6))
    weight = torch.randn(4, 6, dtype=F64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, torch.ones_like(weight))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            composition(dual)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::we_surgery.NotStrippedWarning")
def test_a_trace_can_be_saved_and_loaded() -> None:
    model = ws.convert(conv_net(), "lwe+mwe").eval()
    x = torch.randn(2, 32, 6, 6)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x, check_trace=False), file)
    file.seek(0)
    assert_close([torch.jit.load(file)(x)], [model(x)], 1e-5)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("strict", [True, False])
def test_an_excited_model_can_be_exported(strict: bool) -> None:
    model = ws.convert(conv_net(), "lwe+mwe").eval()
    x = torch.randn(2, 32, 6, 6)
    exported = torch.export.export(model, (x,), strict=strict)
    expected = model(x)
    # Outputs go up to 2,000, and the kernel's sum is rounded in another way within a graph.
    torch.testing.assert_close(
        exported.module()(x), expected, rtol=0, atol=1e-6 * expected.abs().max().item()
    )
