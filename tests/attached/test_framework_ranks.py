"""Attached excitation over two processes that a framework has brought together."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from equal_forms import Net, batches, plain_step
from framework_runs import MODE, STEPS, sgd
from processes import run_together

import we_surgery as ws

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("frameworks")
    run_together("framework_runs.py", folder, 2)
    return [torch.load(folder / f"frameworks-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_two_processes_train_what_one_process_trains(
    name: str, ranks: list[dict[str, Any]]
) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    torch.manual_seed(0)
    model = Net()
    optimizer = sgd(model)
    torch.manual_seed(1)
    ws.attach(model, optimizer, MODE)
    for batch in batches(STEPS):
        plain_step(optimizer, model, batch, 0)
    first, second = (rank[name] for rank in ranks)
    assert isinstance(first, dict), first
    for key, value in model.state_dict().items():
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5, msg=key)
        assert torch.equal(first[key], second[key]), key
