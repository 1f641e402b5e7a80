"""Who computes the closed form in the attached step."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import we_surgery as ws
from we_surgery.errors import InputError
from we_surgery.excitations.compute import backends
from we_surgery.excitations.compute.inputs import ClosedFormInputs

pytest.importorskip("triton")

CURVE = ClosedFormInputs(mwe_epsilon=0.1)


def test_auto_is_eager_on_a_cpu() -> None:
    weight = torch.randn(6, 5)
    assert not backends.runs_on_kernels("auto", weight, CURVE)
    assert backends.runs_on_kernels("triton", weight, CURVE) == backends.is_interpreted()


class OnGPU:
    """What a choice asks of a weight."""

    is_cuda, is_meta = True, False
    dtype = torch.float32
    device = torch.device("cpu")  # where the trial layer is then computed


@pytest.fixture
def _untried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    backends._agrees.cache_clear()
    yield
    backends._agrees.cache_clear()


@pytest.mark.usefixtures("_untried")
def test_auto_takes_kernels_that_agree_on_the_gpu(launches: list[str]) -> None:
    weight: Any = OnGPU()
    assert backends.runs_on_kernels("auto", weight, CURVE)
    assert len(launches) == 7
    assert backends.runs_on_kernels("auto", weight, CURVE)
    assert len(launches) == 7


@pytest.mark.usefixtures("_untried")
@pytest.mark.parametrize("fault", ["fails", "differs", "is not finite"])
def test_auto_stays_eager_where_kernels_do_not(
    fault: str, kernels: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = kernels.differentiate
    factors = [1.0, 1.0, 1.0, 1.1 if fault == "differs" else float("nan"), 1.0]

    def differentiate(layers: Any) -> Any:
        if fault == "fails":
            raise RuntimeError("no binary for gpu")
        return [
            [None if g is None else f * g for f, g in zip(factors, own, strict=True)]
            for own in original(layers)
        ]

    monkeypatch.setattr(kernels, "differentiate", differentiate)
    weight: Any = OnGPU()
    assert not backends.runs_on_kernels("auto", weight, CURVE)
    words = {"fails": "no binary for gpu", "differs": "are off by", "is not finite": "are off by"}
    assert words[fault] in caplog.text


@pytest.mark.usefixtures("_untried")
def test_nothing_is_tried_during_a_capture(
    monkeypatch: pytest.MonkeyPatch, launches: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    weight: Any = OnGPU()
    assert not backends.runs_on_kernels("auto", weight, CURVE)
    assert not backends.runs_on_kernels("triton", weight, CURVE)
    assert not launches


@pytest.mark.usefixtures("_untried")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_fake_tensors_reach_no_kernel(backend: Any, launches: list[str]) -> None:
    """Those say that they are on the GPU."""
    weight: Any = OnGPU()
    with FakeTensorMode():
        assert not backends.runs_on_kernels(backend, weight, CURVE)
    assert not launches
    assert not backends._agrees.cache_info().currsize


def trained(backend: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 1)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ws.attach(model, optimizer, "lwe+mwe", backend=backend)
    for _ in range(2):
        model(torch.randn(2, 3, 6, 6)).square().mean().backward()
        optimizer.step()
    return model


def test_an_attached_model_trains_with_kernels(launches: list[str]) -> None:
    expected = trained("eager")
    assert not launches
    found = trained("triton")
    assert launches
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_an_unknown_backend_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    before = model[0].weight.clone()
    with pytest.raises(InputError, match="triton"):
        ws.attach(model, torch.optim.SGD(model.parameters()), backend="tritton")  # type: ignore[arg-type]
    assert torch.equal(model[0].weight, before)


def test_triton_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    with pytest.raises(InputError, match="not installed"):
        backends.check_backend("triton")
