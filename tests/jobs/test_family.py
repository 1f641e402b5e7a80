"""The listing of all methods."""

import json
from collections.abc import Iterator

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import we_surgery as ws
from we_surgery.cli import convert_command
from we_surgery.excitations import EXCITATIONS, MWE
from we_surgery.jobs.methods import family


def listed(*arguments: str) -> str:
    result = CliRunner().invoke(convert_command, list(arguments))
    assert result.exit_code == 0
    return result.output


def test_every_mode_excitation_and_transplant_is_listed_with_its_source() -> None:
    names = [method.name for method in family()]
    assert set(names) == {*ws.MODES, *ws.EXCITATIONS, *ws.TRANSPLANTS}
    assert all(method.summary and method.source for method in family())


def test_list_modes_prints_the_family() -> None:
    printed = listed("--list-modes")
    assert all(name in printed for name in (*ws.MODES, *ws.EXCITATIONS, *ws.TRANSPLANTS))


@pytest.mark.parametrize("order", [("--list-modes", "--json"), ("--json", "--list-modes")])
def test_list_modes_prints_json_for_machines(order: tuple[str, str]) -> None:
    rows = {(row["kind"], row["name"]): row for row in json.loads(listed(*order))}
    assert rows["excitation", "mwe"]["options"]["epsilon"] == 0.1
    assert rows["mode", "we"]["options"]["depthwise"] == "mwe"


@pytest.fixture
def registry() -> Iterator[dict[str, type[ws.Excitation]]]:
    before = dict(EXCITATIONS)
    yield EXCITATIONS
    EXCITATIONS.clear()
    EXCITATIONS.update(before)


class Doubled(MWE):
    name = "doubled"
    order = 25
    summary = "twice the weight"
    source = "nobody"

    def excite(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_registered_excitation_is_one_of_the_family(
    registry: dict[str, type[ws.Excitation]],
) -> None:
    assert ws.register_excitation(Doubled) is Doubled
    assert ws.register_excitation(Doubled) is Doubled
    assert "doubled" in [method.name for method in family()]
    model = ws.convert(torch.nn.Linear(3, 3), config={"linear": "mwe+doubled"})
    assert [*map(list, model.excitation.record["stages"])] == [["mwe"], ["doubled"]]
    stripped = ws.strip_state_dict(model.state_dict())
    assert torch.equal(stripped["weight"], 2 * MWE()(model.raw_weight.detach()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mwe", "'mwe' is taken by MWE"),
        ("rescale", "is taken by a key of configs"),
        ("conv", "is taken by a key of configs"),
        ("two words", "no usable `name`"),
        (None, "no usable `name`"),
    ],
)
def test_a_name_that_means_something_else_is_refused(
    name: object, message: str, registry: dict[str, type[ws.Excitation]]
) -> None:
    class Taken(Doubled):
        pass

    Taken.name = name
    with pytest.raises(ws.InputError, match=message):
        ws.register_excitation(Taken)


def test_a_class_without_its_methods_is_refused() -> None:
    class Unfinished(ws.Excitation):
        name = "unfinished"
        order = 40

    with pytest.raises(ws.InputError, match="does not define excite"):
        ws.register_excitation(Unfinished)
