"""examples/excite_script.py puts attach into training scripts of several shapes, which then run."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "excite_script.py"

START = '''"""A trainer."""
from __future__ import annotations
import torch
from torch import nn

def main(kind="sgd"):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 2))
'''
MADE = {
    # as timm makes it
    "one call": """    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=0.1,
    )
""",
    # as torchvision's references make it
    "branches": """    if kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    elif kind == "adamw":
        optimizer = torch.optim.AdamW(model.parameters())
    else:
        raise RuntimeError(kind)
""",
}
END = """    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    return model, optimizer
"""


def run(*words: object) -> str:
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("made", MADE)
def test_the_script_then_trains_with_excitation(made: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(START + MADE[made] + END)
    (tmp_path / "train_we.py").write_text(run(script, "--mode", "lwe+mwe"))
    _, optimizer = runpy.run_path(str(tmp_path / "train_we.py"))["main"]()
    assert optimizer.state_dict()["state"]["we_surgery"]["steps"] == 2


def test_the_patch_applies(tmp_path: Path) -> None:
    git = shutil.which("git")
    if git is None:
        pytest.skip("needs git")
    script = tmp_path / "train.py"
    script.write_text(START + MADE["branches"] + END)
    expected = run(script)
    (tmp_path / "excite.patch").write_text(run(script, "--patch"))
    subprocess.run([git, "apply", "excite.patch"], cwd=tmp_path, check=True)
    assert script.read_text() == expected
    assert expected.count("we_surgery") == 2


def test_a_script_without_an_optimizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import os\n\n\ndef main():\n    pass\n")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "train.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "makes an `optimizer`" in done.stderr) == (1, True)


def images(folder: Path, *names: str) -> None:
    """Two random images in each of the folders."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(2):
            image = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / name / f"{i}.png")


def called(clone: Path, *words: object) -> str:
    """What a script prints that runs in the folder of its clone, with the clone's own modules."""
    done = subprocess.run(
        [sys.executable, *map(str, words), "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
        cwd=clone,
        env=os.environ | {"PYTHONPATH": f"{clone}{os.pathsep}{ROOT}"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif("TIMM_CLONE" not in os.environ, reason="TIMM_CLONE names a clone of timm")
def test_timms_own_script_trains_resumes_and_validates(tmp_path: Path) -> None:
    clone = Path(os.environ["TIMM_CLONE"])
    images(tmp_path / "images", "train/a", "train/b", "validation/a", "validation/b")
    script = tmp_path / "train_we.py"
    script.write_text(run(clone / "train.py"))

    def timm(script: Path, *words: object) -> str:
        model = ["--model", "resnet10t", "--num-classes", "2", "--img-size", "32", "-b", "2"]
        return called(clone, script, tmp_path / "images", *model, "--workers", "1", *words)

    options = ["--warmup-epochs", "0", "--model-ema", "--output", tmp_path, "--experiment"]
    timm(script, *options, "one", "--epochs", "1")
    last = tmp_path / "one" / "last.pth.tar"
    said = timm(script, *options, "two", "--epochs", "2", "--resume", last)
    assert "loaded the excitation of 15 weights; the model's weights differed by up to 0" in said
    assert '"top1"' in timm(clone / "validate.py", "--split", "validation", "--checkpoint", last)


def coco(folder: Path) -> None:
    """A data set in COCO's layout, with one box in each image."""
    images(folder, "train2017", "val2017")
    (folder / "annotations").mkdir()
    box = {"bbox": [4, 4, 20, 20], "area": 400, "segmentation": [[4, 4, 24, 4, 24, 24, 4, 24]]}
    for split in ("train", "val"):
        data = {
            "info": {},
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": 32, "height": 32} for i in (0, 1)
            ],
            "annotations": [
                {"id": i + 1, "image_id": i, "category_id": 1, "iscrowd": 0, **box} for i in (0, 1)
            ],
            "categories": [{"id": 1, "name": "square"}],
        }
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(data))


# Some versions of these scripts ask torch.load for weights alone, and save their arguments too.
ALLOWING_ARGUMENTS = """
import argparse, runpy, sys, torch
torch.serialization.add_safe_globals([argparse.Namespace])
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SMALL = ["--train-crop-size", "64", "--val-crop-size", "64", "--val-resize-size", "64"]
TORCHVISION = {
    "classification": (["--model", "resnet18", "--model-ema", *SMALL], "Test: EMA Acc@1"),
    "detection": (["--model", "ssdlite320_mobilenet_v3_large"], "IoU metric: bbox"),
}


@pytest.mark.skipif("VISION_CLONE" not in os.environ, reason="VISION_CLONE names torchvision's")
@pytest.mark.parametrize("task", TORCHVISION)
def test_torchvisions_own_scripts_train_resume_and_evaluate(task: str, tmp_path: Path) -> None:
    clone = Path(os.environ["VISION_CLONE"]) / "references" / task
    if task == "classification":
        # Five classes: it measures how often the right one is among the best five.
        images(tmp_path / "images", *(f"{part}/{i}" for part in ("train", "val") for i in "abcde"))
    else:
        pytest.importorskip("pycocotools")
        coco(tmp_path / "images")
    script = tmp_path / "train_we.py"
    script.write_text(run(clone / "train.py"))
    (tmp_path / "allowing.py").write_text(ALLOWING_ARGUMENTS)
    options, measured = TORCHVISION[task]

    def torchvision(script: Path, *words: object) -> str:
        shared = ["--data-path", tmp_path / "images", "-b", "2", "-j", "0", "--output-dir"]
        return called(
            clone, tmp_path / "allowing.py", script, *options, *shared, tmp_path / "out", *words
        )

    torchvision(script, "--epochs", "1")
    first = tmp_path / "out" / "model_0.pth"
    torchvision(script, "--epochs", "2", "--resume", first)
    once, twice = (
        torch.load(tmp_path / "out" / f"model_{i}.pth", weights_only=False)["optimizer"]["state"]
        for i in (0, 1)
    )
    assert twice["we_surgery"]["steps"] == 2 * once["we_surgery"]["steps"] > 0
    assert measured in torchvision(clone / "train.py", "--test-only", "--resume", first)
