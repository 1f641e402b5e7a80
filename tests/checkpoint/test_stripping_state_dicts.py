import copy
from collections import OrderedDict

import pytest
import torch
import torchvision
from timm.models.resnetv2 import ResNetV2
from torch import nn

import we_surgery as ws
from we_surgery.checkpoint import (
    is_excited_state_dict,
    strip_state_dict,
    strip_state_dict_with_report,
)
from we_surgery.checkpoint.unwrap import VERSIONS
from we_surgery.errors import InputError, NothingToStripWarning, SurgeryError
from we_surgery.excitations.compute import formulas
from we_surgery.excitations.record import make_record, to_tensor
from we_surgery.jobs.convert import Source
from we_surgery.jobs.inspect import inspect_file

EVERYTHING = {"mode": "lwe+mwe", "depthwise": "mwe", "linear": "lwe+mwe"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


MODELS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=3),
    "mobilenet": lambda: torchvision.models.mobilenet_v3_small(num_classes=3),
    "vit": lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=3),
    "mnasnet": lambda: torchvision.models.mnasnet0_5(num_classes=3),
    "StdConv": lambda: ResNetV2([1], channels=(128,), stem_chs=32, num_classes=3),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv2d(6, 2, 1)),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "attention of other widths": lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
    "tied": Tied,
    "the layer itself": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "bfloat16": lambda: torchvision.models.resnet18(num_classes=3).bfloat16(),
    "float64": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double(),
    "channels last": lambda: nn.Sequential(nn.Conv2d(6, 8, 3), nn.ConvTranspose2d(8, 6, 3)).to(
        memory_format=torch.channels_last
    ),
}


@pytest.fixture(params=MODELS, ids=list(MODELS))
def converted(request):
    model = ws.convert(MODELS[request.param](), config=EVERYTHING)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return model


def test_it_equals_the_stripped_models_state_dict_bit_for_bit(converted):
    expected = ws.strip(converted).state_dict()
    state = strip_state_dict(converted.state_dict())
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert state[key].dtype == value.dtype
        assert state[key].stride() == value.stride(), key
        assert torch.equal(state[key], value), key
    assert getattr(state, VERSIONS) == getattr(expected, VERSIONS)
    assert not is_excited_state_dict(state)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_weights_computed_in_blocks_fold_bit_for_bit_and_leave_the_checkpoint(
    dtype, converted, monkeypatch
):
    monkeypatch.setattr(formulas, "_BLOCK", 100)
    before = copy.deepcopy(converted.state_dict())
    folded, report = strip_state_dict_with_report(converted.state_dict(), dtype=dtype)
    assert report.layers
    for key, value in converted.state_dict().items():
        assert torch.equal(value, before[key]), key
    if dtype is not None and is_half(converted):
        converted.float()
    expected = ws.strip(converted).state_dict()
    for key, value in expected.items():
        rounded = value if dtype is None or not value.is_floating_point() else value.to(dtype)
        assert torch.equal(folded[key], rounded), key


def is_half(model: nn.Module) -> bool:
    return next(model.parameters()).dtype is torch.bfloat16


def test_the_input_is_not_changed_and_not_shared_where_it_is_folded(converted):
    state = converted.state_dict()
    before = copy.deepcopy(state)
    stripped = strip_state_dict(state)
    for value in stripped.values():
        if value.is_floating_point():
            value.requires_grad_(False)
    assert list(state) == list(before)
    assert all(torch.equal(state[key], before[key]) for key in before)
    assert all(
        tensor.untyped_storage().data_ptr() != state[key].untyped_storage().data_ptr()
        for key, tensor in stripped.items()
        if key not in state
        for key in state
        if ".raw_" in f".{key}"
    )


@pytest.mark.parametrize("form", ["plain dict", "Parameters", "wrapped", "prefixed", "reversed"])
def test_the_form_of_the_checkpoint_does_not_matter(form):
    model = ws.convert(torchvision.models.resnet18(num_classes=3)).requires_grad_(False)
    expected = ws.strip(model).state_dict()
    state = dict(model.state_dict())
    if form == "Parameters":
        parameters = dict(model.named_parameters())
        state = {key: parameters.get(key, value) for key, value in state.items()}
    elif form == "wrapped":
        state = {"epoch": 1, "model": {"module": state}}
    elif form == "prefixed":
        state = {f"module._orig_mod.{key}": value for key, value in state.items()}
    elif form == "reversed":
        state = dict(reversed(state.items()))
        expected = OrderedDict(reversed(expected.items()))
    stripped = strip_state_dict(state)
    assert list(stripped) == list(expected)
    assert all(torch.equal(stripped[key], expected[key]) for key in expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_vanilla_model_takes_it_strictly(converted):
    vanilla = ws.strip(converted)
    for parameter in vanilla.parameters():
        nn.init.zeros_(parameter)
    vanilla.load_state_dict(strip_state_dict(converted.state_dict()), strict=True)


def test_tied_weights_fold_once_and_stay_tied():
    model = ws.convert(Tied(), config=EVERYTHING)
    done = []
    state, report = strip_state_dict_with_report(
        model.state_dict(), progress=lambda *counts: done.append(counts)
    )
    assert state["first.weight"].data_ptr() == state["second.weight"].data_ptr()
    assert report.layers == 2
    assert done == [(1, 2), (2, 2)]
    excitations = [key for key in model.state_dict() if ".excitation.lwe." in key]
    assert report.removed_values == sum(model.state_dict()[key].numel() for key in excitations)


def test_equal_weights_that_are_not_tied_stay_apart():
    layer = nn.Linear(4, 4)
    model = ws.convert(nn.Sequential(layer, copy.deepcopy(layer)), mode="mwe")
    state = strip_state_dict(model.state_dict())
    assert state["0.weight"].data_ptr() != state["1.weight"].data_ptr()


def test_what_was_tied_to_a_raw_weight_after_conversion_is_refused():
    model = ws.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), mode="mwe")
    state = model.state_dict()
    state["head.weight"] = state["0.raw_weight"]
    with pytest.raises(SurgeryError, match=r"'head\.weight' was tied"):
        strip_state_dict(state)


def test_a_weight_that_is_not_finite_names_its_layer():
    model = ws.convert(nn.Sequential(nn.Linear(4, 4), nn.Conv2d(2, 2, 3)), mode="mwe")
    with torch.no_grad():
        model[1].raw_weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(SurgeryError, match="layer '1' holds"):
        strip_state_dict(model.state_dict())


def test_a_raw_name_without_excitation_is_somebodys_own():
    own = {"raw_weight": torch.ones(2), "layer.raw_data": torch.ones(1), "weight": torch.ones(2)}
    with pytest.warns(NothingToStripWarning):
        state = strip_state_dict(own)
    assert list(state) == list(own)
    assert not is_excited_state_dict(own)


def test_a_vanilla_state_dict_is_returned_with_a_warning():
    vanilla = torchvision.models.resnet18(num_classes=3).state_dict()
    with pytest.warns(NothingToStripWarning, match="nothing to strip"):
        state = strip_state_dict(vanilla)
    assert list(state) == list(vanilla)
    assert all(state[key] is vanilla[key] for key in vanilla)


def test_an_unknown_excitation_names_its_layer():
    state = {
        "head.raw_weight": torch.ones(2, 2),
        "head.excitation.tomorrow.a": torch.ones(1),
        "head.excitation._extra_state": to_tensor(make_record([{"tomorrow": {}}])),
    }
    with pytest.raises(InputError, match="layer 'head': there is no excitation called 'tomorrow'"):
        strip_state_dict(state)


def test_an_incomplete_excitation_is_an_input_error():
    state = dict(ws.convert(nn.Conv2d(4, 4, 3), mode="lwe").state_dict())
    del state["excitation.lwe.fc1.bias"]
    with pytest.raises(InputError, match="cannot be rebuilt"):
        strip_state_dict(state)


def test_an_excitation_of_another_layers_shape_is_a_surgery_error():
    state = dict(ws.convert(nn.Conv2d(4, 4, 3), mode="lwe").state_dict())
    state["raw_weight"] = torch.ones(4, 7, 3, 3)
    with pytest.raises(SurgeryError, match="cannot be computed"):
        strip_state_dict(state)


def test_a_weight_both_vanilla_and_excited_is_refused():
    state = dict(ws.convert(nn.Conv2d(4, 4, 3), mode="lwe").state_dict())
    state["weight"] = state["raw_weight"].clone()
    with pytest.raises(InputError, match="both 'weight' and its excited form"):
        strip_state_dict(state)


def test_a_sharded_state_dict_is_refused():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            return self

    state = dict(ws.convert(nn.Linear(4, 4), mode="mwe").state_dict())
    state["raw_weight"] = torch.ones(4, 4).as_subclass(Sharded)
    with pytest.raises(InputError, match="sharded"):
        strip_state_dict(state)


def test_the_fold_does_not_depend_on_where_a_file_laid_the_tensors():
    torch.manual_seed(0)
    model = ws.convert(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16)), config=EVERYTHING)
    state = model.state_dict()
    expected = ws.strip(model).state_dict()
    for shift in range(1, 16):
        moved = {key: _laid_elsewhere(value, shift) for key, value in state.items()}
        stripped = strip_state_dict(moved)
        assert all(torch.equal(stripped[key], value) for key, value in expected.items())


def _laid_elsewhere(tensor, shift):
    room = torch.empty(tensor.numel() + shift, dtype=tensor.dtype)
    return room[shift:].view(tensor.shape).copy_(tensor)


def test_the_trained_weights_or_their_average_are_stripped():
    trained, averaged = (ws.convert(MODELS["tied"](), "mwe") for _ in range(2))
    checkpoint = {"state_dict": trained.state_dict(), "state_dict_ema": averaged.state_dict()}
    for weights, model in (("raw", trained), ("ema", averaged)):
        found = strip_state_dict(checkpoint, weights=weights)
        expected = ws.strip(model).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(InputError, match="both the key"):
        strip_state_dict(checkpoint, key="state_dict", weights="ema")


@pytest.mark.parametrize(
    "raw",
    [torch.ones(4, 4).long(), torch.tensor(1.0), torch.ones(4, 4).to_sparse()],
    ids=["integers", "a single number", "sparse"],
)
def test_a_raw_weight_that_is_no_weight_is_refused(raw, tmp_path):
    state = ws.convert(nn.Sequential(nn.Linear(4, 4)), "mwe").state_dict()
    state["0.raw_weight"] = raw
    torch.save(state, tmp_path / "model.pt")
    for use in (
        lambda: strip_state_dict(state),
        lambda: inspect_file(Source(str(tmp_path / "model.pt"))),
    ):
        with pytest.raises(InputError, match="the raw weight of layer '0' is of shape"):
            use()
