"""Each example runs as a user would run it, in this process to save the imports."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "needs", "says"),
    [
        ("training_loop", "torch", "accuracy, as it is deployed"),
        ("train_with_timm", "timm", "ways to strip: 0\n"),
        ("train_with_lightning", "lightning", "the stripped file is a vanilla ResNet18"),
        ("train_with_accelerate", "accelerate", "stripped: torchvision.models.resnet.ResNet"),
        ("train_with_transformers", "transformers", "parameters, as vanilla"),
    ],
)
# Lightning's advice on loaders, and its own use of what torch has deprecated.
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*number of training batches")
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
def test_the_example_runs(name, needs, says, capsys):
    pytest.importorskip(needs)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert says in capsys.readouterr().out


def test_the_library_imports_none_of_the_frameworks():
    frameworks = ("lightning", "pytorch_lightning", "accelerate", "transformers")
    code = f"import sys, we_surgery; print([m for m in {frameworks} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
