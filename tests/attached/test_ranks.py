"""Attached training over two processes: ranks stay equal and learn what one process learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from equal_forms import Net, batches, plain_step
from processes import joined_group, run_together
from ranks_runs import FORMS, SHARDED, STEPS, alone, alone_by, cases, hybrid_cases, main, sgd
from torch.distributed.fsdp import fully_shard

import we_surgery as ws

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)


sharded = pytest.mark.skipif(
    torch.__version__.startswith("2.8."),
    reason="FSDP2 over gloo adds gradients up there and does not average them",
)


def run_on(ranks: int, folder: Path, *stage: int) -> list[dict[str, Any]]:
    """What each of that many processes has found."""
    run_together("ranks_runs.py", folder, ranks, ranks, *stage)
    name = stage[0] if stage else None
    return [torch.load(folder / f"rank-{rank}-{name}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_on(2, folder)


@pytest.mark.parametrize("name", [name for name in cases(0) if name.endswith("DDP")])
def test_ddp(name: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[name] for rank in ranks)
    assert not isinstance(first, str), first
    assert not isinstance(second, str), second
    for part in ("weights", "raws"):
        for key, value in first[part].items():
            assert torch.equal(value, second[part][key]), key
    expected = alone(name.partition(",")[0])
    mean = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert mean == pytest.approx(expected["losses"], rel=1e-5)
    for key, value in expected["weights"].items():
        torch.testing.assert_close(first["weights"][key], value.detach(), rtol=1e-4, atol=1e-5)


@sharded
@pytest.mark.parametrize("name", SHARDED)
def test_fsdp2(name: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[f"{name}, FSDP2"] for rank in ranks)
    assert not isinstance(first, str), first
    assert not isinstance(second, str), second
    expected = alone_by(SHARDED[name])
    mean = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert mean == pytest.approx(expected["losses"], rel=1e-5)
    assert ("stem" in first["gathered"]) is not name.startswith("lwe")
    for part in ("weights", "raws"):
        assert list(first[part]) == list(expected[part])
        for key, value in expected[part].items():
            torch.testing.assert_close(
                first[part][key], value.detach(), rtol=1e-4, atol=1e-5, msg=f"{part} {key}"
            )
            assert torch.equal(first[part][key], second[part][key]), key


def test_ddp_reduces_the_buckets_of_vanilla_in_their_order(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        vanilla, attached, converted = (rank[f"buckets, {form}"] for form in FORMS)
        assert isinstance(vanilla, list), vanilla
        assert len(vanilla) > 2 * STEPS
        assert attached == vanilla
        assert converted != vanilla


def test_fully_shard_after_attach_is_an_error_at_the_next_step(tmp_path: Path) -> None:
    with joined_group(tmp_path / "rendezvous", 0, 1):
        model = Net(is_tied=False)
        optimizer = sgd(model)
        ws.attach(model, optimizer, "lwe")
        fully_shard(model)
        with pytest.raises(ws.AttachmentError, match="another Parameter"):
            plain_step(optimizer, model, batches(1)[0], 0)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on(4, tmp_path_factory.mktemp("four"))


@sharded
@pytest.mark.parametrize("name", hybrid_cases(0))
def test_hybrid_sharding(name: str, four_ranks: list[dict[str, Any]]) -> None:
    found = [rank[name] for rank in four_ranks]
    assert not any(isinstance(own, str) for own in found), found[0]
    expected = alone_by(SHARDED[name], slice(4))
    mean = [sum(own) / 4 for own in zip(*(rank["losses"] for rank in found), strict=True)]
    assert mean == pytest.approx(expected["losses"], rel=1e-5)
    for key, value in expected["weights"].items():
        torch.testing.assert_close(found[0]["weights"][key], value.detach(), rtol=1e-4, atol=1e-5)
        for other in found[1:]:
            assert torch.equal(found[0]["weights"][key], other["weights"][key]), key


@sharded
def test_mixed_precision_under_fsdp2(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["mixed precision"] for rank in ranks)
    assert not isinstance(first, str), first
    expected = alone_by(SHARDED["lwe+mwe"])
    for key, value in expected["weights"].items():
        assert first["weights"][key].dtype == torch.float32
        assert torch.equal(first["weights"][key], second["weights"][key])
        torch.testing.assert_close(first["weights"][key], value.detach(), rtol=0.1, atol=0.05)


def test_what_one_rank_writes_is_an_error_on_all(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["one rank writes"] for rank in ranks)
    assert isinstance(first, list), first
    assert "on another rank" in first[0]
    assert "'stem' was changed outside" in second[0]


@pytest.fixture(scope="module")
def three(ranks: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    return run_on(3, folder, 1)


@pytest.fixture(scope="module")
def one(three: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    main(folder, 0, 1, 2)  # in this process
    return [torch.load(folder / "rank-0-2.pt")]


@sharded
def test_each_rank_excites_its_own_rows_and_no_others(
    ranks: list[dict[str, Any]], three: list[dict[str, Any]], one: list[dict[str, Any]]
) -> None:
    weights = [value for name, value in Net(is_tied=False).named_parameters() if value.ndim > 1]
    excited = [weight for weight in weights if weight.shape[1] > 1]  # all but the depthwise one
    for found in (one, ranks, three):
        for rank, own in enumerate(found):
            assert isinstance(own["elements"], list), own["elements"]
            parts = [weight.chunk(len(found)) for weight in excited]
            each = [part[rank].numel() for part in parts if rank < len(part)]
            assert own["elements"] == each * STEPS


@pytest.mark.slow
@sharded
def test_a_run_goes_on_over_two_three_and_one_ranks(
    ranks: list[dict[str, Any]], three: list[dict[str, Any]], one: list[dict[str, Any]]
) -> None:
    torch.manual_seed(0)
    model = Net(is_tied=False)
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    ws.attach(model, optimizer, config=SHARDED["lwe+mwe"])
    expected = [plain_step(optimizer, model, batch, 0) for batch in batches(6)]
    losses: list[float] = []
    for found in (ranks, three, one):
        for rank in found:
            assert isinstance(rank["losses"], list), rank["losses"]
        each = zip(*(rank["losses"] for rank in found), strict=True)
        losses += [sum(own) / len(found) for own in each]
    assert losses == pytest.approx(expected, rel=1e-4)
