"""The transformers callback on the real Trainer, with tiny models of three kinds."""

import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toys import is_vanilla

import we_surgery as ws
from we_surgery.converted.graphs import excited_weights
from we_surgery.converted.state import is_converted

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from we_surgery.training.transformers import WeightExcitation  # noqa: E402

MODELS = {
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    ),
    "convnext v2": lambda: ConvNextV2ForImageClassification(
        ConvNextV2Config(
            num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=32, num_labels=3
        )
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=16,
            num_labels=3,
        )
    ),
}
CONFIG = {"mode": "we", "linear": "lwe"}


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": index % 3}


def trainer(model: nn.Module, folder, *callbacks, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=2,
        save_steps=1,
        learning_rate=1e-2,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
    )
    return Trainer(model, arguments, train_dataset=Images(), callbacks=[*callbacks], **options)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


@pytest.mark.parametrize("name", MODELS)
def test_it_converts_before_the_optimizer_is_made_and_strips_each_checkpoint(name, tmp_path):
    model = build(name)
    run = trainer(model, tmp_path, WeightExcitation(config=CONFIG))
    assert is_converted(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run.train()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = run.optimizer.param_groups
    decay = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert decay.keys() == set(names.values())
    for parameter in before:
        if "excitation." in parameter:
            assert decay[parameter] == (0 if parameter.endswith("bias") else 0.1)
    trained = [n for n, p in model.named_parameters() if not torch.equal(before[n], p)]
    assert sum("excitation." in name for name in trained) > 3
    stripped = type(model).from_pretrained(tmp_path / "checkpoint-2" / "stripped")
    assert is_vanilla(stripped)
    x = torch.stack([Images()[i]["pixel_values"] for i in range(3)])
    with torch.no_grad():
        assert torch.equal(stripped.eval()(x).logits, model.eval()(x).logits)
    # The Trainer's own file, stripped without a model: the names are those that
    # `save_pretrained` of a vanilla model writes, which are not always the model's.
    by_callback = load_file(tmp_path / "checkpoint-2" / "stripped" / "model.safetensors")
    by_file = ws.strip_state_dict(load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    assert by_file.keys() == by_callback.keys()
    assert all(torch.equal(value, by_callback[key]) for key, value in by_file.items())


def test_a_pretrained_model_starts_as_what_it_is(tmp_path):
    model = build("resnet").eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x).logits
    trainer(model, tmp_path, WeightExcitation(config=CONFIG, init="preserve"))
    assert is_converted(model)
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-5, atol=1e-5)


# Not the ViT: the Trainer of transformers 5.23 writes its weights under the names of the hub and
# looks for the model's when it resumes, also without any excitation.
@pytest.mark.parametrize("name", ["resnet", "convnext v2"])
def test_training_resumes_where_it_was(name, tmp_path):
    straight = build(name)
    trainer(straight, tmp_path, WeightExcitation(config=CONFIG)).train()
    resumed = build(name)
    trainer(resumed, tmp_path, WeightExcitation(config=CONFIG)).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-1")
    )
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_excitation_sets_in_at_its_epoch_and_the_run_resumes(tmp_path):
    def paused(model: nn.Module) -> int:
        return sum(weight.excitation.is_paused for weight in excited_weights(model))

    class Watching(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            found.append((state.global_step, paused(model)))

    def train(**options) -> nn.Module:
        model = build("resnet")
        callback = WeightExcitation(config=CONFIG, start_epoch=1)
        run = trainer(model, tmp_path, callback, Watching())
        run.args.max_steps = 5  # of two an epoch
        run.train(**options)
        return model

    found: list[tuple[int, int]] = []
    straight = train()
    everything = found[0][1]
    assert everything > 3
    assert found == [(1, everything), (2, everything), (3, 0), (4, 0), (5, 0)]
    for step in (2, 3):
        found.clear()
        resumed = train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert [after for after, _ in found] == list(range(step + 1, 6))
        assert all(left == (everything if after < 3 else 0) for after, left in found)
        if step == 3 and transformers.__version__ == "5.0.0":
            continue  # within an epoch it goes on with other images, without excitation too
        for name, value in straight.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name


def test_epochs_of_data_without_a_length_are_counted(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (Images()[i] for i in range(8))  # two steps

    class Watching(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            found.append(any(weight.excitation.is_paused for weight in excited_weights(model)))

    def train(**options) -> list[bool]:
        found.clear()
        callback = WeightExcitation(config=CONFIG, start_epoch=1)
        run = trainer(build("resnet"), tmp_path, callback, Watching())
        run.train_dataset = Stream()
        run.args.max_steps = 5
        run.train(**options)
        return list(found)

    found: list[bool] = []
    assert train() == [True, True, False, False, False]
    assert train(resume_from_checkpoint=str(tmp_path / "checkpoint-1")) == [True, *[False] * 3]


def test_an_optimizer_that_was_made_before_gets_the_excitations(tmp_path):
    model = build("resnet")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    run = trainer(model, tmp_path, WeightExcitation(), optimizers=(optimizer, None))
    run.train()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_what_cannot_be_stripped_is_warned_of_and_the_checkpoint_is_there(tmp_path):
    model = build("resnet")
    run = trainer(model, tmp_path, WeightExcitation())
    callback = WeightExcitation()
    (tmp_path / "checkpoint-0").mkdir()
    next(p for n, p in model.named_parameters() if "raw_weight" in n).data.fill_(float("nan"))
    with pytest.warns(UserWarning, match=r"no stripped model was written to .*checkpoint-0"):
        callback.on_save(run.args, run.state, run.control, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WeightExcitation(strip_checkpoints=False).on_save(
            run.args, run.state, run.control, model=model
        )
    assert list((tmp_path / "checkpoint-0").iterdir()) == []


@pytest.mark.parametrize("name", MODELS)
def test_two_lines_without_a_callback_and_a_folder_that_opens(name, tmp_path):
    model = ws.convert(build(name), config=CONFIG)
    x = torch.randn(2, 3, 32, 32)
    stripped = ws.strip(model, example_inputs={"pixel_values": x})
    stripped.save_pretrained(tmp_path)
    opened = type(stripped).from_pretrained(tmp_path)
    assert type(opened) is type(stripped)
    assert torch.equal(opened.eval()(x).logits, model.eval()(x).logits)


@pytest.mark.parametrize("name", ["resnet", "convnext v2"])
def test_a_model_saved_in_shards_strips_to_what_from_pretrained_opens(name, tmp_path):
    torch.manual_seed(0)
    model = ws.convert(MODELS[name](), config=CONFIG)
    model.save_pretrained(tmp_path / "saved", max_shard_size="4KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    ws.strip_sharded(tmp_path / "saved", tmp_path / "deploy")
    shutil.copy(tmp_path / "saved" / "config.json", tmp_path / "deploy")
    again = type(MODELS[name]()).from_pretrained(tmp_path / "deploy")
    for key, value in ws.strip(model).state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
