"""What a checkpoint holds beside its weights is of any class, and never imported."""

import datetime
import importlib
import sys
import textwrap
from collections import OrderedDict, defaultdict, deque
from pathlib import Path, PurePosixPath

import numpy
import pytest
import torch
from torch import nn

from we_surgery.checkpoint import read
from we_surgery.errors import InputError

# HistoryBuffer is pickled as mmengine's: arrays, and its methods in a table.
SOURCE = """
import numpy
import torch
from pathlib import Path

Path("imported").touch()

class HistoryBuffer:
    def __init__(self):
        self._log_history = numpy.array([0.5, 0.25])
        self._count_history = numpy.array([1, 1])
        self.statistics_methods = {"min": HistoryBuffer.min, "current": HistoryBuffer.current}
    def min(self): pass
    def current(self): pass

class Settings(dict):
    pass

class Rows(list):
    pass

class Net(torch.nn.Linear):
    pass

class Table(torch.Tensor):
    pass
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Objects of a package that is not there any more when the file is read."""
    (tmp_path / "some_trainer.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("some_trainer")
    sys.modules.pop("some_trainer", None)


def saved(content):
    torch.save(content, "checkpoint.pt")
    sys.modules.pop("some_trainer", None)
    Path("imported").unlink()
    return Path("checkpoint.pt")


def settings(trainer, **values):
    made = trainer.Settings(values)
    made.note = "mine"
    return made


PARTS = {
    "a log of mmengine": lambda trainer: {"log_scalars": OrderedDict(a=trainer.HistoryBuffer())},
    "a mapping": lambda trainer: trainer.Settings(lr=0.1, inner=trainer.Settings(a=[1])),
    "a mapping with attributes": lambda trainer: settings(trainer, lr=0.1),
    "a list": lambda trainer: trainer.Rows([1, 2]),
    "a class": lambda trainer: trainer.Net,
    "an array": lambda _: numpy.arange(3.0),
    "arrays of text and dates": lambda _: [numpy.array(["a"]), numpy.array("2026-01-01", "M8[D]")],
    "numpy's scalars": lambda _: [numpy.str_("best"), numpy.float64(0.5), numpy.bool_(1)],
    "numpy's random state": lambda _: numpy.random.get_state(),
    "a generator": lambda _: numpy.random.default_rng(0),
    "an optimizer": lambda _: torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1, momentum=0.9),
    "paths and times": lambda _: [Path("a"), PurePosixPath("b"), datetime.datetime.now()],
    "containers": lambda _: [defaultdict(list, a=[1]), deque([1, 2]), frozenset({1})],
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_beside_the_weights_is_not_needed_to_read_them(part, trainer):
    state = nn.Linear(2, 2).state_dict()
    content = {"state_dict": state, "best": numpy.float64(3), "part": PARTS[part](trainer)}
    path = saved(content)
    contents = read(path)
    assert torch.equal(contents.state_dict["weight"], state["weight"])
    assert list(contents.state_dict) == list(state)
    assert any("'part' (" in note for note in contents.notes)
    assert not Path("imported").exists()


def test_a_state_dict_in_a_mapping_of_any_class_is_read(trainer):
    state = nn.Linear(2, 2).state_dict()
    contents = read(saved(trainer.Settings(model=trainer.Settings(state), epoch=3)))
    assert torch.equal(contents.state_dict["weight"], state["weight"])


def with_attribute(value):
    model = nn.Linear(2, 2)
    model.extra = [value]
    return model


def with_tensor_attribute(value):
    tensor = nn.Parameter(torch.ones(2))
    tensor.extra = value
    return {"weight": tensor}


USED = {
    "a model": lambda trainer: trainer.Net(2, 2),
    "a model in a checkpoint": lambda trainer: {
        "model": trainer.Net(2, 2),
        "ema": {"w": torch.ones(2)},
    },
    "in a model": lambda trainer: with_attribute(trainer.HistoryBuffer()),
    "a class in a model": lambda trainer: with_attribute(trainer.Net),
    "a mapping in a model": lambda trainer: with_attribute(
        trainer.Settings(a=trainer.HistoryBuffer())
    ),
    "in a model in a checkpoint": lambda trainer: {
        "model": with_attribute(trainer.HistoryBuffer()),
        "ema": {"w": torch.ones(2)},
    },
    "on a tensor": lambda trainer: with_tensor_attribute(trainer.HistoryBuffer()),
    "a tensor": lambda trainer: {"weight": torch.ones(2).as_subclass(trainer.Table)},
    "alone": lambda trainer: trainer.HistoryBuffer(),
    "without weights": lambda trainer: {"log": trainer.HistoryBuffer()},
}


@pytest.mark.parametrize("use", USED)
def test_a_class_that_a_model_needs_is_refused_by_name(use, trainer):
    path = saved(USED[use](trainer))
    with pytest.raises(InputError, match=r"some_trainer\.\w+.* \(from another package\)") as caught:
        read(path)
    assert "trust=True" in caught.value.cure
    assert not Path("imported").exists()
