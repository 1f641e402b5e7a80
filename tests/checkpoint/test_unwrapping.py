import argparse
import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from we_surgery.checkpoint import read
from we_surgery.checkpoint.unwrap import VERSIONS, unwrap
from we_surgery.errors import InputError


def net():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def assert_is(state, expected):
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value)


@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema", "model_ema", "ema"])
def test_a_state_dict_is_found_under_each_usual_key(key):
    expected = net().state_dict()
    state, notes = unwrap({"epoch": 3, key: expected, "optimizer": {"state": {}}})
    assert_is(state, expected)
    assert notes[0] == f"used {key!r}"
    assert notes[1] == "dropped 'epoch' (int), 'optimizer' (dict)"


def test_the_trained_weights_come_before_the_averaged_ones_and_a_note_says_so():
    trained, averaged = net().state_dict(), net().state_dict()
    checkpoint = {"state_dict_ema": averaged, "state_dict": trained}
    state, notes = unwrap(checkpoint)
    assert_is(state, trained)
    assert any("EMA weights under 'state_dict_ema' were not used" in note for note in notes)
    assert_is(unwrap(checkpoint, key="state_dict_ema")[0], averaged)


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema", "ema", "net_ema", "EMAModel"])
def test_the_average_is_never_taken_for_the_trained_weights(average):
    trained, averaged = net().state_dict(), net().state_dict()
    checkpoint = {"net": trained, average: averaged, "epoch": 1}
    assert_is(unwrap(checkpoint, weights="raw")[0], trained)
    with pytest.raises(InputError, match=f"no trained weights, only those under '{average}'"):
        unwrap({average: averaged, "epoch": 1}, weights="raw")
    with pytest.raises(InputError, match="several state dicts: 'net', 'critic'"):
        unwrap({**checkpoint, "critic": trained}, weights="raw")


def mmengine_checkpoint(trained, averaged):
    """As mmengine's EMAHook saves it: the values of the two state dicts exchanged."""
    beside = {"steps": torch.tensor(3), **{f"module.{key}": v for key, v in trained.items()}}
    return {"meta": {"epoch": 3}, "state_dict": dict(averaged), "ema_state_dict": beside}


def test_what_mmengine_exchanged_is_told_apart():
    trained, averaged = net().state_dict(), net().state_dict()
    checkpoint = mmengine_checkpoint(trained, averaged)
    assert_is(unwrap(checkpoint, weights="raw")[0], trained)
    assert_is(unwrap(checkpoint, weights="ema")[0], averaged)
    assert_is(unwrap(checkpoint, key="ema_state_dict")[0], trained)
    state, notes = unwrap(checkpoint)
    assert_is(state, averaged)
    assert any("under 'state_dict' are the average" in note for note in notes)
    assert any(note.startswith("weights under 'ema_state_dict' were not used") for note in notes)


@pytest.mark.parametrize("name", ["ema_state_dict", "ema_model", "net_ema"])
def test_an_average_under_a_name_that_says_so_is_the_average(name):
    trained, averaged = net().state_dict(), net().state_dict()
    checkpoint = {"state_dict": trained, name: averaged, "epoch": 3}
    assert_is(unwrap(checkpoint, weights="raw")[0], trained)
    assert_is(unwrap(checkpoint, weights="ema")[0], averaged)


def test_the_average_of_ema_pytorch_is_read_without_the_model_beside_it():
    trained, averaged = net().state_dict(), net().state_dict()
    ema = {f"online_model.{key}": value for key, value in trained.items()}
    ema |= {f"ema_model.{key}": value for key, value in averaged.items()}
    ema |= {"initted": torch.tensor(True), "step": torch.tensor(3)}
    checkpoint = {"model": trained, "ema": ema}
    assert_is(unwrap(checkpoint, weights="raw")[0], trained)
    assert_is(unwrap(checkpoint, weights="ema")[0], averaged)
    assert_is(
        unwrap({"steps": torch.ones(1), "a.weight": torch.ones(1)})[0],
        {"steps": torch.ones(1), "a.weight": torch.ones(1)},
    )


@pytest.mark.parametrize("place", ["model", "train"])
def test_nor_is_one_that_lies_alone_in_another_mapping(place):
    checkpoint = {place: {"ema": net().state_dict(), "decay": 0.9}}
    with pytest.raises(InputError, match="no trained weights"):
        unwrap(checkpoint, weights="raw")
    trained = net().state_dict()
    assert_is(unwrap({**checkpoint, "net": trained}, weights="raw")[0], trained)


def test_an_empty_place_is_passed_over_for_the_next_usual_one():
    trained, averaged = net().state_dict(), net().state_dict()
    checkpoint = {"state_dict": None, "model": trained, "model_ema": None, "ema": averaged}
    assert_is(unwrap(checkpoint)[0], trained)
    assert_is(unwrap(checkpoint, weights="raw")[0], trained)
    assert_is(unwrap(checkpoint, weights="ema")[0], averaged)


@pytest.mark.parametrize("options", [{"weights": "ema"}, {"key": "ema"}])
def test_the_key_that_an_error_names_is_one_that_works(options):
    averaged = net().state_dict()
    checkpoint = {"model": net().state_dict(), "ema": {"decay": 0.9, "shadow": averaged}}
    with pytest.raises(InputError) as caught:
        unwrap(checkpoint, **options)
    assert "'ema.shadow'" in caught.value.cure
    assert_is(unwrap(checkpoint, key="ema.shadow")[0], averaged)


def test_a_key_may_be_dotted_and_may_hold_dots():
    expected = net().state_dict()
    assert_is(unwrap({"a": {"b": {"c": expected}}}, key="a.b.c")[0], expected)
    assert_is(unwrap({"a.b": {"c": expected}}, key="a.b.c")[0], expected)


def test_an_unknown_key_names_near_ones_and_those_that_can_be_chosen():
    checkpoint = {"state_dict": net().state_dict(), "epoch": 1}
    with pytest.raises(InputError, match="did you mean 'state_dict'") as caught:
        unwrap(checkpoint, key="state_dct")
    assert "'state_dict'" in caught.value.cure
    with pytest.raises(InputError, match=r"no key 'epoch\.x'"):
        unwrap(checkpoint, key="epoch.x")
    with pytest.raises(InputError, match="is int and not a state dict") as caught:
        unwrap(checkpoint, key="epoch")
    assert "'state_dict'" in caught.value.cure


def test_a_module_and_a_nested_mapping_count_as_state_dicts():
    model = net()
    assert_is(unwrap({"model": model, "epoch": 1})[0], model.state_dict())
    assert_is(unwrap({"ema": {"module": model.state_dict(), "decay": 0.99}})[0], model.state_dict())


def test_the_only_state_dict_is_taken_under_any_name_and_of_several_none():
    first, second = net().state_dict(), net().state_dict()
    state, notes = unwrap({"net": first, "acc": 93.1, "epoch": 20})
    assert_is(state, first)
    assert notes[0] == "used 'net'"
    with pytest.raises(InputError, match="several state dicts: 'generator', 'critic'") as caught:
        unwrap({"generator": first, "critic": second})
    assert "--key" in caught.value.cure


@pytest.mark.parametrize(
    "checkpoint",
    [{}, {"epoch": 1}, {"state_dict": {}}, {0: torch.ones(2)}, {"state_dict": {0: torch.ones(1)}}],
)
def test_a_checkpoint_without_a_state_dict_is_refused(checkpoint):
    with pytest.raises(InputError, match="no state dict"):
        unwrap(checkpoint)


@pytest.mark.parametrize("checkpoint", [None, 3, [1], nn.Linear(1, 1)])
def test_what_is_no_mapping_is_refused(checkpoint):
    with pytest.raises(InputError, match="not a mapping"):
        unwrap(checkpoint)


@pytest.mark.parametrize(
    "prefixes",
    [
        ["module"],
        ["_orig_mod"],
        ["module", "_orig_mod"],
        ["_orig_mod", "module"],
        ["module", "_orig_mod", "module"],
        ["_orig_mod", "_orig_mod"],
    ],
)
def test_wrappers_prefixes_come_off_in_any_nesting(prefixes):
    model = net()
    wrapped = model
    for prefix in reversed(prefixes):
        outer = nn.Module()
        outer.add_module(prefix, wrapped)
        wrapped = outer
    state, notes = unwrap({"state_dict": wrapped.state_dict()})
    assert_is(state, model.state_dict())
    assert getattr(state, VERSIONS) == getattr(model.state_dict(), VERSIONS)
    assert any("removed the prefix" in note for note in notes)


def test_a_compiled_part_of_a_model_loses_its_prefix():
    state, _ = unwrap(
        {"backbone._orig_mod.conv.weight": torch.ones(1), "head.weight": torch.ones(1)}
    )
    assert list(state) == ["backbone.conv.weight", "head.weight"]


def test_module_is_a_name_like_any_other_unless_all_have_it():
    state, _ = unwrap({"module.weight": torch.ones(1), "head.weight": torch.ones(1)})
    assert list(state) == ["module.weight", "head.weight"]


def test_an_averaged_model_is_read_as_the_model_it_averages():
    model = net()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    state, notes = unwrap(averaged.state_dict())
    assert_is(state, model.state_dict())
    assert any("n_averaged" in note for note in notes)


def test_two_entries_that_would_get_one_name_are_refused():
    with pytest.raises(InputError, match="one name"):
        unwrap({"a.weight": torch.ones(1), "_orig_mod.a.weight": torch.ones(1)})


def test_what_is_no_tensor_is_dropped_with_a_note():
    state, notes = unwrap(
        {"weight": torch.ones(1), "_extra_state": {"step": 3}, "b": torch.ones(1)}
    )
    assert list(state) == ["weight", "b"]
    assert any("'_extra_state' (dict)" in note for note in notes)


def test_the_input_is_never_changed():
    checkpoint = {"module._orig_mod.weight": torch.ones(1), "module._orig_mod.n": 3}
    before = copy.copy(checkpoint)
    unwrap({"model": checkpoint})
    assert checkpoint == before


def test_a_checkpoint_as_timm_trains_it_is_read_from_its_file(tmp_path):
    model = net()
    checkpoint = {
        "epoch": 4,
        "arch": "resnet18",
        "state_dict": OrderedDict((f"module.{k}", v) for k, v in model.state_dict().items()),
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "version": 2,
        "args": argparse.Namespace(model="resnet18", lr=0.1, betas=(0.9, 0.99)),
        "amp_scaler": {"scale": 65536.0},
        "state_dict_ema": model.state_dict(),
        "metric": 71.2,
    }
    torch.save(checkpoint, tmp_path / "last.pth.tar")
    contents = read(tmp_path / "last.pth.tar")
    assert_is(contents.state_dict, model.state_dict())
    assert contents.kind == "state_dict"
    assert any("'args' (Namespace)" in note for note in contents.notes)
