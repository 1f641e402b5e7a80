"""What several processes write by torch.distributed.checkpoint strips in one, without a group."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_runs import WRAPPINGS, Net, batches, converted
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.multiprocessing.spawn import spawn

import we_surgery as ws
from we_surgery.checkpoint import read
from we_surgery.checkpoint.shards.dcp import DistributedCheckpoint

PROCESSES = 2
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)


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
        gc.collect()  # FSDP2 leaves reference cycles that hold the group
        dist.destroy_process_group()


def worker(rank: int, folder: str) -> None:
    with join_group(rank, folder):
        for name, wrap in WRAPPINGS.items():
            model = wrap(converted())
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
            model(batches()[0].chunk(PROCESSES)[rank]).square().mean().backward()
            optimizer.step()
            state, optimizer_state = get_state_dict(model, optimizer)
            content = {"model": state, "optim": optimizer_state, "step": 1}
            dcp.save(content, checkpoint_id=Path(folder, name))
            options = StateDictOptions(full_state_dict=True)
            full, _ = get_state_dict(model, optimizer, options=options)
            if rank == 0:
                torch.save(full, Path(folder, f"{name}.pt"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dcp")
    spawn(worker, (str(folder),), nprocs=PROCESSES)
    return folder


@pytest.mark.parametrize("name", WRAPPINGS)
def test_it_strips_to_the_fold_of_the_gathered_weights(name: str, folder: Path) -> None:
    assert not dist.is_initialized()
    ws.strip_sharded(folder / name, folder / f"{name}.safetensors")
    expected = ws.strip_state_dict(torch.load(folder / f"{name}.pt"))
    found = load_file(folder / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    Net().load_state_dict(found, strict=True)


@pytest.mark.parametrize("name", WRAPPINGS)
def test_it_is_read_in_the_state_dicts_own_order(name: str, folder: Path) -> None:
    files = DistributedCheckpoint(folder / name)
    pieces = [len(files._pieces[f"model.{key}"]) for key in ("stem.raw_weight", "norm.weight")]
    assert pieces == ([PROCESSES] * 2 if name.startswith("fsdp") else [1, 1])
    state = read(folder / name).state_dict
    assert state is not None
    gathered = torch.load(folder / f"{name}.pt")
    assert list(state) == list(gathered)
    assert all(torch.equal(state[key], value) for key, value in gathered.items())
