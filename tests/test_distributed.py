"""DDP and FSDP2 over two processes train a converted model as one process does."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import we_surgery as ws

PROCESSES = 2
STEPS = 3
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)


class Net(nn.Module):
    """Each sort of excited layer, and no norm that mixes the images of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 4)
        self.tied = nn.Linear(6, 4)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        tokens = self.up(F.relu(self.depthwise(x))).flatten(2).transpose(1, 2)
        attended = self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1)
        return self.head(attended) * self.tied(attended)


def converted() -> nn.Module:
    torch.manual_seed(0)
    return ws.convert(Net(), config={"mode": "lwe+mwe", "linear": "lwe+mwe", "standardize": "on"})


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 3, 6, 6) for _ in range(STEPS)]


def train(model: nn.Module, parts: list[Tensor]) -> list[float]:
    """The losses of a few steps, each followed by two with no gradient.

    In eval mode throughout, where an excited weight is kept from read to read.
    """
    optimizer = torch.optim.SGD(model.eval().parameters(), 0.1, momentum=0.9)
    losses = []
    for x in parts:
        loss = (10 * model(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            losses += [loss.item(), (10 * model(x)).square().mean().item()]
            shard_again(model)
            for parameter in model.parameters():
                parameter.mul_(1.01)
            losses.append((10 * model(x)).square().mean().item())
            shard_again(model)
    return losses


def shard_again(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def wrap_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def wrap_fsdp(model: nn.Module) -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    for layer in (model.stem, model.up, model.depthwise):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPINGS = {"ddp": wrap_ddp, "fsdp": wrap_fsdp}
REFUSALS = {"ddp": "is wrapped in DistributedDataParallel", "fsdp": "is sharded"}


def refusal(model: nn.Module, surgery: Callable[[nn.Module], Any]) -> str:
    try:
        surgery(model)
    except ws.InputError as error:
        return error.cause
    return ""


@contextmanager
def join_group(rank: int, folder: str) -> Iterator[None]:
    """The process group of a spawned process, for a while."""
    torch.set_num_threads(1)
    loopback = "lo" if sys.platform == "linux" else "lo0"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    rendezvous = Path(folder, "rendezvous").as_uri()
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES, timeout=timedelta(0, 60)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def worker(rank: int, folder: str) -> None:
    with join_group(rank, folder):
        for name, wrap in WRAPPINGS.items():
            model = wrap(converted())
            refusals = [refusal(model, ws.strip), refusal(model, ws.convert)]
            losses = torch.tensor(train(model, [x.chunk(PROCESSES)[rank] for x in batches()]))
            dist.all_reduce(losses)
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            if rank == 0:
                result = {"refusals": refusals, "losses": losses / PROCESSES, "state": state}
                torch.save(result, Path(folder, f"{name}.pt"))


def test_ddp_and_fsdp_train_a_converted_model_as_one_process_does(tmp_path: Path) -> None:
    spawn(worker, (str(tmp_path),), nprocs=PROCESSES)
    alone = converted()
    losses = torch.tensor(train(alone, batches()))
    trained = alone.state_dict()
    assert (losses.diff().abs() > 1e-5).all()
    for name in WRAPPINGS:
        result = torch.load(tmp_path / f"{name}.pt")
        torch.testing.assert_close(result["losses"], losses, rtol=1e-6, atol=1e-6)
        assert list(result["state"]) == list(trained)
        for key, value in result["state"].items():
            torch.testing.assert_close(value, trained[key], msg=lambda m, k=key: f"{k}: {m}")
        assert all(REFUSALS[name] in refused for refused in result["refusals"])
        again = converted()
        again.load_state_dict(result["state"])
        ws.strip(again, example_inputs=batches()[0])
