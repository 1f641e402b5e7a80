"""Pickles, ``torch.save``, deep copies: an excited layer travels as any other."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from toys import EVERYTHING, ConvNet, is_vanilla

import we_surgery as ws
from we_surgery import converted
from we_surgery.converted.layer import excited_class, excited_layers
from we_surgery.excitations.names import raw_name


class Outer:
    class Inner(nn.Linear):
        """A layer whose class is an attribute of another."""


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convs": ConvNet,
    "attention": lambda: nn.MultiheadAttention(8, 2, kdim=6),
    "same padding": lambda: nn.Sequential(Conv2dSame(3, 4, 3), StdConv2d(4, 4, 3)),
    "nested class": lambda: nn.Sequential(Outer.Inner(4, 3)),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
}
TRAVELS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "old pickle": lambda model, _: pickle.loads(pickle.dumps(model, protocol=2)),
    "torch.save": lambda model, path: (
        torch.save(model, path / "model.pt"),
        torch.load(path / "model.pt", weights_only=False),
    )[1],
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "copy": lambda model, _: copy.copy(model),
}


def assert_same_model(found: nn.Module, expected: nn.Module) -> None:
    assert repr(found) == repr(expected)
    for one, other in zip(found.modules(), expected.modules(), strict=True):
        assert type(one) is type(other)
        assert list(vars(one)) == list(vars(other))
    state = found.state_dict()
    assert list(state) == list(expected.state_dict())
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())


@pytest.mark.parametrize("travel", TRAVELS)
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_travels_with_its_classes_and_values(
    name: str, travel: str, tmp_path: Path
) -> None:
    vanilla = MODELS[name]()
    model = ws.convert(vanilla, config=EVERYTHING)
    arrived = TRAVELS[travel](model, tmp_path)
    assert_same_model(arrived, model)
    assert_same_model(ws.strip(arrived), ws.strip(model))


def test_the_stripped_model_pickles_without_a_word_of_this_package() -> None:
    stripped = ws.strip(ws.convert(ConvNet(), config=EVERYTHING))
    assert b"we_surgery" not in pickle.dumps(stripped)
    assert b"raw_" not in pickle.dumps(stripped)


def test_a_class_made_on_demand_is_found_again_in_a_fresh_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet.r160_in1k", num_classes=3).eval()
    model.conv_stem = Conv2dSame(3, model.conv_stem.out_channels, 3, stride=2, bias=False)
    model.attention = nn.MultiheadAttention(8, 2)
    model = ws.convert(model.eval())
    x = torch.randn(1, 3, 32, 32)
    torch.save((model, x, model(x).detach()), tmp_path / "model.pt")
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "model, x, y = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(model(x), y)\n"
        "print(type(model.conv_stem).__name__, type(model.attention).__name__)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["WEConv2dSame", "WEMultiheadAttention"], done.stderr


def test_a_parameter_with_a_separator_in_its_name_pickles() -> None:
    names = ("a:b", "c%3A", "d/e", "é f")
    made = excited_class(nn.ParameterDict, names)
    assert pickle.loads(pickle.dumps(made)) is made
    assert made is not excited_class(nn.ParameterDict, ("a", "b", *names[1:]))


def test_a_class_that_cannot_be_imported_fails_as_it_does_vanilla() -> None:
    class Local(nn.Linear):
        """Exists in this function alone."""

    model = ws.convert(Local(3, 3))
    with pytest.raises((AttributeError, pickle.PicklingError), match="Local"):
        pickle.dumps(Local(3, 3))
    with pytest.raises((AttributeError, pickle.PicklingError), match="Local"):
        pickle.dumps(model)
    assert type(copy.deepcopy(model)) is type(model)


def test_a_made_class_says_what_it_is_made_of() -> None:
    made = excited_class(Conv2dSame, ("weight",))
    assert made.__module__ == "we_surgery.converted"
    assert getattr(converted, made.__qualname__) is made
    assert Conv2dSame.__name__ in made.__qualname__


def test_an_unknown_attribute_of_the_module_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'WEConv9d'"):
        _ = converted.WEConv9d


@pytest.mark.parametrize("name", MODELS)
def test_a_deepcopy_strips_while_the_original_trains_on(name: str) -> None:
    original = ws.convert(MODELS[name](), config=EVERYTHING)
    before = copy.deepcopy(original.state_dict())
    ema = copy.deepcopy(original)
    stripped = ws.strip(ema, inplace=True)
    assert is_vanilla(stripped)
    assert stripped is ema
    assert not is_vanilla(original)
    state = original.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[key], value) for key, value in before.items())
    for _, layer in excited_layers(original):
        for parameter in layer.excited_parameters:
            getattr(layer, parameter).sum().backward()
            assert getattr(layer, raw_name(parameter)).grad is not None
