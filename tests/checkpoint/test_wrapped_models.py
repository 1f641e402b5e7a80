"""State dicts of DDP and compiled models, real ones, strip to files that load strictly."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toys import EVERYTHING, ConvNet

import we_surgery as ws


@pytest.fixture
def _group(tmp_path):
    dist.init_process_group(
        "gloo", init_method=Path(tmp_path, "rendezvous").as_uri(), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def assert_strips(saved, model: nn.Module, key: str | None = None) -> None:
    vanilla = ConvNet()
    vanilla.load_state_dict(ws.strip_state_dict(saved, key=key), strict=True)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(vanilla.eval()(x), model.eval()(x))


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
@pytest.mark.usefixtures("_group")
def test_ddp_and_ddp_of_a_compiled_model_and_their_averages(tmp_path):
    model = ws.convert(ConvNet(), config=EVERYTHING)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)  # the first one copies
    for wrapped in (
        DistributedDataParallel(model),
        DistributedDataParallel(torch.compile(model)),
        torch.compile(DistributedDataParallel(model)),
    ):
        optimizer = torch.optim.SGD(ws.param_groups(wrapped), 0.1)
        model.train()
        (model(torch.randn(2, 3, 8, 8)) - 1).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
        content = {"model": wrapped.state_dict(), "model_ema": average.state_dict(), "epoch": 1}
        torch.save(content, tmp_path / "last.pth")
        saved = torch.load(tmp_path / "last.pth", weights_only=True)
        assert_strips(saved, model)
        assert_strips(saved, average.module, "model_ema")
        assert not torch.equal(average.module.stem.raw_weight, model.stem.raw_weight)
