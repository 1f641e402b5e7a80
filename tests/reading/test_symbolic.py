"""What a symbolic trace tells of a model, and that tracing has no effects."""

import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from we_surgery.reading import LayerFacts, read
from we_surgery.reading.symbolic import trace, weightless_copy

Path = Callable[["Toy", Tensor], Any]


class Toy(nn.Module):
    """A conv whose result takes the path that a test gives."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.first = nn.BatchNorm2d(4)
        self.path = path

    def forward(self, x: Tensor) -> Any:
        return self.path(self, x)


def by_name(layers: list[LayerFacts]) -> dict[str, LayerFacts]:
    return {facts.name: facts for facts in layers}


def test_a_real_model_is_traced_and_its_norms_found() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18(weights=None)
    found = read(model)
    assert found.read_by == "symbolic"
    convs = [facts for facts in found.layers if facts.kind == "conv2d"]
    assert len(convs) == 20
    assert all(facts.followed_by_norm for facts in convs)
    assert by_name(found.layers)["layer2.0.downsample.0"].norm_evidence == (
        "'layer2.0.downsample.1' follows"
    )


def branch(m: Toy, x: Tensor) -> Any:
    return m.first(m.conv(x)) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced_is_listed_with_the_reason_and_the_line() -> None:
    found = read(Toy(branch))
    assert found.read_by == "listed"
    assert "TraceError: symbolically traced variables cannot be used" in found.read_by_reason
    assert "test_symbolic.py:" in found.read_by_reason
    assert [facts.name for facts in found.layers] == ["conv", "other"]


def test_a_forward_that_stops_halfway_is_read_as_far_as_it_goes() -> None:
    def path(m: Toy, x: Tensor) -> Any:
        x = m.first(m.conv(x))
        return m.other(x) if len(x.shape) == 4 else x

    found = read(Toy(path))
    assert found.read_by == "symbolic"
    assert (
        "could not trace the model as a whole: RuntimeError: 'len' is not" in found.read_by_reason
    )
    facts = by_name(found.layers)
    assert facts["conv"].norm_evidence == "'first' follows"
    assert facts["other"].followed_by_norm is not False


def test_what_a_part_is_called_says_nothing_of_movement(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    replayed: list[Any] = []

    def note(*arguments: Any, **_: Any) -> None:
        replayed.append(arguments)

    monkeypatch.setattr("we_surgery.reading.traced_shifts.record", note)
    parts = {"stem": nn.Conv2d(3, 4, 3), "conv_gather": Scaled(), "last": nn.Conv2d(4, 4, 3)}
    model = nn.Sequential(OrderedDict(parts))
    assert len(read(model).layers) == 2
    assert not replayed


def test_a_model_that_cannot_be_copied_is_listed() -> None:
    model = Toy(lambda m, x: m.conv(x))
    model.kept = (n for n in range(3))
    found = read(model)
    assert found.read_by == "listed"
    assert "cannot pickle 'generator'" in found.read_by_reason


def test_the_copy_that_is_traced_has_no_weights_and_no_hooks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].weight.requires_grad_(False)
    model[0].register_forward_hook(lambda *_: None)
    replica = weightless_copy(model)
    assert all(t.is_meta for t in [*replica.parameters(), *replica.buffers()])
    flags = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in replica.parameters()] == flags
    assert not replica[0]._forward_hooks
    assert model[0]._forward_hooks
    assert not any(t.is_meta for t in model.parameters())


def test_ties_survive_in_the_weightless_copy() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    replica = weightless_copy(model)
    assert replica[1].weight is replica[0].weight


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(()).item(),
        lambda: float(torch.randn(3).sum()),
        random.random,
    ],
    ids=["rand", "randn", "random"],
)
def test_a_model_that_draws_while_it_is_traced_moves_no_generator(
    draw: Callable[[], float],
) -> None:
    def path(m: Toy, x: Tensor) -> Any:
        return m.first(m.conv(x)) * draw()

    model = Toy(path)
    states = torch.get_rng_state(), random.getstate()
    assert read(model).read_by == "symbolic"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_no_hook_of_the_user_is_run(register: str) -> None:
    model = nn.Sequential(Toy(lambda m, x: m.first(m.conv(x))))
    for module in list(model.modules()):
        getattr(module, register)(lambda *_: pytest.fail("the hook ran"))
    assert read(model).read_by == "symbolic"


def test_layers_are_kept_whole_in_the_graph_and_gates_are_traced() -> None:
    with torch.device("meta"):
        model = torchvision.models.mobilenet_v3_small(weights=None)
    (block,), untraceable = trace(model)
    assert untraceable == []
    called = {str(node.target) for node in block.graph.nodes if node.op == "call_module"}
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert layers <= called
    assert "features.1.block.1.fc1" in layers  # of a SqueezeExcitation


def test_an_input_that_is_made_up_in_vain_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    frozen = nn.Conv2d(6, 1, 3, padding=1, padding_mode="reflect").requires_grad_(False)
    read(nn.Sequential(frozen, nn.Linear(1, 3)))
    assert capfd.readouterr() == ("", "")


def test_an_interrupt_within_the_clean_up_of_fx_leaves_no_patch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = nn.Module.__call__, nn.Module.__getattr__
    kind = torch.fx._symbolic_trace._PatchedFnSetAttr  # takes fx's patches back
    revert, calls = kind.revert, iter([KeyboardInterrupt])

    def interrupted_once(self: Any) -> None:
        for interrupt in calls:
            raise interrupt
        revert(self)

    monkeypatch.setattr(kind, "revert", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    assert (nn.Module.__call__, nn.Module.__getattr__) == before
    assert torch.fx._symbolic_trace.CURRENT_PATCHER is None
    assert nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())(torch.ones(1, 3, 4, 4)).shape[1] == 4
