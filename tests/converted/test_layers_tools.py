"""The tools that people use around a model: compile, export, autocast, checkpointing, fusing."""

import copy
from collections.abc import Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.utils.model import reparameterize_model
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from toys import EVERYTHING, ConvNet, Zoo, is_vanilla

import we_surgery as ws
from we_surgery.converted.layer import excited_layers
from we_surgery.excitations.record import is_record


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model: nn.Module, other: nn.Module) -> None:
    expected, found = gradients(model), gradients(other)
    assert list(found) == list(expected)
    assert found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_converted_model_compiles_to_one_graph(backend: str, autocast: bool) -> None:
    plain = ws.convert(ConvNet(), config=EVERYTHING)
    compiled = copy.deepcopy(plain)
    run = torch.compile(compiled, fullgraph=True, backend=backend)
    x = image().to(torch.bfloat16 if autocast else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, found = plain(x).float(), run(x).float()
    torch.testing.assert_close(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    assert_same_gradients(plain, compiled)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_a_compiled_model_sees_its_weights_change() -> None:
    model = ws.convert(ConvNet(), config=EVERYTHING).eval()
    run = torch.compile(model, fullgraph=True, backend="eager")
    x = image()
    run(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(run(x), model(x))


@pytest.mark.usefixtures("_fresh_dynamo")
def test_converted_attention_and_transposed_convs_compile_to_one_graph() -> None:
    for vanilla, x in (
        (Zoo(), torch.randn(2, 1, 8, 8)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), torch.randn(1, 4, 5, 5)),
    ):
        model = ws.convert(vanilla, config=EVERYTHING).eval()
        run = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(run(x), model(x))


def targets(model: nn.Module, x: Tensor) -> list[str]:
    program = torch.export.export(model, (x,))
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("model", [ConvNet, Zoo])
def test_a_converted_model_exports_and_a_stripped_one_exports_to_the_vanilla_graph(
    model: type[nn.Module],
) -> None:
    vanilla = model().eval()
    x = torch.randn(2, 3 if model is ConvNet else 1, 8, 8)
    converted = ws.convert(vanilla, config=EVERYTHING)
    with pytest.warns(ws.NotStrippedWarning):
        program = torch.export.export(converted, (x,))
    torch.testing.assert_close(program.module()(x), converted(x))
    stripped = ws.strip(converted)
    assert targets(stripped, x) == targets(vanilla, x)
    with pytest.warns(ws.NotStrippedWarning):
        assert len(targets(stripped, x)) < len(targets(converted, x))


def test_a_model_trained_under_autocast_strips_exactly() -> None:
    converted = ws.convert(ConvNet(), config=EVERYTHING)
    optimizer = torch.optim.SGD(converted.parameters(), 0.01)
    x = image()
    with torch.autocast("cpu", torch.bfloat16):
        loss = converted(x).float().square().sum()
    loss.backward()
    optimizer.step()
    stripped = ws.strip(converted.eval(), example_inputs=x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stripped(x), converted(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_is_converted_and_stripped_in_it(dtype: torch.dtype) -> None:
    vanilla = ConvNet().to(dtype).eval()
    converted = ws.convert(vanilla, config=EVERYTHING)
    assert {p.dtype for p in converted.parameters()} == {dtype}
    stripped, report = ws.strip_with_report(converted, example_inputs=image().to(dtype))
    assert report.output_difference == 0
    assert {p.dtype for p in stripped.parameters()} == {dtype}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    plain = ws.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), "we")
    checkpointed = copy.deepcopy(plain)
    x = image().requires_grad_()
    plain(x).square().sum().backward()
    checkpoint(checkpointed, x, use_reentrant=use_reentrant).square().sum().backward()
    assert_same_gradients(plain, checkpointed)


def test_a_functional_call_computes_with_the_parameters_it_is_given() -> None:
    one = ws.convert(ConvNet(), config=EVERYTHING).eval()
    other = copy.deepcopy(one)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    x = image()
    found = torch.func.functional_call(one, dict(other.named_parameters()), (x,))
    assert torch.equal(found, other(x))


@pytest.mark.parametrize("mode", ["mwe", "lwe"])
def test_a_functional_call_with_a_vanilla_name_is_refused(mode: str) -> None:
    model = ws.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), mode)
    before = copy.deepcopy(model.state_dict())
    given = {"0.bias": torch.zeros(4), "0.weight": torch.ones(4, 3, 3, 3, requires_grad=True)}
    with pytest.raises(
        ws.InputError, match=r"(?s)weight of layer .* takes a Parameter.*give 'raw_weight'"
    ):
        torch.func.functional_call(model, given, (image(),))
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_torch_func_differentiates_by_the_raw_weights() -> None:
    model = ws.convert(nn.Linear(4, 3), config=EVERYTHING)
    x = torch.randn(5, 4)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad)


def test_an_optimizer_works_on_through_a_strip_in_place() -> None:
    model = ws.convert(ConvNet(), config=EVERYTHING)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
    model(image()).square().sum().backward()
    optimizer.step()
    ws.strip(model, inplace=True)
    left = list(model.parameters())
    assert all(any(p is before for before in parameters) for p in left)
    assert all(p.grad is None for p in (model.stem.weight, model.head.weight))
    optimizer.zero_grad()
    before = model.stem.weight.detach().clone()
    model(image()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.stem.weight, before)


def test_the_vanilla_model_takes_the_optimizer_state_of_the_trained_one_by_position() -> None:
    layer = ws.convert(nn.Linear(4, 3), "mwe")
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer(torch.randn(2, 4)).square().sum().backward()
    optimizer.step()
    vanilla = ws.strip(layer)
    resumed = torch.optim.SGD(vanilla.parameters(), 0.1, momentum=0.9)
    resumed.load_state_dict(optimizer.state_dict())
    for parameter in vanilla.parameters():
        assert resumed.state[parameter]["momentum_buffer"].shape == parameter.shape


def test_an_exponential_moving_average_strips_to_vanilla() -> None:
    model = ws.convert(ConvNet(), config=EVERYTHING)
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    records = {key: value for key, value in model.state_dict().items() if is_record(key)}
    for _ in range(3):
        model(image())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        ema.update_parameters(model)
    assert records
    averaged = ema.module.state_dict()
    assert all(torch.equal(averaged[key], value) for key, value in records.items())
    ws.strip(ema.module, example_inputs=image())


@pytest.mark.parametrize("inplace", [False, True])
def test_timm_fuses_excited_layers_to_vanilla_ones(inplace: bool) -> None:
    converted = ws.convert(Zoo(), config=EVERYTHING).eval()
    x = torch.randn(2, 1, 8, 8)
    expected = converted(x)
    fused = reparameterize_model(converted, inplace=inplace)
    assert is_vanilla(fused)
    assert is_vanilla(converted) == inplace
    assert list(fused.state_dict()) == list(Zoo().state_dict())
    assert torch.equal(fused(x), expected)


@pytest.mark.parametrize("name", ["repvit_m0_9", "levit_128s", "repvgg_a0", "mobileone_s0"])
def test_a_timm_model_that_fuses_itself_fuses_the_excited_weights(name: str) -> None:
    size = 224 if "levit" in name else 32
    vanilla = timm.create_model(name, num_classes=4).eval()
    x = torch.randn(1, 3, size, size)
    config = {"mode": "we", "standardize": "off"}  # the norms are not trained, and fuse is inexact
    converted = ws.convert(vanilla, config=config, inplace=True)
    with torch.no_grad():
        expected = converted(x)
        fused = reparameterize_model(converted)
        stripped = reparameterize_model(ws.strip(converted))
        assert is_vanilla(fused)
        assert [type(m) for m in fused.modules()] == [type(m) for m in stripped.modules()]
        assert list(fused.state_dict()) == list(stripped.state_dict())
        assert torch.equal(fused(x), stripped(x))
        torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4)


def test_many_excited_layers_share_no_module() -> None:
    converted = ws.convert(Zoo(), config=EVERYTHING)
    excitations = [e for _, layer in excited_layers(converted) for e in layer.children()]
    assert len({id(e) for e in excitations}) == len(excitations)


# torch.fx


@pytest.mark.parametrize("name", ["resnet18", "swin_t"])
def test_torchs_own_tracer_goes_through_a_converted_model(name: str) -> None:
    model = ws.convert(torchvision.models.get_model(name, weights=None)).eval()
    x = torch.randn(1, 3, 64, 64)
    traced = fx.symbolic_trace(model)
    expected = model(x)
    assert torch.equal(traced(x), expected)
    vanilla = fx.symbolic_trace(torchvision.models.get_model(name, weights=None))
    stripped = ws.strip(traced, example_inputs=x)
    assert list(stripped.state_dict()) == list(vanilla.state_dict())
    assert [node.target for node in stripped.graph.nodes] == [n.target for n in vanilla.graph.nodes]
    torch.testing.assert_close(stripped(x), expected)


def test_torchvisions_feature_extractor_takes_a_converted_model() -> None:
    model = ws.convert(torchvision.models.resnet18()).eval()
    x = torch.randn(1, 3, 32, 32)
    extractor = create_feature_extractor(model, {"layer2": "features"})
    features = extractor(x)["features"]
    assert features.shape == (1, 128, 4, 4)
    features.sum().backward()
    assert model.conv1.raw_weight.grad.any()
    with torch.no_grad():
        model.conv1.raw_weight.mul_(-1)
    assert not torch.equal(extractor(x)["features"], features)
    nodes = get_graph_node_names(torchvision.models.resnet18())
    assert get_graph_node_names(model) == nodes


class Doubled(nn.Linear):
    """A layer of no torch module, which the tracer enters."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * 2, self.bias)


def test_a_layer_that_torchs_tracer_enters_shows_its_excitation() -> None:
    model = ws.convert(nn.Sequential(Doubled(4, 3)), "mwe").eval()
    x = torch.randn(2, 4)
    traced = fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["0.excitation"]
    torch.testing.assert_close(ws.strip(traced, example_inputs=x)(x), model(x))
