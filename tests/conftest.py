"""Shared test settings, such as one thread a process, so that parallel workers do not fight."""

import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    # Before Triton is imported for the first time, which torch does when it is needed.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


OF_TORCH_2_8 = (
    # It instantiates autograd functions while it compiles them.
    "ignore:.*should not be instantiated:DeprecationWarning",
    # The interpreter of its Triton, on NumPy since 1.25.
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning",
    # Its own way of writing checkpoints of many processes.
    "ignore:TypedStorage is deprecated:UserWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if torch.__version__.startswith("2.8."):
        for warning in OF_TORCH_2_8:
            config.addinivalue_line("filterwarnings", warning)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As a shell has it for what it runs in the background; some tests press Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
