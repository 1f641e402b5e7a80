"""What training costs beside Table 1 of the WE paper: parameters, and bytes kept for backward.

    python benchmarks/paper_costs.py

Batch 128 at 224 px in float32, as the paper's memory figures have it. The bytes are those of
the tensors that one training forward pass keeps for its backward pass, on tensors without
memory, each storage once, parameters left out; so no machine is too small for it. The paper's
gigabytes are what its training took of a GPU in all, which is more: only the increase over the
plain network can be compared. The closed form of an excitation keeps a few numbers a filter
beside these, which are not counted. Writes ``results/paper_costs.md`` and ``.json``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

import we_surgery as ws
from we_surgery.recipes import load_recipe

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "we_surgery" / "configs" / "recipes" / "imagenet"
RESULTS = Path(__file__).parent / "results"
BATCH, SIDE = 128, 224

PUBLISHED = {
    "mobilenetv2": (3.5, 9.5),
    "mobilenetv2-lwe": (4.1, 9.6),
    "mobilenetv2-we": (4.1, 9.6),
    "mobilenetv2-se": (3.6, 9.8),
    "mobilenetv2-we-se": (4.2, 9.9),
    "resnet18": (11.7, 4.9),
    "resnet18-lwe": (11.9, 5.1),
    "resnet18-se": (11.8, 5.4),
    "resnet18-lwe-se": (11.9, 5.6),
    "resnet50": (25.6, 14.0),
    "resnet50-bam": (25.9, 15.8),
    "resnet50-lwe": (28.1, 14.8),
    "resnet50-se": (28.1, 16.7),
    "resnet50-cbam": (28.1, 19.3),
    "resnet50-lwe-se": (30.6, 17.6),
    "resnet50-lwe-bam": (28.4, 16.7),
    "resnet50-lwe-cbam": (30.6, 20.2),
    "resnext50": (25.0, 16.8),
    "resnext50-lwe": (27.9, 17.2),
    "resnext50-se": (27.5, 19.5),
    "resnext50-lwe-se": (30.4, 20.0),
    "wideresnet50-2": (68.9, 18.3),
    "wideresnet50-2-lwe": (72.3, 20.0),
    "wideresnet50-2-se": (71.4, 21.2),
    "wideresnet50-2-lwe-se": (74.9, 22.8),
    "resnet152": (60.2, 25.8),
    "resnet152-lwe": (67.3, 29.7),
    "resnet152-se": (66.8, 31.4),
    "resnet152-lwe-se": (73.9, 35.4),
}
"""Train parameters in millions and train memory in GB, by recipe (WE paper, Table 1)."""

PLAIN = ("mobilenetv2", "resnet18", "resnet50", "resnext50", "wideresnet50-2", "resnet152")


@dataclass(frozen=True)
class Cost:
    """One row."""

    recipe: str
    parameters: int
    kept_bytes: int


def main() -> None:
    """Measures all rows and writes them."""
    costs = {name: measure(name) for name in track(PUBLISHED, description="networks")}
    RESULTS.mkdir(exist_ok=True)
    rows = [asdict(cost) for cost in costs.values()]
    (RESULTS / "paper_costs.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "paper_costs.md").write_text(table(costs) + "\n", encoding="utf-8")


def measure(name: str) -> Cost:
    """The costs of one recipe's network."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    with torch.device("meta"):
        model = recipe.model.build()
        if recipe.surgery is not None:
            model = ws.convert(model, config=recipe.surgery, inplace=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(name, parameters, kept_for_backward(model))


def kept_for_backward(model: nn.Module) -> int:
    """Bytes that one forward pass keeps, each storage once."""
    storages: dict[int, Tensor] = {}
    held = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    model.train()
    images = torch.empty(BATCH, 3, SIDE, SIDE, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(images)
    del outputs
    return sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in held)


def table(costs: dict[str, Cost]) -> str:
    """The rows beside the published ones."""
    lines = [
        "# What training costs, beside the WE paper's Table 1",
        "",
        "Written by `python benchmarks/paper_costs.py`; do not edit. What is counted is told at",
        "the top of [paper_costs.py](../paper_costs.py). *Increase* is over the plain network. No",
        "time and no GPU memory was measured.",
        "",
        "| recipe | parameters (M) | published | kept for backward (GB) | increase | "
        "published memory (GB) | published increase |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, cost in costs.items():
        plain_name = next(plain for plain in PLAIN if name.startswith(plain))
        plain = costs[plain_name]
        published, memory = PUBLISHED[name]
        increase = "" if name == plain_name else f"{cost.kept_bytes / plain.kept_bytes - 1:+.1%}"
        theirs = "" if name == plain_name else f"{memory / PUBLISHED[plain_name][1] - 1:+.1%}"
        lines.append(
            f"| {name} | {cost.parameters / 1e6:.2f} | {published} | {cost.kept_bytes / 1e9:.2f} | "
            f"{increase} | {memory} | {theirs} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
