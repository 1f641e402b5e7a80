"""What every method of the registry owes: shape, gradient, state dict, a start, an exact fold."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from methods import EXCITATIONS, LAYOUTS, Stages, every_method, fits, on_layouts
from torch import Tensor, nn
from torch.func import functional_call

import we_surgery as ws
from we_surgery.excitations import Composition, WeightLayout, build_excitation, rebuild_excitation

F64 = torch.float64
TRUE_GRADIENT = {"mwe": {"detach_max": False}}
"""Options for methods whose gradient is by default another function's."""

OWN_GRADIENT = ("dynamic_sparse", "mwe_gradient", "lwe_gradient", "mwe_scheduled")


def with_true_gradient(stages: Any) -> Any:
    if isinstance(stages, str):
        stages = {stage: {} for stage in stages.split("+")}
    changed = {name: {**options, **TRUE_GRADIENT.get(name, {})} for name, options in stages.items()}
    for options in changed.values():
        if "inner" in options:
            options["inner"] = with_true_gradient(options["inner"])
    return changed


def prepared(
    stages: Stages, layout: WeightLayout, dtype: torch.dtype | None = None
) -> tuple[Tensor, Composition]:
    if not fits(stages, layout):
        pytest.skip("the plan would leave it out")
    torch.manual_seed(0)
    weight = torch.randn(layout.shape, dtype=dtype)
    excitation = build_excitation(stages, layout, dtype=dtype)
    excitation.prepare(weight)
    return weight, excitation


@on_layouts("even kernel", "linear", "transposed")
def test_the_weight_keeps_its_shape_and_trains_with_all_parameters(
    stages: Stages, layout: WeightLayout
) -> None:
    weight, excitation = prepared(stages, layout)
    weight.requires_grad_()
    excited = excitation(weight)
    assert excited.shape == weight.shape
    assert excited.dtype == weight.dtype
    assert excited.isfinite().all()
    (excited * torch.randn_like(excited)).sum().backward()
    for parameter in (weight, *excitation.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", ["linear", "transposed"])
@every_method
def test_the_gradient_is_that_of_the_function(stages: Stages, name: str) -> None:
    if not stages[0].keys().isdisjoint(OWN_GRADIENT):
        pytest.skip("its gradient is not that of its function by design; it has tests of its own")
    stages = [with_true_gradient(stages[0])]
    weight, excitation = prepared(stages, LAYOUTS[name], F64)
    weight.requires_grad_()
    excitation.eval()  # in training a buffer may move with each call
    parameters = dict(excitation.named_parameters())

    def excited(weight: Tensor, *values: Tensor) -> Tensor:
        return functional_call(excitation, dict(zip(parameters, values, strict=True)), (weight,))

    assert torch.autograd.gradcheck(excited, (weight, *parameters.values()), fast_mode=True)


def as_saved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    cloned = {key: value.detach().clone() for key, value in state.items()}
    return safetensors.torch.load(safetensors.torch.save(cloned))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("conv2d", torch.bfloat16), ("linear", F64), ("transposed", torch.float32)],
)
@every_method
def test_its_state_dict_rebuilds_it(stages: Stages, name: str, dtype: torch.dtype) -> None:
    weight, built = prepared(stages, LAYOUTS[name], dtype)
    before = torch.get_rng_state()
    rebuilt = rebuild_excitation(as_saved(built.state_dict()))
    assert torch.equal(torch.get_rng_state(), before)
    assert repr(rebuilt) == repr(built)
    assert list(rebuilt.state_dict()) == list(built.state_dict())
    built.eval()
    assert torch.equal(rebuilt.eval()(weight), built(weight))
    other = build_excitation(stages, LAYOUTS[name], dtype=dtype).eval()
    other.load_state_dict(built.state_dict())
    assert torch.equal(other(weight), built(weight))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "half and back": lambda module: copy.deepcopy(module).half().float(),
}


@pytest.mark.parametrize("how", COPIES)
@every_method
def test_a_copy_computes_the_same(stages: Stages, how: str) -> None:
    weight, built = prepared(stages, LAYOUTS["conv2d"])
    copied = COPIES[how](built.eval())
    exact = how != "half and back"
    torch.testing.assert_close(
        copied(weight), built(weight), rtol=0 if exact else 2e-2, atol=0 if exact else 2e-2
    )


@every_method
def test_half_precision_is_computed_in_full(stages: Stages) -> None:
    weight, excitation = prepared(stages, LAYOUTS["conv2d"], torch.bfloat16)
    excitation.eval()
    exact = copy.deepcopy(excitation).float()(weight.float())
    assert torch.equal(excitation(weight), exact.to(torch.bfloat16))


@on_layouts("grouped", "linear", "transposed")
def test_it_starts_as_what_was_there_or_says_that_it_cannot(
    stages: Stages, layout: WeightLayout
) -> None:
    weight, excitation = prepared(stages, layout)
    try:
        raw = excitation.preserve(weight)
    except NotImplementedError as error:
        assert "cannot start as an identity" in str(error)  # noqa: PT017
        return
    excitation.eval()
    torch.testing.assert_close(excitation(raw), weight, rtol=1e-5, atol=1e-6)
    rebuilt = rebuild_excitation(excitation.state_dict()).eval()
    assert torch.equal(rebuilt(raw), excitation(raw))


@every_method
def test_after_such_a_start_every_parameter_learns_within_three_steps(stages: Stages) -> None:
    weight, excitation = prepared(stages, LAYOUTS["conv2d"])
    try:
        raw = nn.Parameter(excitation.preserve(weight))
    except NotImplementedError:
        return
    parameters = dict(excitation.named_parameters())
    optimizer = torch.optim.SGD([raw, *parameters.values()], 0.01)
    learned: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        (excitation(raw) * torch.randn_like(raw)).sum().backward()
        learned |= {n for n, p in parameters.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert learned == set(parameters)


class Small(nn.Module):
    """A layer of each sort that excitations differ in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(6, 6, 3, groups=3)
        self.up = nn.ConvTranspose2d(6, 4, 3)
        self.head = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.grouped(torch.relu(self.norm(self.conv(x)))))
        return self.head(x.mean((2, 3)))


@every_method
def test_all_four_interfaces_take_it_and_strip_gives_the_vanilla_model_back(
    stages: Stages,
) -> None:
    torch.manual_seed(0)
    vanilla, x = Small(), torch.randn(2, 4, 6, 6)
    ((name, options),) = stages[0].items()
    config = {"conv": name, "linear": name, name: options}
    plan = ws.plan(vanilla, config=config)
    assert all(name in row.stages for row in plan.decisions if row.excitation)
    model = ws.convert(vanilla, plan=ws.Plan.from_dict(plan.to_dict()), example_inputs=x)
    added = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in vanilla.parameters()
    )
    assert plan.added_parameters == added
    optimizer = torch.optim.SGD(ws.param_groups(model), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
    stripped = ws.strip(model, example_inputs=x)
    assert list(stripped.state_dict()) == list(vanilla.state_dict())
    from_file = ws.strip_state_dict(as_saved(model.state_dict()))
    for key, value in stripped.state_dict().items():
        assert torch.equal(from_file[key], value), key
    again = ws.convert(Small(), plan=plan).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


# Those with a closed form are compiled in test_closed_form_transforms.py.
@pytest.mark.parametrize("name", sorted(EXCITATIONS.keys() - {"standardize", "lwe", "mwe"}))
def test_it_compiles_to_one_graph(name: str) -> None:
    weight, excitation = prepared([{name: {}}], LAYOUTS["conv2d"])
    torch._dynamo.reset()
    compiled = torch.compile(excitation, fullgraph=True, backend="aot_eager")
    excitation.eval()
    torch.testing.assert_close(compiled(weight), excitation(weight))
    excitation.train()
    compiled(weight.requires_grad_()).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("name", EXCITATIONS)
def test_each_has_a_summary_and_a_source(name: str) -> None:
    assert EXCITATIONS[name].summary
    assert EXCITATIONS[name].source
