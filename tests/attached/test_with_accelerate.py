"""Attached excitation in a loop of one's own under accelerate."""

import copy

import pytest
import torch
from equal_forms import Net, batches, loss_of, plain_step
from torch.utils.data import DataLoader, TensorDataset

import we_surgery as ws

accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

MODE = "lwe+mwe"


@pytest.fixture(autouse=True)
def _fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def loader(count=4):
    x, y = zip(*batches(count), strict=True)
    return DataLoader(TensorDataset(torch.cat(x), torch.cat(y)), batch_size=6)


def prepared(order="prepare first", **options):
    accelerator = accelerate.Accelerator(cpu=True, **options)
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    excitation = None
    if order == "attach first":
        torch.manual_seed(1)
        excitation = ws.attach(model, optimizer, MODE)
    model, optimizer, data = accelerator.prepare(model, optimizer, loader())
    if order == "prepare first":
        torch.manual_seed(1)
        excitation = ws.attach(model, optimizer, MODE)
    return accelerator, model, optimizer, data, excitation


def trained(accelerator, model, optimizer, data, steps=4):
    losses = []
    for batch, _ in zip(data, range(steps), strict=False):
        with accelerator.accumulate(model):
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("order", ["prepare first", "attach first"])
def test_it_is_the_training_of_a_plain_loop(order):
    *run, _ = prepared(order)
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    torch.manual_seed(1)
    ws.attach(model, optimizer, MODE)
    expected = [plain_step(optimizer, model, batch, 0) for batch in loader()]
    assert trained(*run) == expected


def test_steps_are_those_of_the_optimizer_when_gradients_accumulate():
    *run, excitation = prepared(gradient_accumulation_steps=2)
    trained(*run)
    assert excitation.steps == 2


def test_bfloat16():
    *run, excitation = prepared(mixed_precision="bf16")
    before = copy.deepcopy(run[1].state_dict())
    trained(*run)
    assert excitation.steps == 4
    after = run[1].state_dict()
    assert all(value.dtype == torch.float32 for value in after.values())
    assert not any(torch.equal(before[name], after[name]) for name in ("stem.weight", "head.bias"))


@pytest.mark.parametrize("order", ["prepare first", "attach first"])
def test_save_state_resumes_to_the_bit(order, tmp_path):
    accelerator, model, optimizer, data, _ = prepared(order)
    trained(accelerator, model, optimizer, data, 2)
    accelerator.save_state(tmp_path)
    rest = trained(accelerator, model, optimizer, data)
    final = copy.deepcopy(model.state_dict())

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, model, optimizer, data, _ = prepared(order)
    trained(accelerator, model, optimizer, data, 1)
    accelerator.load_state(tmp_path)
    assert trained(accelerator, model, optimizer, data) == rest
    for name, value in model.state_dict().items():
        assert torch.equal(value, final[name]), name


def test_attached_after_the_state_was_loaded(tmp_path):
    accelerator, model, optimizer, data, _ = prepared()
    trained(accelerator, model, optimizer, data, 2)
    accelerator.save_state(tmp_path)
    rest = trained(accelerator, model, optimizer, data)

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, model, optimizer, data, _ = prepared(order="neither")
    accelerator.load_state(tmp_path)
    ws.attach(model, optimizer, MODE)
    assert trained(accelerator, model, optimizer, data) == rest


def test_save_model_writes_the_plain_model(tmp_path):
    from safetensors.torch import load_file

    accelerator, model, optimizer, data, _ = prepared()
    trained(accelerator, model, optimizer, data)
    accelerator.save_model(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    plain = Net()
    plain.load_state_dict(saved, strict=False)  # tied weights are written once
    assert all(torch.equal(value, plain.state_dict()[k]) for k, value in model.state_dict().items())
