"""A read computes; inside of ``ws.cached(model)`` it computes once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import we_surgery as ws
from we_surgery.converted.bypass import prove_excited
from we_surgery.excitations import Composition

X = torch.randn(2, 4)


class ReadsTwice(nn.Module):
    """Reads a child's weight twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.linear.weight), self.linear.weight)


class Functional(nn.Module):
    """Has a weight that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def computed() -> int:
    return _computed[0]


_computed = [0]


@pytest.fixture(autouse=True)
def _count(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    compute = Composition.compute

    def counted(self: Composition, weight: Tensor) -> Tensor:
        _computed[0] += 1
        return compute(self, weight)

    _computed[0] = 0
    monkeypatch.setattr(Composition, "compute", counted)
    return


@pytest.fixture
def model() -> nn.Module:
    return ws.convert(ReadsTwice(), "mwe")


@pytest.mark.parametrize("training", [True, False])
def test_each_read_computes(model: nn.Module, training: bool) -> None:
    model.train(training)
    with torch.set_grad_enabled(training):
        model(X)
    assert computed() == 2


def test_a_block_computes_once_and_forgets_at_its_end(model: nn.Module) -> None:
    expected = model(X)
    before = computed()
    with ws.cached(model):
        assert model.linear.weight is model.linear.weight
        assert torch.equal(model(X), expected)
        assert torch.equal(model(X), expected)
    assert computed() == before + 1
    with torch.no_grad():
        model.linear.raw_weight.mul_(2)
    assert not torch.equal(model(X), expected)
    with ws.cached(model):
        assert not torch.equal(model(X), expected)


def test_an_exception_ends_the_block(model: nn.Module) -> None:
    with pytest.raises(ZeroDivisionError), ws.cached(model):
        raise ZeroDivisionError
    assert model.linear.weight is not model.linear.weight


def test_the_outermost_of_nested_blocks_forgets(model: nn.Module) -> None:
    with ws.cached(model):
        with ws.cached(model.linear):
            first = model.linear.weight
        assert model.linear.weight is first
    assert model.linear.weight is not first


def test_other_models_compute(model: nn.Module) -> None:
    other = ws.convert(ReadsTwice(), "mwe")
    with ws.cached(other):
        assert model.linear.weight is not model.linear.weight


def test_gradients_and_modes_are_kept_apart(model: nn.Module) -> None:
    with ws.cached(model):
        with torch.no_grad():
            assert not model.linear.weight.requires_grad
        with torch.inference_mode():
            assert model.linear.weight.is_inference()
        assert model.linear.weight.requires_grad
        trained = model.linear.weight
        model.eval()
        assert model.linear.weight is not trained


def test_gradients_of_a_block_are_those_of_single_reads(model: nn.Module) -> None:
    (model(X).sum() + model(2 * X).sum()).backward()
    raw = model.linear.raw_weight
    expected = raw.grad.clone()
    model.zero_grad()
    with ws.cached(model):
        (model(X).sum() + model(2 * X).sum()).backward()
    torch.testing.assert_close(raw.grad, expected)


def test_a_step_within_a_block_is_not_a_silent_mistake(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ws.cached(model):
        model(X).sum().backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"second time|modified by an inplace"):
            model(X).sum().backward()


def test_another_thread_computes(model: nn.Module) -> None:
    found: list[Tensor] = []
    with ws.cached(model):
        thread = threading.Thread(target=lambda: found.append(model.linear.weight))
        thread.start()
        thread.join()
        assert found[0] is not model.linear.weight


def test_a_weight_that_another_call_replaces_is_computed(model: nn.Module) -> None:
    with ws.cached(model):
        before = model(X)
        other = {"linear.raw_weight": torch.randn(4, 4)}
        assert not torch.equal(torch.func.functional_call(model, other, (X,)), before)
        assert torch.equal(model(X), before)


def test_compiled_and_traced_code_computes(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with ws.cached(model):
        assert torch.equal(compiled(X), model(X))
        graph = torch.fx.experimental.proxy_tensor.make_fx(model)(X)
    assert not any("constant" in str(node.target) for node in graph.graph.nodes if not node.users)


def test_a_weight_that_a_graph_reads_is_kept() -> None:
    model = ws.convert(fx.symbolic_trace(Functional()), "mwe")
    before = computed()
    with ws.cached(model):
        assert torch.equal(model(X), model(X))
    assert computed() == before + 1


def test_strip_within_a_block_computes_each_weight_for_its_proof(model: nn.Module) -> None:
    with ws.cached(model):
        kept = model.linear.weight
        before = computed()
        stripped = ws.strip(model)
        assert computed() == before + 2  # the fold, and what it is compared with
        assert torch.equal(stripped.linear.weight, kept)
        assert stripped.linear.weight.data_ptr() != kept.data_ptr()


def test_several_reads_in_a_forward_pass_convert_with_their_proof() -> None:
    model = ws.convert(ReadsTwice(), "mwe", example_inputs=X)
    assert prove_excited(model, X, ran_in_both=True) == 1
