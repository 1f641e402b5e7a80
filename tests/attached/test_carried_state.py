"""The excitation's state rides in the optimizer's, and a run goes on to the bit."""

import copy
import io
import logging

import pytest
import torch
from equal_forms import Net, batches, loss_of, plain_step
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import we_surgery as ws
from we_surgery.attached.registry import STATE_KEY


def adamw(model):
    return torch.optim.AdamW(model.parameters(), 1e-2)


def started(seed, mode="lwe+mwe", make=adamw, **options):
    torch.manual_seed(seed)
    model = Net()
    optimizer = make(model)
    return model, optimizer, ws.attach(model, optimizer, mode, **options)


def trained(model, optimizer, parts):
    return [plain_step(optimizer, model, batch, 0) for batch in parts]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def halfway():
    """A checkpoint after three of six steps, and the losses of the other three."""
    model, optimizer, _ = started(0)
    trained(model, optimizer, batches(6)[:3])
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved = through_a_file(saved)
    losses = trained(model, optimizer, batches(6)[3:])
    return saved, losses, copy.deepcopy(model.state_dict())


def assert_goes_on(model, optimizer, halfway):
    _, losses, final = halfway
    assert trained(model, optimizer, batches(6)[3:]) == losses
    for name, value in model.state_dict().items():
        assert torch.equal(value, final[name]), name


def half(model):
    return torch.optim.AdamW(model.bfloat16().parameters(), 1e-2)


@pytest.mark.parametrize("state", ["optimizer", "parameter", "separate"])
@pytest.mark.parametrize("first", ["model", "optimizer", "attach"])
def test_a_half_precision_run_goes_on_to_the_bit(first, state):
    parts = [(images.bfloat16(), labels) for images, labels in batches(6)]
    model, optimizer, excitation = started(0, make=half, state=state)
    trained(model, optimizer, parts[:3])
    saved = through_a_file((model.state_dict(), optimizer.state_dict(), excitation.state_dict()))
    losses = trained(model, optimizer, parts[3:])

    other = Net()
    twin = half(other)
    if first == "attach" or state == "parameter":
        handle = ws.attach(other, twin, "lwe+mwe", state=state)
    if first != "optimizer":
        other.load_state_dict(saved[0])
    twin.load_state_dict(saved[1])
    if first != "attach" and state != "parameter":
        resume = saved[2] if state == "separate" else True
        handle = ws.attach(other, twin, "lwe+mwe", state=state, resume=resume)
    elif state == "separate":
        handle.load_state_dict(saved[2])
    if first == "optimizer":
        other.load_state_dict(saved[0])
    assert trained(other, twin, parts[3:]) == losses
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    for name, value in excitation.named_parameters().items():
        assert torch.equal(value, handle.named_parameters()[name]), name


def test_a_half_precision_state_that_torch_has_cast_is_refused():
    model, optimizer, _ = started(0, make=half, state="parameter")
    trained(model, optimizer, [(images.bfloat16(), labels) for images, labels in batches(1)])
    other = Net()
    twin = half(other)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(ws.AttachmentError, match="has cast the excitation's state") as caught:
        ws.attach(other, twin, "lwe+mwe", state="parameter")
    assert "Attach first" in caught.value.cure


def test_a_vanilla_half_precision_run_is_excited_midway():
    parts = [(images.bfloat16(), labels) for images, labels in batches(4)]
    model = Net()
    optimizer = half(model)
    trained(model, optimizer, parts[:2])
    ws.attach(model, optimizer, "lwe+mwe", init="preserve", resume=False)
    trained(model, optimizer, parts[2:])
    assert optimizer.state[model.stem.weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[model.stem.weight]["step"] == 4


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_attached_before_the_state_is_loaded(halfway, order):
    model, optimizer, _ = started(9)
    saved = copy.deepcopy(halfway[0])
    if order == "model first":
        model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if order == "optimizer first":
        model.load_state_dict(saved["model"])
    assert_goes_on(model, optimizer, halfway)


def test_attached_after_the_state_was_loaded(halfway):
    torch.manual_seed(9)
    model = Net()
    optimizer = adamw(model)
    saved = copy.deepcopy(halfway[0])
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert STATE_KEY in optimizer.state
    ws.attach(model, optimizer, "lwe+mwe")
    assert STATE_KEY not in optimizer.state
    assert_goes_on(model, optimizer, halfway)


def test_loaded_and_never_attached_is_an_error(halfway):
    torch.manual_seed(9)
    model = Net()
    optimizer = adamw(model)
    optimizer.load_state_dict(copy.deepcopy(halfway[0]["optimizer"]))
    with pytest.raises(ws.AttachmentError, match="has no excitation attached"):
        trained(model, optimizer, batches(1))


def test_the_groups_that_are_saved_are_vanilla(halfway):
    model = Net()
    optimizer = adamw(model)
    trained(model, optimizer, batches(1))
    vanilla, saved = optimizer.state_dict(), halfway[0]["optimizer"]
    assert saved["param_groups"] == vanilla["param_groups"]
    assert set(saved["state"]) - set(vanilla["state"]) == {STATE_KEY}
    optimizer.load_state_dict(saved)  # a vanilla optimizer takes it


def test_separate_state(halfway):
    model, optimizer, excitation = started(0, state="separate")
    trained(model, optimizer, batches(6)[:3])
    saved = [model.state_dict(), optimizer.state_dict(), excitation.state_dict()]
    assert STATE_KEY not in saved[1]["state"]
    weights, states, own = through_a_file(saved)
    torch.manual_seed(9)
    model = Net()
    optimizer = adamw(model)
    model.load_state_dict(weights)
    optimizer.load_state_dict(states)
    ws.attach(model, optimizer, "lwe+mwe", resume=own, state="separate")
    assert_goes_on(model, optimizer, halfway)


def test_what_is_loaded_is_copied(halfway):
    model, optimizer, _ = started(9)
    saved = copy.deepcopy(halfway[0])
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    trained(model, optimizer, batches(2))
    kept = saved["optimizer"]["state"][STATE_KEY]["weights"]
    for name, weight in halfway[0]["optimizer"]["state"][STATE_KEY]["weights"].items():
        assert torch.equal(weight["raw"], kept[name]["raw"])
        for key, value in weight["excitation"].items():
            assert torch.equal(value, kept[name]["excitation"][key])


def test_a_model_that_holds_an_average_is_told_of_and_goes_on_from_raw(halfway, caplog):
    model, optimizer, _ = started(9)
    saved = copy.deepcopy(halfway[0])
    model.load_state_dict({name: value * 0.9 for name, value in saved["model"].items()})
    with caplog.at_level(logging.INFO):
        optimizer.load_state_dict(saved["optimizer"])
    assert "differed by up to" in caplog.text
    assert torch.equal(model.stem.weight, saved["model"]["stem.weight"])


def test_a_vanilla_state_is_not_loaded_into_an_attached_optimizer():
    vanilla = Net()
    other = adamw(vanilla)
    trained(vanilla, other, batches(1))
    _, optimizer, _ = started(0)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ws.AttachmentError, match="has no state of the excitation"):
        optimizer.load_state_dict(other.state_dict())
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize(
    ("mode", "message"), [("mwe", "other stages|of \\d+ weights"), ("lwe", "other stages|weights")]
)
def test_the_state_of_another_mode_is_refused(halfway, mode, message):
    model, optimizer, _ = started(9, mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ws.AttachmentError, match=message):
        optimizer.load_state_dict(copy.deepcopy(halfway[0]["optimizer"]))
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


@pytest.mark.parametrize("state", ["parameter", "separate"])
def test_torchs_own_functions_for_checkpoints_of_several_processes(halfway, state):
    model, optimizer, excitation = started(0, state=state)
    trained(model, optimizer, batches(6)[:3])
    saved = get_optimizer_state_dict(model, optimizer)
    parts = [own[STATE_KEY] for own in saved["state"].values() if STATE_KEY in own]
    assert len(parts) == (5 if state == "parameter" else 0)
    saved = copy.deepcopy([model.state_dict(), saved, excitation.state_dict()])
    model, optimizer, excitation = started(9, state=state)
    model.load_state_dict(saved[0])
    if state == "separate":
        excitation.load_state_dict(saved[2])
    set_optimizer_state_dict(model, optimizer, saved[1])
    assert_goes_on(model, optimizer, halfway)


@pytest.mark.parametrize("make", [adamw, lambda m: torch.optim.SGD(m.parameters(), 0.1)])
def test_state_beside_each_parameter_is_loaded_before_or_after_attach(make):
    model, optimizer, _ = started(0, state="parameter", make=make)
    trained(model, optimizer, batches(6)[:3])
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    by_name = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    expected = trained(model, optimizer, batches(6)[3:])

    model, optimizer, _ = started(9, state="parameter", make=make)
    model.load_state_dict(saved[0])
    set_optimizer_state_dict(model, optimizer, by_name)
    assert trained(model, optimizer, batches(6)[3:]) == expected

    model = Net()
    optimizer = make(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    with pytest.raises(ws.AttachmentError, match="has no excitation attached"):
        trained(model, optimizer, batches(1))
    optimizer.zero_grad()
    ws.attach(model, optimizer, "lwe+mwe")
    assert trained(model, optimizer, batches(6)[3:]) == expected


def test_the_converted_twin_computes_the_models_weights_and_trains_on(halfway):
    model, optimizer, excitation = started(0)
    trained(model, optimizer, batches(6)[:3])
    twin = excitation.converted()
    x = batches(1)[0][0]
    assert torch.equal(twin.eval()(x), model.eval()(x))
    assert type(twin.stem).__name__ == "WEConv2d"
    assert twin.tied.excitation is twin.tied_too.excitation
    deployed = ws.strip(twin, example_inputs=x)
    for name, value in deployed.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    trained(twin, adamw(twin), batches(1))
    assert torch.equal(model.eval()(x), deployed.eval()(x))


@pytest.mark.parametrize("mode", ["lwe+mwe", "thesis"])
def test_a_converted_run_goes_on_attached_and_an_attached_one_converted(mode):
    def plain_sgd(model):  # which has no state that would have to be translated
        return torch.optim.SGD(model.parameters(), 0.1)

    torch.manual_seed(0)
    converted = ws.convert(Net(), mode, inplace=True)
    trained(converted, plain_sgd(converted), batches(6)[:2])
    saved = through_a_file(converted.state_dict())
    expected = trained(converted, plain_sgd(converted), batches(6)[2:])

    model = Net()
    model.load_state_dict(ws.strip_state_dict(saved))
    optimizer = plain_sgd(model)
    before = copy.deepcopy(model.state_dict())
    excitation = ws.attach(model, optimizer, mode, resume=saved)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    twin = excitation.converted().state_dict()
    assert list(twin) == list(saved)
    assert all(torch.equal(value, twin[name]) for name, value in saved.items())
    assert trained(model, optimizer, batches(6)[2:4]) == expected[:2]

    twin = excitation.converted()
    assert trained(twin, plain_sgd(twin), batches(6)[4:]) == expected[2:]


@pytest.mark.parametrize(("there", "here"), [("lwe+mwe", "lwe"), ("lwe", "mwe")])
def test_a_converted_run_of_another_mode_is_refused(there, here):
    saved = ws.convert(Net(), there).state_dict()
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ws.AttachmentError, match=r"not excited here|other stages|weights"):
        ws.attach(model, adamw(model), here, resume=saved)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


@pytest.mark.parametrize("make", [adamw, lambda m: torch.optim.SGD(m.parameters(), 0.1)])
def test_paused_runs_resume_paused_or_excited(make):
    for resumed_at in (1, 4):
        model, optimizer, excitation = started(0, start="paused", make=make)
        for t, batch in enumerate(batches(6)[:3]):
            if t == resumed_at:
                excitation.resume()
            trained(model, optimizer, [batch])
        saved = through_a_file([model.state_dict(), optimizer.state_dict()])
        expected = trained(model, optimizer, batches(6)[3:])
        model, optimizer, again = started(9, start="paused", make=make)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        assert trained(model, optimizer, batches(6)[3:]) == expected
        assert (again.resume() == 0) is (resumed_at == 1)


def test_a_schedule_resumes_an_attached_excitation_at_its_epoch():
    model, _, excitation = started(0, start="paused")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    schedule = ws.WESchedule(excitation, 2)
    assert [schedule.step(epoch) for epoch in range(4)] == [False, False, True, False]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-5)
    assert ws.resume(started(0, start="paused")[2]) == 5


@pytest.mark.parametrize("is_attached_first", [True, False])
def test_each_of_several_optimizers_carries_its_own_weights(is_attached_first):
    def make(seed):
        torch.manual_seed(seed)
        model = Net()
        first = list(model.stem.parameters())
        rest = [p for p in model.parameters() if not any(p is q for q in first)]
        return model, [torch.optim.AdamW(part, 1e-2) for part in (first, rest)]

    def steps(model, optimizers, parts):
        losses = []
        for batch in parts:
            loss = loss_of(model, batch)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model, optimizers = make(0)
    ws.attach(model, optimizers, "lwe+mwe")
    steps(model, optimizers, batches(6)[:3])
    saved = through_a_file([model.state_dict(), *(o.state_dict() for o in optimizers)])
    assert set(saved[1]["state"][STATE_KEY]["weights"]) == {"stem.weight"}
    expected = steps(model, optimizers, batches(6)[3:])
    model, optimizers = make(9)
    if is_attached_first:
        ws.attach(model, optimizers, "lwe+mwe")
    model.load_state_dict(saved[0])
    for optimizer, state in zip(optimizers, saved[1:], strict=True):
        optimizer.load_state_dict(state)
    if not is_attached_first:
        ws.attach(model, optimizers, "lwe+mwe")
    assert steps(model, optimizers, batches(6)[3:]) == expected
