"""Shared test settings, such as one thread a process, so that parallel workers do not fight."""

import os
import re
import signal
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Before Triton is imported for the first time, which torch does when it is needed.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def kernels() -> Any:
    """The kernels, on the CPU: Triton's interpreter is asked for above."""
    pytest.importorskip("triton")
    from we_surgery.excitations.compute import backends, triton_backend

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


# What versions of torch warn of in their own code.
OF_TORCH = {
    "2.8.": (
        # It instantiates autograd functions while it compiles them.
        "ignore:.*should not be instantiated:DeprecationWarning",
        # The interpreter of its Triton, on NumPy since 1.25.
        "ignore:Conversion of an array with ndim > 0:DeprecationWarning",
        # Its own way of writing checkpoints of many processes.
        "ignore:TypedStorage is deprecated:UserWarning",
        # Its LBFGS with a learning rate that is a tensor.
        "ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning",
    ),
    "2.13.": (
        "ignore:.*should not be instantiated:DeprecationWarning",
        # Its export, and its exporter to ONNX.
        "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
        # Where it compiles for a CPU; later versions have another category, which is left alone.
        "ignore:`torch.jit.* is deprecated:DeprecationWarning",
    ),
}


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    for version, warnings in OF_TORCH.items():
        for warning in warnings if torch.__version__.startswith(version) else ():
            config.addinivalue_line("filterwarnings", warning)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As a shell has it for what it runs in the background; some tests press Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Marks that follow from where a test lies; `slow` stands at the tests themselves.
OF_PLACE = {
    "docs": r"^tests/pages/",
    "distributed": r"/test_(ranks|distributed\w*)\.py::",
    "integration": r"/test_with_\w+\.py::|^tests/zoo/"
    r"|^tests/training/test_(accelerate|examples|lightning|pytorch_lightning|transformers)\.py::",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark, place in OF_PLACE.items():
            if re.search(place, item.nodeid):
                item.add_marker(mark)
