"""What a command answers before it does any work does not import torch, which takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = "{'torch', 'torchvision', 'timm', 'numpy'} & set(sys.modules)"
ANSWER = f"""
import json, sys
from click.testing import CliRunner
from we_surgery.cli import we_surgery
found = {{}}
for case, words in json.load(sys.stdin).items():
    result = CliRunner().invoke(we_surgery, words)
    found[case] = (result.exit_code, result.output, sorted({HEAVY}))
print(json.dumps(found))
"""
COMPLETE = f"""
import sys
from we_surgery.cli import we_surgery
try:
    we_surgery(prog_name="we-surgery")
finally:
    print("heavy:", sorted({HEAVY}))
"""
ANSWERED = {
    "help": (["--help"], 0, "Usage: we-surgery"),
    "version": (["--version"], 0, "version"),
    "help of convert": (["convert", "--help"], 0, "--plan"),
    "help of strip": (["strip", "--help"], 0, "--dtype"),
    "help of inspect": (["inspect", "--help"], 0, "--html"),
    "help of run": (["run", "--help"], 0, "--backbone"),
    "help of analyse": (["analyse", "--help"], 0, "importance"),
    "help of sensitivity": (["analyse", "sensitivity", "--help"], 0, "--vary"),
    "version of convert": (["convert", "--version"], 0, "version"),
    "version of analyse": (["analyse", "--version"], 0, "version"),
    "no command of this name": (["melt"], 2, "No such command"),
    "no argument": (["convert"], 2, "Missing argument"),
    "no option of this name": (["strip", "model.pt", "--fold"], 2, "No such option"),
    "no such mode": (["convert", "model.pt", "--mode", "lve"], 2, "'lve' is not one of"),
    "a rule without stages": (["convert", "here.pt", "--rule", "layer4"], 2, "PATTERN=STAGES"),
    "an option without stage": (["convert", "here.pt", "--option", "x=1"], 2, "STAGE.NAME"),
    "a shape of words": (["convert", "here.pt", "--input-shape", "big"], 2, "1,3,224,224"),
    "plan and mode": (["convert", "here.pt", "--plan", "p", "--mode", "lwe"], 2, "plan alone"),
    "raw and ema": (["strip", "here.pt", "--raw", "--ema"], 2, "more than one"),
    "maps without page": (["inspect", "here.pt", "--maps", "m.json"], 2, "without --html"),
    "convert a missing file": (["convert", "gone.pt"], 2, "there is no file gone.pt"),
    "strip a missing file": (["strip", "hree.pt"], 2, "did you mean 'here.pt'"),
    "inspect a missing file": (["inspect", "here.pt", "gone.pt"], 2, "no file gone.pt"),
    "a missing start": (["inspect", "here.pt", "--start", "gone.pt"], 2, "no file gone.pt"),
    "analyse a missing file": (["analyse", "prune", "gone.pt", "-o", "x"], 2, "no file gone.pt"),
    "a missing recipe": (["run", "imagenet/resnet50-lw"], 2, "mean 'imagenet/resnet50-lwe'"),
}


def run(folder: Path, code: str, given: str = "", **environment: str) -> str:
    (folder / "here.pt").touch()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    cases = {case: words for case, (words, _, _) in ANSWERED.items()}
    answered = run(tmp_path_factory.mktemp("answers"), ANSWER, json.dumps(cases))
    return json.loads(answered)  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", ANSWERED)
def test_answers_come_without_torch(
    case: str, answers: dict[str, tuple[int, str, list[str]]]
) -> None:
    _, code, expected = ANSWERED[case]
    exit_code, output, heavy = answers[case]
    assert (exit_code, heavy) == (code, [])
    assert expected in output


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("we-surgery ", "inspect"),
        ("we-surgery convert --mo", "--mode"),
        ("we-surgery convert x --mode l", "lwe+mwe"),
        ("we-surgery convert x --config paper", "paper-conv-only"),
        ("we-surgery run imagenet/resnet50-lwe-9", "imagenet/resnet50-lwe-90-epochs"),
        ("we-surgery convert he", "file,he"),
    ],
)
def test_completions_come_without_torch(words: str, completed: str, tmp_path: Path) -> None:
    shown = run(
        tmp_path,
        COMPLETE,
        _WE_SURGERY_COMPLETE="bash_complete",
        COMP_WORDS=words,
        COMP_CWORD=str(words.count(" ")),
    )
    assert completed in shown
    assert shown.endswith("heavy: []\n"), shown


def test_the_names_of_the_package_come_when_they_are_used() -> None:
    code = (
        "import sys, we_surgery as ws; assert 'torch' not in sys.modules; "
        "ws.convert; assert 'torch' in sys.modules; ws.training.norm_loss; "
        "assert set(ws.__all__) <= set(dir(ws))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
