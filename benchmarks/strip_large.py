"""Peak memory of stripping a large state dict that lies in several files.

    python benchmarks/strip_large.py --json benchmarks/results/strip_large.json
    python benchmarks/strip_large.py --gigabytes 0.5 --shard-gigabytes 0.001    # one tensor a shard
    python benchmarks/strip_large.py --gigabytes 1.1 --shard-gigabytes 0.001 --filters 16384

Writes a synthetic converted state dict of that size, as safetensors shards with an index, as
torch.save shards, and as a folder of torch.distributed.checkpoint by four processes; strips each
in a process of its own; and prints the most memory that process ever held above what it held
before, mapped files included, against the largest shard. All files go to a temporary folder
(``--folder``), which takes twice the size, and are deleted. ``--json`` adds the rows to a file.
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
from measuring import peak_mib
from safetensors.torch import save_file
from torch import Tensor

LAYOUTS = ("safetensors", "torch.save", "dcp")
RANKS = 4
GIB = 2**30

# One layer: a 3x3 conv over 512 channels with standardization, LWE and MWE; 18 KiB a filter.
IN, HIDDEN = 512, 32
FILTERS = 1024


def layer_bytes(filters: int) -> int:
    """Of one layer's state dict."""
    return 4 * (filters * IN * 9 + filters + 2 * IN * HIDDEN + IN + HIDDEN)


def layer(index: int, filters: int) -> dict[str, Tensor]:
    """The state dict of one excited conv, with values of its own."""
    generator = torch.Generator().manual_seed(index)
    name = f"blocks.{index}.conv"

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        f"{name}.raw_weight": random(filters, IN, 3, 3),
        f"{name}.bias": random(filters),
        f"{name}.excitation.standardize.epsilon": torch.tensor(1e-5),
        f"{name}.excitation.lwe.fc1.weight": random(HIDDEN, IN),
        f"{name}.excitation.lwe.fc1.bias": random(HIDDEN),
        f"{name}.excitation.lwe.fc2.weight": random(IN, HIDDEN),
        f"{name}.excitation.lwe.fc2.bias": random(IN),
        f"{name}.excitation.mwe.epsilon": torch.tensor(0.1),
    }


def entries(layers: int, filters: int) -> Iterator[tuple[str, Tensor]]:
    """All entries in order, one layer in memory at a time."""
    for index in range(layers):
        yield from layer(index, filters).items()


def write_shards(folder: Path, layers: int, filters: int, shard_bytes: int, layout: str) -> None:
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

    for name, tensor in entries(layers, filters):
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor
    flush()
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": places}))


def save_distributed(rank: int, folder: str, layers: int, filters: int) -> None:
    """One of the processes that write a checkpoint of tensors sharded over their first axis."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    rendezvous = Path(folder).with_suffix(".rendezvous")
    dist.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    state = {}
    for name, tensor in entries(layers, filters):
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

    torch.set_num_threads(1)
    # The first strip loads code of torch that stays: it is no part of what a shard costs.
    ws.strip_state_dict(layer(0, FILTERS))
    with tempfile.TemporaryDirectory() as folder:
        for layout in LAYOUTS[:2]:
            small = Path(folder, layout)
            small.mkdir()
            write_shards(small, 1, 16, 2**10, layout)
            ws.strip_sharded(small, small / "out.safetensors")
    started = time.process_time()
    layers = []
    peak = peak_mib(lambda: layers.append(ws.strip_sharded(source, target).layers))
    seconds = time.process_time() - started
    return {"layers": layers[0], "peak_mib": peak, "seconds": seconds}


def run(
    layout: str, layers: int, filters: int, shard_bytes: int, folder: Path
) -> dict[str, object]:
    """Writes one layout, strips it in a new process, deletes both."""
    source, target = folder / "source", folder / "target"
    source.mkdir()
    if layout == "dcp":
        context = multiprocessing.get_context("spawn")
        arguments = [(rank, str(source), layers, filters) for rank in range(RANKS)]
        processes = [context.Process(target=save_distributed, args=a) for a in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert all(process.exitcode == 0 for process in processes)
    else:
        write_shards(source, layers, filters, shard_bytes, layout)
    sizes = [file.stat().st_size for file in source.iterdir()]
    command = [sys.executable, __file__, "--measure", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(source)
    shutil.rmtree(target)
    tensor = 4 * filters * IN * 9 / 2**20
    largest = max(*sizes, tensor * 2**20) / 2**20
    return {
        "layout": layout,
        "gib": sum(sizes) / GIB,
        "shards": sum(size > 2**20 for size in sizes),
        "largest_tensor_mib": tensor,
        "largest_shard_mib": max(sizes) / 2**20,
        **measured,
        "peak_over_largest": measured["peak_mib"] / largest,
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
    parser.add_argument("--filters", type=int, default=FILTERS, help="of a layer, 18 KiB each")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--folder", type=Path, help="where to write; default the system's")
    parser.add_argument("--json", type=Path, help="add the rows to this file")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        warnings.simplefilter("ignore")
        say(json.dumps(measure(*arguments.measure)))
        return
    layers = math.ceil(arguments.gigabytes * GIB / layer_bytes(arguments.filters))
    shard_bytes = int((arguments.shard_gigabytes or arguments.gigabytes / 10) * GIB)
    rows = []
    say("| layout | GiB | shards | tensor | shard | peak memory | peak / larger | CPU s |")
    say("|---|---|---|---|---|---|---|---|")
    for layout in arguments.layouts:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            row = run(layout, layers, arguments.filters, shard_bytes, Path(folder))
        rows.append(row)
        say(
            f"| {layout} | {row['gib']:.2f} | {row['shards']} "
            f"| {row['largest_tensor_mib']:.0f} MiB | {row['largest_shard_mib']:.0f} MiB "
            f"| {row['peak_mib']:.0f} MiB | {row['peak_over_largest']:.2f} "
            f"| {row['seconds']:.0f} |"
        )
    if arguments.json:
        known = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        arguments.json.write_text(json.dumps(known + rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
