"""The options of ``convert`` as callbacks and passes take them."""

import inspect

import pytest
import torch
from torch import fx
from toys import EVERYTHING, ConvNet

import we_surgery as ws
from we_surgery.converted.options import ConvertOptions, resolve_options
from we_surgery.fx import ExcitePass


def test_they_are_the_keyword_arguments_of_convert() -> None:
    parameters = inspect.signature(ws.convert).parameters
    assert [*ConvertOptions.__annotations__] == [
        name for name in parameters if name not in ("model", "mode", "inplace")
    ]


@pytest.mark.parametrize(
    ("mode", "options", "cause"),
    [
        (None, {"confg": {}}, "no option 'confg'; did you mean 'config'"),
        (None, {"init": "preserved"}, "no init 'preserved'; did you mean 'preserve'"),
        (None, {"start": "pause"}, "no start 'pause'; did you mean 'paused'"),
        ("lve", {}, "no mode called 'lve'"),
        ("mwe", {"config": {"mode": "lwe"}}, "contradicts"),
        ("lwe", {"plan": ws.plan(ConvNet())}, "both a plan and a mode"),
        (None, {"plan": ws.plan(ConvNet()), "rules": [ws.Rule("*", "skip")]}, "both a plan"),
    ],
)
def test_what_does_not_fit_is_refused_before_there_is_a_model(mode, options, cause) -> None:
    with pytest.raises(ws.InputError, match=cause):
        resolve_options(mode, options)
    with pytest.raises(ws.InputError, match=cause):
        ExcitePass(mode, **options)


def test_mode_config_and_rules_become_one_policy_and_the_caller_keeps_his_own() -> None:
    given: ConvertOptions = {"config": {"linear": "skip"}, "rules": [ws.Rule("stem", "mwe")]}
    resolved = resolve_options("we", given)
    assert given.keys() == {"config", "rules"}
    model = ws.convert(ConvNet(), **resolved)
    expected = ws.convert(ConvNet(), "we", **given)
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert "head.raw_weight" not in model.state_dict()


def test_a_pass_preserves_and_pauses_as_convert_does() -> None:
    x = torch.randn(2, 3, 8, 8)
    vanilla = fx.symbolic_trace(ConvNet().eval())
    expected = vanilla(x)
    assert ExcitePass(config=EVERYTHING, init="preserve")(vanilla).modified
    torch.testing.assert_close(vanilla(x), expected, rtol=1e-5, atol=1e-5)
    paused = fx.symbolic_trace(ConvNet().eval())
    expected = paused(x)
    ExcitePass("lwe", start="paused", example_inputs=x)(paused)
    assert torch.equal(paused(x), expected)
    assert ws.resume(paused) > 0
