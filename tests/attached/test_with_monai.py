"""Attached excitation in MONAI's trainer, with its networks and its checkpoint handlers."""

import pytest
import torch

import we_surgery as ws

pytest.importorskip("ignite")
monai = pytest.importorskip("monai")
pytestmark = pytest.mark.filterwarnings("ignore")  # MONAI's own, of torch and of NumPy


def network():
    torch.manual_seed(0)
    return monai.networks.nets.UNet(3, 1, 2, channels=(4, 8), strides=(2,), norm="batch")


def run(folder, epochs, *, resume=None):
    from monai.engines import SupervisedTrainer
    from monai.handlers import CheckpointLoader, CheckpointSaver

    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    excitation = ws.attach(model, optimizer, "lwe")
    generator = torch.Generator().manual_seed(0)
    volumes = [
        {
            "image": torch.randn(2, 1, 8, 8, 8, generator=generator),
            "label": torch.randint(2, (2, 1, 8, 8, 8), generator=generator),
        }
        for _ in range(3)
    ]
    parts = {"model": model, "optimizer": optimizer}
    saver = CheckpointSaver(str(folder), parts, save_interval=1, epoch_level=True)
    handlers = [saver]
    if resume is not None:
        handlers.append(CheckpointLoader(str(resume), parts))
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=volumes,
        network=model,
        optimizer=optimizer,
        loss_function=monai.losses.DiceCELoss(to_onehot_y=True, softmax=True),
        train_handlers=handlers,
    )
    trainer.run()
    return model, excitation


def test_its_checkpoints_are_vanilla_and_resume_to_the_bit(tmp_path):
    straight, excitation = run(tmp_path / "one", 2)
    assert excitation.steps == 6
    first = next((tmp_path / "one").glob("*epoch=1.pt"))
    resumed, excitation = run(tmp_path / "two", 1, resume=first)
    assert excitation.steps == 6
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    network().load_state_dict(torch.load(first, weights_only=True)["model"])
