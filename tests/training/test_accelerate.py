"""A converted model through accelerate, which needs no integration of ours."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import EVERYTHING, ConvNet

import we_surgery as ws

accelerate = pytest.importorskip("accelerate")


def batches() -> DataLoader:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(8, 3, 8, 8)), batch_size=4)


def run(accelerator, model: nn.Module, optimizer, loader) -> None:
    for (x,) in loader:
        optimizer.zero_grad()
        accelerator.backward((model(x) - 1).square().mean())
        optimizer.step()


def prepared(inside: nn.Module):
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(ws.param_groups(inside, 0.05), 1e-2)
    return accelerator, *accelerator.prepare(inside, optimizer, batches())


def build() -> nn.Module:
    torch.manual_seed(0)
    return ws.convert(ConvNet(), config=EVERYTHING)


def test_a_saved_state_strips_and_resumes(tmp_path):
    accelerator, model, optimizer, loader = prepared(build())
    run(accelerator, model, optimizer, loader)
    accelerator.save_state(str(tmp_path / "state"))
    file = tmp_path / "state" / "model.safetensors"
    vanilla = ConvNet()
    vanilla.load_state_dict(ws.strip_state_dict(load_file(file)), strict=True)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(vanilla.eval()(x), model.eval()(x))
    model.train()
    run(accelerator, model, optimizer, loader)

    accelerator, again, resumed, loader = prepared(build())
    accelerator.load_state(str(tmp_path / "state"))
    run(accelerator, again, resumed, loader)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_save_model_strips_and_so_does_the_unwrapped_model(tmp_path):
    accelerator, model, optimizer, loader = prepared(build())
    run(accelerator, model, optimizer, loader)
    accelerator.save_model(model, str(tmp_path))
    state = ws.strip_state_dict(load_file(tmp_path / "model.safetensors"))
    stripped = ws.strip(accelerator.unwrap_model(model))
    assert all(torch.equal(value, state[name]) for name, value in stripped.state_dict().items())
    gathered = ws.strip_state_dict(accelerator.get_state_dict(model))
    assert all(torch.equal(value, state[name]) for name, value in gathered.items())


def test_a_conversion_in_the_middle_reaches_the_prepared_optimizer():
    vanilla = ConvNet()
    accelerator, model, optimizer, loader = prepared(vanilla)
    run(accelerator, model, optimizer, loader)
    ws.convert(accelerator.unwrap_model(model), config=EVERYTHING, inplace=True)
    added = ws.add_to_optimizer(optimizer, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run(accelerator, model, optimizer, loader)
    assert added
    assert any(not torch.equal(before[name], model.get_parameter(name)) for name in added)


def test_a_model_saved_in_shards_strips_shard_by_shard(tmp_path):
    accelerator, model, optimizer, loader = prepared(build())
    run(accelerator, model, optimizer, loader)
    accelerator.save_model(model, str(tmp_path / "saved"), max_shard_size="2KB")
    shards = list((tmp_path / "saved").glob("model-*.safetensors"))
    assert len(shards) > 1
    ws.strip_sharded(tmp_path / "saved", tmp_path / "deploy")
    again = ConvNet()
    accelerate.load_checkpoint_in_model(again, str(tmp_path / "deploy"))
    for name, value in ws.strip(model).state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
