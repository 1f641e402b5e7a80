"""What torchrun runs for ``test_ranks``: attached training over two processes."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from equal_forms import Net, batches, loss_of
from processes import joined_group
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import we_surgery as ws
from we_surgery.attached import shard_transform

STEPS = 4
FORMS = ("vanilla", "attached", "converted")


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, part: slice, *, looks: bool = False
) -> list[float]:
    """With ``looks`` a forward pass before each step leaves the whole weights of FSDP behind."""
    losses = []
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, (x[part], y[part]))
        loss.backward()
        if looks:
            with torch.no_grad():
                model(x)
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def attached_around_ddp(is_first: bool, mode: str, seed: int, part: slice) -> dict[str, Any]:
    """Excitation attached before or after the model is wrapped; ranks begin with other seeds."""
    torch.manual_seed(0)
    model = Net()
    torch.manual_seed(seed)
    if is_first:
        optimizer = sgd(model)
        excitation = ws.attach(model, optimizer, mode)
        wrapped: nn.Module = DistributedDataParallel(model)
    else:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer = sgd(wrapped)
        excitation = ws.attach(wrapped, optimizer, mode)
    losses = train(wrapped, optimizer, part)
    return {
        "losses": losses,
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "raws": {name: p.detach().clone() for name, p in excitation.named_parameters().items()},
    }


def bucket_order(form: str, part: slice) -> list[list[str]]:
    """The Parameters of each gradient bucket of DDP, in the order in which they are reduced."""
    torch.manual_seed(0)
    model: nn.Module = Net()
    if form == "converted":
        model = ws.convert(model, "lwe+mwe")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.0005)
    optimizer = sgd(model)
    if form == "attached":
        ws.attach(wrapped, optimizer, "lwe+mwe")
    found: list[list[str]] = []

    def reduce(_, bucket):  # torch takes no annotations that are text
        found.append([names[id(parameter)] for parameter in bucket.parameters()])
        work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    wrapped.register_comm_hook(None, reduce)
    train(wrapped, optimizer, part)  # after the first step DDP makes its buckets anew
    return found


def sharded_net(*shape: int, **options: Any) -> nn.Module:
    """Uneven shards: 5 filters of the head over two ranks. With two numbers, HSDP."""
    torch.manual_seed(0)
    model = Net(is_tied=False)
    names = ("replicate", "shard")[-len(shape) :]
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in (model.stem, model.mix, model.head):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def attached_after_fully_shard(
    config: dict[str, Any], part: slice, *shape: int, **options: Any
) -> dict[str, Any]:
    model = sharded_net(*shape, **options)
    torch.manual_seed(1)
    optimizer = sgd(model)
    excitation = ws.attach(model, optimizer, config=config)
    losses = train(model, optimizer, part, looks=True)
    return {
        "losses": losses,
        "weights": {name: p.full_tensor() for name, p in model.named_parameters()},
        "raws": {
            name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone()
            for name, p in excitation.named_parameters().items()
        },
        "gathered": [row.layer for row in excitation.plan.excited if "gathered" in row.reason],
    }


def one_rank_writes(part: slice) -> list[str]:
    """What each rank raises where one of them has changed a weight; none waits for the other."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Net())
    optimizer = sgd(model)
    excitation = ws.attach(model, optimizer, "lwe")
    train(model, optimizer, part)
    before = {name: p.clone() for name, p in model.named_parameters()}
    if dist.get_rank() == 1:
        model.module.stem.weight.data.mul_(0.5)
    try:
        train(model, optimizer, part)
    except ws.AttachmentError as error:
        excitation.restore()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        train(model, optimizer, part)
        return [str(error)]
    return []


def sharded(config: dict[str, Any], seed: int) -> tuple[nn.Module, Any]:
    model = sharded_net(dist.get_world_size())
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    ws.attach(model, optimizer, config=config)
    return model, optimizer


def stage_of_a_run(folder: Path, number: int) -> list[float]:
    """Two of the run's six steps, from the checkpoint of the stage before, on any ranks."""
    model, optimizer = sharded(SHARDED["lwe+mwe"], seed=1 if number == 0 else 7)
    if number:
        get_optimizer_state_dict(model, optimizer)  # makes the states that are to be loaded
        state = whole_state(model, optimizer)
        dcp.load(state, checkpoint_id=folder / f"stage-{number - 1}")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    rank, ranks = dist.get_rank(), dist.get_world_size()
    losses = []
    for x, y in batches(6)[2 * number : 2 * number + 2]:
        optimizer.zero_grad()
        part = slice(6 // ranks * rank, 6 // ranks * (rank + 1))
        loss = loss_of(model, (x[part], y[part]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    dcp.save(whole_state(model, optimizer), checkpoint_id=folder / f"stage-{number}")
    return losses


def excited_elements() -> list[int]:
    """How many values of each weight this rank excites, step after step."""
    torch.manual_seed(0)
    model = sharded_net(dist.get_world_size())
    optimizer = sgd(model)
    ws.attach(model, optimizer, config=SHARDED["lwe"])
    excited: list[int] = []
    compute = shard_transform.excite_into

    def counted(jobs: Any, backend: Any) -> Any:
        excited.extend(raw.numel() for raw, _, _ in jobs)
        return compute(jobs, backend)

    with mock.patch.object(shard_transform, "excite_into", counted):
        train(model, optimizer, slice(6))
    return excited


def whole_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": states}


SHARDED = {
    "lwe": {"mode": "lwe", "linear": "lwe"},
    "lwe+mwe": {"mode": "lwe+mwe", "standardize": "on"},
    "thesis": {"mode": "thesis"},
    "spectral norm": {"conv": "spectral_norm", "linear": "spectral_norm"},
    "mwe with a moving maximum": {"mode": "mwe", "mwe": {"detach_max": False}},
}


def alone_by(config: dict[str, Any], part: slice = slice(None)) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Net(is_tied=False)
    torch.manual_seed(1)
    optimizer = sgd(model)
    excitation = ws.attach(model, optimizer, config=config)
    losses = train(model, optimizer, part)
    return {
        "losses": losses,
        "weights": dict(model.named_parameters()),
        "raws": excitation.named_parameters(),
    }


def alone(mode: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Net()
    torch.manual_seed(1)
    optimizer = sgd(model)
    ws.attach(model, optimizer, mode)
    losses = train(model, optimizer, slice(None))
    return {"losses": losses, "weights": dict(model.named_parameters())}


def cases(rank: int) -> dict[str, Callable[[], Any]]:
    part = slice(3 * rank, 3 * rank + 3)
    found: dict[str, Callable[[], Any]] = {}
    for mode in ("lwe+mwe", "thesis"):
        for is_first in (True, False):
            name = f"{mode}, {'before' if is_first else 'after'} DDP"
            found[name] = partial(attached_around_ddp, is_first, mode, 1 + rank, part)
    for name, config in SHARDED.items():
        found[f"{name}, FSDP2"] = partial(attached_after_fully_shard, config, part, 2)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found["mixed precision"] = partial(
        attached_after_fully_shard, SHARDED["lwe+mwe"], part, 2, mp_policy=policy
    )
    found |= {f"buckets, {form}": partial(bucket_order, form, part) for form in FORMS}
    found["elements"] = excited_elements
    found["one rank writes"] = partial(one_rank_writes, part)
    return found


def hybrid_cases(rank: int) -> dict[str, Callable[[], Any]]:
    """Two replicas of a model that is divided over two ranks."""
    part = slice(rank, rank + 1)
    return {
        name: partial(attached_after_fully_shard, SHARDED[name], part, 2, 2)
        for name in ("lwe+mwe", "spectral norm")
    }


def main(folder: Path, rank: int, ranks: int, stage: int | None) -> None:
    found = cases(rank) if ranks == 2 else hybrid_cases(rank)
    if ranks == 2:
        found["losses"] = partial(stage_of_a_run, folder, 0)
    if stage is not None:
        found = {"losses": partial(stage_of_a_run, folder, stage), "elements": excited_elements}
    result: dict[str, Any] = {}
    for number, (name, run) in enumerate(found.items()):
        with joined_group(folder / f"rendezvous-{stage}-{number}", rank, ranks):
            try:
                result[name] = run()
            except Exception:
                result[name] = traceback.format_exc()
    torch.save(result, folder / f"rank-{rank}-{stage}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, *numbers = sys.argv[1:]
    own, count, *stages = map(int, numbers)
    main(Path(place), own, count, stages[0] if stages else None)
