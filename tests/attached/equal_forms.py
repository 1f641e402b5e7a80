"""One short training in both forms, and what differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import we_surgery as ws
from we_surgery.converted.graphs import excited_weights

STEPS = 5


class Net(nn.Module):
    """Each sort of layer that the modes tell apart, small enough for hundreds of runs."""

    def __init__(self, *, is_tied: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.GroupNorm(2, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.mix = nn.Conv2d(8, 12, 1)
        self.mix_norm = nn.GroupNorm(3, 12)
        self.tied = nn.Linear(12, 12)
        self.tied_too = nn.Linear(12, 12)
        if is_tied:
            self.tied_too.weight = self.tied.weight
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.mix_norm(self.mix(self.depthwise(x)))).mean((2, 3))
        return self.head(x + self.tied_too(F.relu(self.tied(x))))


class Tokens(nn.Module):
    """With the names that the configs for transformers and MLP-Mixer go by."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, 4)
        block = nn.Module()
        block.attn = nn.Module()
        block.attn.qkv, block.attn.proj = nn.Linear(12, 12), nn.Linear(12, 12)
        for name in ("mlp_tokens", "mlp_channels", "mlp"):
            mlp = nn.Module()
            mlp.fc1, mlp.fc2 = nn.Linear(12, 12), nn.Linear(12, 12)
            setattr(block, name, mlp)
        self.blocks = nn.ModuleList([block])
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        block: Any = self.blocks[0]
        for layer in (
            *(block.attn.qkv, block.attn.proj),
            *(
                fc
                for mlp in (block.mlp_tokens, block.mlp_channels, block.mlp)
                for fc in (mlp.fc1, mlp.fc2)
            ),
        ):
            x = x + F.gelu(layer(x))
        return self.head(x.mean(1))


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(6, 3, 8, 8, generator=generator),
            torch.randint(5, (6,), generator=generator),
        )
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    with ws.cached(model):  # else a tied weight's gradients are rounded once for each read
        return F.cross_entropy(model(batch[0]), batch[1])


Step = Callable[[Any, nn.Module, tuple[Tensor, Tensor], int], float]


def plain_step(optimizer: Any, model: nn.Module, batch: tuple[Tensor, Tensor], _: int) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    return loss.item()


@dataclass
class Run:
    losses: list[float]
    weights: dict[str, Tensor]
    raws: dict[str, Tensor]
    model: nn.Module
    optimizer: Any
    excitation: ws.AttachedExcitation | None = None


def train(
    form: str,
    make_optimizer: Callable[[Any], Any],
    mode: str | None = "lwe+mwe",
    *,
    step: Step = plain_step,
    steps: int = STEPS,
    make_model: Callable[[], nn.Module] = Net,
    **options: Any,
) -> Run:
    """A run in the ``converted`` or the ``attached`` form, from the same seed."""
    torch.manual_seed(0)
    model = make_model()
    optimizer = make_optimizer(model)
    excitation = None
    torch.manual_seed(1)
    if form == "converted":
        ws.convert(model, mode, inplace=True, **options)
        ws.add_to_optimizer(optimizer, model)
    else:
        excitation = ws.attach(model, optimizer, mode, **options)
    torch.manual_seed(2)
    losses = [step(optimizer, model, batch, t) for t, batch in enumerate(batches(steps))]
    if excitation is None:
        raws = {}
        for weight in excited_weights(model):
            if not any(weight.raw is raw for raw in raws.values()):
                raws[f"{weight.module}.{weight.parameter}"] = weight.raw
        deployed = ws.strip(model)
    else:
        raws = {name: p for name, p in excitation.named_parameters().items() if ":" not in name}
        deployed = model
    raws = {name: raw.detach().clone() for name, raw in raws.items()}
    return Run(losses, deployed.state_dict(), raws, model, optimizer, excitation)


def assert_equal_runs(converted: Run, attached: Run) -> None:
    """To the bit."""
    assert attached.losses == converted.losses
    assert len(set(attached.losses)) == len(attached.losses)
    for one, other in ((converted.weights, attached.weights), (converted.raws, attached.raws)):
        assert list(one) == list(other)
        for name, value in one.items():
            assert torch.equal(value, other[name]), name


def assert_forms_agree(make_optimizer: Callable[[Any], Any], *args: Any, **options: Any) -> None:
    converted = train("converted", make_optimizer, *args, **options)
    assert_equal_runs(converted, train("attached", make_optimizer, *args, **options))


def of(kind: Any, *args: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda model: kind(model.parameters(), *args, **options)


O = torch.optim  # noqa: E741
TORCH = {
    "sgd": of(O.SGD, 0.1),
    "sgd momentum": of(O.SGD, 0.1, momentum=0.9, weight_decay=1e-3),
    "sgd nesterov": of(O.SGD, 0.1, momentum=0.9, nesterov=True),
    "sgd foreach": of(O.SGD, 0.1, momentum=0.9, foreach=True),
    "sgd fused": of(O.SGD, 0.1, momentum=0.9, fused=True),
    "sgd maximize": of(O.SGD, 0.01, maximize=True),
    "adam": of(O.Adam, 1e-2),
    "adam amsgrad": of(O.Adam, 1e-2, amsgrad=True),
    "adam foreach": of(O.Adam, 1e-2, foreach=True),
    "adam fused": of(O.Adam, 1e-2, fused=True),
    "adam decay": of(O.Adam, 1e-2, weight_decay=1e-2),
    "adam tensor lr": lambda m: O.Adam(m.parameters(), torch.tensor(1e-2)),
    "adamw": of(O.AdamW, 1e-2),
    "adamw foreach": of(O.AdamW, 1e-2, foreach=True),
    "adamw fused": of(O.AdamW, 1e-2, fused=True),
    "adamax": of(O.Adamax, 1e-2),
    "nadam": of(O.NAdam, 1e-2),
    "radam": of(O.RAdam, 1e-2),
    "adagrad": of(O.Adagrad, 1e-2, initial_accumulator_value=0.1),
    "adagrad fused": of(O.Adagrad, 1e-2, fused=True),
    "adadelta": of(O.Adadelta),
    "asgd": of(O.ASGD, 1e-2),
    "rprop": of(O.Rprop, 1e-3),
    "rmsprop": of(O.RMSprop, 1e-3, momentum=0.9, centered=True),
    "adafactor": of(O.Adafactor, 1e-2),
}
SGD = of(O.SGD, 0.1, momentum=0.9, weight_decay=1e-3)
