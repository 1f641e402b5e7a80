"""A stripped model exports as the vanilla one does: torch.export, and ONNX in onnxruntime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from toys import EVERYTHING, ConvNet

import we_surgery as ws

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
    assert nodes(converted).total() > nodes(vanilla).total()


@pytest.mark.skipif(
    torch.__version__.startswith("2.8."),
    reason="torch 2.8 exports no model, vanilla ones neither, with an onnxscript that is not older",
)
@pytest.mark.parametrize("make", [ConvNet, vit])
def test_onnx_of_a_stripped_model_runs_in_onnxruntime(make, tmp_path: Path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    stripped, _ = stripped_and_vanilla(make)
    file = tmp_path / "model.onnx"
    torch.onnx.export(stripped, (IMAGE,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})
    with torch.no_grad():
        expected = stripped(IMAGE)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
