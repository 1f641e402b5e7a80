"""Training attached is training converted, to the bit: closures, scalers, schedules, wrappers."""

from functools import partial

import pytest
import torch
from equal_forms import (
    SGD,
    TORCH,
    Net,
    O,
    assert_equal_runs,
    assert_forms_agree,
    batches,
    loss_of,
    of,
    plain_step,
    train,
)
from timm.optim import Lookahead

import we_surgery as ws
from we_surgery.excitations.spectral_norm import SpectralNorm


def closure_step(optimizer, model, batch, _):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return optimizer.step(closure).item()


@pytest.mark.parametrize("name", ["sgd momentum", "adam", "adamw fused", "rmsprop", "adafactor"])
def test_closures(name):
    assert_forms_agree(TORCH[name], step=closure_step)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs(search):
    make = of(O.LBFGS, 0.1, max_iter=4, history_size=3, line_search_fn=search)
    converted = _lbfgs("converted", make)
    assert_equal_runs(converted, _lbfgs("attached", make))


def _lbfgs(form, make):
    """LBFGS takes no more parameters once it is made, so that it is made of all of them."""
    if form == "attached":
        return train(form, make, step=closure_step, steps=3)
    late = {}

    def step(optimizer, model, batch, t):
        if "optimizer" not in late:
            stand_in = optimizer.param_groups[0]["params"]
            late["optimizer"] = make(_Holder(stand_in))
        return closure_step(late["optimizer"], model, batch, t)

    return train(form, of(O.SGD, 0.1), step=step, steps=3)


class _Holder:
    def __init__(self, params):
        self.parameters = lambda: params


class SAM(O.Optimizer):
    """As the widespread implementation is built: around another optimizer, in two halves."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old"] = p.data.clone()
                    p.add_(p.grad * (group["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


def sam(model):
    return SAM(model.parameters(), O.SGD, lr=0.1, momentum=0.9)


def test_sam_in_two_steps():
    def step(optimizer, model, batch, _):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.first_step(zero_grad=True)
        loss_of(model, batch).backward()
        optimizer.second_step(zero_grad=True)
        return loss.item()

    assert_forms_agree(sam, step=step)


def test_sam_with_a_closure():
    def step(optimizer, model, batch, _):
        def closure():
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        loss = closure()
        optimizer.step(closure)
        optimizer.zero_grad()
        return loss.item()

    assert_forms_agree(sam, step=step)


@pytest.mark.parametrize("zeroed_first", [False, True])
def test_lookahead_with_sync(zeroed_first):
    def make(model):
        optimizer = Lookahead(O.AdamW(model.parameters(), 1e-2), k=2)
        if zeroed_first:
            optimizer.zero_grad()
        return optimizer

    def step(optimizer, model, batch, t):
        loss = plain_step(optimizer, model, batch, t)
        if t == 2:
            optimizer.sync_lookahead()
        return loss

    assert_forms_agree(make, step=step)


def test_accumulation_is_equal_to_rounding():
    def step(optimizer, model, batch, t):
        loss = loss_of(model, batch) / 2
        loss.backward()
        if t % 2:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    converted, attached = (
        train(form, of(O.SGD, 0.1), step=step, steps=6) for form in ("converted", "attached")
    )
    assert attached.losses == pytest.approx(converted.losses, rel=1e-6)


@pytest.mark.parametrize("name", ["sgd momentum", "adamw", "adamw fused"])
def test_a_grad_scaler_that_skips_a_step(name):
    def step(scaler, optimizer, model, batch, t):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        scaler.scale(loss * (float("inf") if t == 2 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    converted, attached = (
        train(form, TORCH[name], step=partial(step, torch.amp.GradScaler("cpu", init_scale=4.0)))
        for form in ("converted", "attached")
    )
    # The loss after the skipped step is that of the batch alone.
    assert attached.losses == converted.losses
    for key, value in converted.weights.items():
        assert torch.equal(value, attached.weights[key]), key


def test_autocast():
    def step(optimizer, model, batch, _):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    # A tied Parameter is cast once for all its layers, and W' of a converted model for each.
    assert_forms_agree(SGD, step=step, make_model=partial(Net, is_tied=False))


@pytest.mark.parametrize("is_made_first", [True, False])
def test_schedules(is_made_first):
    schedules = {}

    def make(model):
        optimizer = O.SGD(model.parameters(), 0.1, momentum=0.9)
        if is_made_first:
            schedules[id(optimizer)] = O.lr_scheduler.StepLR(optimizer, 2, 0.1)
        return optimizer

    def step(optimizer, model, batch, t):
        if not is_made_first and t == 0:
            schedules[id(optimizer)] = O.lr_scheduler.StepLR(optimizer, 2, 0.1)
        loss = plain_step(optimizer, model, batch, t)
        schedules[id(optimizer)].step()
        return loss

    assert_forms_agree(make, step=step)


def test_groups_with_and_without_decay_and_names():
    def make(model):
        named = list(model.named_parameters())
        return O.AdamW(
            [
                {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": 0.1},
                {"params": [(n, p) for n, p in named if p.ndim <= 1], "weight_decay": 0.0},
            ],
            1e-2,
        )

    assert_forms_agree(make)


def clipped_step(optimizer, model, batch, _):
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    return loss.item()


def test_clipping_acts_on_other_gradients_unless_raw_ones_are_clipped():
    make = of(O.SGD, 0.1)
    converted = train("converted", make, step=clipped_step)
    outside = train("attached", make, step=clipped_step)
    inside = train("attached", make, clip_raw=0.05)
    assert inside.losses == pytest.approx(converted.losses, rel=1e-6)
    assert outside.losses != pytest.approx(converted.losses, rel=1e-4)


def test_raw_gradients_are_clipped_the_same_where_the_optimizer_unscales_them():
    losses = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=fused)
        ws.attach(model, optimizer, "lwe+mwe", clip_raw=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for batch in batches(4):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    assert losses[4:] == pytest.approx(losses[:4], rel=1e-6)


def test_kernels_work_on_all_layers_at_once(launches):
    config = {"mode": "lwe+mwe", "standardize": "on"}  # LWE and MWE, and MWE alone
    torch.manual_seed(0)
    model = Net()
    optimizer = O.SGD(model.parameters(), 0.1)
    torch.manual_seed(1)
    ws.attach(model, optimizer, config=config, backend="triton")
    losses = []
    for batch in batches(3):
        launches.clear()
        losses.append(plain_step(optimizer, model, batch, 0))
        assert len(launches) == len(set(launches)) == 7, launches
    eager = train("attached", of(O.SGD, 0.1), None, config=config, steps=3)
    assert losses == pytest.approx(eager.losses, rel=1e-4)


def test_a_power_iteration_moves_once_per_step(monkeypatch):
    moved = []
    iterate = SpectralNorm._iterate

    def counted(self, weight, steps):
        moved.append(steps)
        iterate(self, weight, steps)

    torch.manual_seed(0)
    model = Net()
    optimizer = O.SGD(model.parameters(), 0.1)
    ws.attach(model, optimizer, config={"conv": "spectral_norm", "linear": "skip"})
    monkeypatch.setattr(SpectralNorm, "_iterate", counted)
    for batch in batches(3):  # micro-batches
        loss_of(model, batch).backward()
    assert not moved
    optimizer.step()
    assert moved == [1, 1]  # of the stem and of the 1x1 conv


def test_several_optimizers():
    """One per half of the model, against one over all of it."""
    torch.manual_seed(0)
    model = Net()
    half = [*model.stem.parameters(), *model.norm.parameters(), *model.depthwise.parameters()]
    rest = [p for p in model.parameters() if not any(p is q for q in half)]
    both = [O.SGD(half, 0.1, momentum=0.9), O.SGD(rest, 0.1, momentum=0.9)]
    torch.manual_seed(1)
    ws.attach(model, both, "lwe+mwe")
    losses = []
    for batch in batches():
        loss = loss_of(model, batch)
        loss.backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == train("attached", of(O.SGD, 0.1, momentum=0.9)).losses


def test_a_step_in_each_backward_hook():
    torch.manual_seed(0)
    model = Net()
    own = {p: O.SGD([p], 0.1, momentum=0.9) for p in model.parameters()}

    def move(parameter):
        own[parameter].step()
        own[parameter].zero_grad()

    for parameter in own:
        parameter.register_post_accumulate_grad_hook(move)
    torch.manual_seed(1)
    ws.attach(model, own, "lwe+mwe")
    losses = []
    for batch in batches():
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.item())
    assert losses == train("attached", of(O.SGD, 0.1, momentum=0.9)).losses


def test_a_layer_without_a_gradient_in_a_step_is_left_alone():
    def step(optimizer, model, batch, t):
        model.stem.weight.requires_grad_(t != 2)
        return plain_step(optimizer, model, batch, t)

    run = train("attached", SGD, step=step)
    assert len(set(run.losses)) == len(run.losses)
