"""Processes that train together."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_together(script: str, folder: Path, ranks: int, *words: object) -> None:
    """Runs a script of this folder in that many processes, each with the folder and its rank."""
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
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
