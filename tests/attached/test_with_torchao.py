"""Quantization-aware training by torchao: train attached, convert, and run quantized."""

import pytest
import torch
from equal_forms import batches, loss_of, plain_step
from torch import nn

import we_surgery as ws

torchao = pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 32, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)),
    )


def trained(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    excitation = ws.attach(model, optimizer, **options)
    losses = [plain_step(optimizer, model, batches(1)[0], 0) for _ in range(6)]
    assert losses[-1] < losses[0]
    return excitation, losses


def test_fake_quantized_layers():
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import QATConfig

    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32)
    )
    model = network()
    quantize_(model, QATConfig(config, step="prepare"))
    excitation, _ = trained(model, mode="lwe+mwe")
    assert len(excitation.plan.excited) == 3
    x = batches(1)[0][0]
    with torch.no_grad():
        expected = model(x)
        quantize_(model, QATConfig(config, step="convert"))
        assert type(model[7].weight).__module__.startswith("torchao")
        torch.testing.assert_close(model(x), expected)


def test_an_exported_graph_by_the_plan_of_the_eager_model():
    from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    eager, x = network(), batches(1)[0][0]
    plan = ws.plan(eager, "lwe+mwe")
    model = prepare_qat_pt2e(torch.export.export(eager, (x,)).module(), quantizer)
    move_exported_model_to_train(model)
    _, losses = trained(model, plan=plan)
    move_exported_model_to_eval(model)
    with torch.no_grad():
        expected = model(x)
        deployed = convert_pt2e(model)
        assert any("dequantize_per_channel" in str(node.target) for node in deployed.graph.nodes)
        assert (deployed(x) - expected).abs().max() < 0.25 * expected.abs().max()
        assert loss_of(deployed, batches(1)[0]) < losses[0]
