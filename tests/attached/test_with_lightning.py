"""Attached excitation in Lightning's real Trainer, by one callback."""

import copy
import pickle

import pytest
import torch
from equal_forms import Net, batches, loss_of, plain_step
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import we_surgery as ws

lightning = pytest.importorskip("lightning.pytorch")
lightning_fabric = pytest.importorskip("lightning.fabric")

from lightning.pytorch.callbacks import (  # noqa: E402
    BackboneFinetuning,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from we_surgery.training.lightning import WeightExcitation  # noqa: E402

pytestmark = [
    # Lightning's own use of what torch has deprecated, and its advice on loaders.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

MODE = "lwe+mwe"
STEPS = 3
"""In an epoch."""


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.losses: list[float] = []

    def training_step(self, batch, index):
        loss = loss_of(self.net, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.01)


class Validated(Module):
    def validation_step(self, batch, index):
        return loss_of(self.net, batch)


@pytest.mark.parametrize("is_set_up_first", [True, False])
def test_fabric(is_set_up_first):
    torch.manual_seed(0)
    plain, fabric = Net(), lightning_fabric.Fabric(accelerator="cpu", devices=1)
    model = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) for net in (plain, model)]
    wrapped, outer = fabric.setup(model, optimizers[1]) if is_set_up_first else (model, None)
    torch.manual_seed(1)
    excitation = ws.attach(wrapped, outer or optimizers[1], MODE)
    torch.manual_seed(1)
    ws.attach(plain, optimizers[0], MODE)
    if outer is None:
        wrapped, outer = fabric.setup(model, optimizers[1])
    for batch in batches(STEPS):
        plain_step(optimizers[0], plain, batch, 0)
        outer.zero_grad()
        fabric.backward(loss_of(wrapped, batch))
        outer.step()
    assert next(iter(excitation.named_parameters())) == "stem.weight"
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


class Normed(Module):
    """SWA runs one more epoch without backward for the norms' statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.net.norm = nn.BatchNorm2d(8)


class Manual(Module):
    automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Two(Manual):
    """The stem has an optimizer of its own."""

    def configure_optimizers(self):
        stem, rest = list(self.net.stem.parameters()), list(self.net.parameters())[1:]
        return torch.optim.SGD(stem, 0.1), torch.optim.AdamW(rest, 0.01)

    def training_step(self, batch, index):
        loss = Module.training_step(self, batch, index)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


def module(kind=Module):
    torch.manual_seed(0)
    return kind()


def loader():
    x, y = zip(*batches(STEPS), strict=True)
    return DataLoader(TensorDataset(torch.cat(x), torch.cat(y)), batch_size=6)


def fit(net, folder, *callbacks, epochs=2, ckpt_path=None, **options):
    trainer = lightning.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"enable_checkpointing": False, **options},
    )
    torch.manual_seed(1)
    trainer.fit(
        net, loader(), loader() if isinstance(net, Validated) else None, ckpt_path=ckpt_path
    )
    return trainer


def attached(**options):
    return WeightExcitation(MODE, form="attached", **options)


def own_loop(epochs=2):
    """The same training without Lightning, and its losses."""
    net = module()
    optimizer = net.configure_optimizers()
    torch.manual_seed(1)
    ws.attach(net, optimizer, MODE)
    return net, [plain_step(optimizer, net.net, b, 0) for _ in range(epochs) for b in loader()]


def assert_same(one, other):
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("kind", [Module, Manual])
def test_it_is_the_training_of_a_loop_of_ones_own(kind, tmp_path):
    expected, losses = own_loop()
    net = module(kind)
    callback = attached()
    fit(net, tmp_path, callback)
    assert net.losses == losses
    assert_same(expected, net)
    assert callback.excitation.steps == 2 * STEPS
    assert type(net.net.stem) is nn.Conv2d


def test_two_optimizers(tmp_path):
    net = module(Two)
    before = copy.deepcopy(net)
    callback = attached()
    fit(net, tmp_path, callback)
    assert "net.stem.weight" in callback.excitation.named_parameters()
    assert callback.excitation.steps == 2 * STEPS
    changed = [n for n, p in net.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert len(changed) == len(list(net.parameters()))


def test_checkpoints_are_vanilla_and_resume_to_the_bit(tmp_path):
    straight = module()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(straight, tmp_path, attached(), saving, enable_checkpointing=True)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch=0.ckpt", "epoch=1.ckpt"}
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == module().state_dict().keys()
    resumed = module()
    with torch.no_grad():
        resumed.net.stem.weight.mul_(3)
    fit(resumed, tmp_path, attached(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.losses == straight.losses[STEPS:]
    assert_same(straight, resumed)
    # Lightning alone opens it with the trained weights.
    opened = Module.load_from_checkpoint(tmp_path / "epoch=1.ckpt")
    assert_same(straight, opened)


def test_a_vanilla_checkpoint_is_not_excited_in_silence(tmp_path):
    trainer = fit(module(), tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "vanilla.ckpt")
    with pytest.raises(ws.AttachmentError, match="no state of the excitation"):
        fit(module(), tmp_path, attached(), ckpt_path=tmp_path / "vanilla.ckpt")


def test_an_attached_checkpoint_is_not_resumed_without_excitation(tmp_path):
    trainer = fit(module(), tmp_path, attached(), epochs=1)
    trainer.save_checkpoint(tmp_path / "attached.ckpt")
    with pytest.raises(ws.AttachmentError, match="no excitation attached"):
        fit(module(), tmp_path, ckpt_path=tmp_path / "attached.ckpt")


class Watching(lightning.Callback):
    """Keeps the weights after each batch that is trained on."""

    def __init__(self) -> None:
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append({n: p.detach().clone() for n, p in pl_module.net.named_parameters()})


@pytest.mark.parametrize("kind", [Module, Normed])
def test_swa_averages_the_excited_weights(kind, tmp_path):
    net, watching = module(kind), Watching()
    average = StochasticWeightAveraging(0.1, swa_epoch_start=2, annealing_epochs=1)
    callback = attached()
    fit(net, tmp_path, callback, average, watching, epochs=3)
    first, second = watching.weights[STEPS - 1], watching.weights[2 * STEPS - 1]
    for name, parameter in net.net.named_parameters():
        expected = (first[name] + second[name]) / 2
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
    assert callback.excitation.steps == 3 * STEPS
    fit(net, tmp_path, attached(), epochs=1)


def test_ema_averages_the_excited_weights(tmp_path):
    net, watching = module(Validated), Watching()
    fit(net, tmp_path, attached(), EMAWeightAveraging(decay=0.75), watching)
    expected = watching.weights[0]
    for weights in watching.weights[1:]:
        expected = {n: v * 0.75 + weights[n] * 0.25 for n, v in expected.items()}
    for name, parameter in net.net.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)


def test_an_average_resumes_to_the_bit(tmp_path):
    straight, resumed = module(Validated), module(Validated)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    ema = EMAWeightAveraging(decay=0.75)
    fit(straight, tmp_path, attached(), ema, saving, enable_checkpointing=True)
    ema = EMAWeightAveraging(decay=0.75)
    fit(resumed, tmp_path, attached(), ema, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.losses == straight.losses[STEPS:]
    assert_same(straight, resumed)


def test_a_second_fit_goes_on(tmp_path):
    net = module()
    callback = attached()
    trainer = fit(net, tmp_path, callback, EMAWeightAveraging(decay=0.75), epochs=1)
    raw = callback.excitation.named_parameters()["net.mix.weight"]
    before = raw.detach().clone()
    trainer.fit_loop.max_epochs = 2
    first = trainer.optimizers[0]
    trainer.fit(net, loader())
    assert trainer.optimizers[0] is not first
    assert callback.excitation.named_parameters()["net.mix.weight"] is raw
    assert not torch.equal(raw, before)
    fit(net, tmp_path, attached(), epochs=1)  # another Trainer and another callback
    assert len(net.losses) == 3 * STEPS
    assert callback.excitation.steps == 3 * STEPS


def test_only_a_new_callback_goes_into_spawned_processes(tmp_path):
    callback = attached(start_epoch=1)
    assert pickle.loads(pickle.dumps(callback)).start_epoch == 1
    fit(module(), tmp_path, callback, epochs=1)
    with pytest.raises(ws.InputError, match="has attached an excitation in this process"):
        pickle.dumps(callback)


def test_the_learning_rate_finder_leaves_no_trace(tmp_path):
    expected = module()
    fit(expected, tmp_path, attached(), epochs=1)
    net = module()
    net.learning_rate = 0.1
    finder = LearningRateFinder(num_training_steps=4, update_attr=False)
    fit(net, tmp_path, attached(), finder, epochs=1)
    assert net.losses[-STEPS:] == expected.losses
    assert_same(expected, net)


def test_thawed_layers_are_excited_by_extend(tmp_path):
    callback = attached()

    class Thawing(BackboneFinetuning):
        def on_train_epoch_start(self, trainer, pl_module):
            super().on_train_epoch_start(trainer, pl_module)
            if trainer.current_epoch == 1:
                assert callback.excitation.extend() == 1

    class Finetuned(Module):
        def __init__(self):
            super().__init__()
            self.backbone = self.net.stem

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)

    net = module(Finetuned)
    thawing = Thawing(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01)
    fit(net, tmp_path, callback, thawing)
    assert any("stem" in name for name in callback.excitation.named_parameters())


def test_it_sets_in_at_an_epoch_also_when_resumed(tmp_path):
    straight, resumed = module(), module()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    callback = attached(start_epoch=1)
    fit(straight, tmp_path, callback, saving, epochs=3, enable_checkpointing=True)
    weights = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    raws = weights["optimizer_states"][0]["state"]["we_surgery"]["weights"]
    assert torch.equal(raws["net.mix.weight"]["raw"], weights["state_dict"]["net.mix.weight"])
    raw = callback.excitation.named_parameters()["net.mix.weight"]
    assert not torch.equal(raw, straight.net.mix.weight)
    for epoch in (0, 1):
        resumed = module()
        path = tmp_path / f"epoch={epoch}.ckpt"
        fit(resumed, tmp_path, attached(start_epoch=1), epochs=3, ckpt_path=path)
        assert resumed.losses == straight.losses[STEPS * (epoch + 1) :]
        assert_same(straight, resumed)


def test_a_submodule_alone(tmp_path):
    net = module()
    net.extra = nn.Linear(2, 2)
    callback = attached(submodule="net")
    fit(net, tmp_path, callback, epochs=1)
    assert "mix.weight" in callback.excitation.named_parameters()


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ws.InputError, match="there is no form 'atached'; did you mean 'attached'"):
        WeightExcitation(form="atached")
    with pytest.raises(ws.InputError, match="transplants change"):
        fit(module(), tmp_path, attached(transplants=["max_dropout"]))
