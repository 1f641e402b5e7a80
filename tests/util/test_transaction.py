"""What a block that fails leaves of modules that it changed."""

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from toys import ConvNet

from we_surgery._util.transaction import AllOrNothing


class FaultError(Exception):
    pass


def fail_after(model: nn.Module, change: Callable[[nn.Module], object]) -> None:
    with AllOrNothing(model.modules()):
        change(model)
        raise FaultError


def change_everything(model: nn.Module) -> None:
    model.stem.__class__ = nn.Identity
    model.norm._parameters.clear()
    model.depthwise._buffers["more"] = torch.ones(1)
    model.grouped.register_forward_hook(print)
    model.head._parameters["weight"].data = torch.zeros(1)
    model.head.bias.grad = None
    model.eval()
    model.extra = nn.Linear(1, 1)
    del model.group_norm


def test_a_block_that_fails_leaves_modules_as_they_were() -> None:
    model = ConvNet()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    tables = [(m, type(m), vars(m), dict(vars(m)), m._parameters) for m in model.modules()]
    pointers = [(p, p.data_ptr(), p.grad) for p in model.parameters()]
    names = list(dict(model.named_parameters())), list(model.state_dict())
    with pytest.raises(FaultError):
        fail_after(model, change_everything)
    assert (list(dict(model.named_parameters())), list(model.state_dict())) == names
    for module, kind, attributes, before, parameters in tables:
        assert type(module) is kind
        assert vars(module) is attributes
        assert attributes.keys() == before.keys()
        assert all(attributes[name] is before[name] for name in before)
        assert module._parameters is parameters
        assert not module._forward_hooks
    assert all(p.data_ptr() == address and p.grad is grad for p, address, grad in pointers)


def test_a_block_that_ends_keeps_its_changes() -> None:
    model = ConvNet()
    with AllOrNothing(model.modules()):
        change_everything(model)
    assert type(model.stem) is nn.Identity
    assert "more" in model.depthwise._buffers


def drop_the_norm(model: fx.GraphModule) -> None:
    node = next(n for n in model.graph.nodes if n.target == "norm")
    node.replace_all_uses_with(node.args[0])
    model.graph.erase_node(node)
    model.recompile()


@pytest.mark.parametrize("changed", [False, True])
def test_a_graph_that_was_changed_is_put_back_and_another_stays(changed: bool) -> None:
    model = fx.symbolic_trace(ConvNet())
    x, graph, program = torch.randn(2, 3, 8, 8), model.graph, model.code
    model.eval()
    expected = model(x)
    with pytest.raises(FaultError):
        fail_after(model, drop_the_norm if changed else nn.Module.train)
    assert (model.graph is graph) == (not changed)
    assert model.code == program
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "parameter",
    [
        nn.Parameter(torch.ones(2, 2).to_sparse()),
        nn.Parameter(torch.ones(2, device="meta")),
        nn.Parameter(torch.ones(1).expand(3)),
        nn.UninitializedParameter(),
    ],
    ids=["sparse", "meta", "expanded", "lazy"],
)
def test_parameters_of_any_sort_stay(parameter: nn.Parameter) -> None:
    model = nn.Module()
    model.register_parameter("weight", parameter)
    with pytest.raises(FaultError):
        fail_after(model, lambda changed: changed._parameters.clear())
    assert model.weight is parameter
