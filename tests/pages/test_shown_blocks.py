"""The shell and YAML blocks of the pages run as shown, in a folder with the files they name."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from click.testing import CliRunner
from sharded_files import write_dcp
from test_shown_commands import COMMANDS, PAGES, ROOT
from torch import nn

import we_surgery as ws
from we_surgery import analysis

# The first words of what test_distributed.py runs. Here its files and options are checked.
RUN_ELSEWHERE = ("torchrun --nproc-per-node 2 examples/train_distributed.py",)
# In place of eight GPUs and ImageNet: a CPU, and two made-up batches of two images.
ON_ANY_MACHINE = ("--device", "cpu", "--dry-run", "--step-batch", "2")

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
BLOCKS = [
    (page.name, kind, text) for page in PAGES for kind, text in BLOCK.findall(page.read_text())
]


def of_kind(wanted: str) -> list[object]:
    found = [(page, text) for page, kind, text in BLOCKS if kind == wanted]
    return [pytest.param(*pair, id=f"{pair[0]}-{n}") for n, pair in enumerate(found)]


CODE = {
    "my_data.py": """
import torch

def test_loader():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 16, 16, generator=generator), torch.arange(4))]
""",
    "my_code.py": """
import torch

@torch.no_grad()
def top1(model):
    return model(torch.ones(1, 3, 16, 16)).sum().item()

def train(model, seed):
    model.eval()
""",
}


def small_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(4, 4),
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file under each name that the pages use."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    (folder / "before" / "out").mkdir(parents=True)
    for name, code in CODE.items():
        (folder / name).write_text(code)
    torch.save(small_model(), folder / "model.pt")
    batches = [(torch.randn(4, 3, 16, 16), torch.arange(4))]
    maps = analysis.location_maps(small_model(), batches, samples=(2, 2))
    analysis.save_result(maps, folder / "before" / "out" / "location", picture=False)
    for name in ("before/model.we.pt", "trained.we.pt", "first.we.pt", "second.we.pt"):
        torch.save(ws.convert(small_model(), "lwe"), folder / name)
    resnet18 = ws.convert(torchvision.models.resnet18(), "lwe")
    torch.save(resnet18.state_dict(), folder / "checkpoint.pt")
    resnet50 = ws.convert(timm.create_model("resnet50"), "lwe").state_dict()
    torch.save({"state_dict": resnet50, "state_dict_ema": resnet50}, folder / "last.pth.tar")
    small = ws.convert(small_model(), "lwe").state_dict()
    for name in ("dcp_folder", "run"):
        write_dcp({"model": small, "epoch": 3}, folder / name)
    return folder


@pytest.fixture
def folder(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each block finds them as they were."""
    place = tmp_path / "user"
    shutil.copytree(files, place, copy_function=lambda a, b: Path(b).hardlink_to(a))
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    return place


def run_line(line: str) -> str:
    """Runs a line of shell in this process, and looks for the file it says it makes."""
    command, _, remark = line.partition(" #")
    command, _, target = command.partition(" > ")
    words = shlex.split(command)
    if words[:2] == ["mkdir", "-p"]:
        Path(words[2]).mkdir(exist_ok=True)
        return ""
    if words[0] == "torchrun":
        return run_processes(words[1:])
    result = CliRunner().invoke(COMMANDS[words[0]], words[1:])
    assert result.exit_code == 0, f"{line}\n{result.output}"
    if target:
        Path(target.strip()).write_text(result.stdout)
    for made in re.findall(r"-> ([\w.]+\w)", remark):
        assert Path(made).exists(), line
    return result.output


def run_processes(words: list[str]) -> str:
    """What torchrun is given, a recipe, in this process and dry."""
    assert words[2:4] == ["-m", "we_surgery"]
    Path("DIR").mkdir()
    words = [str(ROOT / word) if word.endswith(".yaml") else word for word in words[4:]]
    result = CliRunner().invoke(COMMANDS["we-surgery"], [*words, *ON_ANY_MACHINE])
    assert result.exit_code == 0, result.output
    return result.output


def runs_elsewhere(block: str) -> bool:
    return block.startswith(RUN_ELSEWHERE)


SHELL = of_kind("sh")


@pytest.mark.parametrize(("page", "block"), [p for p in SHELL if not runs_elsewhere(p.values[1])])
def test_each_shell_block_runs(page: str, block: str, folder: Path) -> None:
    if "--start model.we.pt" in block:  # which, like the maps, an earlier command made
        shutil.copytree(folder / "before", folder, dirs_exist_ok=True)
    printed = "".join(run_line(line) for line in block.replace("\\\n", " ").splitlines())
    shown = following_output(page, block)
    if shown is not None:
        assert comparable(shown) in comparable(printed)


def following_output(page: str, block: str) -> str | None:
    """The block without a kind that comes right after this one, which shows what it prints."""
    text = next(p for p in PAGES if p.name == page).read_text()
    after = text.partition(block + "```\n")[2]
    found = re.match(r"\n```\n(.*?)^```$", after, re.M | re.S)
    return found[1] if found else None


def comparable(text: str) -> str:
    """Without hashes, and without the length of rules, which depends on the version of rich."""
    return re.sub("─+", "─", re.sub(r"\b[0-9a-f]{64}\b", "HASH", text))


@pytest.mark.parametrize("start", RUN_ELSEWHERE)
def test_a_block_that_runs_elsewhere_names_files_and_options_that_exist(start: str) -> None:
    (block,) = (p.values[1] for p in SHELL if p.values[1].startswith(start))
    script = start.split()[-1]
    assert Path(script).stem in (ROOT / "tests" / "distributed_runs.py").read_text()
    source = (ROOT / script).read_text()
    for line in block.splitlines():
        options = line.partition(f"{script} ")[2]
        assert options
        assert all(f'"{option}"' in source for option in re.findall(r"--[\w-]+", options))


@pytest.mark.parametrize(("page", "block"), of_kind("yaml"))
def test_each_yaml_block_is_a_config(page: str, block: str) -> None:
    model = torchvision.models.resnet18()
    model.fc = nn.Sequential(nn.Dropout(), model.fc)
    plan = ws.plan(model, config=yaml.safe_load(block))
    assert plan.excited


def test_every_block_says_what_it_is() -> None:
    commands = re.compile(r"^ *(\$ )?(we-\w+|torchrun|python\d?|pip|make|git) ", re.M)
    for page, kind, text in BLOCKS:
        assert kind in ("python", "sh", "toml", "yaml", ""), (page, kind)
        assert kind in ("python", "sh") or not commands.search(text), (page, text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_the_text_name_programs_and_targets_that_exist(page: Path) -> None:
    text = page.read_text()
    for script in re.findall(r"`python ([\w/]+\.py)", text):
        assert (ROOT / script).is_file(), script
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([\w-]+)", text)) <= targets
