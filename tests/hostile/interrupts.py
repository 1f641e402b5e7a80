"""Interrupts at the bytecodes of surgery in place: the model is as it was, or all is done.

``python tests/hostile/interrupts.py`` tries every one of them; the tests try a part.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import we_surgery as ws

PACKAGE = Path(ws.__file__).parent
# What changes a model lies here; the rest reads it.
CHANGING = (
    "convert.py strip.py excite.py sites.py names.py graphs.py views.py transaction.py transplants"
).split()


class Small(nn.Module):
    """Layers of each form that excitation takes, two of them tied, and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.drop = nn.Dropout(0.1)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).flatten(2).mT
        return self.second(self.first(self.drop(self.attention(x, x, x)[0])))


class Held(nn.Module):
    """A weight that only a graph reads, and a dropout of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 3, 3))
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.dropout(F.conv2d(x, self.weight), 0.1, self.training))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers": Small,
    "graph": lambda: fx.symbolic_trace(Held()),
}
OPTIONS: dict[str, Any] = {
    "config": {"mode": "lwe+mwe", "linear": "lwe+mwe"},
    "transplants": [{"max_dropout": {"rate": 0.3}}],
}


def convert(model: nn.Module) -> None:
    ws.convert(model, inplace=True, init="preserve", **OPTIONS)


def strip(model: nn.Module) -> None:
    ws.strip(model, inplace=True)


def strip_layer_by_layer(model: nn.Module) -> None:
    ws.strip(model, inplace=True, layer_by_layer=True)


SURGERY: dict[str, Callable[[nn.Module], None]] = {
    "convert": convert,
    "strip": strip,
    "layer by layer": strip_layer_by_layer,
}


def prepared(model: str, surgery: str) -> nn.Module:
    """A model that the surgery is for, always the same."""
    torch.manual_seed(0)
    made = MODELS[model]()
    if surgery != "convert":
        # Another start than preserve, so that a fold is no raw weight.
        ws.convert(made, inplace=True, **OPTIONS)
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return made


@dataclass
class Interrupt:
    """Counts the bytecodes that are run in some files, and interrupts at one of them."""

    files: tuple[str, ...]
    at: int = -1
    count: int = 0

    def __post_init__(self) -> None:
        self.places: list[tuple[CodeType, int]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.files):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self.step

    def step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            self.places.append((frame.f_code, frame.f_lasti))
            self.count += 1
            if self.count == self.at + 1:
                raise KeyboardInterrupt
        return self.step

    def run(self, surgery: str, model: nn.Module) -> bool:
        """Whether the surgery came to its end."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            SURGERY[surgery](model)
        except KeyboardInterrupt:
            return False
        finally:
            sys.settrace(before)
        return True


def points(model: str, surgery: str, *, everything: bool) -> list[int]:
    """At which bytecodes to interrupt: at each, or at each place in the code once or twice."""
    files = (str(PACKAGE),) if everything else tuple(str(PACKAGE / name) for name in CHANGING)
    interrupt = Interrupt(files)
    assert interrupt.run(surgery, prepared(model, surgery))
    if everything:
        return list(range(interrupt.count))
    first: dict[tuple[CodeType, int], int] = {}
    last: dict[tuple[CodeType, int], int] = {}
    for number, place in enumerate(interrupt.places):
        first.setdefault(place, number)
        last[place] = number
    return sorted({*first.values(), *last.values()})


Description = dict[str, Any]


def described(model: nn.Module) -> Description:
    """All of a model that its users can see, as far as surgery may change it."""
    graphs = [m for m in model.modules() if isinstance(m, fx.GraphModule)]
    return {
        "modules": [(n, type(m), list(vars(m)), m.training) for n, m in model.named_modules()],
        "parameters": [(n, id(p)) for n, p in model.named_parameters(remove_duplicate=False)],
        "gradients": [n for n, p in model.named_parameters() if p.grad is not None],
        "programs": [m.code for m in graphs],
        "keys": list(model.state_dict()),
    }


def without_ids(description: Description) -> Description:
    names = [name for name, _ in description["parameters"]]
    modules = [entry[:2] for entry in description["modules"]]
    kinds = [(name, kind.__qualname__) for name, kind in modules]
    return {**description, "parameters": names, "modules": kinds}


def same_values(model: nn.Module, values: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == values.keys() and all(
        torch.equal(value, values[name]) for name, value in state.items()
    )


class Expectation:
    """What a model may be after an interrupt of its surgery."""

    def __init__(self, model: str, surgery: str) -> None:
        self.surgery = surgery
        done = prepared(model, surgery)
        before = copy.deepcopy(done.state_dict())
        SURGERY[surgery](done)
        self.before, self.done = before, copy.deepcopy(done.state_dict())
        self.done_description = without_ids(described(done))

    def fault(self, model: nn.Module, before: Description) -> str | None:
        """What is wrong with an interrupted model, or None."""
        found = described(model)
        if found == before and same_values(model, self.before):
            return None
        is_done = without_ids(found) == self.done_description
        # New parameters of a conversion are drawn anew.
        kept = {k: v for k, v in self.done.items() if self.surgery != "convert"}
        if is_done and (not kept or same_values(model, kept)):
            return None
        if self.surgery == "layer by layer":
            return self._fault_of_a_part(model)
        return next((k for k in before if found[k] != before[k]), "values")

    def _fault_of_a_part(self, model: nn.Module) -> str | None:
        """Some layers may be vanilla already; a second call goes on."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ws.errors.NothingToStripWarning)
            SURGERY[self.surgery](model)
        if without_ids(described(model))["modules"] != self.done_description["modules"]:
            return "a second call does not come to the end"
        return None if same_values(model, self.done) else "values after a second call"


def faults(model: str, surgery: str, numbers: list[int], *, everything: bool) -> Iterator[str]:
    """What is wrong after each interrupt that leaves something wrong."""
    files = (str(PACKAGE),) if everything else tuple(str(PACKAGE / name) for name in CHANGING)
    expected = Expectation(model, surgery)
    for number in numbers:
        interrupted = prepared(model, surgery)
        before = described(interrupted)
        interrupt = Interrupt(files, at=number)
        interrupt.run(surgery, interrupted)
        fault = expected.fault(interrupted, before)
        if fault is not None:
            code, offset = interrupt.places[-1]
            line = next((n for a, b, n in code.co_lines() if a <= offset < b), 0)
            yield f"{Path(code.co_filename).name}:{line} ({code.co_name}), point {number}: {fault}"


def main() -> None:
    """Every bytecode, for every model and surgery; takes hours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(MODELS))
    parser.add_argument("--surgery", choices=list(SURGERY))
    parser.add_argument("--changing", action="store_true", help="only in files that change models")
    parser.add_argument("--stride", type=int, default=1)
    given = parser.parse_args()
    for model in [given.model] if given.model else MODELS:
        for surgery in [given.surgery] if given.surgery else SURGERY:
            everything = not given.changing
            numbers = points(model, surgery, everything=everything)[:: given.stride]
            found = list(faults(model, surgery, numbers, everything=everything))
            told = [f"{model}, {surgery}: {len(numbers)} points, {len(found)} wrong", *found]
            sys.stdout.write("\n".join(told) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
