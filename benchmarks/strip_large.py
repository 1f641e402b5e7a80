"""Peak memory of stripping a large state dict that lies in several files.

    python benchmarks/strip_large.py --gigabytes 10 --json benchmarks/results/strip_large.json

Writes a synthetic converted state dict of that size, as safetensors shards with an index, as
torch.save shards, and as a folder of torch.distributed.checkpoint by four processes; strips each
in a process of its own; and prints the most memory that process ever held above what it held
before, mapped files included, against the largest shard. All files go to a temporary folder
(``--folder``), which takes twice the size, and are deleted.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYOUTS = ("safetensors", "torch.save", "dcp")
RANKS = 4
GIB = 2**30

# One layer: a conv of 1024 filters over 512 channels, 18 MiB, with standardization and LWE.
OUT, IN, HIDDEN = 1024, 512, 32
LAYER_BYTES = 4 * (OUT * IN * 9 + OUT + 2 * IN * HIDDEN + IN + HIDDEN)


def layer(index: int) -> dict[str, Tensor]:
    """The state dict of one excited conv, with values of its own."""
    generator = torch.Generator().manual_seed(index)
    name = f"blocks.{index}.conv"

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        f"{name}.raw_weight": random(OUT, IN, 3, 3),
        f"{name}.bias": random(OUT),
        f"{name}.excitation.standardize.epsilon": torch.tensor(1e-5),
        f"{name}.excitation.lwe.fc1.weight": random(HIDDEN, IN),
        f"{name}.excitation.lwe.fc1.bias": random(HIDDEN),
        f"{name}.excitation.lwe.fc2.weight": random(IN, HIDDEN),
        f"{name}.excitation.lwe.fc2.bias": random(IN),
    }


def entries(layers: int) -> Iterator[tuple[str, Tensor]]:
    """All entries in order, one layer in memory at a time."""
    for index in range(layers):
        yield from layer(index).items()


def write_shards(folder: Path, layers: int, shard_bytes: int, layout: str) -> None:
    """Shards of one size, cut between any two tensors, and their index."""
    ending = "safetensors" if layout == "safetensors" else "bin"
    stem = "model" if ending == "safetensors" else "pytorch_model"
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        file = f"{stem}-{len(set(places.values())) + 1:05}.{ending}"
        places.update(dict.fromkeys(shard, file))
        if ending == "safetensors":
            save_file(shard, folder / file)
        else:
            torch.save(shard, folder / file)
        shard.clear()

    for name, tensor in entries(layers):
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor
    flush()
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": places}))


def save_distributed(rank: int, folder: str, layers: int) -> None:
    """One of the processes that write a checkpoint of tensors sharded over their first axis."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    rendezvous = Path(folder).with_suffix(".rendezvous")
    dist.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    state = {}
    for name, tensor in entries(layers):
        if tensor.ndim == 0:
            state[name] = tensor
            continue
        local = tensor.chunk(RANKS)[rank].clone()
        state[name] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    dcp.save({"model": state}, checkpoint_id=folder)
    dist.destroy_process_group()


def measure(source: Path, target: Path) -> dict[str, float]:
    """Strips in this process; megabytes of memory above the start, and seconds."""
    import we_surgery as ws

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    torch.set_num_threads(1)
    # The first fold loads code of torch that stays: it is no part of what a shard costs.
    ws.strip_state_dict(layer(0))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    started = time.process_time()
    report = ws.strip_sharded(source, target)
    return {
        "layers": report.layers,
        "peak_mib": status("VmHWM") - before,
        "seconds": time.process_time() - started,
    }


def run(layout: str, layers: int, shard_bytes: int, folder: Path) -> dict[str, object]:
    """Writes one layout, strips it in a new process, deletes both."""
    source, target = folder / "source", folder / "target"
    source.mkdir()
    if layout == "dcp":
        context = multiprocessing.get_context("spawn")
        arguments = [(rank, str(source), layers) for rank in range(RANKS)]
        processes = [context.Process(target=save_distributed, args=a) for a in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert all(process.exitcode == 0 for process in processes)
    else:
        write_shards(source, layers, shard_bytes, layout)
    sizes = [file.stat().st_size for file in source.iterdir()]
    command = [sys.executable, __file__, "--measure", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(source)
    shutil.rmtree(target)
    largest = max(sizes) / 2**20
    return {
        "layout": layout,
        "gib": sum(sizes) / GIB,
        "shards": sum(size > 2**20 for size in sizes),
        "largest_shard_mib": largest,
        **measured,
        "peak_over_largest_shard": measured["peak_mib"] / largest,
    }


def say(line: str) -> None:
    """A line on stdout, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """The command line; see above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the state dict")
    parser.add_argument("--shard-gigabytes", type=float, help="of a shard; default a tenth")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--folder", type=Path, help="where to write; default the system's")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        warnings.simplefilter("ignore")
        say(json.dumps(measure(*arguments.measure)))
        return
    layers = math.ceil(arguments.gigabytes * GIB / LAYER_BYTES)
    shard_bytes = int((arguments.shard_gigabytes or arguments.gigabytes / 10) * GIB)
    rows = []
    say("| layout | GiB | shards | largest shard | peak memory | peak / largest | CPU s |")
    say("|---|---|---|---|---|---|---|")
    for layout in arguments.layouts:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            row = run(layout, layers, shard_bytes, Path(folder))
        rows.append(row)
        say(
            f"| {layout} | {row['gib']:.2f} | {row['shards']} | {row['largest_shard_mib']:.0f} MiB "
            f"| {row['peak_mib']:.0f} MiB | {row['peak_over_largest_shard']:.2f} "
            f"| {row['seconds']:.0f} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
