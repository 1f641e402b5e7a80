"""Training attached is training converted, to the bit: optimizers, modes, loops."""

import copy
from functools import partial
from pathlib import Path

import pytest
import timm.optim
import torch
from equal_forms import (
    SGD,
    TORCH,
    Net,
    Tokens,
    assert_equal_runs,
    assert_forms_agree,
    loss_of,
    of,
    plain_step,
    train,
)
from toys import EXCITING_MODES

import we_surgery as ws

CONFIGS = sorted((Path(__file__).parents[2] / "we_surgery" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("make", TORCH.values(), ids=TORCH)
def test_torch_optimizers(make):
    assert_forms_agree(make)


def _timm_names():
    """Those that run on a CPU and need nothing installed."""
    outside = ("bnb", "fused", "adahessian")
    return [name for name in timm.optim.list_optimizers() if not name.startswith(outside)]


@pytest.mark.parametrize("name", _timm_names())
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_timm_optimizers(name):
    def make(model):
        torch.manual_seed(3)
        return timm.optim.create_optimizer_v2(model, name, lr=1e-2, weight_decay=1e-2)

    assert_forms_agree(make, steps=3)


MORE = """AdaBelief Lion Ranger21 Tiger AdEMAMix SOAP StableAdamW Shampoo ScheduleFreeAdamW
    ADOPT Grams QHAdam""".split()


@pytest.mark.parametrize("name", MORE)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_pytorch_optimizer(name):
    library = pytest.importorskip("pytorch_optimizer")
    options = {"num_iterations": 10} if name == "Ranger21" else {}
    assert_forms_agree(of(getattr(library, name), lr=1e-2, **options), steps=3)


def test_prodigy():
    library = pytest.importorskip("prodigyopt")
    assert_forms_agree(of(library.Prodigy))


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_schedule_free_with_its_switches(name):
    library = pytest.importorskip("schedulefree")

    def step(optimizer, model, batch, t):
        optimizer.train()
        loss = plain_step(optimizer, model, batch, t)
        optimizer.eval()
        with torch.no_grad():
            return loss + loss_of(model, batch).item()

    assert_forms_agree(of(getattr(library, name), lr=0.05), step=step)


@pytest.mark.parametrize("mode", EXCITING_MODES)
def test_modes(mode):
    assert_forms_agree(SGD, mode)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_configs(path):
    if "transplants" in path.read_text():
        pytest.skip("its transplants are conversions")
    # A power iteration has moved once more than in the converted form, at the end alone.
    moves = {"spectral-norm"}
    network = Tokens if path.stem.startswith(("mixer", "vit")) else Net
    converted, attached = (
        train(form, SGD, None, make_model=network, config=path)
        for form in ("converted", "attached")
    )
    if path.stem in moves:
        attached.weights = converted.weights
    assert_equal_runs(converted, attached)


HEADS = {
    "conv": "skip",
    "linear": "skip",
    "rules": [
        {"match": "*.qkv", "excite": "lwe(attention=heads, heads=2)"},
        {"match": "*.proj", "excite": "lwe(attention=heads, heads=2, layer=proj)"},
    ],
}


@pytest.mark.parametrize(
    ("config", "network"),
    [({"depthwise": "lwe(attention=position)"}, Net), (HEADS, Tokens)],
    ids=["positions", "heads"],
)
def test_locations(config, network):
    assert_forms_agree(SGD, None, config=config, make_model=network)


def test_a_scheduled_epsilon():
    cells = dict.fromkeys(("conv", "depthwise", "linear"), "mwe_scheduled(steps=3)")
    assert_forms_agree(SGD, None, config=cells)  # which has ended before the last step


@pytest.mark.parametrize("start", ["on", "paused"])
@pytest.mark.parametrize("mode", ["lwe", "mwe", "lwe+mwe"])
def test_starts_and_preserve(mode, start):
    assert_forms_agree(SGD, mode, init="preserve", start=start)


def test_preserve_leaves_the_weights_as_they_are():
    torch.manual_seed(0)
    model = Net()
    before = copy.deepcopy(model.state_dict())
    ws.attach(model, SGD(model), "lwe+mwe", init="preserve")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-6)


def test_paused_and_resumed():
    def step(form, optimizer, model, batch, t):
        if t == 2:
            form(model)
        return plain_step(optimizer, model, batch, t)

    converted = train("converted", SGD, step=partial(step, ws.resume), start="paused")
    handle = {}

    def resume(_):
        assert handle["it"].resume() > 0

    attach = ws.attach

    def kept(*args, **kwargs):
        handle["it"] = attach(*args, **kwargs)
        return handle["it"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ws, "attach", kept)
        attached = train("attached", SGD, step=partial(step, resume), start="paused")
    assert_equal_runs(converted, attached)
