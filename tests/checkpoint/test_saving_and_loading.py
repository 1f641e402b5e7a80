import copy
import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

import we_surgery as ws
from we_surgery.checkpoint import (
    Architecture,
    Metadata,
    load,
    model_from,
    read,
    save,
    write,
)
from we_surgery.checkpoint.unwrap import VERSIONS
from we_surgery.converted.layer import excited_layers
from we_surgery.converted.state import PLAN_ATTRIBUTE
from we_surgery.errors import InputError

EVERYTHING = {"mode": "lwe+mwe", "depthwise": "mwe", "linear": "lwe+mwe"}

FACTORIES = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.second(self.first(x)) * self.scale

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.attention(x, x, x)[0])

def transposed():
    return nn.Sequential(
        nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 6, 3, groups=2)
    )

def layer():
    return nn.Conv2d(6, 8, 3)

def shared():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer)
"""

CASES = {
    "timm:test_efficientnet": (1, 3, 64, 64),
    "timm:test_vit": (1, 3, 160, 160),
    "timm:test_nfnet": (1, 3, 64, 64),
    "saved_nets:Tied": (2, 6),
    "saved_nets:Attention": (2, 3, 6),
    "saved_nets:transposed": (2, 6, 8, 8),
    "saved_nets:layer": (2, 6, 8, 8),
    "saved_nets:shared": (2, 6),
}


@pytest.fixture(autouse=True)
def _saved_nets(tmp_path, monkeypatch):
    (tmp_path / "saved_nets.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("saved_nets", None)


def converted(architecture, dtype=torch.float32):
    model = ws.convert(Architecture.parse(architecture).build().to(dtype), config=EVERYTHING)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return model.eval()


def assert_same_model(found, expected, shape):
    states = found.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for key, value in states[1].items():
        assert states[0][key].dtype == value.dtype, key
        assert torch.equal(states[0][key], value), key
    assert [type(m) for m in found.modules()] == [type(m) for m in expected.modules()]
    dtype = next(expected.parameters()).dtype
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        assert torch.equal(found.eval()(x), expected.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["module", "state_dict", "safetensors"])
@pytest.mark.parametrize("name", CASES)
def test_a_converted_model_comes_back_with_bit_equal_outputs(name, kind, dtype, tmp_path):
    model = converted(name, dtype)
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    save(model, path, architecture=None if kind == "module" else name)
    found = load(path, allow=["saved_nets"])
    assert read(path, allow=["saved_nets"]).kind == kind
    assert_same_model(found, model, CASES[name])
    assert found.__dict__[PLAN_ATTRIBUTE] == model.__dict__[PLAN_ATTRIBUTE]
    stripped = ws.strip(found)
    for key, value in ws.strip(model).state_dict().items():
        assert torch.equal(stripped.state_dict()[key], value)


@pytest.mark.parametrize("kind", ["module", "state_dict", "safetensors"])
@pytest.mark.parametrize("name", ["timm:test_vit", "saved_nets:Tied", "torchvision:mnasnet0_5"])
def test_a_vanilla_model_comes_back_too(name, kind, tmp_path):
    model = Architecture.parse(name).build().eval()
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    save(model, path, architecture=None if kind == "module" else name)
    found = load(path, allow=["saved_nets"])
    assert_same_model(found, model, CASES.get(name, (1, 3, 32, 32)))
    assert next(excited_layers(found), None) is None


def test_tied_layers_share_parameter_and_excitation_again(tmp_path):
    model = converted("saved_nets:Tied")
    for path in (tmp_path / "m.pt", tmp_path / "m.safetensors"):
        save(model, path, architecture="saved_nets:Tied")
        found = load(path, architecture="saved_nets:Tied")
        assert found.first.raw_weight is found.second.raw_weight
        assert found.first.excitation is found.second.excitation


def test_it_can_be_trained_without_changing_what_was_read(tmp_path):
    model = converted("saved_nets:layer")
    save(model, tmp_path / "m.pt", architecture="saved_nets:layer")
    contents = read(tmp_path / "m.pt")
    before = copy.deepcopy(contents.state_dict)
    found = model_from(contents, architecture="saved_nets:layer")
    assert all(parameter.requires_grad for parameter in found.parameters())
    optimizer = torch.optim.SGD(found.parameters(), lr=0.1)
    found(torch.randn(CASES["saved_nets:layer"])).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(contents.state_dict[key], before[key]) for key in before)
    assert not torch.equal(found.raw_weight, before["raw_weight"])


def test_memory_formats_come_back(tmp_path):
    model = converted("saved_nets:transposed").to(memory_format=torch.channels_last)
    save(model, tmp_path / "m.pt", architecture="saved_nets:transposed")
    found = load(tmp_path / "m.pt", architecture="saved_nets:transposed")
    assert found[0].raw_weight.stride() == model[0].raw_weight.stride()
    assert_same_model(found, model, CASES["saved_nets:transposed"])


def test_buffers_outside_the_file_follow_the_dtype(tmp_path):
    model = converted("saved_nets:Tied", torch.float64)
    save(model, tmp_path / "m.pt", architecture="saved_nets:Tied")
    assert load(tmp_path / "m.pt", architecture="saved_nets:Tied").scale.dtype == torch.float64


def test_mixed_dtypes_come_back_each(tmp_path):
    model = converted("saved_nets:transposed").bfloat16()
    model[1].float()
    save(model, tmp_path / "m.pt", architecture="saved_nets:transposed")
    found = load(tmp_path / "m.pt", architecture="saved_nets:transposed")
    for key, value in model.state_dict().items():
        assert found.state_dict()[key].dtype == value.dtype, key


def test_an_index_that_was_cast_with_the_weights_stays_an_index(tmp_path):
    model = torchvision.models.mobilenet_v3_small()
    state = {key: value.half() for key, value in model.state_dict().items()}
    write(state, tmp_path / "half.pt", "state_dict")
    found = load(tmp_path / "half.pt", architecture="torchvision:mobilenet_v3_small")
    assert found.features[0][1].num_batches_tracked.dtype == torch.int64
    assert found.features[0][0].weight.dtype == torch.float16


def test_loading_leaves_the_random_numbers_as_they_were(tmp_path):
    save(converted("timm:test_vit"), tmp_path / "m.pt", architecture="timm:test_vit")
    torch.manual_seed(5)
    load(tmp_path / "m.pt")
    found = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(found, torch.rand(1))


def test_the_extension_and_the_architecture_decide_on_the_kind(tmp_path):
    model = converted("saved_nets:layer")
    save(model, tmp_path / "a.safetensors")
    save(model, tmp_path / "b.pth")
    save(model, tmp_path / "c.pth", architecture="saved_nets:layer")
    kinds = {name: read(tmp_path / name).kind for name in ("a.safetensors", "b.pth", "c.pth")}
    assert kinds == {"a.safetensors": "safetensors", "b.pth": "module", "c.pth": "state_dict"}


def test_weights_without_an_architecture_ask_for_one(tmp_path):
    save(converted("saved_nets:layer"), tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="does not name their architecture") as caught:
        load(tmp_path / "m.safetensors")
    assert "--arch" in caught.value.cure


def test_the_callers_architecture_comes_before_the_files(tmp_path):
    model = Architecture.parse("timm:test_vit", {"num_classes": 3}).build()
    metadata = Metadata(architecture=Architecture("timm:test_vit"))
    write(model.state_dict(), tmp_path / "m.pt", "state_dict", metadata=metadata)
    with pytest.raises(InputError, match="does not fit timm:test_vit"):
        load(tmp_path / "m.pt")
    found = load(tmp_path / "m.pt", architecture=Architecture("timm:test_vit", {"num_classes": 3}))
    assert found.num_classes == 3


def test_a_file_imports_no_factory_by_its_own_word(tmp_path):
    save(converted("saved_nets:layer"), tmp_path / "m.pt", architecture="saved_nets:layer")
    sys.modules.pop("saved_nets")
    with pytest.raises(InputError, match="code to import"):
        load(tmp_path / "m.pt")
    # Nor does it where its word is handed back as the caller's.
    said = read(tmp_path / "m.pt").metadata.architecture
    with pytest.raises(InputError, match="code to import"):
        load(tmp_path / "m.pt", architecture=said)
    assert "saved_nets" not in sys.modules


def test_a_trainers_checkpoint_loads_with_a_key_and_an_architecture(tmp_path):
    model, averaged = converted("timm:test_vit"), converted("timm:test_vit")
    checkpoint = {
        "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()},
        "state_dict_ema": averaged.state_dict(),
        "epoch": 3,
    }
    torch.save(checkpoint, tmp_path / "last.pth")
    found = load(tmp_path / "last.pth", architecture="timm:test_vit")
    assert_same_model(found, model, CASES["timm:test_vit"])
    found = load(tmp_path / "last.pth", architecture="timm:test_vit", key="state_dict_ema")
    assert_same_model(found, averaged, CASES["timm:test_vit"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("0.bias"), "lacks 1 such as '0.bias'"),
        (lambda state: state.update(extra=torch.ones(1)), "1 more such as 'extra'"),
        (lambda state: state.update({"0.bias": torch.ones(3)}), r"'0.bias' \(3,\) against \(8,\)"),
        (lambda state: state.update({"0.raw_weight": torch.ones(3, 3)}), "another shape"),
        (
            lambda state: state.update(
                {key.replace("0.", "7.", 1): state.pop(key) for key in list(state) if key[0] == "0"}
            ),
            "no such weight",
        ),
    ],
)
def test_weights_that_do_not_fit_say_where(change, message, tmp_path):
    state = dict(converted("saved_nets:transposed").state_dict())
    change(state)
    write(state, tmp_path / "m.safetensors", "safetensors")
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / "m.safetensors", architecture="saved_nets:transposed")
    assert "num_classes" in caught.value.cure


def test_one_parameter_with_two_values_in_the_file_is_refused(tmp_path):
    state = dict(converted("saved_nets:Tied").state_dict())
    state["second.raw_weight"] = state["second.raw_weight"] + 1
    write(state, tmp_path / "m.safetensors", "safetensors")
    with pytest.raises(InputError, match="one Parameter"):
        load(tmp_path / "m.safetensors", architecture="saved_nets:Tied")


def test_wrapped_models_are_not_saved(tmp_path):
    for wrapped in (nn.DataParallel(nn.Linear(2, 2)), torch.compile(nn.Linear(2, 2))):
        with pytest.raises(InputError, match="wrapped"):
            save(wrapped, tmp_path / "m.pt")
    assert not list(tmp_path.glob("m.pt"))


def test_a_stripped_file_loads_into_the_vanilla_architecture_by_torch_alone(tmp_path):
    cases = {"torchvision:mnasnet0_5": (1, 3, 32, 32), "timm:test_nfnet": (1, 3, 64, 64)}
    for name, shape in cases.items():
        model = converted(name)
        state = ws.strip(model).state_dict()
        write(state, tmp_path / "stripped.pt", "state_dict", force=True)
        vanilla = Architecture.parse(name).build()
        found = torch.load(tmp_path / "stripped.pt", weights_only=True)
        assert getattr(found, VERSIONS) == getattr(state, VERSIONS)
        vanilla.load_state_dict(found)
        x = torch.randn(shape)
        with torch.no_grad():
            assert torch.equal(vanilla.eval()(x), ws.strip(model).eval()(x))


def test_timm_models_load_what_was_saved_for_them(tmp_path):
    model = timm.create_model("test_vit", num_classes=4)
    save(ws.strip(ws.convert(model)), tmp_path / "m.safetensors")
    again = timm.create_model(
        "test_vit", num_classes=4, checkpoint_path=str(tmp_path / "m.safetensors")
    )
    assert again.num_classes == 4
