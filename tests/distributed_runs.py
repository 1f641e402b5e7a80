"""What torchrun runs on each process for ``test_distributed``; the first writes what came out."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import we_surgery as ws
from we_surgery.excitations.lwe_global import LocationNet

STEPS = 3
EXAMPLE = Path(__file__).parents[1] / "examples" / "train_distributed.py"


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


METHODS: dict[str, dict[str, Any]] = {
    "lwe+mwe": {"mode": "lwe+mwe", "linear": "lwe+mwe", "standardize": "on"},
    # One net for all layers.
    "global": {"conv": "lwe", "linear": "lwe", "lwe": {"attention": "global"}},
    # Buffers that each forward pass in training moves.
    "spectral": {cell: "spectral_norm" for cell in ("conv", "depthwise", "linear")},
}


def converted(method: str = "lwe+mwe") -> nn.Module:
    torch.manual_seed(0)
    return ws.convert(Net(), config=METHODS[method])


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 3, 6, 6) for _ in range(STEPS)]


def train(model: nn.Module, parts: list[Tensor], *, training: bool = False) -> list[float]:
    """The losses of a few steps, each followed by two with no gradient.

    By default in eval mode throughout, where an excited weight is kept from read to read.
    """
    optimizer = torch.optim.SGD(model.train(training).parameters(), 0.1, momentum=0.9)
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
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    # What all layers have in common is the whole model's, and gathered for as long as it runs.
    common = {
        p
        for module in model.modules()
        if isinstance(module, LocationNet)
        for p in module.parameters()
    }
    for layer in (model.stem, model.up, model.depthwise):
        fully_shard(layer, mesh=mesh, ignored_params=common)
    return fully_shard(model, mesh=mesh)


WRAPPINGS = {"ddp": wrap_ddp, "fsdp": wrap_fsdp}
SPECIAL = [(method, name) for method in ("global", "spectral") for name in WRAPPINGS]


def special_run(method: str, name: str) -> dict[str, Any]:
    """What a method with more than a layer's own parameters computes and becomes, in training."""
    model = converted(method)
    return trained(WRAPPINGS[name](model), training=True)


def refusal(model: nn.Module, surgery: Callable[[nn.Module], Any]) -> str:
    try:
        surgery(model)
    except ws.InputError as error:
        return error.cause
    return ""


def wrapped_run(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """What a converted net refuses, computes and becomes under DDP or FSDP2."""
    model = wrap(converted())
    refusals = [refusal(model, ws.strip), refusal(model, ws.convert)]
    return {"refusals": refusals, **trained(model)}


def trained(model: nn.Module, *, training: bool = False) -> dict[str, Any]:
    rank, processes = dist.get_rank(), dist.get_world_size()
    parts = [x.chunk(processes)[rank] for x in batches()]
    losses = torch.tensor(train(model, parts, training=training))
    dist.all_reduce(losses)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {"losses": losses / processes, "state": state}


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_distributed", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example_run(folder: Path, *words: str, of: Path | None = None) -> list[float]:
    """The losses of the example; with ``of``, from the first checkpoint in that folder."""
    if of is not None and dist.get_rank() == 0:
        first = min(of.glob("step-*"))
        shutil.copytree(first, folder / first.name)
    dist.barrier()
    module = example()
    losses: list[float] = module.main(module.parse(["--folder", str(folder), *STEPPING, *words]))
    dist.barrier()
    return losses


STEPPING = ("--steps", "4", "--save-every", "2")
# Everything at once; the compiled graph may be of any backend that differentiates.
ALL = ("--amp", "bf16", "--accumulate", "2", "--checkpoint-activations", "--compile", "aot_eager")
TOGETHER = {
    "ddp": ("--engine", "ddp"),
    "fsdp": ("--engine", "fsdp"),
    "fsdp all": ("--engine", "fsdp", *ALL),
    "fsdp fp16": ("--engine", "fsdp", "--amp", "fp16"),
}


def cases(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The name of each case and what runs it, in an order in which each finds its inputs."""
    for wrapping, wrap in WRAPPINGS.items():
        yield wrapping, partial(wrapped_run, wrap)
    for case in SPECIAL:
        yield "-".join(map(str, case)), partial(special_run, *case)
    for name, words in TOGETHER.items():
        yield f"example {name}", partial(example_run, folder / name, *words)
    for name in ("ddp", "fsdp"):
        again = partial(example_run, folder / f"{name} from one", *TOGETHER[name])
        yield f"example {name} from one", partial(again, of=folder / "one")
    for name in ("fsdp all", "fsdp fp16"):
        again = partial(example_run, folder / f"{name} again", *TOGETHER[name])
        yield f"example {name} again", partial(again, of=folder / name)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for number, (name, run) in enumerate(cases(folder)):
        # Each case has a group of its own, so that one that failed on a single process does not
        # leave half of its messages to the next.
        dist.init_process_group(
            "gloo",
            init_method=(folder / f"rendezvous-{number}").as_uri(),
            rank=rank,
            world_size=processes,
            timeout=timedelta(seconds=60),
        )
        try:
            result[name] = run()
        except Exception:
            result[name] = traceback.format_exc()
        finally:
            gc.collect()  # as in the example
            dist.destroy_process_group()
    if rank == 0:
        torch.save(result, folder / "result.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
