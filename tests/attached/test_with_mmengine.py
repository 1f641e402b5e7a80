"""Attached excitation in mmengine's Runner, by one hook."""

import logging

import pytest
import torch
from equal_forms import Net, batches, loss_of
from torch.utils.data import DataLoader, TensorDataset

import we_surgery as ws

pytest.importorskip("mmengine")
pytestmark = pytest.mark.filterwarnings("ignore")  # mmengine's own, of torch and of pkg_resources


def run(folder, *, epochs=2, hooks=(), resume=None, optim_wrapper=None):
    from mmengine.hooks import Hook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner, set_random_seed

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.losses = []

        def forward(self, x, y, mode="loss"):
            loss = loss_of(self.net, (x, y))
            self.losses.append(loss.item())
            return {"loss": loss}

    class Excite(Hook):
        priority = "VERY_HIGH"  # before the averages

        def before_train(self, runner):
            self.excitation = ws.attach(runner.model, runner.optim_wrapper, "lwe+mwe")

    torch.manual_seed(0)
    model, hook = Model(), Excite()
    x, y = zip(*batches(3), strict=True)
    runner = Runner(
        model,
        work_dir=str(folder),
        train_dataloader=DataLoader(TensorDataset(torch.cat(x), torch.cat(y)), batch_size=6),
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper=optim_wrapper or {"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
        custom_hooks=[hook, *hooks],
        default_hooks={"logger": None, "checkpoint": {"type": "CheckpointHook", "interval": 1}},
        load_from=resume,
        resume=resume is not None,
        experiment_name=f"run{torch.rand(1).item()}{id(model)}",
        log_level="ERROR",
    )
    set_random_seed(1)
    runner.train()
    return runner.model, hook.excitation


@pytest.fixture(autouse=True)
def _its_checkpoints_open(monkeypatch):
    # mmengine 0.10 resumes no run of its own where torch.load allows tensors alone.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    yield
    logging.getLogger("mmengine").handlers.clear()


def test_it_trains_and_resumes_to_the_bit(tmp_path):
    straight, excitation = run(tmp_path / "one")
    assert excitation.steps == 6
    saved = torch.load(tmp_path / "one" / "epoch_1.pth", weights_only=False)
    assert saved["state_dict"].keys() == straight.state_dict().keys()
    resumed, excitation = run(tmp_path / "two", resume=str(tmp_path / "one" / "epoch_1.pth"))
    assert excitation.steps == 6
    assert resumed.losses == straight.losses[3:]
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_its_average_and_accumulation(tmp_path):
    wrapper = {
        "type": "OptimWrapper",
        "optimizer": {"type": "SGD", "lr": 0.1},
        "accumulative_counts": 2,
    }
    average = {"type": "EMAHook", "ema_type": "ExponentialMovingAverage", "momentum": 0.5}
    _, excitation = run(tmp_path / "one", hooks=[average], optim_wrapper=dict(wrapper))
    assert excitation.steps == 3
    file = str(tmp_path / "one" / "epoch_1.pth")
    run(tmp_path / "two", hooks=[dict(average)], optim_wrapper=dict(wrapper), resume=file)
    saved = torch.load(tmp_path / "one" / "epoch_2.pth", weights_only=False)
    again = torch.load(tmp_path / "two" / "epoch_2.pth", weights_only=False)
    for key in ("state_dict", "ema_state_dict"):
        assert saved[key].keys() == again[key].keys()
