"""Shared test settings: one thread a process, so that parallel workers do not fight."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_configure() -> None:
    torch.set_num_threads(1)
