"""What touches an attached model from outside is adopted, refused or followed, never ignored."""

import copy

import pytest
import torch
from attached_run import OUTSIDE, go_on, same, sgd, snapshot, steps
from equal_forms import Net, batches
from torch import nn
from torch.nn.utils import parametrize, prune

import we_surgery as ws

WRITES = {
    "nn.init": lambda m: nn.init.normal_(m.stem.weight),
    "data": lambda m: m.stem.weight.data.mul_(0.5),
    "numpy": lambda m: m.stem.weight.detach().numpy().__imul__(0.5),
    "new data": lambda m: setattr(m.stem.weight, "data", m.stem.weight.data * 0.5),
    "load_state_dict": lambda m: m.load_state_dict(
        {name: value * 0.5 for name, value in m.state_dict().items()}
    ),
    "apply": lambda m: m.apply(lambda k: getattr(k, "reset_parameters", lambda: None)()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_an_error_at_the_next_step(run, write):
    model, optimizer, _ = run
    write(model)
    written = snapshot(model)
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    with pytest.raises(ws.AttachmentError, match="'stem'.*" + OUTSIDE) as caught:
        go_on(model, optimizer)
    assert "adopt()" in caught.value.cure
    assert same(written, model.state_dict())
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == groups


def test_a_single_value_is_found_within_a_few_steps(run):
    model, optimizer, _ = run
    model.mix.weight.detach().numpy()[7, 3] += 1e-3
    with pytest.raises(ws.AttachmentError, match="'mix'"):
        steps(model, optimizer, 3)


def test_a_write_is_found_in_a_weight_with_gaps_in_memory():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 5))
    model[0].weight = nn.Parameter(torch.randn(10, 24)[::2, ::2])
    optimizer = sgd(model)
    ws.attach(model, optimizer, "mwe")
    model(torch.ones(3, 12)).sum().backward()
    optimizer.step()
    model[0].weight.data.mul_(0.5)
    with pytest.raises(ws.AttachmentError, match="'0'"):
        optimizer.step()


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_restore_puts_the_excited_weights_back(run, write):
    model, optimizer, excitation = run
    before = snapshot(model)
    write(model)
    excitation.restore()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in ("stem.weight", "head.weight"))
    go_on(model, optimizer)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_adopt_goes_on_from_what_was_written(run, write):
    model, optimizer, excitation = run
    write(model)
    written = snapshot(model)
    excitation.adopt()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, written[name], rtol=1e-5, atol=1e-5)
    go_on(model, optimizer)
    assert not same(written, model.state_dict())


class Average:
    """As torch_ema: stores, copies in and restores through ``data``."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.shadow = [p.detach().clone() for p in self.parameters]

    def update(self):
        for shadow, p in zip(self.shadow, self.parameters, strict=True):
            shadow.sub_(0.1 * (shadow - p.detach()))

    def store(self):
        self.kept = [p.clone() for p in self.parameters]

    def copy_to(self):
        for shadow, p in zip(self.shadow, self.parameters, strict=True):
            p.data.copy_(shadow.data)

    def restore(self):
        for kept, p in zip(self.kept, self.parameters, strict=True):
            p.data.copy_(kept.data)


def test_an_average_that_is_put_in_and_taken_out_again(run):
    model, optimizer, _ = run
    average = Average(model.parameters())
    go_on(model, optimizer)
    average.update()
    before = snapshot(model)
    average.store()
    average.copy_to()
    assert not same(before, model.state_dict())
    average.restore()
    go_on(model, optimizer)
    average.copy_to()
    with pytest.raises(ws.AttachmentError, match=OUTSIDE):
        go_on(model, optimizer)


def test_a_step_without_gradients_touches_nothing(run):
    model, optimizer, _ = run
    optimizer.zero_grad()
    with torch.no_grad():
        model.stem.weight.zero_()  # an average that was put in for the last evaluation
    written = snapshot(model)
    optimizer.step()
    assert same(written, model.state_dict())


def trained_once(model, optimizer, dtype):
    images, labels = batches(1)[0]
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images.to(dtype)), labels).backward()
    optimizer.step()


def test_a_cast_beyond_the_precision_of_the_raw_weights_is_an_error(run):
    model, optimizer, excitation = run
    model.double()
    written = snapshot(model)
    with pytest.raises(ws.AttachmentError, match=r"'stem' was cast to torch\.float64"):
        trained_once(model, optimizer, torch.float64)
    with pytest.raises(ws.AttachmentError, match=r"raw weight has torch\.float32"):
        excitation.restore()
    assert same(written, model.state_dict())
    go_on(model.float(), optimizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_to_half_precision_keeps_the_raw_weights(run, dtype):
    model, optimizer, excitation = run
    before = excitation.named_parameters()["stem.weight"].detach().clone()
    trained_once(model.to(dtype), optimizer, dtype)
    raw = excitation.named_parameters()["stem.weight"]
    assert raw.dtype == torch.float32
    assert not torch.equal(raw, before)
    assert model.stem.weight.dtype == dtype


def test_what_only_moves_in_memory_is_followed(run):
    model, optimizer, excitation = run
    twin = copy.deepcopy(model)
    model.to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        parameter.share_memory_()
    go_on(model, optimizer)
    stem = excitation.named_parameters()["stem.weight"]
    assert stem.stride() == model.stem.weight.stride() != twin.stem.weight.stride()
    assert not same(twin.state_dict(), model.state_dict())


def test_half_precision_keeps_its_raw_weights_in_float32(run):
    model, optimizer, excitation = run
    model.bfloat16()
    for t in range(2):
        optimizer.zero_grad()
        x, y = batches(1)[0]
        nn.functional.cross_entropy(model(x.bfloat16()), y).backward()
        optimizer.step()
        assert model.stem.weight.dtype == torch.bfloat16, t
    assert excitation.named_parameters()["stem.weight"].dtype == torch.float32


def test_a_half_precision_model_moves_by_less_than_its_last_bit():
    model = Net().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), 1e-5)
    excitation = ws.attach(model, optimizer, "lwe+mwe")
    before = {name: p.detach().clone() for name, p in excitation.named_parameters().items()}
    x, y = batches(1)[0]
    nn.functional.cross_entropy(model(x.bfloat16()), y).backward()
    optimizer.step()
    raw = excitation.named_parameters()["stem.weight"]
    moved = (raw != before["stem.weight"]).float().mean()
    assert moved > 0.9
    as_half = (raw.bfloat16() != before["stem.weight"].bfloat16()).float().mean()
    assert as_half < 0.5


REPLACEMENTS = {
    "another Parameter": lambda m: setattr(m.stem, "weight", nn.Parameter(m.stem.weight.clone())),
    "assign": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
    "prune": lambda m: prune.random_unstructured(m.stem, "weight", 0.5),
    "parametrize": lambda m: parametrize.register_parametrization(m.stem, "weight", nn.Identity()),
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m.stem),
}


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_another_parameter_in_the_place_of_the_weight_is_an_error(run, replace, zero):
    model, optimizer, _ = run
    replace(model)
    # Without `zero_grad` the old Parameter still has the last step's gradient.
    with pytest.raises(ws.AttachmentError, match="holds another Parameter"):
        steps(model, optimizer, 1, zero=zero)


HEADS = {"same": nn.Linear(12, 5), "deeper": nn.Sequential(nn.Dropout(), nn.Linear(12, 5))}


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_new_layer_in_the_place_of_an_excited_one_is_an_error(run, head, zero):
    model, optimizer, excitation = run
    model.head = copy.deepcopy(head)
    optimizer.add_param_group({"params": list(model.head.parameters())})
    with pytest.raises(ws.AttachmentError, match="'head' holds another Parameter") as caught:
        steps(model, optimizer, 1, zero=zero)
    assert "detach()" in caught.value.cure
    excitation.detach()
    optimizer = sgd(model)
    before = snapshot(model)
    ws.attach(model, optimizer, "lwe+mwe", init="preserve")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-5)
    steps(model, optimizer, 1)


def wrap(model):
    model.head = nn.Sequential(model.head)


def remove(model):
    model.head = nn.Identity()


@pytest.mark.parametrize("change", [wrap, remove])
def test_a_layer_that_is_wrapped_or_removed_is_no_error(run, change):
    model, optimizer, _ = run
    change(model)
    before = snapshot(model)
    steps(model, optimizer, 2)
    assert not same(before, model.state_dict())


CHANGES = {
    "in place": lambda weight: weight.grad.mul_(0.5),
    "assigned": lambda weight: setattr(weight, "grad", weight.grad * 0.5),
    "dropped": lambda weight: setattr(weight, "grad", None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_hook_that_changes_a_gradient_too_late_is_an_error(run, change):
    model, optimizer, _ = run
    before = snapshot(model)

    def edit(*_):
        change(model.stem.weight)

    hook = optimizer.register_step_pre_hook(edit)
    with pytest.raises(ws.AttachmentError, match="the gradient of layer 'stem'") as caught:
        go_on(model, optimizer)
    assert "param_groups" in caught.value.cure
    assert torch.equal(before["stem.weight"], model.stem.weight)
    hook.remove()
    go_on(model, optimizer)
    assert not torch.equal(before["stem.weight"], model.stem.weight)


def test_a_hook_over_the_groups_changes_the_gradients_of_the_raw_weights(run):
    model, optimizer, _ = run
    still = copy.deepcopy(model.state_dict())

    def clear(own, *_):
        for group in own.param_groups:
            group["weight_decay"] = group["momentum"] = 0
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.zero_()

    optimizer.register_step_pre_hook(clear)
    go_on(model, optimizer)
    assert torch.equal(still["stem.weight"], model.stem.weight)
