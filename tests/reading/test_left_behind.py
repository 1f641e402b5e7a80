"""What a model's forward keeps outside of the model is the same as if no recording had been."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import we_surgery as ws
from we_surgery.reading.fakes import Replay

_BY_SIZE: dict[Any, Tensor] = {}
_last: Tensor | None = None


@functools.lru_cache
def positions(n: int, device: torch.device) -> Tensor:
    return torch.arange(n, device=device, dtype=torch.float32)


class Kept(nn.Module):
    """A conv, and something else that each subclass keeps in another place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("frequency", torch.tensor([0.5, 0.25]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) + self.kept(x)
        return out

    def kept(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class InLruCache(Kept):
    def kept(self, x: Tensor) -> Tensor:
        return positions(x.shape[-1], x.device)


class InLruCacheOfMethod(Kept):
    @functools.lru_cache(maxsize=4)  # noqa: B019
    def _positions(self, n: int) -> Tensor:
        return torch.arange(n) * self.frequency[0]

    def kept(self, x: Tensor) -> Tensor:
        return self._positions(x.shape[-1])


class InGlobalDictionary(Kept):
    def kept(self, x: Tensor) -> Tensor:
        n = x.shape[-1]
        if n not in _BY_SIZE:
            _BY_SIZE[n] = torch.arange(n, device=x.device).float()
        return _BY_SIZE[n]


class InGlobal(Kept):
    def kept(self, x: Tensor) -> Tensor:
        global _last
        if _last is None:
            _last = torch.outer(torch.arange(x.shape[-1]).float(), self.get_buffer("frequency"))
        return _last[:, 0]


class InClass(Kept):
    table: ClassVar[list[Tensor]] = []

    def kept(self, x: Tensor) -> Tensor:
        if not self.table:
            made = torch.zeros(x.shape[-1])
            view = made[1:]
            view.add_(2)  # the kept tensor is written to by another one over its memory
            self.table.append(made)
        return self.table[0]


class InClassAttribute(Kept):
    mean: ClassVar[Tensor | None] = None

    def kept(self, x: Tensor) -> Tensor:
        if InClassAttribute.mean is None:
            InClassAttribute.mean = F.conv2d(x, self.conv.weight, padding=1).mean()
        return InClassAttribute.mean


class Inner(nn.Module):
    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[-1], device=x.device)
        return self.table


class InSubmodule(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def kept(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


class FromBuffer(Kept):
    """A trace finds a buffer on the meta device."""

    tables: ClassVar[dict[str, dict[int, Tensor]]] = {"by size": {}}

    def kept(self, x: Tensor) -> Tensor:
        made = self.get_buffer("frequency").repeat(3)[:5]
        return self.tables["by size"].setdefault(5, made)


class InFunction(Kept):
    """Keeps it as an attribute of a function, as some write a static variable."""

    def kept(self, x: Tensor) -> Tensor:
        return by_function(x)


def by_function(x: Tensor) -> Tensor:
    if not hasattr(by_function, "table"):
        by_function.table = torch.arange(5, device=x.device)  # type: ignore[attr-defined]
    table: Tensor = by_function.table  # type: ignore[attr-defined]
    return table


def _forget() -> None:
    global _last
    _last = None
    positions.cache_clear()
    InLruCacheOfMethod._positions.cache_clear()
    _BY_SIZE.clear()
    InClass.table.clear()
    InClassAttribute.mean = None
    FromBuffer.tables["by size"].clear()
    vars(by_function).clear()


def _fakes() -> list[FakeTensor]:
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is FakeTensor]


def _new_fakes(before: list[FakeTensor]) -> list[FakeTensor]:
    """Those that came since; what other tests have left may go at any time."""
    known = {id(fake) for fake in before}
    return [fake for fake in _fakes() if id(fake) not in known]


KINDS = [
    *[InLruCache, InLruCacheOfMethod, InGlobalDictionary, InGlobal],
    *[InClass, InClassAttribute, InSubmodule, FromBuffer, InFunction],
]


ACTS = [*((kind, ws.plan) for kind in KINDS), (InLruCache, ws.convert), (InClass, ws.convert)]


@pytest.mark.parametrize(("kind", "act"), ACTS)
def test_no_stand_in_outlives_a_recording(kind: type[Kept], act: Callable[..., Any]) -> None:
    model, x = kind().eval(), torch.randn(1, 3, 5, 5)
    _forget()
    with torch.no_grad():
        expected = model(x)
    _forget()
    fresh = kind().eval()
    fresh.load_state_dict(model.state_dict())
    before = _fakes()
    done = act(fresh, "lwe", example_inputs=x)
    try:
        assert not _new_fakes(before)
        with torch.no_grad():
            torch.testing.assert_close(fresh(x), expected, rtol=0, atol=0)
        if isinstance(done, nn.Module):
            assert type(done(x)) is Tensor
    finally:
        _forget()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_outlives_a_trace(kind: type[Kept]) -> None:
    model, x = kind().eval(), torch.randn(1, 3, 5, 5)
    _forget()
    with torch.no_grad():
        expected = model(x)
    _forget()
    fresh = kind().eval()
    fresh.load_state_dict(model.state_dict())
    try:
        assert ws.plan(fresh, "lwe").read_by == "symbolic"
        with torch.no_grad():
            assert torch.equal(fresh(x), expected)
    finally:
        _forget()


def test_a_trace_leaves_what_a_forward_had_kept_before_it() -> None:
    _forget()
    kept = torch.full((5,), 3.0)
    InClass.table.append(kept)
    ws.plan(InClass(), "lwe")
    assert len(InClass.table) == 1
    assert InClass.table[0] is kept
    _forget()


class KeepsHalfway(InGlobalDictionary):
    """Cannot run on tensors without values."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if out.sum().item() > 0 else -out


def test_nor_a_recording_that_failed() -> None:
    _forget()
    before = _fakes()
    ws.plan(KeepsHalfway(), "lwe", example_inputs=torch.randn(1, 3, 5, 5))
    assert not _new_fakes(before)
    assert torch.equal(_BY_SIZE[5], torch.arange(5.0))
    _forget()


def test_what_a_hook_of_the_users_keeps_has_values() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    seen: list[Tensor] = []

    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return seen[-1] * x

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        seen.append(output)

    model.append(Reads())
    model[2].register_forward_hook(keep)
    x = torch.randn(1, 3, 8, 8)
    plan = ws.plan(model, "lwe", example_inputs=x)
    assert plan.read_by == "recorded"
    assert seen
    assert all(type(output) is Tensor for output in seen)
    torch.testing.assert_close(seen[0], model[:3](x), rtol=0, atol=0)


class Remembers(nn.Module):
    """Keeps all sorts of things of a forward in a list that is not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.rnn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LSTM(3, 4)
        self.everything: list[Any] = EVERYTHING

    def __deepcopy__(self, memo: dict[int, Any]) -> Remembers:
        copied = Remembers()
        copied._modules = copy.deepcopy(self._modules, memo)
        return copied

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        z, states = self.rnn(y.flatten(2).transpose(1, 2))
        self.everything += [y.half(), (z, states), self.conv.weight, self.conv.weight.data]
        self.everything += [lambda: y, y.chunk(3, 1)[1], torch.tensor([1, 2]), self, torch.rand(3)]
        return y


EVERYTHING: list[Any] = []


def test_results_of_all_sorts_become_real() -> None:
    x, before = torch.randn(2, 3, 4, 4), _fakes()
    model = Remembers()
    try:
        ws.convert(model, "lwe", example_inputs=x)
        assert len(EVERYTHING) >= 4 * 9
        assert not _new_fakes(before)
        half, _, weight, data, _, chunk, constant, *_ = EVERYTHING
        model.eval()
        torch.testing.assert_close(half, model(x).half(), rtol=0, atol=0)
        torch.testing.assert_close(chunk, model(x)[:, 1:2], rtol=0, atol=0)
        assert isinstance(weight, nn.Parameter)
        assert torch.equal(weight, model.conv.weight)
        assert torch.equal(data, model.conv.weight)
        assert constant.tolist() == [1, 2]
    finally:
        EVERYTHING.clear()


def test_what_cannot_be_computed_again_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Tensor:
        raise RuntimeError("no")

    monkeypatch.setattr(Replay, "value_of", fail)
    _forget()
    with pytest.raises(ws.SurgeryError, match="it cannot be computed again"):
        ws.plan(InLruCache(), "lwe", example_inputs=torch.randn(1, 3, 5, 5))
    _forget()


def test_dinov3_of_transformers_computes_what_it_did() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
    )
    model = transformers.DINOv3ViTModel(config).eval()
    x = torch.randn(1, 3, 32, 32)
    before = _fakes()
    converted = ws.convert(model, "we", example_inputs=x)
    assert not _new_fakes(before)
    with torch.no_grad():
        assert type(model(x).last_hidden_state) is Tensor
        assert type(converted(x).last_hidden_state) is Tensor
