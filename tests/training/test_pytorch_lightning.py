"""The callback on the Trainer of ``pytorch_lightning``, Lightning's older name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset
from toys import EVERYTHING, ConvNet

import we_surgery as ws
from we_surgery.converted.state import is_converted
from we_surgery.excitations.record import is_record, read_record

pl = pytest.importorskip("pytorch_lightning")

from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402

from we_surgery.training.pytorch_lightning import WeightExcitation  # noqa: E402

pytestmark = [
    # Lightning's own use of what torch has deprecated, and its advice on loaders.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Network(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()

    def training_step(self, batch, index):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(ws.param_groups(self, 0.01), lr=1e-2)


def fit(folder: Path, *callbacks: pl.Callback, **options) -> Network:
    torch.manual_seed(0)
    module = Network()
    trainer = pl.Trainer(
        callbacks=[
            WeightExcitation(config=EVERYTHING, submodule="net", start_epoch=1),
            *callbacks,
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
        ],
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    trainer.fit(module, DataLoader(data, 2), **options)
    return module


def test_it_converts_strips_each_checkpoint_and_resumes(tmp_path):
    module = fit(tmp_path / "straight")
    assert is_converted(module)
    for epoch in (0, 1):
        deployed = ConvNet()
        deployed.load_state_dict(
            load_file(tmp_path / "straight" / f"epoch={epoch}.stripped.safetensors")
        )
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(deployed.eval()(x), module.net.eval()(x))
    resumed = fit(tmp_path / "resumed", ckpt_path=tmp_path / "straight" / "epoch=0.ckpt")
    assert all(map(torch.equal, module.state_dict().values(), resumed.state_dict().values()))


def test_its_averages_set_in_with_the_model(tmp_path):
    fit(tmp_path, EMAWeightAveraging(decay=0.5))
    state = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    records = [read_record(value) for key, value in state.items() if is_record(key)]
    assert records
    assert not any(record["paused"] for record in records)
