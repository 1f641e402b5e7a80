"""Attached excitation with timm's average and its checkpoints."""

import argparse

import pytest
import torch
from equal_forms import Net, batches, plain_step
from timm.models import resume_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3

import we_surgery as ws


def started(seed=0):
    torch.manual_seed(seed)
    model = Net(is_tied=False)  # timm averages tied weights twice
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    excitation = ws.attach(model, optimizer, "lwe+mwe")
    return model, optimizer, excitation, ModelEmaV3(model, decay=0.5)


def trained(model, optimizer, average, parts):
    losses = []
    for batch in parts:
        losses.append(plain_step(optimizer, model, batch, 0))
        average.update(model)
    return losses


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_average_checkpoint_and_resume(tmp_path):
    model, optimizer, excitation, average = started()
    arguments = argparse.Namespace(model="net")
    saver = CheckpointSaver(
        model, optimizer, args=arguments, model_ema=average, checkpoint_dir=str(tmp_path)
    )
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for batch in batches(3):
        trained(model, optimizer, average, [batch])
        for name, value in model.state_dict().items():
            expected[name] = expected[name] * 0.5 + value * 0.5
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    saver.save_checkpoint(0, metric=1.0)
    rest = trained(model, optimizer, average, batches(6)[3:])

    other, optimizer, excitation, average = started(seed=9)
    file = str(tmp_path / "last.pth.tar")
    assert resume_checkpoint(other, file, optimizer, log_info=False) == 1
    assert excitation.steps == 3
    assert trained(other, optimizer, average, batches(6)[3:]) == rest
    plain = Net(is_tied=False)
    plain.load_state_dict(torch.load(file, weights_only=False)["state_dict"])
    assert type(plain.stem) is torch.nn.Conv2d
