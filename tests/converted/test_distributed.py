"""DDP and FSDP2 over two processes train a converted model as one process does."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_runs import (
    ALL,
    SPECIAL,
    WRAPPINGS,
    batches,
    converted,
    example,
    example_run,
    train,
)
from torch import Tensor

import we_surgery as ws

PROCESSES = 2
ROOT = Path(__file__).parents[2]
AVERAGES_NOTHING = "FSDP2 of torch 2.8 adds gradients up over gloo, also a vanilla model's"
REFUSALS = {"ddp": "is wrapped in DistributedDataParallel", "fsdp": "is sharded"}
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def one_process(folder: Path) -> Iterator[None]:
    address = (folder / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(one_process: None, folder: Path) -> list[float]:
    """The losses of the example in one process."""
    return example_run(folder / "one")


class Found(dict[str, Any]):
    """What came out, by the name of the case; a case that failed fails whoever asks for it."""

    def __getitem__(self, name: str) -> Any:
        result = super().__getitem__(name)
        if isinstance(result, str):
            pytest.fail(f"{name!r} failed in its process:\n{result}")
        return result


@pytest.fixture(scope="module")
def found(alone: list[float], folder: Path) -> Found:
    """What two processes under torchrun have found; they also go on from the one's checkpoint."""
    loopback = "lo" if sys.platform == "linux" else "lo0"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(PROCESSES)),
            *(str(ROOT / "tests" / "distributed_runs.py"), str(folder)),
        ],
        env={"GLOO_SOCKET_IFNAME": loopback, "PYTHONPATH": str(ROOT), **os.environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return Found(torch.load(folder / "result.pt"))


def skip_where_gradients_add_up(name: str) -> None:
    if name.startswith("fsdp") and torch.__version__.startswith("2.8."):
        pytest.skip(AVERAGES_NOTHING)


def averaged(folder: Path) -> dict[str, Tensor]:
    """The deployed weights of an example, loaded into a vanilla network and out of it again."""
    network = example().Network()
    network.load_state_dict(torch.load(folder / "deploy.pt"), strict=True)
    state: dict[str, Tensor] = network.state_dict()
    return state


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPINGS)
def test_each_sort_of_layer_trains_as_in_one_process(name: str, found: dict[str, Any]) -> None:
    skip_where_gradients_add_up(name)
    alone = converted()
    losses = torch.tensor(train(alone, batches()))
    trained = alone.state_dict()
    assert (losses.diff().abs() > 1e-5).all()
    result = found[name]
    torch.testing.assert_close(result["losses"], losses, rtol=1e-6, atol=1e-6)
    assert list(result["state"]) == list(trained)
    for key, value in result["state"].items():
        torch.testing.assert_close(value, trained[key], msg=lambda m, k=key: f"{k}: {m}")
    refusal = REFUSALS[name]
    assert all(refusal in refused for refused in result["refusals"])
    again = converted()
    again.load_state_dict(result["state"])
    ws.strip(again, example_inputs=batches()[0])


@pytest.mark.parametrize(("method", "name"), SPECIAL)
def test_what_layers_share_and_what_moves_trains_as_in_one_process(
    method: str, name: str, found: dict[str, Any]
) -> None:
    skip_where_gradients_add_up(name)
    alone = converted(method)
    before = {key: value.clone() for key, value in alone.state_dict().items()}
    losses = torch.tensor(train(alone, batches(), training=True))
    trained = alone.state_dict()
    moved = [k for k in trained if ".net.fc2.weight" in k or k.endswith("spectral_norm.u")]
    assert moved
    assert not any(torch.equal(trained[key], before[key]) for key in moved)
    result = found[f"{method}-{name}"]
    torch.testing.assert_close(result["losses"], losses, rtol=1e-5, atol=1e-6)
    assert list(result["state"]) == list(trained)
    for key, value in result["state"].items():
        torch.testing.assert_close(
            value, trained[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )
    ws.strip_state_dict(result["state"])


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_the_example_trains_averages_and_strips_as_in_one_process(
    name: str, found: dict[str, Any], alone: list[float], folder: Path
) -> None:
    assert len(set(alone)) == len(alone) == 4
    assert found[f"example {name}"] == pytest.approx(alone, rel=1e-5)
    expected = averaged(folder / "one")
    for key, value in averaged(folder / name).items():
        # Where a gradient is nothing but rounding, AdamW takes a whole step all the same.
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_checkpoint_of_one_process_goes_on_in_two(
    name: str, found: dict[str, Any], alone: list[float]
) -> None:
    skip_where_gradients_add_up(name)
    assert found[f"example {name} from one"] == pytest.approx(alone[2:], rel=1e-5)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_sharded_checkpoint_of_two_processes_goes_on_in_one(
    engine: str, found: dict[str, Any], folder: Path
) -> None:
    skip_where_gradients_add_up("fsdp")
    losses = example_run(folder / f"{engine} from two", "--engine", engine, of=folder / "fsdp")
    assert losses == pytest.approx(found["example fsdp"][2:], rel=1e-5)


@pytest.mark.parametrize("name", ["fsdp all", "fsdp fp16"])
def test_the_same_processes_go_on_bit_for_bit(name: str, found: dict[str, Any]) -> None:
    straight, resumed = found[f"example {name}"], found[f"example {name} again"]
    assert resumed == straight[2:]


@pytest.mark.parametrize("name", ["fsdp all", "fsdp fp16"])
def test_half_precision_in_two_processes_is_as_in_one(
    name: str, found: dict[str, Any], alone: list[float]
) -> None:
    losses = found[f"example {name}"]
    assert losses != pytest.approx(alone, rel=1e-6)
    assert losses == pytest.approx(alone, rel=2e-2)


@pytest.mark.parametrize(
    ("words", "tolerance"),
    [
        (("--checkpoint-activations",), 0),
        (("--accumulate", "2"), 1e-5),
        (("--amp", "bf16"), 2e-2),
        (("--amp", "fp16"), 2e-2),
        (ALL, 2e-2),
    ],
    ids=["activation checkpointing", "accumulation", "bf16", "fp16", "all"],
)
@pytest.mark.filterwarnings("ignore:.*lru_cache.*:UserWarning")
def test_in_one_process_each_option_gives_the_losses_of_the_plain_run(
    words: tuple[str, ...], tolerance: float, alone: list[float], folder: Path
) -> None:
    torch._dynamo.reset()
    losses = example_run(folder / "-".join(words), *words)
    assert losses == pytest.approx(alone, rel=tolerance, abs=0)
    assert tolerance < 1e-3 or losses != pytest.approx(alone, rel=1e-7)
    averaged(folder / "-".join(words))
