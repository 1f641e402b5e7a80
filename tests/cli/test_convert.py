"""``we-convert`` from a user's side: files in, files out, messages, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from click.testing import CliRunner, Result
from torch import nn

import we_surgery as ws
from we_surgery.cli import convert_command, we_surgery
from we_surgery.converted.layer import ExcitedLayer


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(convert_command, [str(word) for word in words])


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)
    )


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    torch.save(small_model(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_a_module_file_alone_gives_a_module_file_beside_it(model_file: Path) -> None:
    result = run(model_file)
    assert result.exit_code == 0, result.output
    target = model_file.with_name("model.we.pt")
    converted = torch.load(target, weights_only=False)
    assert isinstance(converted[0], ExcitedLayer)
    assert isinstance(converted[0], nn.Conv2d)
    assert "next: train it" in result.stderr
    assert str(target) in result.stderr


def test_the_next_command_can_be_pasted_also_with_spaces(model_file: Path) -> None:
    target = model_file.with_name("a model.pt")
    result = run(model_file, "-o", target)
    assert f"`we-strip '{target}'`" in " ".join(result.stderr.split("\n"))


def test_the_same_seed_gives_the_same_file_contents(model_file: Path) -> None:
    first, second, other = (model_file.with_name(f"{name}.pt") for name in "abc")
    run(model_file, "-o", first)
    run(model_file, "-o", second)
    run(model_file, "-o", other, "--seed", "1")
    states = [ws.load(path).state_dict() for path in (first, second, other)]
    key = "0.excitation.lwe.fc1.weight"
    assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0][key], states[2][key])


def test_a_dry_run_prints_each_layer_with_its_reason_and_writes_nothing(
    model_file: Path,
) -> None:
    result = run(model_file, "--dry-run")
    assert result.exit_code == 0
    for word in ("layer", "decision", "why", "LWE (standardized)", "'1' follows", "MWE"):
        assert word in result.stdout
    assert "2 of 2 weights excited" in result.stdout
    assert [path.name for path in model_file.parent.iterdir()] == ["model.pt"]


def test_the_plan_of_a_deep_network_fits_80_columns() -> None:
    source = "torchvision:resnet50"
    narrow, wide = run(source, "--dry-run").stdout, run(source, "--dry-run", "--wide").stdout
    lines = narrow.splitlines()
    assert len(lines) < 35
    assert max(map(len, lines)) <= 80
    assert "layer3.{0-5}.conv2" in narrow
    names = [row.layer for row in ws.plan(torchvision.models.resnet50()).decisions]
    shown = [line.split()[0] for line in wide.splitlines() if line.startswith(tuple(names))]
    assert shown == names
    assert "conv; standardized: 'layer3.5.bn2' follows" in wide


def test_an_edited_plan_is_done_exactly(model_file: Path) -> None:
    plan = json.loads(run(model_file, "--dry-run", "--json").stdout)
    plan["layers"][0]["excitation"] = [{"mwe": {"epsilon": 0.2}}]
    plan["layers"][1]["excitation"] = []
    plan_file = model_file.with_name("plan.json")
    plan_file.write_text(json.dumps(plan))
    assert run(model_file, "--plan", plan_file).exit_code == 0
    converted = ws.load(model_file.with_name("model.we.pt"))
    keys = [key for key in converted.state_dict() if "excitation" in key]
    assert keys == ["0.excitation._extra_state"]
    assert converted[0].excitation.mwe.epsilon == 0.2


def test_a_recorded_dry_run_names_its_reading(model_file: Path) -> None:
    result = run(model_file, "--dry-run", "--input-shape", "2,4,8,8")
    assert "graph from a recorded forward pass" in result.stdout


def test_skip_and_rule_report_how_many_layers_they_matched(model_file: Path) -> None:
    result = run(model_file, "--skip", "4", "--rule", "type:Conv2d=lwe+mwe", "--dry-run")
    assert "pattern '4' matched 1 layers" in result.stdout
    assert "LWE+MWE" in result.stdout


def test_what_is_skipped_is_skipped_whatever_a_rule_says(model_file: Path) -> None:
    for words in (("--rule", "*=mwe", "--skip", "4"), ("--skip", "4", "--rule", "*=mwe")):
        plan = json.loads(run(model_file, *words, "--dry-run", "--json").stdout)
        assert [bool(row["excitation"]) for row in plan["layers"]] == [True, False]


def test_an_architecture_that_is_not_the_modules_is_refused(model_file: Path) -> None:
    words = ("--to", "state_dict", "-o", model_file.with_name("out.pt"))
    for name, said in (
        ("nosuch", "no model 'nosuch'"),
        ("resnet18", "is not a torchvision:resnet18"),
    ):
        result = run(model_file, *words, "--arch", f"torchvision:{name}")
        assert (result.exit_code, said in result.stderr) == (2, True)
    assert [path.name for path in model_file.parent.iterdir()] == ["model.pt"]


def test_the_modules_own_architecture_is_kept_in_the_result(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(num_classes=3), tmp_path / "model.pt")
    target = tmp_path / "out.safetensors"
    own = ("--arch", "torchvision:resnet18", "--arch-arg", "num_classes=3")
    assert run(tmp_path / "model.pt", *own, "-o", target).exit_code == 0
    assert ws.load(target).get_submodule("fc").out_features == 3


def test_endings_in_upper_case_say_the_same(model_file: Path) -> None:
    target = model_file.with_name("out.SAFETENSORS")
    assert run(model_file, "-o", target).exit_code == 0
    assert "0.raw_weight" in safetensors.torch.load_file(target)


def test_a_config_file_is_used(model_file: Path) -> None:
    config = Path(__file__).parents[2] / "we_surgery" / "configs" / "paper-conv-only.yaml"
    plan = json.loads(run(model_file, "--config", config, "--dry-run", "--json").stdout)
    assert [list(stage) for row in plan["layers"] for stage in row["excitation"]] == [
        ["standardize"],
        ["lwe"],
    ]


@pytest.mark.parametrize(
    "config",
    sorted((Path(__file__).parents[2] / "we_surgery" / "configs").glob("*.yaml")),
    ids=lambda p: p.stem,
)
def test_each_config_of_the_repository_converts_a_model(config: Path, model_file: Path) -> None:
    # Some name the layers of a sort of model, and nothing is to be written of that.
    source = {"mixer-channels": "timm:mixer_s16_224", "vit": "timm:vit_tiny_patch16_224"}
    words = (source[config.stem], "--dry-run") if config.stem in source else (model_file,)
    assert run(*words, "--config", config).exit_code == 0


def test_an_architecture_is_a_source_and_the_result_lies_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("torchvision:resnet18", "--arch-arg", "num_classes=3")
    assert result.exit_code == 0, result.output
    converted = ws.load("resnet18.we.pt")
    assert converted.get_submodule("fc").out_features == 3


def test_weights_need_an_architecture_and_the_result_remembers_it(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    vanilla = torchvision.models.resnet18()
    safetensors.torch.save_file(vanilla.state_dict(), weights)
    without = run(weights)
    assert without.exit_code == 2
    assert "--arch" in without.stderr
    assert run(weights, "--arch", "torchvision:resnet18").exit_code == 0
    converted = ws.load(tmp_path / "weights.we.safetensors")
    assert isinstance(converted.get_submodule("conv1"), ExcitedLayer)
    assert torch.equal(converted.get_submodule("conv1").raw_weight, vanilla.conv1.weight)


def test_an_existing_file_needs_force(model_file: Path) -> None:
    target = model_file.with_name("model.we.pt")
    target.write_text("mine")
    refused = run(model_file)
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert target.read_text() == "mine"
    assert run(model_file, "--force").exit_code == 0


def test_converting_twice_says_so_and_writes_nothing(model_file: Path) -> None:
    run(model_file)
    again = run(model_file.with_name("model.we.pt"))
    assert again.exit_code == 2
    assert "converted already" in again.stderr
    assert not model_file.with_name("model.we.we.pt").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--skip", "layr9"], 2, "matches none of the 2 layers"),
        (["--rule", "0"], 2, "PATTERN=STAGES"),
        (["--rule", "0=lwee"], 2, "did you mean 'lwe'"),
        (["--config", "no.yaml"], 2, "no.yaml"),
        (["--plan", "no.json"], 2, "no.json"),
        (["--plan", "x", "--mode", "lwe"], 2, "together"),
        (["--to", "safetensors", "-o", "x.pt"], 2, "does not fit"),
        (["--input-shape", "1,x"], 2, "positive numbers"),
        (["--skip", "*"], 1, "excites none"),
        (["--arch-arg", "x"], 2, "KEY=VALUE"),
        (["--mode", "lew"], 2, "lew"),
        (["--seed", str(2**64)], 2, "not in the range"),
        (["-o", ""], 2, "is an empty name"),
        (["-o", "new/"], 2, "yields a single file"),
    ],
)
def test_a_slip_is_one_line_of_cause_and_one_of_cure(
    words: list[str], code: int, said: str, model_file: Path
) -> None:
    result = run(model_file, *words)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert [path.name for path in model_file.parent.iterdir()] == ["model.pt"]


def test_a_missing_file_is_bad_input() -> None:
    result = run("nowhere.pt")
    assert (result.exit_code, "nowhere.pt" in result.stderr) == (2, True)


def test_an_empty_source_is_not_the_current_folder() -> None:
    result = run("")
    assert (result.exit_code, "SOURCE is empty" in result.stderr) == (2, True)


def test_json_output_is_json_alone(model_file: Path) -> None:
    found = json.loads(run(model_file, "--json").stdout)
    assert found["kind"] == "module"
    assert Path(found["target"]).exists()
    assert len(found["plan"]["layers"]) == 2


@pytest.mark.parametrize("command", [[], ["convert"], ["strip"], ["inspect"]])
def test_help_shows_an_example(command: list[str]) -> None:
    result = CliRunner().invoke(we_surgery, [*command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert "model" in result.output


def test_options_go_to_all_layers_and_those_of_a_rule_to_its_own(model_file: Path) -> None:
    words = ("--option", "mwe.epsilon=0.2", "--rule", "0=lwe(reduction=2)+mwe", "--dry-run")
    result = run(model_file, "--mode", "we", *words, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["mode"] == "we"
    conv, linear = (row["excitation"] for row in plan["layers"])
    assert conv == [{"standardize": {}}, {"lwe": {"reduction": 2}}, {"mwe": {"epsilon": 0.2}}]
    assert linear == [{"mwe": {"epsilon": 0.2}}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--option", "epsilon=0.2"), "takes STAGE.NAME=VALUE, not 'epsilon=0.2'"),
        (("--option", "spectral_norm.eps=0.2"), "It has no options."),
        (("--option", "mwe.eps=0.2"), "mwe has no option 'eps'; did you mean 'epsilon'"),
        (("--option", "mew.eps=0.2"), "no excitation called 'mew'"),
        (("--option", "mwe.epsilon=["), "the value of --option 'mwe.epsilon=[' cannot be read"),
        (("--rule", "lwe(reduction=8)"), "takes PATTERN=STAGES"),
    ],
)
def test_an_option_that_is_none_is_bad_usage(
    model_file: Path, words: tuple[str, str], message: str
) -> None:
    result = run(model_file, *words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
