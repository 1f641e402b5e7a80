"""Triton's kernels where they can run, and what they launch."""

from typing import Any

import pytest

from we_surgery.excitations import backends


@pytest.fixture
def kernels() -> Any:
    """The kernels, on the CPU: `tests/conftest.py` asks for Triton's interpreter."""
    from we_surgery.excitations import triton_backend

    if not backends.is_interpreted():
        pytest.skip("Triton is not interpreted here")
    return triton_backend


@pytest.fixture
def launches(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that ran, in order."""
    names: list[str] = []
    original = kernels.launch

    def counted(kernel: Any, *rest: Any, **constants: Any) -> None:
        names.append(kernel.fn.__name__)
        original(kernel, *rest, **constants)

    monkeypatch.setattr(kernels, "launch", counted)
    return names
