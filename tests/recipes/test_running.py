import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipe_toys import picture, tiny_network
from timm.utils import CheckpointSaver
from torch import nn

import we_surgery as ws
from we_surgery.checkpoint import Architecture
from we_surgery.errors import InputError, SurgeryError
from we_surgery.jobs.convert import Source
from we_surgery.jobs.inspect import inspect_file
from we_surgery.recipes import run_recipe
from we_surgery.recipes.recipe import Data
from we_surgery.recipes.tasks import MeanIntersectionOverUnion, TopAccuracy, loss_of


def run(recipe, data, output, **options):
    return run_recipe(recipe, data, output, workers=0, **options)


@pytest.mark.parametrize("form", ["attached", "converted"])
def test_a_run_trains_and_reports(form, recipe, image_folder, tmp_path):
    result = run(recipe.replace(form=form), image_folder, tmp_path / "run")
    vanilla = tiny_network()
    vanilla.load_state_dict(torch.load(result.file, weights_only=True), strict=True)
    assert result.stripped == result.last
    assert result.output_difference == (0 if form == "converted" else None)
    assert result.training_parameters == result.deployed_parameters + 35
    assert result.deployed_parameters == sum(p.numel() for p in vanilla.parameters())
    assert result.published == {"top1": 50.0}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["last"] == result.last
    rows = list(csv.DictReader((tmp_path / "run" / "summary.csv").read_text().splitlines()))
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.05, 0.005, 0.005])
    assert (tmp_path / "run" / "model_best.pth.tar").exists()
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    found = inspect_file(Source(str(tmp_path / "run" / "last.pth.tar")))
    assert [layer.name for layer in found.layers] == ["0.weight", "3.weight", "8.weight"]
    assert found.is_attached == (form == "attached")
    saved = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=True)["state_dict"]
    # The model of an attached run is what is deployed.
    deployed = ws.strip_state_dict(saved) if form == "converted" else saved
    assert all(torch.equal(deployed[key], value) for key, value in vanilla.state_dict().items())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"excite_from": 1, "excitation_init": "xavier"},
        {"init": "preserve", "decay_all": False, "precision": "bfloat16"},
    ],
    ids=["plain", "paused", "preserve"],
)
def test_both_forms_train_the_same_weights(recipe, image_folder, tmp_path, settings):
    attached, converted = (
        run(recipe.replace(form=form, **settings), image_folder, tmp_path / form)
        for form in ("attached", "converted")
    )
    first, second = (torch.load(r.file, weights_only=True) for r in (attached, converted))
    assert all(torch.equal(first[key], second[key]) for key in first | second)
    assert attached == dataclasses.replace(converted, file=attached.file, output_difference=None)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema_decay": 0.5, "smoothing": 0.1},
        {"precision": "bfloat16", "excite_from": 2},
        {"form": "converted", "excite_from": 1, "ema_decay": 0.5},
        {"form": "converted", "precision": "bfloat16"},
    ],
    ids=["plain", "ema", "paused bfloat16", "converted paused ema", "converted bfloat16"],
)
def test_a_resumed_run_ends_as_one_that_went_through(recipe, image_folder, tmp_path, settings):
    recipe = recipe.replace(**settings)
    whole = run(recipe, image_folder, tmp_path / "whole")

    calls = []

    def stop(done, total):
        calls.append(done)
        if len(calls) == 9:  # two batches of training and two of evaluation per epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, image_folder, tmp_path / "parts", progress=stop)
    resumed = run(recipe, image_folder, tmp_path / "parts", resume=True)
    first, second = (torch.load(r.file, weights_only=True) for r in (whole, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert dataclasses.replace(resumed, file=whole.file) == whole


def test_accumulated_steps_make_the_same_update(recipe, image_folder, tmp_path):
    # Without a norm, whose statistics are those of a step.
    recipe = dataclasses.replace(
        recipe, model=Architecture("recipe_toys:network_without_norm", {}), surgery={"mode": "lwe"}
    ).replace(epochs=1)
    at_once = run(recipe, image_folder, tmp_path / "once")
    in_parts = run(recipe, image_folder, tmp_path / "parts", step_batch=2)
    first, second = (torch.load(r.file, weights_only=True) for r in (at_once, in_parts))
    # Other random crops of the same images: close, and not the same.
    assert all(torch.allclose(first[key], second[key], atol=0.05) for key in first)


def test_a_recipe_without_surgery_trains_the_vanilla_network(recipe, image_folder, tmp_path):
    result = run(dataclasses.replace(recipe, surgery=None), image_folder, tmp_path / "run")
    assert result.output_difference is None
    assert result.training_parameters == result.deployed_parameters


def test_the_thresholds_of_sparse_training_grow_with_their_loss(recipe, image_folder, tmp_path):
    surgery = {"mode": "none", "conv": "dynamic_sparse"}
    recipe = dataclasses.replace(recipe, surgery=surgery).replace(smoothing=0.1)
    with pytest.raises(InputError, match="needs the thresholds in the model"):
        run(recipe.replace(sparsity=0.5), image_folder, tmp_path / "attached")
    recipe = recipe.replace(form="converted")
    without = run(recipe, image_folder, tmp_path / "without")
    pushed = run(recipe.replace(sparsity=0.5), image_folder, tmp_path / "with")
    assert pushed.zeros > without.zeros + 10


def test_a_segmentation_is_trained_from_a_backbone(recipe, tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split in ("train", "val"):
        names = [f"{split}{index}" for index in range(4)]
        (lists / f"{split}.txt").write_text("\n".join(names))
        for seed, name in enumerate(names):
            picture(root / "JPEGImages" / f"{name}.jpg", seed=seed)
            picture(root / "SegmentationClass" / f"{name}.png", seed=seed, mode="L", high=3)
    recipe = dataclasses.replace(
        recipe,
        task="segmentation",
        model=Architecture("recipe_toys:TinySegmentation", {}),
        data=Data("voc", classes=3, input_size=(3, 16, 16), crop="scaled"),
        backbone=True,
    ).replace(epochs=1, init="preserve", schedule={"sched": "poly", "per_update": True})
    with pytest.raises(InputError, match="trained backbone"):
        run(recipe, tmp_path, tmp_path / "run")
    backbone = nn.Conv2d(3, 8, 3, padding=1)
    torch.save({"weight": backbone.weight.detach()}, tmp_path / "part.pt")
    with pytest.raises(InputError, match="lacks 1 tensors of the backbone, such as 'bias'"):
        run(recipe, tmp_path, tmp_path / "run", backbone=tmp_path / "part.pt")
    torch.save(backbone.state_dict(), tmp_path / "whole.pt")
    result = run(recipe, tmp_path, tmp_path / "run", backbone=tmp_path / "whole.pt")
    assert set(result.stripped) == {"miou"}
    trained = torch.load(result.file, weights_only=True)["backbone.weight"]
    # Two updates away from where it began.
    assert torch.allclose(trained, backbone.weight, atol=0.2)
    assert not torch.equal(trained, backbone.weight)


def test_videos_are_trained(recipe, tmp_path):
    for video in range(4):
        for frame in range(4):
            picture(tmp_path / f"v{video}" / f"{frame}.jpg", seed=10 * video + frame)
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("".join(f"v{n} {n % 2}\n" for n in range(4)))
    recipe = dataclasses.replace(
        recipe,
        task="video",
        model=Architecture("recipe_toys:tiny_video_network", {}),
        data=Data("frames", classes=2, input_size=(3, 16, 16), frames=2, sampling="strided"),
    ).replace(epochs=1)
    assert set(run(recipe, tmp_path, tmp_path / "run").stripped) == {"top1"}


def test_training_that_diverges_is_an_error(recipe, image_folder, tmp_path):
    recipe = recipe.replace(optimizer={"opt": "momentum", "lr": 1e30})
    with pytest.raises(SurgeryError, match="training has diverged"):
        run(recipe, image_folder, tmp_path / "run")


def test_nothing_is_overwritten(recipe, image_folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        run(recipe, image_folder, tmp_path / "run")
    with pytest.raises(InputError, match="no run to resume"):
        run(recipe, image_folder, tmp_path / "run", resume=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_file_cannot_be_the_folder_of_a_run(recipe, image_folder, tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="is a file, not a folder"):
            run(recipe, image_folder, output)


@pytest.mark.parametrize("device", ["nope", "meta", "cuda:4096", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(device, recipe, image_folder, tmp_path):
    with pytest.raises(InputError, match="there is no device"):
        run(recipe, image_folder, tmp_path / "run", device=device)
    assert not (tmp_path / "run").exists()


def test_a_timm_that_cannot_resume_is_named(recipe, image_folder, tmp_path, monkeypatch):
    run(recipe, image_folder, tmp_path / "run")
    monkeypatch.delattr(CheckpointSaver, "load_state_dict_from_checkpoint")
    with pytest.raises(InputError, match=r"this timm version does not restore .*\n.*timm>=1.0.31"):
        run(recipe, image_folder, tmp_path / "run", resume=True)


def test_a_batch_that_cannot_be_divided_is_refused(recipe, image_folder, tmp_path):
    with pytest.raises(InputError, match="cannot be made of steps of 3"):
        run(recipe, image_folder, tmp_path / "run", step_batch=3)
    assert not (tmp_path / "run").exists()


def test_missing_images_leave_no_folder_behind(recipe, tmp_path):
    with pytest.raises(InputError, match="cannot be opened"):
        run(recipe, tmp_path / "absent", tmp_path / "run")
    with pytest.raises(InputError, match="no data folder"):
        run(recipe, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


DISTRIBUTED = """
import gc
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {tests!r})

destroy = torch.distributed.destroy_process_group

def destroy_when_nobody_holds_it():
    # Destroyed after the group, it could wait for ever.
    assert not [found for found in gc.get_objects() if type(found) is DistributedDataParallel]
    destroy()

torch.distributed.destroy_process_group = destroy_when_nobody_holds_it
from we_surgery.cli import we_surgery
we_surgery(["run", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_two_processes_train_one_model(image_folder, tmp_path):
    (tmp_path / "tiny.yaml").write_text(
        "title: tiny\nsource: nowhere\ntask: classification\n"
        "model: recipe_toys:tiny_network\n"
        "data: {layout: imagefolder, classes: 2, input_size: [3, 16, 16], crop: center}\n"
        "training: {epochs: 1, batch_size: 4, optimizer: {opt: momentum, lr: 0.05}}\n"
        "surgery: {mode: lwe}\n"
    )
    program = tmp_path / "program.py"
    program.write_text(DISTRIBUTED.format(tests=str(Path(__file__).parent)))
    words = [tmp_path / "tiny.yaml", "--data", image_folder, "--workers", 0, "--json"]
    words += ["--output", tmp_path / "run"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [*torchrun, str(program), *map(str, words)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # The gloo of torch 2.8 says on the same stream that it is connected.
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert result["training_parameters"] > result["deployed_parameters"]
    assert result["stripped"] == result["last"]


def test_the_mean_intersection_over_union():
    metric = MeanIntersectionOverUnion(3, torch.device("cpu"))
    labels = torch.tensor([[[0, 0, 1, 255]]])
    predicted = torch.tensor([[[0, 1, 1, 2]]])
    metric.update(nn.functional.one_hot(predicted, 3).permute(0, 3, 1, 2).float(), labels)
    # Class 0: 1 of 2; class 1: 1 of 2; class 2 occurs only where labels are ignored.
    assert metric.result() == pytest.approx({"miou": 50.0})


def test_the_top_accuracies():
    metric = TopAccuracy(8, torch.device("cpu"))
    logits = torch.arange(8.0).repeat(4, 1)
    metric.update(logits, torch.tensor([7, 6, 3, 2]))
    assert metric.result() == {"top1": 25.0, "top5": 75.0}


def test_an_auxiliary_output_counts_less():
    logits, labels = torch.randn(4, 3, 2, 2), torch.randint(3, (4, 2, 2))
    alone = loss_of({"out": logits}, labels, 0.0)
    both = loss_of({"out": logits, "aux": logits}, labels, 0.0)
    torch.testing.assert_close(both, 1.4 * alone)
