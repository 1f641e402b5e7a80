"""Attached excitation over two processes that a framework has brought together."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from equal_forms import Net, batches, plain_step
from framework_runs import MODE, OWN, STEPS, sgd
from processes import run_together

import we_surgery as ws

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
    ),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("frameworks")
    run_together("framework_runs.py", folder, 2)
    return [torch.load(folder / f"frameworks-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ["accelerate", "by hand-plain"])
def test_two_processes_train_what_one_process_trains(
    name: str, ranks: list[dict[str, Any]]
) -> None:
    if name == "accelerate":
        pytest.importorskip(name)
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
    assert_same(first, second)


def assert_same(expected: dict[str, torch.Tensor], *others: dict[str, torch.Tensor]) -> None:
    for other in others:
        assert isinstance(other, dict), other
        assert expected.keys() == other.keys()
        for key, value in expected.items():
            assert torch.equal(value, other[key]), key


@pytest.mark.integration
@pytest.mark.parametrize("optimization", ["automatic", "manual"])
@pytest.mark.parametrize("strategy", OWN)
def test_lightnings_strategies_train_what_a_loop_with_ddp_trains(
    strategy: str, optimization: str, ranks: list[dict[str, Any]]
) -> None:
    pytest.importorskip("lightning")
    net = "unused" if "unused" in strategy else "plain"
    trained = [rank[f"{strategy}-{optimization}"] for rank in ranks]
    assert_same(ranks[0][f"by hand-{net}"], *trained)


@pytest.mark.integration
def test_forked_processes_of_lightning_train_the_same_and_the_model_outside_has_it(
    ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("lightning")
    names = ["ddp_fork-automatic", "ddp_fork-manual", "ddp_notebook-automatic"]
    run_together("lightning_runs.py", tmp_path, 1, *names)
    for name in names:
        trained = [torch.load(tmp_path / f"{name}-{who}.pt") for who in (0, 1, "parent")]
        assert_same(ranks[0]["by hand-plain"], *trained)
