"""Configs and recipes that come with the package go by their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torchvision

import we_surgery as ws
from we_surgery._util import shipped
from we_surgery.recipes import load_recipe


def test_a_config_goes_by_its_name() -> None:
    model = torchvision.models.resnet18(num_classes=2)
    named = ws.plan(model, config="paper-conv-only")
    assert named == ws.plan(model, config=shipped.CONFIGS / "paper-conv-only.yaml")
    assert named != ws.plan(model)


def test_a_file_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lwe").write_text("mode: mwe")
    assert ws.make_policy(config="lwe").mode == "mwe"
    Path("lwe").unlink()
    assert ws.make_policy(config="lwe").mode == "lwe"


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ws.InputError, match="paper-conv-only") as error:
        ws.make_policy(config="paper")
    assert error.value.exit_code == 2


def test_a_recipe_goes_by_its_name() -> None:
    assert load_recipe("imagenet/resnet50-lwe").name == "resnet50-lwe"
    with pytest.raises(ws.InputError, match="did you mean 'imagenet/resnet50-lwe'"):
        load_recipe("imagenet/resnet50-lwee")


def test_names_leave_out_what_recipes_extend() -> None:
    names = shipped.names_in(shipped.RECIPES)
    assert "cinic10/resnet18" in names
    assert not [name for name in names if name.endswith("base")]
    assert not [name for name in shipped.names_in(shipped.CONFIGS) if "/" in name]
