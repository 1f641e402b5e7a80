"""The Lightning callback on the real Trainer."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, TensorDataset
from toys import EVERYTHING, ConvNet, is_vanilla

import we_surgery as ws
from we_surgery.cli import strip_command
from we_surgery.converted.graphs import excited_weights
from we_surgery.converted.layer import ExcitedLayer
from we_surgery.converted.state import is_converted
from we_surgery.excitations.record import is_record, read_record

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import (  # noqa: E402
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
)

from we_surgery.training.lightning import WeightExcitation  # noqa: E402

pytestmark = [
    # Lightning's own use of what torch has deprecated, and its advice on loaders.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Network(lightning.LightningModule):
    """A network, and a loss with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()
        self.loss = nn.Linear(5, 1)

    def training_step(self, batch, index):
        loss = self.loss(self.net(batch[0])).square().mean()
        self.log("loss", loss)
        return loss

    test_step = training_step

    def configure_optimizers(self):
        return torch.optim.AdamW(ws.param_groups(self, 0.01), lr=1e-2)


def batches() -> DataLoader:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(8, 3, 8, 8)), batch_size=2)


def trainer(folder: Path, *callbacks, epochs: int = 1, **options):
    return lightning.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def test_it_converts_before_the_optimizer_is_made_and_strips_each_checkpoint(tmp_path):
    excitation = WeightExcitation(config=EVERYTHING, submodule="net")
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    run = trainer(tmp_path, saving, excitation, epochs=2)
    module = network()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    run.fit(module, batches())
    assert is_converted(module.net)
    assert type(module.loss) is nn.Linear
    held = {id(p) for g in run.optimizers[0].param_groups for p in g["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert not torch.equal(module.net.stem.raw_weight, before["net.stem.weight"])
    for epoch in (0, 1):
        deployed = ConvNet()
        deployed.load_state_dict(load_file(tmp_path / f"epoch={epoch}.stripped.safetensors"))
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        module.load_state_dict(saved)
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(deployed.eval()(x), module.net.eval()(x))
    vanilla = Network()
    vanilla.load_state_dict(ws.strip_state_dict(torch.load(tmp_path / "epoch=1.ckpt")))


def test_a_pretrained_network_starts_as_what_it_is(tmp_path):
    module = network()
    x = torch.randn(2, 3, 8, 8)
    expected = module.net.eval()(x)
    callback = WeightExcitation(config=EVERYTHING, submodule="net", init="preserve")
    run = trainer(tmp_path, callback, enable_checkpointing=False)
    callback.setup(run, module, "fit")
    assert is_converted(module.net)
    torch.testing.assert_close(module.net(x), expected, rtol=1e-5, atol=1e-5)


def test_the_whole_module_is_converted_by_default(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="last")
    module = network()
    trainer(tmp_path, WeightExcitation("mwe"), saving).fit(module, batches())
    assert type(module.loss) is not nn.Linear
    Network().load_state_dict(load_file(tmp_path / "last.stripped.safetensors"))


def test_a_removed_checkpoints_stripped_file_goes_with_it(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="epoch_number", mode="max")

    class Counting(Network):
        def on_train_epoch_end(self):
            self.log("epoch_number", float(self.current_epoch))

    trainer(tmp_path, WeightExcitation(), saving, epochs=3).fit(Counting(), batches())
    assert {path.name for path in tmp_path.iterdir()} == {
        "epoch=2.ckpt",
        "epoch=2.stripped.safetensors",
    }


def test_training_resumes_where_it_was(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    straight = network()
    torch.manual_seed(5)
    trainer(tmp_path, WeightExcitation(), saving, epochs=2).fit(straight, batches())
    resumed = network()
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(saved["net.stem.raw_weight"], straight.net.stem.raw_weight)
    again = ModelCheckpoint(tmp_path / "again", filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, WeightExcitation(), again, epochs=2).fit(
        resumed, batches(), ckpt_path=tmp_path / "epoch=0.ckpt"
    )
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_testing_converts_only_for_a_converted_checkpoint(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="last")
    fitted = network()
    trainer(tmp_path, WeightExcitation(), saving).fit(fitted, batches())
    fresh = network()
    expected = trainer(tmp_path).test(fitted, batches(), verbose=False)
    run = trainer(tmp_path, WeightExcitation(), ModelCheckpoint(tmp_path))
    found = run.test(fresh, batches(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert is_converted(fresh)
    assert found == expected
    vanilla = network()
    trainer(tmp_path, WeightExcitation()).test(vanilla, batches(), verbose=False)
    assert is_vanilla(vanilla)


def test_averaged_weights_are_what_is_stripped(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="last")
    module = network()
    averaging = EMAWeightAveraging(decay=0.5)
    trainer(tmp_path, WeightExcitation(submodule="net"), averaging, saving).fit(module, batches())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    averaged = ws.strip_state_dict(checkpoint)
    trained = ws.strip_state_dict(checkpoint, key="current_model_state")
    side = load_file(tmp_path / "last.stripped.safetensors")
    for state in (averaged, trained):
        Network().load_state_dict(state)
    assert torch.equal(side["stem.weight"], averaged["net.stem.weight"])
    assert not torch.equal(side["stem.weight"], trained["net.stem.weight"])


def paused_count(model: nn.Module) -> int:
    return sum(weight.excitation.is_paused for weight in excited_weights(model))


def test_excitation_sets_in_at_its_epoch_in_the_average_too_and_the_run_resumes(tmp_path):
    class Watched(Network):
        def on_train_epoch_start(self):
            self.paused = [*getattr(self, "paused", []), paused_count(self)]

    def fit(folder, epochs: int = 4, **options) -> tuple[Network, nn.Module]:
        torch.manual_seed(0)
        module, averaging = Watched(), EMAWeightAveraging(decay=0.5)
        excitation = WeightExcitation(config=EVERYTHING, submodule="net", start_epoch=2)
        saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        run = trainer(tmp_path, excitation, averaging, saving, epochs=epochs)
        run.fit(module, batches(), **options)
        return module

    straight = fit(tmp_path / "straight")
    everything = paused_count(ws.convert(ConvNet(), config=EVERYTHING, start="paused"))
    assert straight.paused == [everything, everything, 0, 0]
    for epoch, found in enumerate((everything, everything, 0, 0)):
        checkpoint = torch.load(tmp_path / "straight" / f"epoch={epoch}.ckpt", weights_only=True)
        for key in ("state_dict", "current_model_state"):
            records = [read_record(v) for k, v in checkpoint[key].items() if is_record(k)]
            assert sum(bool(record["paused"]) for record in records) == found
            ConvNet().load_state_dict(
                {
                    name.removeprefix("net."): value
                    for name, value in ws.strip_state_dict(checkpoint, key=key).items()
                    if name.startswith("net.")
                }
            )
    for epoch in (1, 2):
        path = tmp_path / "straight" / f"epoch={epoch}.ckpt"
        resumed = fit(tmp_path / f"resumed {epoch}", ckpt_path=path)
        assert resumed.paused == straight.paused[epoch + 1 :]
        for name, value in straight.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_command_strips_a_checkpoint_with_hyperparameters(tmp_path):
    class Configured(Network):
        def __init__(self, width: int = 3, options: tuple = (1, "a")) -> None:
            super().__init__()
            self.save_hyperparameters()

    saving = ModelCheckpoint(tmp_path, filename="last", monitor="loss")
    trainer(tmp_path, WeightExcitation(strip_checkpoints=False), saving).fit(
        Configured(), batches()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    done = CliRunner().invoke(strip_command, [str(tmp_path / "last.ckpt")])
    assert done.exit_code == 0, done.output
    stripped = torch.load(tmp_path / "last.stripped.ckpt", weights_only=True)
    Network().load_state_dict(stripped, strict=True)


def test_a_callback_that_has_copied_the_vanilla_model_is_named(tmp_path):
    run = trainer(tmp_path, EMAWeightAveraging(), WeightExcitation(), enable_checkpointing=False)
    with pytest.raises(ws.InputError, match="EMAWeightAveraging has copied the model") as caught:
        run.fit(network(), batches())
    assert "before it" in caught.value.cure


class FreezesFirst(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net.stem)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.stem, optimizer)


def test_a_callback_that_freezes_before_the_conversion_is_named_and_may_come_after_it(tmp_path):
    run = trainer(tmp_path, FreezesFirst(), WeightExcitation(), enable_checkpointing=False)
    with pytest.raises(ws.InputError, match="FreezesFirst has frozen layers") as caught:
        run.fit(network(), batches())
    assert "before it" in caught.value.cure

    class Trainable(Network):
        def configure_optimizers(self):
            return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)

    module = Trainable()
    callbacks = (WeightExcitation(), FreezesFirst())
    run = trainer(tmp_path, *callbacks, epochs=2, enable_checkpointing=False)
    run.fit(module, batches())
    assert isinstance(module.net.stem, ExcitedLayer)
    held = {id(p) for g in run.optimizers[0].param_groups for p in g["params"]}
    assert {id(p) for p in module.net.stem.parameters()} <= held


def in_children(tmp_path, strategy):
    options = {"strategy": strategy, "enable_checkpointing": False}
    return trainer(tmp_path, WeightExcitation(submodule="net"), **options)


def test_child_processes_are_refused(tmp_path):
    with pytest.raises(ProcessRaisedException, match="the strategy trains in child processes"):
        in_children(tmp_path, "ddp_fork").fit(network(), batches())


@pytest.mark.slow
def test_a_network_that_is_converted_before_comes_back_trained_from_a_child_process(tmp_path):
    module = network()
    ws.convert(module.net, inplace=True)
    before = module.net.stem.raw_weight.detach().clone()
    # Spawned: autograd does not run in a fork of a process that has used it.
    in_children(tmp_path, "ddp_spawn").fit(module, batches())
    assert not torch.equal(module.net.stem.raw_weight, before)


def test_what_cannot_be_stripped_is_warned_of_and_training_goes_on(tmp_path):
    class Diverging(Network):
        def on_train_epoch_end(self):
            self.net.stem.raw_weight.data.fill_(float("nan"))

    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    run = trainer(tmp_path, WeightExcitation(), saving, epochs=1)
    with pytest.warns(UserWarning, match=r"no stripped file was written beside .*epoch=0.ckpt"):
        run.fit(Diverging(), batches())
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0.ckpt"]


def test_an_unknown_submodule_and_a_model_without_layers_are_named(tmp_path):
    run = trainer(tmp_path, WeightExcitation(submodule="nte"), enable_checkpointing=False)
    with pytest.raises(ws.InputError, match="no submodule 'nte'") as caught:
        run.fit(network(), batches())
    assert "net, loss" in caught.value.cure

    class Late(lightning.LightningModule):
        def configure_model(self):
            self.net = nn.Linear(2, 2)

        training_step = Network.training_step
        configure_optimizers = Network.configure_optimizers

    run = trainer(tmp_path, WeightExcitation(), enable_checkpointing=False)
    with pytest.raises(ws.InputError, match="has converted nothing"):
        run.fit(Late(), batches())
