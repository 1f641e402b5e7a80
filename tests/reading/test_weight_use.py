"""Who reads a weight, and how, is told by a recorded forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import we_surgery as ws
from we_surgery.reading import LayerFacts, read


def facts_of(model: nn.Module, shape: tuple[int, ...]) -> dict[str, LayerFacts]:
    reading = read(model, torch.randn(shape))
    assert reading.read_by == "recorded"
    return {layer.name: layer for layer in reading.layers}


class Mixed(nn.Module):
    """A weight for each way of being read."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(4, 4)
        self.by_parent = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.training_head = nn.Linear(4, 4)
        self.on_table = nn.Linear(2, 4)
        self.bare = nn.Parameter(torch.randn(4, 4))
        self.turned = nn.Parameter(torch.randn(4, 4))
        self.scaled = nn.Parameter(torch.randn(4, 4))
        self.scale = nn.Parameter(torch.ones(4, 1))
        self.offset = nn.Parameter(torch.randn(4))
        self.register_buffer("table", torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.own(x), self.by_parent.weight, self.by_parent.bias)
        x = self.twice(self.twice(x)) + self.on_table(self.table).mean(0)
        x = F.linear(x, self.bare) @ self.turned + self.offset
        x = F.linear(x, self.scaled * self.scale)
        return self.training_head(x) if self.training else x


@pytest.fixture(scope="module")
def mixed() -> dict[str, LayerFacts]:
    return facts_of(Mixed(), (3, 4))


def test_a_weight_read_by_its_parent_is_told_from_one_read_by_its_own_forward(
    mixed: dict[str, LayerFacts],
) -> None:
    assert mixed["own"].readers == ()
    assert mixed["by_parent"].readers == ("",)


def test_reads_are_counted(mixed: dict[str, LayerFacts]) -> None:
    assert [mixed[name].reads for name in ("own", "twice", "unused")] == [1, 2, 0]


def test_a_layer_that_runs_in_train_mode_alone_is_used(mixed: dict[str, LayerFacts]) -> None:
    assert mixed["training_head"].reads == 1


def test_a_layer_applied_to_a_constant_table_is_marked(mixed: dict[str, LayerFacts]) -> None:
    assert mixed["on_table"].constant_input
    assert not mixed["own"].constant_input


def test_a_bare_parameter_that_is_a_linear_weight_becomes_a_row(
    mixed: dict[str, LayerFacts],
) -> None:
    assert (mixed["bare"].kind, mixed["bare"].obstacle) == ("linear", None)
    assert "x @ W" in str(mixed["turned"].obstacle_for("converted"))
    assert "one part of a weight" in str(mixed["scaled"].obstacle)
    assert "offset" not in mixed


def test_a_bare_conv_kernel_is_excited_through_a_property_of_its_own_name() -> None:
    class Kernel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(8, 2, 3, 3))
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(F.conv2d(x, self.kernel, groups=2))

    x = torch.randn(2, 4, 6, 6)
    model = Kernel()
    converted = ws.convert(model, "lwe", example_inputs=x)
    assert isinstance(converted, Kernel)
    assert "raw_kernel" in converted.state_dict()
    assert not torch.equal(converted.kernel, model.kernel)
    stripped = ws.strip(converted, example_inputs=x)
    assert list(stripped.state_dict()) == list(model.state_dict())
    assert torch.equal(stripped.kernel, converted.kernel)


def test_recording_changes_nothing_and_takes_no_memory_of_the_weights() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    generator = torch.get_rng_state()
    flags = [module.training for module in model.modules()]
    reading = read(model, torch.randn(2, 3, 64, 64))
    assert reading.read_by == "recorded"
    assert all(layer.reads == 1 for layer in reading.layers)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert flags == [module.training for module in model.modules()]
    generator_after = torch.get_rng_state()
    torch.set_rng_state(generator)
    torch.randn(2, 3, 64, 64)
    assert torch.equal(generator_after, torch.get_rng_state())


def test_a_model_that_fails_on_the_inputs_is_read_symbolically_and_says_why() -> None:
    reading = read(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 5))
    assert reading.read_by == "symbolic"
    assert "does not run in eval mode" in reading.read_by_reason


def test_data_dependent_control_flow_is_recorded_with_real_tensors() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.sum().item() < 1e9 else x

    reading = read(Branch(), torch.randn(2, 4))
    assert (reading.read_by, reading.layers[0].reads) == ("recorded", 1)


def test_a_norm_is_seen_through_reshapes_and_functional_calls() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3)
            self.b = nn.Conv2d(4, 4, 3)
            self.c = nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.layer_norm(self.a(x).permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)
            return self.c(F.gelu(self.b(x)))

    facts = facts_of(Norms(), (2, 3, 9, 9))
    assert [facts[name].followed_by_norm for name in "abc"] == [True, False, False]
    assert facts["b"].norm_evidence == "aten.gelu"


@pytest.mark.parametrize(
    ("equation", "shape", "stored"),
    [
        ("bi,oi->bo", (8, 4), True),
        ("oi,bi->bo", (8, 4), True),
        ("bi,io->bo", (4, 8), False),
    ],
)
def test_an_einsum_is_a_linear_where_the_filters_are_its_weights_first_axis(
    equation: str, shape: tuple[int, int], stored: bool
) -> None:
    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Tensor:
            operands = (self.kernel, x) if equation.startswith("o") else (x, self.kernel)
            return torch.einsum(equation, *operands)

    obstacle = facts_of(Einsum(), (3, 4))["kernel"].obstacle_for("converted")
    assert obstacle is None if stored else "x @ W" in str(obstacle)


class Product(nn.Module):
    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 4))
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.kernel, x)


@pytest.mark.parametrize(
    ("multiply", "shape", "stored"),
    [
        (lambda kernel, x: kernel @ x, (2, 4, 3), True),
        (lambda kernel, x: kernel @ x, (4,), True),
        (lambda kernel, x: kernel.expand(2, 5, 4).bmm(x), (2, 4, 3), True),
        (lambda kernel, x: kernel.t() @ x, (2, 5, 3), False),
        (lambda kernel, x: x @ kernel, (2, 3, 5), False),
        (lambda kernel, x: x @ kernel.t(), (2, 3, 4), True),
    ],
    ids=["W @ x", "W @ vector", "W's bmm", "W^T @ x", "x @ W", "x @ W^T"],
)
def test_the_filters_of_a_product_are_where_the_sum_does_not_run(
    multiply: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], stored: bool
) -> None:
    obstacle = facts_of(Product(multiply), shape)["kernel"].obstacle_for("converted")
    assert obstacle is None if stored else "x @ W" in str(obstacle)


def test_a_permutation_of_a_matrix_among_axes_of_length_one_is_followed() -> None:
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            moved = self.kernel[:, None, :].permute(1, 0, 2).transpose(1, 2)
            return torch.bmm(x[None], moved)

    assert facts_of(Permuted(), (3, 4))["kernel"].obstacle is None
