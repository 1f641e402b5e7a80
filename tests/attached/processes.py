"""Processes that train together."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

HERE = Path(__file__).parent


def run_together(script: str, folder: Path, ranks: int, *words: object) -> None:
    """Runs a script of this folder in that many processes, each with the folder and its rank."""
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    # Lightning would choose the number of threads, and sums round differently with several.
    own = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment = {**os.environ, **own}
    running = [
        subprocess.Popen(
            [sys.executable, str(HERE / script), str(folder), str(rank), *map(str, words)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


@contextmanager
def joined_group(rendezvous: Path, rank: int, ranks: int) -> Iterator[None]:
    """The gloo group of this process, for a while."""
    dist.init_process_group(
        "gloo",
        init_method=rendezvous.as_uri(),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    try:
        yield
    finally:
        gc.collect()  # FSDP2 leaves reference cycles that hold the group
        dist.destroy_process_group()
