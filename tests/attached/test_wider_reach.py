"""What the attached form excites and the converted one cannot: it leaves the layers alone."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from equal_forms import batches, loss_of, plain_step
from torch import nn

import we_surgery as ws


class Packed(nn.Sequential):
    """A container with a weight of its own, which it uses as a linear layer's."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.table = nn.Parameter(torch.randn(5, 8) * 0.3)

    def forward(self, x):
        return F.linear(super().forward(x), self.table)


class Named(nn.Conv2d):
    """Has an attribute of the name that a raw weight takes when converted."""

    def __init__(self) -> None:
        super().__init__(3, 5, 3)
        self.raw_weight = "this is ours"

    def forward(self, x):
        return super().forward(x).mean((2, 3))


MODELS = {"container": (Packed, "table"), "name": (Named, "weight")}


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_what_the_converted_form_leaves_alone_is_excited(case):
    make, name = case
    model = make()
    x = batches(1)[0][0]
    config = {"mode": "lwe", "linear": "lwe+mwe"}
    rows = {
        row.module + row.parameter: row
        for row in ws.plan(model, config=config, example_inputs=x).decisions
    }
    assert not rows[name].excitation
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    excitation = ws.attach(model, optimizer, config=config, example_inputs=x)
    raw = excitation.named_parameters()[name]
    before = raw.detach().clone()
    losses = [plain_step(optimizer, model, batches(1)[0], 0) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert not torch.equal(raw, before)
    assert not torch.equal(raw, model.get_parameter(name))
    with pytest.raises(ws.InputError, match="there is no converted form of layer"):
        excitation.converted()
    with pytest.raises(ws.InputError, match="the plan excites layer"):
        ws.convert(make(), plan=excitation.plan)


class Columns(nn.Module):
    """Multiplies as ``x @ W``."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.randn(3 * 64, 8) * 0.1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(F.relu(x.flatten(1) @ self.hidden))


class Rows(Columns):
    """The same with filters first."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Parameter(self.hidden.detach().t().contiguous())

    def forward(self, x):
        return self.head(F.relu(F.linear(x.flatten(1), self.hidden)))


def test_columns_are_excited_as_the_rows_of_a_linear_layer():
    found = []
    for make in (Columns, Rows):
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        config = {"mode": "lwe", "linear": "lwe+mwe"}
        torch.manual_seed(1)
        x = batches(1)[0][0]
        excitation = ws.attach(model, optimizer, config=config, example_inputs=x)
        assert "hidden:lwe.fc1.weight" in excitation.named_parameters()
        found.append([plain_step(optimizer, model, batch, 0) for batch in batches(4)])
        hidden = model.hidden.detach()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert hidden.shape == (8, 3 * 64)


def test_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")

    def started(seed):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 40, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
        config = transformers.GPT2Config(
            **sizes, bos_token_id=1, eos_token_id=1, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
        )
        model = transformers.GPT2LMHeadModel(config)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        inputs = {"input_ids": words, "labels": words}
        excitation = ws.attach(model, optimizer, "mwe", example_inputs=inputs)
        return model, optimizer, excitation

    def trained(model, optimizer, steps):
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(input_ids=words, labels=words).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    words = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(3))
    model, optimizer, excitation = started(0)
    raws = [name.rpartition("h.0.")[2] for name in excitation.named_parameters()]
    assert raws == [
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    ]
    trained(model, optimizer, 2)
    model.save_pretrained(tmp_path)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    opened = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(opened(words).logits, model(words).logits)
    rest = trained(model, optimizer, 2)
    model, optimizer, _ = started(9)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert trained(model, optimizer, 2) == rest


def quantizable():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def test_quantization_aware_training_to_int8():
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qat_qconfig_mapping

    x = batches(1)[0][0]
    engine = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = get_default_qat_qconfig_mapping(engine if engine != "none" else "x86")
        model = quantize_fx.prepare_qat_fx(quantizable().train(), mapping, (x,))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    excitation = ws.attach(model, optimizer, "lwe+mwe")
    assert len(excitation.plan.excited) == 3
    losses = [plain_step(optimizer, model, batches(1)[0], 0) for _ in range(6)]
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        expected = model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            deployed = quantize_fx.convert_fx(copy.deepcopy(model))
        got = deployed(x)
    assert any("quantized" in type(module).__module__ for module in deployed.modules())
    assert (got - expected).abs().max() < 0.25 * expected.abs().max()
    assert loss_of(deployed, batches(1)[0]) < losses[0]


def with_torchscript(compiled):
    torch.manual_seed(0)
    inner = nn.Sequential(
        *(nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop it
        inner = torch.jit.script(inner) if compiled else inner
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), inner)


@pytest.mark.parametrize("inputs", [None, batches(1)[0][0]], ids=["symbolic", "recorded"])
def test_torchscript_within_a_model_trains_as_the_eager_layers(inputs):
    config = {"conv": "lwe", "linear": "lwe+mwe", "standardize": "off"}
    found = []
    for compiled in (False, True):
        model = with_torchscript(compiled)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        torch.manual_seed(1)
        excitation = ws.attach(model, optimizer, config=config, example_inputs=inputs)
        assert len(excitation.plan.excited) == 3
        found.append([plain_step(optimizer, model, batch, 0) for batch in batches(4)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    with pytest.raises(ws.InputError, match=r"'2.0', which is TorchScript"):
        excitation.converted()


def test_a_traced_conv_is_left_alone_with_the_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = torch.jit.trace(nn.Sequential(nn.Conv2d(8, 8, 3)).eval(), torch.randn(2, 8, 6, 6))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), inner)
    excitation = ws.attach(model, torch.optim.SGD(model.parameters(), 0.1))
    reasons = {row.layer: row.reason for row in excitation.plan.decisions}
    assert "does not say how many groups" in reasons["1.0"]
