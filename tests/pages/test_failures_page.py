"""Each message that docs/when_it_fails.md quotes is provoked here, and begins as it says."""

from __future__ import annotations

import builtins
import copy
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import we_surgery as ws
from we_surgery import excitations
from we_surgery.excitations import EXCITATIONS
from we_surgery.excitations.mwe import CURVES

PAGE = (Path(__file__).parents[2] / "docs" / "when_it_fails.md").read_text(encoding="utf-8")


def net(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    second = nn.BatchNorm2d(8) if norm else nn.ReLU()
    layers = (nn.Conv2d(3, 8, 3, padding=1), second, nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5))


class Bypassing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        own = self.conv._parameters
        return nn.functional.conv2d(x, own.get("weight", own.get("raw_weight")))


class Random(nn.Module):
    """By the system's generator, which nothing seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + random.SystemRandom().random()


class Noise(ws.Excitation):
    name = "noise_of_this_test"
    order = 12

    def excite(self, weight: Tensor) -> Tensor:
        return weight + torch.rand_like(weight)


class Packing(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "packed"] = self.weight


def with_a_hook_that_renames(layer: nn.Module) -> nn.Module:
    def rename(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
        state[prefix + "kernel"] = state.pop(prefix + "weight")

    layer.register_state_dict_post_hook(rename)
    return layer


def edited(model: nn.Module) -> None:
    """A file whose plan is not that of its tensors."""
    ws.save(model, "model.pt", architecture="torchvision:alexnet")
    checkpoint = torch.load("model.pt")
    checkpoint["we_surgery"]["plan"]["layers"][0]["excitation"] = [{"weight_align": {}}]
    torch.save(checkpoint, "model.pt")
    ws.load("model.pt")


@pytest.fixture
def noise() -> Iterator[None]:
    ws.register_excitation(Noise)
    yield
    del EXCITATIONS[Noise.name]


def with_value(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = value
    return model


def named(name: str) -> nn.Module:
    wrapper = type(name, (nn.Module,), {"forward": lambda self, x: x})
    return wrapper()


def sharded() -> nn.Module:
    model = net()
    model[0].weight.full_tensor = lambda: None
    return model


def foreign_plan() -> ws.Plan:
    data = ws.plan(net()).to_dict()
    data["layers"][0]["module"] = "9"
    return ws.Plan.from_dict(data)


def old_optimizer(kind: Callable[..., Any], inplace: bool) -> None:
    model = net()
    optimizer = kind(model.parameters(), lr=0.1)
    ws.add_to_optimizer(optimizer, ws.convert(model, inplace=inplace))


def offloaded(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, torch.device("cpu"))


def attached(
    model: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, ws.AttachedExcitation]:
    model = model or net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, ws.attach(model, optimizer, **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(X + torch.randn_like(X)).square().mean().backward()
    optimizer.step()


def with_hook(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> torch.optim.Optimizer:
    """The optimizer, which drops a gradient as the last thing before a step."""
    optimizer.register_step_pre_hook(lambda *_: setattr(weight, "grad", None))
    return optimizer


def step_after(change: Callable[[Any, Any], Any]) -> None:
    """A step of what ``change`` returns, or of the attached optimizer."""
    model, optimizer, excitation = attached()
    step(model, optimizer)
    changed = change(model, optimizer)
    step(model, optimizer if changed is None else changed)
    assert excitation is not None


def thawed() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    model, optimizer, _ = attached(model)
    model[0].weight.requires_grad_(True)
    step(model, optimizer)


def cast_up() -> None:
    model, optimizer, _ = attached()
    model.double()(X.double()).sum().backward()
    optimizer.step()


def attach_again() -> None:
    model, optimizer, _ = attached()
    ws.attach(model, optimizer)


def vanilla_run() -> torch.optim.Optimizer:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    return optimizer


def attach_after_steps() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    ws.attach(model, optimizer)


def load_less() -> None:
    _, optimizer, excitation = attached()
    state = excitation.state_dict()
    state["optimizer"].popitem()
    excitation.load_state_dict(state)
    assert optimizer is not None


def load(mode: str, rules: Any = ()) -> None:
    """The state of another run."""
    model, optimizer, _ = attached(mode="lwe")
    step(model, optimizer)
    _, other, excitation = attached(mode=mode, rules=rules)
    other.load_state_dict(optimizer.state_dict())
    assert excitation is not None


def attached_to(name: str) -> None:
    kind = type(name, (torch.optim.SGD,), {})
    model = net()
    ws.attach(model, kind(model.parameters(), lr=0.1))


def attach_to_two() -> None:
    model = net()
    ws.attach(model, [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)])


def load_cast() -> None:
    model, optimizer, _ = attached(net().bfloat16(), state="parameter")
    model(X.bfloat16()).sum().backward()
    optimizer.step()
    other = net().bfloat16()
    twin = torch.optim.SGD(other.parameters(), lr=0.1)
    twin.load_state_dict(optimizer.state_dict())
    ws.attach(other, twin, state="parameter")


def load_wrong_bit() -> None:
    torch.save(net().state_dict(), "model.pt")
    content = bytearray(Path("model.pt").read_bytes())
    content[content.index(net()[0].weight.detach().numpy().tobytes())] ^= 1
    Path("model.pt").write_bytes(content)
    ws.load("model.pt")


def adopt_without_inverse() -> None:
    model, _, excitation = attached(config={"conv": "shift_attention"})
    nn.init.ones_(model[0].weight)
    excitation.adopt()


def norm_loss_of_raw_weights() -> None:
    model, optimizer, _ = attached()
    ws.norm_loss(model)
    assert optimizer is not None


def saved(thing: Any, **options: Any) -> Any:
    torch.save(thing, "file.pt")
    return ws.load("file.pt", **options)


X = torch.ones(2, 3, 8, 8)
PLANNED: dict[str, Callable[[], Any]] = {
    "the pattern '...' matches none of the ... layers": lambda: ws.plan(
        net(), rules=[ws.Rule("layer9", "skip")]
    ),
    "there is no mode called '...'": lambda: ws.plan(net(), "lwee"),
    "the config has an unknown key '...'": lambda: ws.plan(net(), config={"mod": "lwe"}),
    "the config ... cannot be read": lambda: ws.plan(net(), config="configs/none.yaml"),
    "layer '...' cannot be initialized as the identity": lambda: ws.convert(
        net(), config={"conv": "shift_attention"}, init="preserve"
    ),
    "the model is wrapped in DistributedDataParallel": lambda: ws.convert(
        named("DistributedDataParallel")
    ),
    "the model is wrapped by torch.compile": lambda: ws.convert(torch.compile(net())),
    "the model is sharded": lambda: ws.convert(sharded()),
    "the model is TorchScript": lambda: ws.convert(torch.jit.trace(net(), X, check_trace=False)),
    "the weight of layer '...' holds ... non-finite values": lambda: ws.convert(
        with_value(net(), torch.inf)
    ),
    "the converted model does not run in eval mode": lambda: ws.convert(
        net(), example_inputs=torch.ones(2, 4, 8, 8)
    ),
    "aten.convolution in module '...' reads '...raw_weight' itself": lambda: ws.convert(
        Bypassing(), example_inputs=X
    ),
    "the plan names layer '...', which does not exist in this model": lambda: ws.convert(
        net(), plan=foreign_plan()
    ),
    "both a plan and a mode, config, rules or transplants were given": lambda: ws.convert(
        net(), "lwe", plan=ws.plan(net())
    ),
    "the weight of layer '...' was changed outside of the optimizer's step": lambda: step_after(
        lambda model, _: model[0].reset_parameters()
    ),
    "a hook before the optimizer's step changes the gradient of layer '...'": lambda: step_after(
        lambda model, optimizer: with_hook(optimizer, model[0].weight)
    ),
    "layer '...' holds another Parameter than when excitation was attached": lambda: step_after(
        lambda model, _: setattr(model[0], "weight", nn.Parameter(torch.ones(8, 3, 3, 3)))
    ),
    "layer '...' was cast to torch.float64 after excitation was attached": cast_up,
    "SGD trains a weight whose excitation is attached to another optimizer": lambda: step_after(
        lambda model, _: torch.optim.SGD(model.parameters(), lr=0.1)
    ),
    "this SGD is a copy of an optimizer with excitation, or has loaded the state of one": (
        lambda: step_after(lambda _, optimizer: copy.deepcopy(optimizer))
    ),
    "the optimizer no longer holds the weight of layer '...'": lambda: step_after(
        lambda _, optimizer: optimizer.param_groups[0]["params"].clear()
    ),
    "layer '...' was frozen or not in the optimizer when excitation was attached": thawed,
    "the optimizer holds none of the ... weights that the plan excites": lambda: ws.attach(
        net(), torch.optim.SGD(net().parameters(), lr=0.1)
    ),
    "the plan excites none of the model's ... weights": lambda: attached(
        rules=[ws.Rule("*", "skip")]
    ),
    "the weight of layer '...' is in 2 of the optimizers": attach_to_two,
    "the optimizer has made steps already, and holds no state of an excitation": attach_after_steps,
    "'...' is excited by an excitation that was attached before": attach_again,
    "the model is converted: its layers compute their excited weights themselves": lambda: attached(
        ws.convert(net())
    ),
    "transplants change the model's layers": lambda: attached(
        nn.Sequential(net(), nn.Dropout()), config={"transplants": ["max_dropout"]}
    ),
    "ZeroRedundancyOptimizer is not supported": lambda: attached_to("ZeroRedundancyOptimizer"),
    "this optimizer state has no state of the excitation": lambda: attached()[1].load_state_dict(
        vanilla_run().state_dict()
    ),
    "the saved excitation is of ... weights and this one of ...": lambda: load(
        "lwe", [ws.Rule("4", "skip")]
    ),
    "the saved excitation of '...' has other stages than this one": lambda: load("mwe"),
    "the saved excitation has other trained parameters than this one": load_less,
    "the optimizer has cast the excitation's state to the model's half precision": load_cast,
    "the weight of layer '...' cannot be taken over": adopt_without_inverse,
    "excitation was attached by a plan": lambda: attached(plan=ws.plan(net()))[2].extend(),
    "the excitation is attached to the optimizer, so a loss on the model reaches the excited "
    "weights": norm_loss_of_raw_weights,
    "the parameter groups hold none of the model's parameters": lambda: old_optimizer(
        torch.optim.SGD, False
    ),
    "LBFGS keeps one flat history": lambda: old_optimizer(torch.optim.LBFGS, True),
    "weight of layer '...' (...) is computed by ... and cannot be assigned": lambda: setattr(
        ws.convert(net())[0], "weight", nn.Parameter(torch.ones(8, 3, 3, 3))
    ),
    "weight of layer '...' (...) takes a Parameter": lambda: torch.func.functional_call(
        ws.convert(net()), {"0.weight": torch.ones(8, 3, 3, 3)}, (X,)
    ),
    "Error(s) in loading state_dict for Sequential: Missing key(s)": lambda: ws.convert(
        net()
    ).load_state_dict(ws.convert(net(), "mwe").state_dict()),
    "'weight_orig' cannot be registered in layer '...'": lambda: prune.l1_unstructured(
        ws.convert(net())[0], "weight", 0.5
    ),
    "'weight' cannot be registered in layer '...'": lambda: ws.convert(net())[0].register_parameter(
        "weight", nn.Parameter(torch.ones(8, 3, 3, 3))
    ),
    "the excited weight of layer '...' (...) cannot be computed: its excitation is on the meta "
    "device": lambda: offloaded(ws.convert(net()))(X),
    "torch.jit.script does not support converted models": lambda: torch.jit.script(
        ws.convert(net())
    ),
    "'weight'": lambda: nn.utils.spectral_norm(ws.convert(net())[0]),
    "Module '...' does not have a parameter": lambda: nn.utils.parametrizations.spectral_norm(
        ws.convert(net())[0]
    ),
    "you can only change requires_grad flags of leaf variables": lambda: ws.convert(net())[
        0
    ].weight.requires_grad_(False),
    "... is refused: it refers to ... (from another package)": lambda: saved(Random()),
    "... is refused: it refers to ... (not an nn.Module class)": lambda: saved(eval),
    "... holds weights but does not name their architecture": lambda: saved(net().state_dict()),
    "the state dict does not fit ...": lambda: saved(
        net().state_dict(), architecture="torchvision:alexnet"
    ),
    "... is damaged: the record '...' does not fit its checksum": load_wrong_bit,
    "there is no file ...": lambda: ws.load("none.pt"),
    "... exists already": lambda: [ws.save(net(), "a.pt") for _ in range(2)],
    "the stripped model's outputs differ by ...": lambda: ws.strip(
        ws.convert(Random()), example_inputs=X
    ),
    "the folded weight of layer '...' is not bit-equal": lambda: ws.strip(
        ws.convert(net(), config={"conv": Noise.name})
    ),
    "the folded weight of layer '...' holds ... non-finite values": lambda: ws.strip(
        with_value(ws.convert(net()), torch.nan)
    ),
    "the model fails on the example inputs": lambda: ws.strip(
        ws.convert(net()), example_inputs=torch.ones(2, 4, 8, 8)
    ),
    "nothing says how '...raw_weight' were excited": lambda: ws.strip_state_dict(
        dict(ws.convert(net()).named_parameters())
    ),
    "the record of an excitation cannot be read": lambda: excitations.rebuild_excitation(
        {"_extra_state": torch.ones(3)}
    ),
    "an excitation of the stages ... cannot be rebuilt": lambda: excitations.rebuild_excitation(
        {}, ws.convert(net())[0].excitation.record
    ),
    "...: the file's plan gives layer '...'": lambda: edited(ws.convert(net(), "mwe")),
    "layer '...' (...) would not save its raw weight": lambda: ws.convert(
        nn.Sequential(Packing(3, 3)), "mwe"
    ),
    "the model's own code for its state dict fails on excited layers": lambda: ws.convert(
        with_a_hook_that_renames(nn.Linear(3, 3)), "mwe"
    ),
}
QUOTED = [
    quote
    for table in re.findall(r"\| message begins .*?(?=\n\n|\Z)", PAGE, re.S)
    for quote in re.findall(r"^\| `([^|]*)` \|", table, re.M)
]


def test_each_quoted_message_is_provoked() -> None:
    assert list(PLANNED) == QUOTED


ERRORS = (ws.WESurgeryError, RuntimeError, KeyError, ValueError, ws.ThawedLayerWarning)


@pytest.mark.filterwarnings("ignore:`?torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.usefixtures("noise")
@pytest.mark.parametrize("quote", QUOTED)
def test_the_message_begins_as_the_page_says(
    quote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ERRORS) as caught:
        PLANNED[quote]()
    message = " ".join(str(caught.value).split())
    assert re.match(re.escape(quote).replace(r"\.\.\.", ".*"), message), message


@pytest.mark.parametrize("start", ["on", "paused"])
def test_the_page_says_which_excitations_have_no_such_start(start: str) -> None:
    def starts(config: dict[str, Any]) -> bool:
        try:
            ws.convert(net(), config=config, init="preserve", start=start)
        except ws.InputError:
            return False
        return True

    stages = [name for name in EXCITATIONS if EXCITATIONS[name].__module__.startswith("we_surg")]
    assert [s for s in stages if not starts({"conv": s})] == ["shift_attention"]
    assert [c for c in CURVES if starts({"mode": "mwe", "mwe": {"curve": c}})] == ["atanh"]
    assert not starts({"mode": "mwe", "mwe": {"rescale": False}})
    assert not starts({"lwe": {"inner": "mwe"}})
    for options in ({"learn": "mix"}, {"learn": "epsilon"}, {"detach_max": False}):
        assert starts({"mode": "mwe", "mwe": options})
    for attention in ("se", "bam", "cbam", "global", "triplet"):
        assert starts({"lwe": {"attention": attention}})


def test_the_reasons_are_those_of_plans() -> None:
    def reason(model: nn.Module, **how: Any) -> str:
        return ws.plan(model, **how).decisions[0].reason

    frozen = net().requires_grad_(False)
    parametrized = net()
    nn.utils.parametrizations.weight_norm(parametrized[0])
    pruned = net()
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    found = [
        reason(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))),
        reason(frozen),
        reason(parametrized),
        reason(pruned),
        reason(net(norm=False)).partition(" (")[0],
    ]
    assert [text for text in found if f"`{text}`" not in PAGE] == []


def test_the_classes_have_the_exit_codes_of_the_page() -> None:
    for name, base, code in re.findall(r"^\| `ws\.(\w+)` \|.*\| `(\w+)` \| (\d?) ?\|$", PAGE, re.M):
        assert issubclass(getattr(ws, name), getattr(builtins, base))
        if code:
            assert getattr(ws, name).exit_code == int(code)
    classes = {n for n in dir(ws) if n.endswith(("Error", "Warning"))}
    assert classes == set(re.findall(r"^\| `ws\.(\w+)`", PAGE, re.M))


def test_an_optimizer_of_before_leaves_the_excitations_as_they_are() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ws.convert(model, inplace=True)
    before = {name: value.clone() for name, value in model.named_parameters()}
    model(X + torch.randn_like(X)).square().mean().backward()
    optimizer.step()
    moved = {n for n, value in model.named_parameters() if not torch.equal(value, before[n])}
    assert "0.raw_weight" in moved
    assert not [name for name in moved if "excitation" in name]
