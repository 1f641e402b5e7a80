"""What is found of one model of the zoo: a row of its table."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import we_surgery as ws

# A layer left alone for one of these reasons is one the mode, or the model itself, asks to leave.
_BY_DESIGN = (
    "inside an attention gate",
    "not used",
    "applied to a constant",
    "frozen",
    "depthwise",
)
# Names differ from layer to layer; the reason is what is left without them.
_NAMES = re.compile(r"'[^']*'|\([^)]*\)|of shape .*|of dtype .*")


@dataclass
class ZooRow:
    """What was found of one model.

    Attributes:
        name: ``torchvision:...``, ``timm:...`` or of another library.
        passed: whether every promise was kept.
        cause: which one was not, and why; "" for a pass.
        parameters: of the vanilla model.
        input_shape: of the first picture or clip it ran on.
        read_by: how the model was read.
        read_by_reason: what the reading says of itself.
        weights: rows of the plan.
        converted: rows that are excited.
        alone: rows left alone, by reason.
        exceptions: layers left alone that neither the mode nor the model asks to leave.
        plain: rows of torch's own conv and linear layers.
        plain_alone: those of them that are left alone, by reason.
        pickles: whether the vanilla model can be pickled, and so the converted one has to.
        forward_s: CPU seconds of one vanilla forward in eval mode.
        read_s: making the plan.
        convert_s: attaching the excitations.
        prove_s: recording the converted model again.
        strip_s: folding and comparing the weights.
        difference: excited to stripped outputs, over the larger of 1 and the largest output.
        effect: raw to excited outputs, likewise; None where their shapes differ.
        preserved: vanilla outputs to those of the model converted with ``init="preserve"``,
            likewise, by mode.
        rounding: where that is over 1e-5, the vanilla model's outputs in float64 to those in
            float32, likewise.
    """

    name: str
    passed: bool = False
    cause: str = ""
    parameters: int = 0
    input_shape: tuple[int, ...] = ()
    read_by: str = ""
    read_by_reason: str = ""
    weights: int = 0
    converted: int = 0
    alone: dict[str, int] = field(default_factory=dict)
    exceptions: dict[str, str] = field(default_factory=dict)
    plain: int = 0
    plain_alone: dict[str, int] = field(default_factory=dict)
    pickles: bool = False
    forward_s: float = 0.0
    read_s: float = 0.0
    convert_s: float = 0.0
    prove_s: float = 0.0
    strip_s: float = 0.0
    difference: float | None = None
    effect: float | None = None
    preserved: dict[str, float] = field(default_factory=dict)
    rounding: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON types, times in milliseconds' precision."""
        return {
            key: round(value, 3) if key.endswith("_s") else value
            for key, value in asdict(self).items()
        }

    def note_plan(self, plan: ws.Plan) -> None:
        """Takes down how the model was read and what is left alone."""
        self.read_by, self.read_by_reason = plan.read_by, plan.read_by_reason
        self.weights, self.converted = len(plan.decisions), len(plan.excited)
        left = [decision for decision in plan.decisions if not decision.excitation]
        self.alone = dict(Counter(short_reason(decision.reason) for decision in left))
        self.exceptions = {
            decision.layer: decision.reason
            for decision in left
            if not decision.reason.startswith(_BY_DESIGN)
        }

    def note_plain_alone(self, left: Iterable[ws.Decision]) -> None:
        """Takes down why layers of torch's own classes are left alone."""
        self.plain_alone = dict(Counter(short_reason(decision.reason) for decision in left))

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Puts the CPU seconds of a block into ``<step>_s``."""
        start = time.process_time()
        yield
        setattr(self, f"{step}_s", time.process_time() - start)


def short_reason(reason: str) -> str:
    """The reason without names, shapes and further remarks."""
    if reason.startswith("inside an attention gate"):
        how = "what the data does" if "the map it is made from" in reason else "its class"
        return f"inside an attention gate, by {how}"
    return re.sub(r"\s+", " ", _NAMES.sub("", reason.partition(";")[0])).strip(" ,:")
