"""What a model of the zoo has to keep besides its outputs: files, state dicts, generators."""

from __future__ import annotations

import gc
import io
import pickle
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from zoo_row import ZooRow

import we_surgery as ws
from we_surgery.converted.graphs import excited_weights
from we_surgery.converted.proof import run_in_eval, same_bits


class ZooError(Exception):
    """A model broke one of the promises."""


@contextmanager
def generators_untouched(what: str) -> Iterator[None]:
    """Fails where a block draws from torch's or Python's generator, or seeds them."""
    before = torch.get_rng_state(), random.getstate()
    yield
    if not torch.equal(before[0], torch.get_rng_state()):
        raise ZooError(f"{what} moves torch's random generator")
    if before[1] != random.getstate():
        raise ZooError(f"{what} moves Python's random generator")


@contextmanager
def no_fakes_left() -> Iterator[None]:
    """Fails where a block leaves fake tensors behind; those from before it are not its own."""
    before = {id(fake): fake for fake in _fakes()}  # held, so that no address is used again
    yield
    left = sum(id(fake) not in before for fake in _fakes())
    if left:
        raise ZooError(f"{left} fake tensors outlive the reading")


def _fakes() -> list[FakeTensor]:
    gc.collect()
    fakes = (value for value in gc.get_objects() if type(value) is FakeTensor)
    # Those with symbolic sizes are torch.compile's own.
    return [fake for fake in fakes if fake.fake_mode.shape_env is None]


def refuse_fake_outputs(fresh: nn.Module, inputs: Any) -> None:
    """A new model of the class does not return what the reading of another one has recorded."""
    if any(isinstance(output, FakeTensor) for output in run_in_eval(fresh, inputs)):
        raise ZooError("a new model of the class returns fake tensors")


def check_files(row: ZooRow, vanilla: nn.Module, plan: ws.Plan) -> None:
    """Saved and loaded twice, as a module and as a state dict, a converted model is the same.

    Args:
        row: gets whether the vanilla model can be pickled at all.
        vanilla: the vanilla model.
        plan: what is done to it.
    """
    model = again = ws.convert(vanilla, plan=plan)
    expected = _tensors(model)
    row.pickles = _pickles(vanilla)
    if row.pickles:
        with tempfile.TemporaryDirectory() as folder:
            for index in range(2):
                path = Path(folder) / f"{index}.pt"
                ws.save(again, path)
                again = ws.load(path, trust=True)  # their configs are no modules
                _refuse_other(expected, _tensors(again), "the loaded module")
    state = model.state_dict()
    for _ in range(2):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        loaded = ws.convert(vanilla, plan=plan)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        _refuse_other(expected, _tensors(loaded), "the model given the loaded state dict")
        state = loaded.state_dict()


def check_folded_state(folded: dict[str, Tensor], stripped: nn.Module) -> None:
    """What ``strip_state_dict`` gave is, bit for bit and key for key, what ``strip`` left."""
    state = stripped.state_dict()
    if list(folded) != list(state):
        unlike = sorted(set(folded) ^ set(state)) or ["their order"]
        raise ZooError(f"strip_state_dict gives other keys than strip: {unlike[:3]}")
    for key, value in state.items():
        if isinstance(value, Tensor) and not same_bits(value, folded[key]):
            raise ZooError(f"strip_state_dict gives {key} other values than strip")


def note_plain(row: ZooRow, model: nn.Module, plan: ws.Plan, kinds: Sequence[type]) -> None:
    """Counts the weights of torch's own conv and linear layers, and why some are left alone."""
    modules = dict(model.named_modules())
    plain = [d for d in plan.decisions if type(modules.get(d.module)) in kinds]
    row.plain = len(plain)
    row.note_plain_alone(decision for decision in plain if not decision.excitation)


def _pickles(model: nn.Module) -> bool:
    try:
        pickle.dumps(model)
    except Exception:  # whatever the attributes of a model raise
        return False
    return True


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        excited = {f"{w.module}:{w.parameter}": w.excited() for w in excited_weights(model)}
    state = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    return {key: value.detach().clone() for key, value in (state | excited).items()}


def _refuse_other(expected: dict[str, Tensor], found: dict[str, Tensor], what: str) -> None:
    if list(expected) != list(found):
        unlike = sorted(set(expected) ^ set(found)) or ["their order"]
        raise ZooError(f"{what} has other keys: {unlike[:3]}")
    for key, value in expected.items():
        if not same_bits(value, found[key]):
            raise ZooError(f"{what} has another {key}")
