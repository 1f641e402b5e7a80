"""Tools that replace ``layer.weight`` are refused by name, with what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.nn.utils import prune
from toys import ConvNet

import we_surgery as ws


def excited() -> nn.Module:
    return ws.convert(ConvNet(), "lwe+mwe")


@pytest.mark.parametrize(
    "act",
    [
        lambda layer: prune.random_structured(layer, "weight", 0.5, dim=0),
        lambda layer: prune.custom_from_mask(layer, "weight", torch.ones_like(layer.raw_weight)),
        lambda layer: prune.global_unstructured(
            [(layer, "weight")], pruning_method=prune.L1Unstructured, amount=0.5
        ),
    ],
)
def test_what_replaces_a_weight_is_refused_by_name_and_leaves_the_layer_as_it_was(act) -> None:
    model = excited()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ws.ExcitationError, match="'weight_orig' cannot be registered"):
        act(model.stem)
    assert list(model.state_dict()) == list(before)
    ws.strip(model.eval(), example_inputs=torch.randn(2, 3, 8, 8))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[DeviceMesh]:
    address = (tmp_path / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_tensor_parallel_plan_is_refused_by_name(one_process: DeviceMesh) -> None:
    layer = ws.convert(nn.Sequential(nn.Linear(4, 4)), "mwe")[0]
    with pytest.raises(RuntimeError, match="non-leaf tensor"):
        parallelize_module(layer, one_process, RowwiseParallel())
    with (
        torch.no_grad(),
        pytest.raises(ws.ExcitationError, match="'weight' cannot be registered") as caught,
    ):
        parallelize_module(layer, one_process, RowwiseParallel())
    assert "FSDP2" in caught.value.cure


def test_an_offloaded_excitation_is_named_and_the_hint_helps() -> None:
    accelerate = pytest.importorskip("accelerate")
    x = torch.randn(2, 3, 8, 8)
    expected = excited().eval()
    for preload in (None, sorted({type(m).__name__ for m in expected.modules() if is_excited(m)})):
        model = excited().eval()
        model.load_state_dict(expected.state_dict())
        accelerate.cpu_offload(model, torch.device("cpu"), preload_module_classes=preload)
        if preload is None:
            with pytest.raises(ws.ExcitationError, match="on the meta device") as caught:
                model(x)
            assert "preload_module_classes" in caught.value.cure
        else:
            torch.testing.assert_close(model(x), expected(x))


def is_excited(module: nn.Module) -> bool:
    return hasattr(module, "excitation")


def test_pruning_the_stripped_model_works_as_the_hint_says() -> None:
    stripped = ws.strip(excited())
    prune.l1_unstructured(stripped.stem, "weight", 0.5)
    assert int((stripped.stem.weight == 0).sum()) >= stripped.stem.weight.numel() // 2


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torchscript_is_refused_with_the_hint() -> None:
    with pytest.raises(ws.ExcitationError, match=r"torch\.jit\.script") as caught:
        torch.jit.script(excited())
    assert "Strip" in caught.value.cure
