"""What a symbolic trace tells of the norms after a layer, and that tracing has no effects."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
        self.relu = nn.ReLU()
        self.pool = nn.AvgPool2d(2)
        self.drop = nn.Dropout()
        self.first = nn.BatchNorm2d(4)
        self.second = nn.GroupNorm(2, 4)
        self.layer_norm = nn.LayerNorm(4)
        self.path = path

    def forward(self, x: Tensor) -> Any:
        return self.path(self, x)


PATHS: dict[str, tuple[Path, bool]] = {
    "norm": (lambda m, x: m.first(m.conv(x)), True),
    "functional norm": (lambda m, x: F.layer_norm(m.conv(x), (8,)), True),
    "dropout, norm": (lambda m, x: m.first(m.drop(m.conv(x))), True),
    "pool, norm": (lambda m, x: m.first(m.pool(m.conv(x))), True),
    "permute, norm": (lambda m, x: m.layer_norm(m.conv(x).permute(0, 2, 3, 1)), True),
    "flatten, transpose, norm": (
        lambda m, x: m.layer_norm(torch.flatten(m.conv(x), 2).transpose(1, 2)),
        True,
    ),
    "its shape is read as well": (
        lambda m, x: (lambda y: m.first(y) + y.shape[0] * y.size(1))(m.conv(x)),
        True,
    ),
    "two norms": (lambda m, x: (lambda y: m.first(y) + m.second(y))(m.conv(x)), True),
    "called twice, each with a norm": (
        lambda m, x: m.first(m.conv(x)) + m.second(m.conv(x.relu())),
        True,
    ),
    "relu, norm": (lambda m, x: m.first(m.relu(m.conv(x))), False),
    "functional relu, norm": (lambda m, x: m.first(F.relu(m.conv(x))), False),
    "sum, norm": (lambda m, x: m.first(m.conv(x) + x), False),
    "conv, norm": (lambda m, x: m.first(m.other(m.conv(x))), False),
    "output": (lambda m, x: m.conv(x), False),
    "norm beside a shortcut": (lambda m, x: (lambda y: m.first(y) + y)(m.conv(x)), False),
    "called twice, once with a norm": (
        lambda m, x: m.first(m.conv(x)) + m.relu(m.conv(x)),
        False,
    ),
    "unused": (lambda m, x: (m.conv(x), x)[1], False),
}


@pytest.mark.parametrize("path", PATHS)
def test_a_norm_counts_where_it_comes_before_anything_that_is_not_linear(path: str) -> None:
    forward, followed = PATHS[path]
    found = read(Toy(forward))
    assert found.rung == "symbolic"
    conv = next(facts for facts in found.layers if facts.name == "conv")
    assert conv.followed_by_norm is followed


def test_the_evidence_names_what_follows() -> None:
    def evidence(path: Path) -> str:
        return read(Toy(path)).layers[0].norm_evidence

    assert evidence(lambda m, x: m.first(m.conv(x))) == "'first' follows"
    assert evidence(lambda m, x: m.relu(m.conv(x))) == "'relu'"
    assert evidence(lambda m, x: F.relu(m.conv(x))) == "relu"
    assert evidence(lambda m, x: m.conv(x)) == "the model's output"


def by_name(layers: list[LayerFacts]) -> dict[str, LayerFacts]:
    return {facts.name: facts for facts in layers}


def test_a_real_model_is_traced_and_its_norms_found() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18(weights=None)
    found = read(model)
    assert found.rung == "symbolic"
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
    assert found.rung == "listed"
    assert "TraceError: symbolically traced variables cannot be used" in found.rung_reason
    assert "test_symbolic.py:" in found.rung_reason
    assert [facts.name for facts in found.layers] == ["conv", "other"]


def test_a_model_that_cannot_be_copied_is_listed() -> None:
    model = Toy(lambda m, x: m.conv(x))
    model.kept = (n for n in range(3))
    found = read(model)
    assert found.rung == "listed"
    assert "cannot pickle 'generator'" in found.rung_reason


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
    assert read(model).rung == "symbolic"
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
    assert read(model).rung == "symbolic"


def test_gates_and_layers_are_kept_whole_in_the_graph() -> None:
    with torch.device("meta"):
        model = torchvision.models.mobilenet_v3_small(weights=None)
    (block,), untraceable = trace(model)
    assert untraceable == []
    called = {str(node.target) for node in block.graph.nodes if node.op == "call_module"}
    assert "features.1.block.1" in called  # a SqueezeExcitation
    assert not any(name.startswith("features.1.block.1.") for name in called)


def test_an_input_that_is_made_up_in_vain_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    frozen = nn.Conv2d(6, 1, 3, padding=1, padding_mode="reflect").requires_grad_(False)
    read(nn.Sequential(frozen, nn.Linear(1, 3)))
    assert capfd.readouterr() == ("", "")
