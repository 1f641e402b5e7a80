"""Attached excitation in the Trainer of transformers, by one callback."""

import pytest
import torch
from torch import nn

import we_surgery as ws

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

from we_surgery.training.transformers import WeightExcitation  # noqa: E402

CONFIG = {"mode": "we", "linear": "lwe"}


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": index % 3}


def resnet():
    torch.manual_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    )


def trainer(model, folder, *callbacks, optimizers=(None, None), **arguments):
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,  # two epochs
        "save_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
    }
    return Trainer(
        model,
        TrainingArguments(**{**options, **arguments}),
        train_dataset=Images(),
        eval_dataset=Images(),
        callbacks=[*callbacks],
        optimizers=optimizers,
    )


def attached(**options):
    return WeightExcitation(form="attached", **{"config": CONFIG, **options})


def assert_same(one: nn.Module, other: nn.Module):
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_what_it_saves_is_the_plain_trained_model(tmp_path):
    model, callback = resnet(), attached()
    before = model.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    run = trainer(model, tmp_path / "run", callback)
    run.train()
    assert callback.excitation.steps == 4
    assert len(callback.excitation.plan.excited) > 3
    assert model.state_dict().keys() == before.keys()
    run.save_model(tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names <= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "training_args.bin",
    }
    for folder in (tmp_path / "model", tmp_path / "run" / "checkpoint-4"):
        opened = type(model).from_pretrained(folder)
        assert_same(model, opened)
        batch = {key: torch.as_tensor(value)[None] for key, value in Images()[0].items()}
        assert torch.equal(opened.eval()(**batch).logits, model.eval()(**batch).logits)


def test_training_resumes_to_the_bit(tmp_path):
    straight, resumed = resnet(), resnet()
    trainer(straight, tmp_path, attached()).train()
    with torch.no_grad():
        next(resumed.parameters()).zero_()
    run = trainer(resumed, tmp_path, attached())
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(straight, resumed)


def test_it_is_the_training_of_the_converted_form(tmp_path):
    one, other = resnet(), resnet()
    torch.manual_seed(1)
    trainer(one, tmp_path, WeightExcitation(config=CONFIG, strip_checkpoints=False)).train()
    torch.manual_seed(1)
    callback = attached()
    trainer(other, tmp_path, callback).train()
    for name, value in ws.strip(one).state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_the_best_model_is_loaded_and_a_second_training_goes_on_from_it(tmp_path):
    class Worse(transformers.TrainerCallback):
        """The first evaluation is the best."""

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    model, callback = resnet(), attached()
    run = trainer(
        model,
        tmp_path,
        callback,
        Worse(),
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    best = ResNetForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert_same(best, model)
    steps = callback.excitation.steps
    run.train()
    assert callback.excitation.steps == steps + 4


def test_a_vanilla_checkpoint_and_a_vanilla_resume_are_not_silent(tmp_path):
    trainer(resnet(), tmp_path / "vanilla").train()
    with pytest.raises(ws.InputError, match="excited twice"):
        trainer(resnet(), tmp_path, attached()).train(
            resume_from_checkpoint=str(tmp_path / "vanilla" / "checkpoint-2")
        )
    trainer(resnet(), tmp_path, attached()).train()
    with pytest.raises(ws.AttachmentError, match="no excitation attached"):
        trainer(resnet(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_an_optimizer_of_ones_own_accumulation_and_bfloat16(tmp_path):
    model, callback = resnet(), attached()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    run = trainer(
        model,
        tmp_path,
        callback,
        optimizers=(optimizer, None),
        bf16=True,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    run.train()
    assert callback.excitation.steps == 4
    assert callback.excitation.is_in([optimizer])


def test_it_sets_in_at_an_epoch_also_when_resumed(tmp_path):
    straight, resumed, callback = resnet(), resnet(), attached(start_epoch=1)

    class Watching(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            model, raws = kwargs["model"], callback.excitation.named_parameters()
            name = "classifier.1.weight"
            found.append(torch.equal(raws[name], model.get_parameter(name)))

    found: list[bool] = []
    trainer(straight, tmp_path, callback, Watching()).train()
    assert found == [True, True, False, False]
    run = trainer(resumed, tmp_path, attached(start_epoch=1))
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(straight, resumed)
