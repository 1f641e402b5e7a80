"""DDP or FSDP2 on any number of processes, with checkpoints that any other number resumes.

On CPUs with gloo, on GPUs with NCCL, one process a device:

    torchrun --nproc-per-node 2 examples/train_distributed.py --engine fsdp --folder run
    torchrun --nproc-per-node 1 examples/train_distributed.py --engine ddp --folder run --steps 12

The second command goes on from the last checkpoint of the first, with another engine on another
number of processes. What excitation asks for stands at (1) to (3).
"""

from __future__ import annotations

import argparse
import copy
import gc
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import we_surgery as ws

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DECAY = 0.9


class Block(nn.Module):
    """Two convs and a shortcut; the norms do not mix images, so no loss depends on the split."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(4, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class Network(nn.Module):
    """A small residual network of ten classes."""

    def __init__(self, channels: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(4, channels)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(blocks))
        self.head = nn.Linear(channels, 10)
        self.checkpoint_activations = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            if self.checkpoint_activations:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(x.mean((2, 3)))


def wrap(model: nn.Module, engine: str) -> nn.Module:
    if engine == "ddp":
        return DistributedDataParallel(model.to(memory_format=torch.channels_last))
    # FSDP2 shards parameters of the default memory format only; the images may have another.
    mesh = dist.device_mesh.init_device_mesh(device().type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", dist.get_node_local_rank(0))


def batch(step: int, number: int = 16) -> tuple[Tensor, Tensor]:
    """This process's part of a step's images [N, 3, 12, 12] and labels: ten noisy patterns."""
    patterns = torch.randn(10, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(step + 1)
    labels = torch.randint(10, (number,), generator=generator)
    images = patterns[labels] + torch.randn(number, 3, 12, 12, generator=generator)
    images = images.to(memory_format=torch.channels_last)
    rank, processes = dist.get_rank(), dist.get_world_size()
    return images.chunk(processes)[rank].to(device()), labels.chunk(processes)[rank].to(device())


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    step: int,
    options: argparse.Namespace,
) -> float:
    """One step of several accumulated parts; the loss of the whole batch."""
    images, labels = batch(step)
    total = torch.zeros((), device=images.device)
    parts = images.chunk(options.accumulate)
    for index, (x, y) in enumerate(zip(parts, labels.chunk(options.accumulate), strict=True)):
        is_last = index == len(parts) - 1
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = is_last
        elif isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(is_last)
        with torch.autocast(x.device.type, DTYPES[options.amp], enabled=options.amp != "fp32"):
            loss = F.cross_entropy(model(x), y) / len(parts)
        scaler.scale(loss).backward()
        total += loss.detach()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module) -> None:
    for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(parameter, 1 - DECAY)


def main(options: argparse.Namespace) -> list[float]:
    """Trains up to a step, from the last checkpoint in the folder if there is one.

    Returns:
        The losses of the steps that were taken.
    """
    torch.manual_seed(0)
    options.folder.mkdir(parents=True, exist_ok=True)
    # (1) Convert first of all.
    model = ws.convert(Network(), "lwe+mwe", example_inputs=torch.randn(1, 3, 12, 12))
    model.to(device())
    model.checkpoint_activations = options.checkpoint_activations
    # (2) The average is a copy of the converted model. Sharded models cannot be copied.
    average = copy.deepcopy(model).requires_grad_(False)
    if options.compile:
        # Whole, and under FSDP2, whose hooks cannot be compiled, what it gathers at a time.
        for part in model.blocks if options.engine == "fsdp" else [model]:
            part.forward = torch.compile(part.forward, fullgraph=True, backend=options.compile)
    model = wrap(model, options.engine)
    if options.engine == "fsdp":
        average = wrap(average, "fsdp")

    optimizer = torch.optim.AdamW(ws.param_groups(model, 0.05), lr=3e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scaler = torch.amp.GradScaler(device().type, enabled=options.amp == "fp16")

    def state() -> dict[str, object]:
        weights, momenta = get_state_dict(model, optimizer)
        return {
            "model": weights,
            "optimizer": momenta,
            "average": get_model_state_dict(average),
            "schedule": schedule.state_dict(),
            "scaler": scaler.state_dict(),
        }

    first, losses = 0, []
    saved = sorted(options.folder.glob("step-*"))
    if saved:
        loaded = state()
        dcp.load(loaded, checkpoint_id=saved[-1])
        set_state_dict(
            model,
            optimizer,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
        )
        set_model_state_dict(average, loaded["average"])
        schedule.load_state_dict(loaded["schedule"])
        scaler.load_state_dict(loaded["scaler"])
        first = int(saved[-1].name.removeprefix("step-"))
    for step in range(first, options.steps):
        losses.append(train_step(model, optimizer, scaler, step, options))
        schedule.step()
        update_average(average, model)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {losses[-1]!r}", flush=True)
        if (step + 1) % options.save_every == 0:
            dcp.save(state(), checkpoint_id=options.folder / f"step-{step + 1:06}")

    # (3) Strip a full state dict: it needs no model.
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(average, options=full)
    if dist.get_rank() == 0:
        deployed = Network()
        deployed.load_state_dict(ws.strip_state_dict(whole), strict=True)
        torch.save(deployed.state_dict(), options.folder / "deploy.pt")
        print(f"wrote {options.folder / 'deploy.pt'}: the averaged weights, vanilla", flush=True)
    return losses


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--folder", type=Path, default=Path("distributed_run"))
    parser.add_argument("--steps", type=int, default=8, help="train up to this step")
    parser.add_argument("--save-every", type=int, default=4, metavar="STEPS")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a process's batch")
    parser.add_argument("--amp", choices=DTYPES, default="fp32")
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--compile", metavar="BACKEND", help="such as inductor")
    return parser.parse_args(words)


if __name__ == "__main__":
    chosen = parse()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    try:
        main(chosen)
    finally:
        # What FSDP2 leaves holds the group in cycles. Let go of at exit, it may abort the process.
        gc.collect()
        dist.destroy_process_group()
