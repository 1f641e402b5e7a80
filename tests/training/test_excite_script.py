"""examples/excite_script.py puts attach into training scripts of several shapes, which then run."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.skipif("TIMM_CLONE" not in os.environ, reason="TIMM_CLONE names a clone of timm")
def test_timms_own_script_trains_resumes_and_validates(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    clone = Path(os.environ["TIMM_CLONE"])
    random = np.random.default_rng(0)
    for name in ("train/a", "train/b", "validation/a", "validation/b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            image = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "train_we.py").write_text(run(clone / "train.py"))

    def timm(script: Path, *words: object) -> str:
        model = ["--model", "resnet10t", "--num-classes", "2", "--img-size", "32", "-b", "2"]
        command = [sys.executable, script, tmp_path / "images", *model, "--workers", "1", *words]
        done = subprocess.run(
            [*map(str, command), "--device", "cpu"],
            capture_output=True,
            text=True,
            check=False,
            cwd=clone,
            env=os.environ | {"PYTHONPATH": f"{clone}{os.pathsep}{ROOT}"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    options = ["--warmup-epochs", "0", "--model-ema", "--output", tmp_path, "--experiment"]
    timm(tmp_path / "train_we.py", *options, "one", "--epochs", "1")
    last = tmp_path / "one" / "last.pth.tar"
    said = timm(tmp_path / "train_we.py", *options, "two", "--epochs", "2", "--resume", last)
    assert "loaded the excitation of 15 weights; the model's weights differed by up to 0" in said
    assert '"top1"' in timm(clone / "validate.py", "--split", "validation", "--checkpoint", last)
