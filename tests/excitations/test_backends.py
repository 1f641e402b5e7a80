"""Whoever computes the closed form, the numbers are the same."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from computed_alike import assert_agreement, compose
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import we_surgery as ws
from we_surgery.errors import InputError
from we_surgery.excitations.compute import backends
from we_surgery.excitations.compute.terms import Terms

pytest.importorskip("triton")


# Choice


def test_auto_is_eager_on_a_cpu(launches: list[str]) -> None:
    composition = compose("sl", (6, 5))
    assert composition.backend == "eager"  # the converted form's, on any device
    composition.backend = "auto"
    composition(torch.randn(6, 5))
    assert not launches


class OnGPU:
    """What a choice asks of a weight."""

    is_cuda, is_meta = True, False
    dtype = torch.float32
    device = torch.device("cpu")  # where the trial layer is then computed

    def numel(self) -> int:
        return 30


@pytest.fixture
def _untried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    backends._agrees.cache_clear()
    yield
    backends._agrees.cache_clear()


@pytest.mark.usefixtures("_untried")
def test_auto_takes_kernels_that_agree_on_the_gpu(kernels: Any, launches: list[str]) -> None:
    weight: Any = OnGPU()
    assert backends.arithmetic("auto", weight, Terms()) == kernels.ARITHMETIC
    tried = len(launches)
    assert tried == 7
    backends.arithmetic("auto", weight, Terms())
    assert len(launches) == tried


@pytest.mark.usefixtures("_untried")
@pytest.mark.parametrize("fault", ["fails", "differs"])
def test_auto_stays_eager_where_kernels_do_not(
    fault: str, kernels: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = kernels.launch

    def launch(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        if fault == "fails":
            raise RuntimeError("no binary for gpu")
        original(kernel, grid, *arguments, **constants)
        arguments[0].mul_(1.1)

    monkeypatch.setattr(kernels, "launch", launch)
    weight: Any = OnGPU()
    assert backends.arithmetic("auto", weight, Terms()) == backends.EAGER
    assert "eager is used" in caplog.text


@pytest.mark.usefixtures("_untried")
def test_auto_tries_nothing_during_a_capture(
    monkeypatch: pytest.MonkeyPatch, launches: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    weight: Any = OnGPU()
    assert backends.arithmetic("auto", weight, Terms()) == backends.EAGER
    assert not launches


@pytest.mark.usefixtures("_untried")
@pytest.mark.parametrize("backend", ["auto", "inductor", "triton"])
def test_a_recording_sees_the_operations_and_no_kernel(backend: Any, launches: list[str]) -> None:
    """As a model is read on fake tensors, which say that they are on the GPU."""
    weight: Any = OnGPU()
    with FakeTensorMode():
        assert backends.arithmetic(backend, weight, Terms()) == backends.EAGER
    assert not launches
    assert not backends._agrees.cache_info().currsize


# Attach


def test_an_unknown_backend_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="triton"):
        ws.attach(model, optimizer, backend="tritton")  # type: ignore[arg-type]
    ws.attach(model, optimizer)


def test_triton_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    with pytest.raises(InputError, match="not installed"):
        backends.check_backend("triton")


@pytest.fixture
def _quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traces as for inductor, without the minute that its C++ takes."""
    compiler = torch.compile
    torch.compiler.reset()
    backends._compiled.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **how: compiler(f, backend="aot_eager", **how))
        yield
    backends._compiled.cache_clear()
    torch.compiler.reset()


@pytest.mark.usefixtures("_quick_compiler")
@pytest.mark.parametrize("stages", ["sl", "slrm"])
def test_compiled_formulas_give_what_eager_gives(stages: str) -> None:
    weight = torch.randn(6, 5, 3, 3).contiguous(memory_format=torch.channels_last)
    assert_agreement(compose(stages, (6, 5)), weight, "inductor")
    assert backends._compiled.cache_info().currsize == 1


@pytest.mark.usefixtures("_quick_compiler")
def test_more_shapes_are_compiled_than_a_compiler_follows_for_one_function() -> None:
    composition = compose("m", (4, 5))
    composition.backend = "inductor"
    for rows in range(1, 12):  # a compiler gives up at 8, and raises as a whole graph is asked for
        weight = torch.randn(rows, 5)
        torch.testing.assert_close(composition(weight), composition.excite(weight))
