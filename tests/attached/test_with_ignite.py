"""Attached excitation in ignite's trainer and its checkpoints."""

import pytest
import torch
from equal_forms import Net, batches

import we_surgery as ws

pytest.importorskip("ignite")
pytestmark = pytest.mark.filterwarnings("ignore")  # ignite's own, of torch


def run(folder, epochs, *, resume=None):
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver

    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    excitation = ws.attach(model, optimizer, "lwe+mwe")
    trainer = create_supervised_trainer(model, optimizer, torch.nn.functional.cross_entropy)
    parts = {"model": model, "optimizer": optimizer, "trainer": trainer}
    if resume is not None:
        Checkpoint.load_objects(parts, torch.load(resume, weights_only=True))
    saver = Checkpoint(parts, DiskSaver(str(folder), create_dir=True), n_saved=None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    trainer.run(batches(3), max_epochs=epochs)
    return model, excitation


def test_its_checkpoints_are_vanilla_and_resume_to_the_bit(tmp_path):
    straight, excitation = run(tmp_path / "one", 2)
    assert excitation.steps == 6
    first = tmp_path / "one" / "checkpoint_3.pt"
    resumed, excitation = run(tmp_path / "two", 2, resume=first)
    assert excitation.steps == 6
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    plain = Net()
    plain.load_state_dict(torch.load(first, weights_only=True)["model"])
