"""A converted model through timm's own training loop parts, files and reparameterization."""

import argparse
import copy
import types

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, reparameterize_model
from torch import nn
from toys import is_vanilla

import we_surgery as ws
from we_surgery.checkpoint import read
from we_surgery.cli import strip_command
from we_surgery.converted.graphs import excited_weights

NAME = "resnet10t"
CONFIG = {"mode": "lwe", "linear": "lwe"}


def vanilla() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=4)


def run(model: nn.Module, optimizer, scheduler, ema: ModelEmaV3 | None, steps: int) -> float:
    model.train()
    for step in range(steps):
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step_update(step)
        if ema is not None:
            ema.update(model)
    return loss.item()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model, its average and its optimizer after three steps, and the file timm wrote."""
    folder = tmp_path_factory.mktemp("timm")
    model = ws.convert(vanilla(), config=CONFIG)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=2, updates_per_epoch=3)
    ema = ModelEmaV3(model, decay=0.5)
    saver = CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(model=NAME),
        model_ema=ema,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
    )
    before = copy.deepcopy(model.state_dict())
    run(model, optimizer, scheduler, ema, 3)
    saver.save_checkpoint(0, metric=0.5)
    return types.SimpleNamespace(
        model=model,
        ema=ema,
        optimizer=optimizer,
        before=before,
        file=folder / "checkpoint-0.pth.tar",
    )


def outputs(model: nn.Module) -> torch.Tensor:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return model.eval()(x)


def test_the_factories_train_every_excitation(trained):
    held = {id(p) for g in trained.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in trained.model.parameters()}
    after = trained.model.state_dict()
    moved = [
        not torch.equal(after[f"{w.module}.excitation.lwe.fc2.weight"], trained.before[key])
        for w in excited_weights(trained.model)
        if (key := f"{w.module}.excitation.lwe.fc2.weight") in trained.before
    ]
    assert all(moved)
    assert len(moved) > 5


@pytest.mark.parametrize("key", ["state_dict", "state_dict_ema"])
def test_timms_file_strips_to_the_trained_and_to_the_averaged_weights(trained, key):
    source = trained.model if key == "state_dict" else trained.ema.module
    state = ws.strip_state_dict(read(trained.file, key=key).state_dict)
    model = vanilla()
    model.load_state_dict(state, strict=True)
    assert torch.equal(outputs(model), outputs(source))
    assert not torch.equal(outputs(trained.model), outputs(trained.ema.module))


def test_the_command_strips_the_averaged_weights_of_timms_file(trained, tmp_path):
    target = tmp_path / "deploy.safetensors"
    words = [str(trained.file), "--key", "state_dict_ema", "-o", str(target)]
    done = CliRunner().invoke(strip_command, words)
    assert done.exit_code == 0, done.output
    model = vanilla()
    model.load_state_dict(load_file(target), strict=True)
    assert torch.equal(outputs(model), outputs(trained.ema.module))


def test_the_average_strips_and_leaves_the_model_alive(trained):
    stripped = ws.strip(trained.ema.module)
    assert is_vanilla(stripped)
    assert next(excited_weights(trained.model)) is not None
    assert torch.equal(outputs(stripped), outputs(trained.ema.module))


def test_timm_resumes_from_its_file(trained, tmp_path):
    straight = copy.deepcopy(trained.model)
    optimizer = create_optimizer_v2(straight, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    optimizer.load_state_dict(copy.deepcopy(trained.optimizer.state_dict()))
    model = ws.convert(vanilla(), config=CONFIG)
    resumed = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    resume_checkpoint(model, str(trained.file), optimizer=resumed, log_info=False)
    assert run(model, resumed, None, None, 2) == run(straight, optimizer, None, None, 2)


def test_timm_loads_a_stripped_file_and_refuses_a_converted_one(trained, tmp_path):
    torch.save(ws.strip_state_dict(read(trained.file).state_dict), tmp_path / "deploy.pth")
    model = timm.create_model(NAME, num_classes=4, checkpoint_path=str(tmp_path / "deploy.pth"))
    assert torch.equal(outputs(model), outputs(trained.model))
    with pytest.raises(RuntimeError, match="raw_weight"):
        load_checkpoint(vanilla(), str(trained.file))


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "mobileone_s0", "repvgg_a0"])
def test_reparameterize_model_strips_and_fuses_timms_own_branches(name):
    model = timm.create_model(name, num_classes=4)
    converted = ws.convert(model, config=CONFIG)
    expected = outputs(converted)
    fused = reparameterize_model(converted)
    assert is_vanilla(fused)
    assert next(excited_weights(converted)) is not None
    assert fused.state_dict().keys() == reparameterize_model(model).state_dict().keys()
    torch.testing.assert_close(outputs(fused), expected, rtol=1e-3, atol=1e-3)
