"""Attacks through classes that a file may name: what it sets on them may run nothing."""

from __future__ import annotations

import argparse
import copyreg
import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.layers
import timm.models
import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms import v2

import we_surgery as ws
from we_surgery.checkpoint import read
from we_surgery.errors import InputError

# What torch.fx writes into a program for a submodule of this name runs it.
INJECTION = 'training"), exec("from os import mkdir; mkdir(\'canary\')"), getattr(self, "training'


def with_module(name: str, model: nn.Module | None = None) -> nn.Module:
    """A chain whose middle, a fixed depthwise conv, makes the reading look for a shift."""
    model = model or nn.Sequential()
    fixed = nn.Conv2d(8, 8, 3, padding=1, groups=8).requires_grad_(False)
    model._modules |= {"norm": nn.BatchNorm2d(8), name: fixed, "conv": nn.Conv2d(8, 8, 1)}
    return model


def with_attribute(name: str, value: Any, model: nn.Module | None = None) -> nn.Module:
    model = model or nn.Linear(2, 2)
    model.__dict__[name] = value
    return model


def with_tensor(name: str, value: Any) -> nn.Module:
    model = nn.Linear(2, 2)
    setattr(model.bias, name, value)
    return model


def with_table(table: str, name: Any, value: Any) -> nn.Module:
    model = nn.Linear(2, 2)
    model.__dict__[table][name] = value
    return model


def with_plain(name: str, record: Any) -> Any:
    """An object that is no module, with an attribute that copying it would call."""
    record.__dict__[name] = nn.Identity
    return record


RECORDS: dict[str, Callable[[], Any]] = {
    "namespace": argparse.Namespace,
    "record": lambda: torchvision.models.detection._utils.BoxCoder((1.0, 1.0, 1.0, 1.0)),
    "partial": lambda: functools.partial(nn.BatchNorm2d, 3),
    "dictionary": OrderedDict,
}


class TensorWithHook:
    def __reduce__(self) -> Any:
        storage = torch.ones(2)._typed_storage()
        hooks = OrderedDict({0: nn.Identity()})
        return torch._utils._rebuild_tensor_v2, (storage, 0, (2,), (1,), True, hooks)


class TensorWithState:
    """A parameter whose state sets attributes that torch keeps beside its `__dict__`."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        storage = torch.ones(2)._typed_storage()
        plain = (storage, 0, (2,), (1,), True, OrderedDict())
        made = (torch._utils._rebuild_tensor_v2, Tensor, plain, self.state)
        return torch._tensor._rebuild_from_type_v2, made


def cycle(length: int) -> nn.Module:
    links = [nn.Sequential() for _ in range(length)]
    for index, link in enumerate(links):
        link._modules["next"] = links[(index + 1) % length]
    return links[0]


def emptied(*tables: str) -> nn.Module:
    model = nn.Linear(2, 2)
    for table in tables:
        del model.__dict__[table]
    return model


def fake_method(name: str) -> nn.Module:
    return with_attribute(name, nn.Identity())


HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]
FAKED = (
    "forward state_dict load_state_dict _load_from_state_dict _save_to_state_dict train eval apply "
    "named_modules named_parameters parameters modules children to _apply _get_name extra_repr "
    "get_extra_state register_forward_hook get_submodule zero_grad _call_impl requires_grad_"
).split()
SPECIAL = "__reduce_ex__ __reduce__ __deepcopy__ __copy__ __getstate__ __call__ __class__ __iter__"

ATTACKS: dict[str, tuple[Callable[[], Any], str]] = {
    "code in a submodule's name": (lambda: with_module(INJECTION), "attribute called"),
    "a quote in a name": (lambda: with_module('a"b'), "attribute called"),
    "an escape in a name": (lambda: with_module("a\x1b[2Jb"), "attribute called"),
    "a newline in a name": (lambda: with_module("a\nb"), "attribute called"),
    "a number for a name": (lambda: with_table("_modules", 3, nn.Identity()), "attribute called"),
    "no name": (lambda: with_table("_modules", "", nn.Identity()), "attribute called"),
    "a tuple for a parameter's name": (
        lambda: with_table("_parameters", ("a",), nn.Parameter(torch.ones(1))),
        "attribute called",
    ),
    "a module as a parameter": (
        lambda: with_table("_parameters", "weight", nn.Identity()),
        "is of type Identity",
    ),
    "a number as a buffer": (lambda: with_table("_buffers", "count", 3), "is of type int"),
    "a layer class as a submodule": (
        lambda: with_table("_modules", "layer", nn.Identity),
        "is of type type",
    ),
    "a partial as a submodule": (
        lambda: with_table("_modules", "layer", functools.partial(nn.Linear, 2)),
        "is of type partial",
    ),
    "no submodules": (lambda: emptied("_modules"), "never initialized"),
    "nothing at all": (lambda: emptied("_modules", "_parameters", "_buffers"), "never initialized"),
    "itself": (lambda: cycle(1), "contains itself"),
    "a ring of three": (lambda: cycle(3), "contains itself"),
    "a ring below": (lambda: nn.Sequential(nn.Linear(2, 2), cycle(2)), "contains itself"),
    "a model class to call": (
        lambda: with_attribute("activation", torchvision.models.ResNet),
        "ResNet .a callable that is not a layer",
    ),
    "a model class in a list": (
        lambda: with_attribute("blocks", [timm.models.VisionTransformer]),
        "VisionTransformer .a callable that is not a layer",
    ),
    "a tracer's class": (
        lambda: with_attribute("activation", timm.models.GraphExtractNet),
        "GraphExtractNet .a callable that is not a layer",
    ),
    "a model class in a transform": (
        lambda: v2.Lambda(timm.models.VisionTransformer, Tensor),
        "VisionTransformer .a callable that is not a layer",
    ),
    "a class in a partial's arguments": (
        lambda: with_attribute(
            "layer", functools.partial(timm.layers.ConvNormAct, norm_layer=torchvision.models.VGG)
        ),
        "VGG .a callable that is not a layer",
    ),
    "a lazy layer that becomes a model": (
        lambda: with_attribute("cls_to_become", torchvision.models.ResNet),
        "ResNet .a callable that is not a layer",
    ),
    "a module's name of its own": (
        lambda: with_attribute("__module__", "os"),
        "attribute called '__module__'",
    ),
    "a hook of a tensor": (lambda: with_attribute("table", TensorWithHook()), "hooks"),
    **{
        f"{name} of a tensor": (
            lambda name=name: with_attribute("t", TensorWithState(**{name: {0: nn.Identity()}})),
            "a tensor has hooks",
        )
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
    },
    "hooks that say they are empty": (
        lambda: with_attribute("_forward_hooks", nn.ModuleDict()),
        "has _forward_hooks",
    ),
    "hooks of a tensor that say they are empty": (
        lambda: with_attribute("t", TensorWithState(_backward_hooks=nn.ModuleDict())),
        "a tensor has hooks",
    ),
    "hooks of a gradient": (
        lambda: with_attribute("t", TensorWithState(grad=TensorWithHook())),
        "a tensor has hooks",
    ),
    "billions of values as data": (
        lambda: with_attribute("t", TensorWithState(data=torch.zeros(1).expand(1 << 40))),
        "repeats the 1 values",
    ),
    "what torch calls in place of a module": (
        lambda: Built(nn.Identity, vars(nn.Identity()) | {"_compiled_call_impl": nn.Identity()}),
        "'_compiled_call_impl'.* hides the method",
    ),
    "numel of a tensor": (lambda: with_tensor("numel", nn.Identity()), "'numel' of a tensor"),
    "__deepcopy__ of a tensor": (
        lambda: with_tensor("__torch_function__x__", nn.Identity()),
        "attribute called",
    ),
    **{
        f"__deepcopy__ of a {kind}": (
            lambda make=make: with_plain("__deepcopy__", make()),
            "attribute called '__deepcopy__'",
        )
        for kind, make in RECORDS.items()
    },
    "decode of a record": (lambda: with_plain("decode", RECORDS["record"]()), "hides the method"),
    "copy of a dictionary": (lambda: with_plain("copy", OrderedDict(a=1)), "hides the method"),
    "billions of values in one": (
        lambda: with_attribute("table", torch.zeros(1).expand(1 << 40)),
        "repeats the 1 values",
    ),
    **{
        f"{name} hidden": ((lambda name=name: fake_method(name)), f"'{name}'.* hides the method")
        for name in FAKED
    },
    **{
        f"{name} hidden": ((lambda name=name: fake_method(name)), "attribute called")
        for name in SPECIAL.split()
        if name not in ("__reduce_ex__", "__reduce__", "__getstate__", "__class__")
    },
    **{
        f"{name} with a module": (
            (lambda name=name: with_attribute(name, OrderedDict({0: nn.Identity()}))),
            f"has {name}",
        )
        for name in HOOKS
    },
    **{
        f"{name} with a partial": (
            (lambda name=name: with_attribute(name, {0: functools.partial(nn.Linear, 2)})),
            f"has {name}",
        )
        for name in HOOKS
    },
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_module_that_no_class_builds_is_refused(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, cause = ATTACKS[attack]
    torch.save(make(), "attack.pt")
    with pytest.raises(InputError, match=cause):
        read("attack.pt")
    # Nor does it pass as part of a checkpoint, or in what only hangs on a layer.
    layer = with_attribute("deep", [{"er": (make(),)}])
    torch.save({"state_dict": layer.state_dict(), "extra": layer}, "attack.pt")
    with pytest.raises(InputError, match=cause):
        read("attack.pt")
    assert not Path("canary").exists()


def test_what_is_refused_opens_when_it_is_trusted(tmp_path: Path) -> None:
    torch.save(fake_method("forward"), tmp_path / "own.pt")
    with pytest.raises(InputError, match="--trust"):
        read(tmp_path / "own.pt")
    assert read(tmp_path / "own.pt", trust=True).kind == "module"


@pytest.mark.parametrize("inputs", [None, (1, 8, 6, 6)])
@pytest.mark.parametrize("mode", ["we", "lwe+mwe"])
def test_reading_a_model_in_memory_runs_no_code_in_its_names(
    inputs: tuple[int, ...] | None,
    mode: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = with_module(INJECTION)
    x = None if inputs is None else torch.randn(inputs)
    converted = ws.convert(model, mode, example_inputs=x)
    ws.strip(converted, example_inputs=x)
    assert not Path("canary").exists()


def test_the_name_does_run_where_torch_writes_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    traced = torch.fx.symbolic_trace(with_module(INJECTION))
    with pytest.raises(TypeError):
        traced(torch.randn(1, 8, 6, 6))
    assert Path("canary").exists()


class Built:
    """Pickles as a new object of a class with a state, whatever that class makes of it."""

    def __init__(self, kind: type, state: Any) -> None:
        self.kind, self.state = kind, state

    @property
    def __class__(self) -> type:
        return self.kind

    def __reduce_ex__(self, protocol: int) -> Any:
        return copyreg.__newobj__, (self.kind,), self.state


def test_a_recurrent_layer_looks_up_what_its_state_says_and_calls_nothing(tmp_path: Path) -> None:
    """Its __setstate__ gets attributes by names that stand in the state."""
    state = nn.LSTM(2, 2).__getstate__()
    state |= {"_all_weights": [["all_weights", "train"]], "_flat_weights_names": ["train"]}
    torch.save(Built(nn.LSTM, state), tmp_path / "rnn.pt")
    found = read(tmp_path / "rnn.pt").model
    assert type(found) is nn.LSTM
    assert found.training


@pytest.mark.parametrize(
    "state", [None, {}, [], "text", 3, {"a": 1}, ({}, {}), ({}, {"training": nn.Identity}), {3: 4}]
)
@pytest.mark.parametrize("kind", [nn.Linear, nn.LSTM, nn.MultiheadAttention, nn.Softmax])
def test_any_state_for_a_class_is_an_input_error(kind: type, state: Any, tmp_path: Path) -> None:
    torch.save(Built(kind, state), tmp_path / "model.pt")
    with pytest.raises(InputError):
        read(tmp_path / "model.pt")


@pytest.mark.parametrize("value", ["detect", 3, 0.5, True, None])
def test_plain_values_hide_no_method_of_a_module(value: Any, tmp_path: Path) -> None:
    """As Ultralytics keeps a layer's type under `type`, which casts a module."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].type = value
    model[0].bias.half = value
    torch.save(model, tmp_path / "model.pt")
    found = read(tmp_path / "model.pt").model
    assert found[0].type == value
    assert torch.equal(found[0].weight, model[0].weight)


# "volatile" does nothing any more, and "__dict__" is what ordinary attributes are set in.
DESCRIPTORS = [
    name
    for owner in Tensor.__mro__
    for name, value in vars(owner).items()
    if isinstance(value, types.GetSetDescriptorType | property)
    and name not in ("volatile", "__dict__")
]


@pytest.mark.parametrize("value", [nn.Identity(), {0: nn.Identity()}, OrderedDict(a=nn.Identity())])
def test_no_state_of_a_tensor_holds_what_torch_would_call(value: Any, tmp_path: Path) -> None:
    passed = []
    for name in DESCRIPTORS:
        torch.save({"w": torch.ones(2), "t": TensorWithState(**{name: value})}, tmp_path / "t.pt")
        try:
            read(tmp_path / "t.pt")
        except InputError:
            continue
        passed.append(name)
    assert passed == []


def test_layer_classes_and_partials_of_them_stay_plain_data(tmp_path: Path) -> None:
    model = torchvision.models.swin_t()
    model.norm_layer = nn.BatchNorm2d
    torch.save(model, tmp_path / "model.pt")
    assert read(tmp_path / "model.pt").model.norm_layer is nn.BatchNorm2d


@pytest.mark.parametrize("kind", RECORDS)
def test_plain_attributes_of_plain_objects_stay(kind: str, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.held = RECORDS[kind]()
    model.held.__dict__ |= {"note": "mine", "_metadata": {}}
    model.function = torchvision.ops.boxes.box_iou
    model.format = timm.layers.format.Format.NHWC
    torch.save(model, tmp_path / "model.pt")
    found = read(tmp_path / "model.pt").model
    assert found.held.note == "mine"
    assert found.format is timm.layers.format.Format.NHWC
