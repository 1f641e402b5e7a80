"""Excitation that is paused and sets in without a jump."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import we_surgery as ws
from tests.toys import EVERYTHING, EXCITING_MODES, ConvNet
from we_surgery.converted.layer import excited_layers
from we_surgery.training.schedule import paused_until


def paused(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return ws.convert(ConvNet(), config=EVERYTHING, start="paused", **options)


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 5


def train(model: nn.Module, steps: int, seed: int = 1) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    images, labels = batch(seed)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = copy.deepcopy(model)(batch()[0])
    return result


@pytest.mark.parametrize("standardize", ["on", "off", "auto"])
@pytest.mark.parametrize("mode", EXCITING_MODES)
def test_a_paused_model_is_the_vanilla_one_and_resumes_without_a_jump(
    mode: str, standardize: str
) -> None:
    torch.manual_seed(0)
    vanilla = ConvNet()
    model = ws.convert(vanilla, config={"mode": mode, "standardize": standardize}, start="paused")
    assert torch.equal(outputs(model), outputs(vanilla))
    assert train(model, 4) == train(vanilla, 4)
    before = outputs(model)
    assert ws.resume(model) == len(list(excited_layers(model)))
    after = outputs(model)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert ws.resume(model) == 0
    train(model, 2)
    assert not torch.allclose(outputs(model), before, atol=1e-3)


def test_a_model_that_was_cast_since_resumes_in_its_new_precision() -> None:
    model = paused().double().eval()
    x = batch()[0].double()
    before = model(x)
    ws.resume(model)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    half = paused().bfloat16()
    ws.resume(half)
    gains = [b for name, b in half.named_buffers() if name.endswith("rescale.gain")]
    assert gains
    assert all(gain.dtype == torch.float32 for gain in gains)


def test_the_loss_before_the_switch_is_the_loss_after_it() -> None:
    model = paused()
    train(model, 5)
    images, labels = batch()
    with torch.no_grad():
        before = F.cross_entropy(copy.deepcopy(model)(images), labels)
        ws.resume(model)
        after = F.cross_entropy(copy.deepcopy(model)(images), labels)
    assert abs(after - before) <= 1e-5 * before


def test_while_paused_excitations_have_gradients_of_zero_and_then_learn() -> None:
    model = paused()
    images, labels = batch()
    F.cross_entropy(model(images), labels).backward()
    own = {n: p for n, p in model.named_parameters() if ".excitation." in n}
    assert own
    assert all(p.grad is not None and not p.grad.any() for p in own.values())
    waiting = set(own)
    ws.resume(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        waiting -= {name for name in waiting if own[name].grad.any()}
        optimizer.step()
    assert not waiting


def test_the_parameters_and_keys_are_the_same_before_and_after() -> None:
    model = paused()
    before = [(name, id(p)) for name, p in model.named_parameters()]
    keys = list(model.state_dict())
    ws.resume(model)
    assert [(name, id(p)) for name, p in model.named_parameters()] == before
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("resumed", [False, True])
def test_a_state_dict_says_whether_it_is_paused(resumed: bool) -> None:
    model = paused()
    train(model, 2)
    if resumed:
        ws.resume(model)
        train(model, 2)
    for other in (paused(), paused()):
        if other is not model and not resumed:
            ws.resume(other)
        other.load_state_dict(model.state_dict())
        assert torch.equal(outputs(other), outputs(model))
        assert ws.resume(other) == (0 if resumed else len(list(excited_layers(model))))


@pytest.mark.parametrize("resumed", [False, True])
def test_strip_folds_what_the_layer_computes(resumed: bool) -> None:
    model = paused()
    train(model, 2)
    if resumed:
        ws.resume(model)
        train(model, 2)
    x = batch()[0]
    stripped = ws.strip(model, example_inputs=x)
    folded = ws.strip_state_dict(model.state_dict())
    assert list(folded) == list(ConvNet().state_dict())
    for key, value in stripped.state_dict().items():
        assert torch.equal(folded[key], value)


def test_copies_pickles_and_files_stay_paused(tmp_path: Path) -> None:
    model = paused()
    path = tmp_path / "model.pt"
    torch.save(model, path)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        ws.load(path, allow=["toys", "tests"]),
    ):
        assert torch.equal(outputs(copied), outputs(model))
        assert ws.resume(copied) > 0


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_distributed_checkpoint_loads_into_a_model_that_is_as_far(tmp_path: Path) -> None:
    model = paused()
    ws.resume(model)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    other = paused()
    with pytest.raises(dcp.api.CheckpointException, match=r"Size mismatch .*_extra_state"):
        dcp.load({"model": other.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    ws.resume(other)
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(state["model"])
    assert torch.equal(outputs(other), outputs(model))


def test_tied_layers_resume_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    converted = ws.convert(model, "mwe", start="paused")
    x = torch.randn(3, 6)
    before = converted(x)
    assert ws.resume(converted) == 1
    torch.testing.assert_close(converted(x), before)


def test_a_weight_that_is_not_finite_resumes_nothing() -> None:
    model = paused()
    with torch.no_grad():
        model.head.raw_weight[0, 0] = float("nan")
    with pytest.raises(ws.SurgeryError, match="head"):
        ws.resume(model)
    assert all(layer.excitation.is_paused for _, layer in excited_layers(model))


def test_a_schedule_sets_in_once_at_its_epoch() -> None:
    model = paused()
    schedule = ws.WESchedule(model, start_epoch=2)
    assert [schedule.step(epoch) for epoch in range(5)] == [False, False, True, False, False]
    resumed = ws.WESchedule(model, start_epoch=2)
    assert not resumed.step(3)
    for wrong in (-1, 1.5, True):
        with pytest.raises(ws.InputError, match="start_epoch"):
            ws.WESchedule(model, start_epoch=wrong)  # type: ignore[arg-type]


AVERAGES = {
    "timm": lambda model: ModelEmaV3(model, decay=0.5),
    "torch": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "torch with buffers": lambda model: AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True
    ),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_sets_in_with_its_model_without_a_jump_and_goes_on(kind: str) -> None:
    # Without standardization excitations have no buffers of a weight's own.
    config = {"mode": "lwe+mwe", "standardize": "off"} if kind == "torch" else EVERYTHING
    torch.manual_seed(0)
    model = ws.convert(ConvNet(), config=config, start="paused")
    average = AVERAGES[kind](model)
    update = getattr(average, "update", None) or average.update_parameters
    for seed in range(3):
        train(model, 2, seed)
        update(model)
    before = outputs(average.module)
    assert not torch.allclose(before, outputs(model), atol=1e-3)
    schedule = ws.WESchedule(model, 1, average)
    assert not schedule.step(0)
    assert schedule.step(1)
    torch.testing.assert_close(outputs(average.module), before, rtol=1e-4, atol=1e-4)
    train(model, 2)
    update(model)
    assert not torch.equal(outputs(average.module), before)
    for _ in range(40):
        update(model)
    expected = outputs(model.eval() if kind == "timm" else model)
    torch.testing.assert_close(outputs(average.module), expected, rtol=1e-3, atol=1e-3)


def test_an_average_does_not_jump_at_its_next_update_either() -> None:
    torch.manual_seed(0)
    model = ws.convert(ConvNet(), config={"conv": "standardize+lwe"}, start="paused")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)

    def moved() -> float:
        before = outputs(average.module)
        train(model, 1)
        average.update_parameters(model)
        return float((outputs(average.module) - before).norm() / before.norm())

    paused_moves = [moved() for _ in range(30)]
    ws.resume(model, average)
    assert moved() < 2 * paused_moves[-1]


def test_an_average_that_would_copy_gain_and_shift_is_refused_before_anything_changes() -> None:
    model = paused()
    average = AVERAGES["torch"](model)
    for attempt in (lambda: ws.resume(model, average), lambda: ws.WESchedule(model, 3, average)):
        with pytest.raises(ws.InputError, match="without use_buffers copies") as caught:
            attempt()
        assert "use_buffers=True" in caught.value.cure
    assert all(layer.excitation.is_paused for _, layer in excited_layers(model))
    ws.resume(model)
    late = AVERAGES["torch"](model)  # of a model that is not paused
    assert not ws.WESchedule(model, 3, late).step(3)


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_that_was_left_paused_does_not_go_on_silently(kind: str) -> None:
    model = paused()
    average = AVERAGES[kind](model)
    ws.resume(model)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        (getattr(average, "update", None) or average.update_parameters)(model)


def test_a_weight_of_an_average_that_is_not_finite_resumes_nothing() -> None:
    model = paused()
    average = copy.deepcopy(model)
    with torch.no_grad():
        average.head.raw_weight[0, 0] = float("nan")
    with pytest.raises(ws.SurgeryError, match="head"):
        ws.resume(model, average)
    assert all(layer.excitation.is_paused for _, layer in excited_layers(model))


def test_the_start_of_a_callbacks_options() -> None:
    assert paused_until(None, {"start": "on"}) == {"start": "on"}
    assert paused_until(3, {"init": "paper"}) == {"init": "paper", "start": "paused"}
    with pytest.raises(ws.InputError, match="both start_epoch=3 and start='on'"):
        paused_until(3, {"start": "on"})
    with pytest.raises(ws.InputError, match="start_epoch must be an integer"):
        paused_until(-1, {})


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(ws.InputError, match="did you mean 'paused'"):
        ws.convert(ConvNet(), start="pause")  # type: ignore[arg-type]


def test_compiled_it_recompiles_once() -> None:
    model = paused().eval()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = batch()[0]
    before = compiled(x)
    compiled(x)
    assert counter.frame_count == 1
    ws.resume(compiled)
    torch.testing.assert_close(compiled(x), before, rtol=1e-4, atol=1e-5)
    compiled(x)
    assert counter.frame_count == 2


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    address = (tmp_path / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)
@pytest.mark.usefixtures("one_process")
def test_under_ddp_no_parameter_is_waited_for() -> None:
    model, alone = paused(), paused()
    wrapped = DistributedDataParallel(model)
    assert train(wrapped, 3) == pytest.approx(train(alone, 3), rel=1e-6)
    ws.resume(wrapped), ws.resume(alone)
    assert train(wrapped, 3) == pytest.approx(train(alone, 3), rel=1e-5)
