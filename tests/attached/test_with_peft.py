"""Attached excitation with PEFT: LoRA's adapters, or the base while it is trained."""

import pytest
import torch
from equal_forms import Net, batches, loss_of
from torch import nn

import we_surgery as ws

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def adapted(**options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["tied", "mix"], init_lora_weights=False)
    return peft.get_peft_model(Net(is_tied=False), config, **options)


def step(model, optimizer):
    optimizer.zero_grad()
    loss = loss_of(model, batches(1)[0])
    loss.backward()
    optimizer.step()
    return loss.item()


def test_adapters_are_excited_saved_and_merged(tmp_path):
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    excitation = ws.attach(model, optimizer, "mwe")
    names = list(excitation.named_parameters())
    assert len(names) == 4
    assert all("lora_" in name for name in names)
    losses = [step(model, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]
    # Its own file holds the adapters as they are used.
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    opened = peft.PeftModel.from_pretrained(Net(is_tied=False), tmp_path)
    x = batches(1)[0][0]
    with torch.no_grad():
        assert torch.equal(opened.eval()(x), model.eval()(x))
        expected = model(x)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
    assert type(merged.tied) is nn.Linear


def test_a_merge_into_an_excited_base_is_seen():
    model = adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    excitation = ws.attach(model, optimizer, "lwe+mwe")
    assert any(name.endswith("tied.base_layer.weight") for name in excitation.named_parameters())
    step(model, optimizer)
    model.merge_adapter()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ws.AttachmentError, match="changed outside"):
        optimizer.step()
    model.unmerge_adapter()
    excitation.adopt()
    step(model, optimizer)
    assert excitation.steps == 2
