"""A stripped model exports as the vanilla one does: torch.export, and ONNX in onnxruntime."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from toys import EVERYTHING, ConvNet

import we_surgery as ws

WITHOUT_TORCH_2_8 = pytest.mark.skipif(
    torch.__version__.startswith("2.8."),
    reason="torch 2.8 exports no model, vanilla ones neither, with an onnxscript that is not older",
)
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(8, 4, 1, 2, 16, 32, num_classes=5)


def stripped_and_vanilla(make) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    vanilla = make().eval()
    return ws.strip(ws.convert(vanilla, config=EVERYTHING)).eval(), vanilla


def nodes(model: nn.Module) -> Counter[str]:
    graph = torch.export.export(model, (IMAGE,)).graph
    return Counter(f"{node.op} {node.target}" for node in graph.nodes)


@pytest.mark.parametrize("make", [ConvNet, vit])
def test_torch_export_has_the_vanilla_nodes(make):
    stripped, vanilla = stripped_and_vanilla(make)
    assert nodes(stripped) == nodes(vanilla)
    converted = ws.convert(vanilla, config=EVERYTHING)
    with pytest.warns(ws.NotStrippedWarning):
        assert nodes(converted).total() > nodes(vanilla).total()


@WITHOUT_TORCH_2_8
@pytest.mark.parametrize("make", [ConvNet, vit])
def test_onnx_of_a_stripped_model_runs_in_onnxruntime(make, tmp_path: Path):
    stripped, _ = stripped_and_vanilla(make)
    assert_runs_in_onnxruntime(stripped, tmp_path / "model.onnx")


@WITHOUT_TORCH_2_8
@pytest.mark.parametrize("mode", ["lwe", "lwe+mwe"])
def test_onnx_of_a_converted_model_runs_too_and_names_strip(mode: str, tmp_path: Path):
    model = ws.convert(ConvNet(), mode).eval()
    with pytest.warns(ws.NotStrippedWarning, match="strip it first"):
        assert_runs_in_onnxruntime(model, tmp_path / "model.onnx")


def test_a_trace_of_a_converted_model_names_strip():
    model = ws.convert(ConvNet(), "lwe").eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.jit.trace(model, IMAGE, check_trace=False)
    assert ws.NotStrippedWarning in {warning.category for warning in caught}


def test_neither_use_nor_training_nor_compiling_a_converted_model_is_an_export():
    model = ws.convert(ConvNet(), "lwe+mwe")
    model(IMAGE).sum().backward()
    torch.compile(model, fullgraph=True, backend="eager")(IMAGE)


def assert_runs_in_onnxruntime(model: nn.Module, file: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(model, (IMAGE,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})
    with torch.no_grad():
        expected = model(IMAGE)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
