"""During a step the gradients of the raw weights lie in the memory of W', which then returns."""

import pytest
import torch
from attached_run import go_on, same, sgd, snapshot
from equal_forms import Net, batches, plain_step

import we_surgery as ws
from we_surgery.attached import transform


def watch(model, optimizer):
    """Of each step, which weights of the model hold a gradient of the optimizer's."""
    found = []

    def look(own, *_):
        places = {p.grad.data_ptr() for g in own.param_groups for p in g["params"] if p.ndim > 1}
        named = model.named_parameters(remove_duplicate=False)
        found.append({name for name, weight in named if weight.data_ptr() in places})

    optimizer.register_step_pre_hook(look)
    return found


@pytest.mark.parametrize("mode", ["lwe", "mwe", "lwe+mwe"])
def test_a_step_takes_no_memory_for_gradients(mode):
    torch.manual_seed(0)
    model = Net()
    optimizer = sgd(model)
    excitation = ws.attach(model, optimizer, mode)
    found = watch(model, optimizer)
    plain_step(optimizer, model, batches(1)[0], 0)
    excited = {".".join(filter(None, (r.module, r.parameter))) for r in excitation.plan.excited}
    assert excited
    assert found == [excited]
    assert same(ws.strip(excitation.converted()).state_dict(), model.state_dict())


def test_weights_that_another_process_may_read_never_hold_gradients(run):
    model, optimizer, _ = run
    model.share_memory()
    before = snapshot(model)
    found = watch(model, optimizer)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(same(before, model.state_dict())))
    go_on(model, optimizer)
    assert found == [set()]
    assert seen == [True]


def test_an_error_while_gradients_are_pulled_back_leaves_the_weights(run, monkeypatch):
    model, optimizer, _ = run
    before = snapshot(model)
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    whole = transform.pull_back_in_closed_form

    def fail(backend, jobs):
        whole(backend, jobs)
        assert not same(before, model.state_dict())
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(transform, "pull_back_in_closed_form", fail)
        with pytest.raises(MemoryError):
            go_on(model, optimizer)
    weights = {name: value for name, value in before.items() if name.endswith("weight")}
    assert same(weights, model.state_dict())
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == groups
    go_on(model, optimizer)
    assert not same(weights, model.state_dict())
