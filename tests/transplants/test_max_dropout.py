"""MaxDropout: its formula, and dropout layers and calls that become it and come back."""

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import we_surgery as ws
from we_surgery.transplants.max_dropout import MaxDropout, drop_largest

X = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0])


class Droppy(nn.Module):
    """Dropout as a layer of each sort, one of them twice, and as a call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.maps = nn.Dropout2d(0.4)
        self.fc = nn.Linear(4, 4)
        self.values = nn.Dropout(0.3, inplace=True)
        self.alpha = nn.AlphaDropout(0.2)
        self.off = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maps(self.bn(self.conv(x))).mean((2, 3))
        x = F.dropout(self.off(self.alpha(self.values(self.fc(x)))), 0.2, training=self.training)
        return F.dropout1d(x, p=0.6)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (0.3, [-1.0, 0.0, 1.0, 0.0, 0.0]),
        (0.25, [-1.0, 0.0, 1.0, 2.0, 0.0]),
        (0.0, [-1.0, 0.0, 1.0, 2.0, 3.0]),
        (1.0, [-1.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_golden_values(rate: float, expected: list[float]) -> None:
    assert drop_largest(X, rate).tolist() == expected
    assert drop_largest(X.half(), rate).tolist() == expected


def test_what_is_kept_passes_its_gradient_and_what_is_dropped_none() -> None:
    x = X.clone().requires_grad_()
    drop_largest(x, 0.3).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_constant_and_empty_tensors_are_kept() -> None:
    assert torch.equal(drop_largest(torch.full((3,), 2.0), 0.9), torch.full((3,), 2.0))
    assert drop_largest(torch.empty(0, 3), 0.5).shape == (0, 3)


def test_the_threshold_is_one_for_the_whole_batch() -> None:
    batch = torch.tensor([[0.0, 1.0], [5.0, 10.0]])
    assert drop_largest(batch, 0.3).tolist() == [[0.0, 1.0], [5.0, 0.0]]


def test_the_module_drops_in_training_and_in_eval_mode_only_if_always_on() -> None:
    module = MaxDropout(0.3)
    assert torch.equal(module(X), drop_largest(X, 0.3))
    assert torch.equal(module.eval()(X), X)
    assert torch.equal(MaxDropout(0.3, always_on=True).eval()(X), drop_largest(X, 0.3))
    with pytest.raises(ValueError, match="from 0 to 1"):
        MaxDropout(1.5)


def test_the_plan_says_where_it_goes_and_where_not() -> None:
    model = Droppy()
    kept = copy.deepcopy(model.state_dict())
    plan = ws.plan(model, "none", transplants=["max_dropout"])
    rows = {row.place: (row.attach, row.reason) for row in plan.transplants}
    assert rows == {
        "maps": (True, "dropout of 0.4, which is the rate"),
        "values": (True, "dropout of 0.3, which is the rate"),
        "alpha": (False, "is not a plain dropout"),
        "off": (False, "its probability is 0"),
    }
    assert type(model.maps) is nn.Dropout2d
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    assert "max_dropout: put in at 2 of 4 places" in str(plan)


def test_dropout_layers_become_it_and_come_back_as_they_were() -> None:
    model = Droppy()
    converted = ws.convert(model, "lwe", transplants=["max_dropout"])
    assert isinstance(converted.maps, MaxDropout)
    assert converted.maps.p == 0.4  # which some models read
    assert "SwappedDropout(rate=0.4" in repr(converted)
    assert torch.equal(converted.values.train()(X), drop_largest(X, 0.3))
    assert torch.equal(converted.values.eval()(X), X)
    stripped, report = ws.strip_with_report(
        converted.train(), example_inputs=torch.randn(2, 3, 5, 5)
    )
    assert (report.layers, report.transplants) == (2, 2)
    assert repr(stripped) == repr(model)
    assert stripped.values.__dict__.keys() == model.values.__dict__.keys()
    assert stripped.training
    assert isinstance(converted.maps, MaxDropout)


def test_the_rate_overrides_the_dropouts_own_and_zero_ones_then_drop_too() -> None:
    converted = ws.convert(Droppy(), "none", transplants=[{"max_dropout": {"rate": 0.25}}])
    assert converted.off.rate == 0.25
    assert torch.equal(converted.off(X), drop_largest(X, 0.25))
    assert ws.strip(converted).off.p == 0.0


def test_always_on_stays_at_strip_because_taking_it_out_would_change_the_model() -> None:
    options = {"rate": 0.3, "always_on": True, "match": "values"}
    converted = ws.convert(Droppy(), "mwe", transplants=[{"max_dropout": options}])
    inputs = torch.randn(2, 3, 5, 5)
    stripped = ws.strip(converted, example_inputs=inputs).eval()
    assert isinstance(stripped.values, MaxDropout)
    assert torch.equal(stripped.values(X), drop_largest(X, 0.3))
    assert type(stripped.maps) is nn.Dropout2d


def test_calls_in_a_graph_become_it_and_come_back_as_they_were() -> None:
    graph_module = fx.symbolic_trace(Droppy().train())
    code = graph_module.code
    converted = ws.convert(graph_module, "lwe", transplants=["max_dropout"])
    rows = {row["place"]: row["attach"] for row in converted.we_surgery_plan["transplants"]}
    assert rows["@dropout"]
    assert rows["@dropout1d"]
    assert "max_dropout(" in converted.code
    converted.graph.lint()
    alone = fx.Graph()
    x = alone.placeholder("x")
    alone.output(alone.call_function(F.dropout, (x, 0.3, True)))
    small = ws.convert(fx.GraphModule({}, alone), "none", transplants=["max_dropout"])
    assert torch.equal(small(X), drop_largest(X, 0.3))
    stripped = ws.strip(converted)
    assert stripped.code == code
    assert "max_dropout(" in converted.code


def test_a_converted_graph_survives_pickling() -> None:
    graph_module = fx.symbolic_trace(Droppy().train())
    converted = ws.convert(
        graph_module, "none", transplants=[{"max_dropout": {"rate": 0.1, "match": "@dropout"}}]
    )
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert "rate = 0.1" in loaded.code
    assert "max_dropout(" not in ws.strip(loaded).code


def test_a_graph_traced_in_eval_mode_is_left_alone() -> None:
    graph_module = fx.symbolic_trace(Droppy().eval())
    plan = ws.plan(graph_module, "none", transplants=["max_dropout"])
    reasons = {row.place: (row.attach, row.reason) for row in plan.transplants}
    assert reasons["@dropout"] == (False, "the graph was traced in eval mode")


def test_an_exported_program_is_reached_too() -> None:
    program = torch.export.export(nn.Sequential(nn.Dropout(0.3)).train(), (X,)).module()
    converted = ws.convert(program, "none", transplants=["max_dropout"])
    assert torch.equal(converted(X), drop_largest(X, 0.3))
    assert "aten.dropout" in ws.strip(converted).code


def test_a_model_in_files_keeps_it(tmp_path) -> None:
    path = tmp_path / "model.pt"
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    ws.save(ws.convert(model, "none", transplants=["max_dropout"]), path)
    loaded = ws.load(path)
    assert isinstance(loaded[1], MaxDropout)
    assert type(ws.strip(loaded)[1]) is nn.Dropout


class Stages(nn.Module):
    """Without dropout; an activation is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.mix = nn.Conv2d(4, 4, 1)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.mix(self.act(self.bn(self.conv(x)))))
        return self.fc(self.layer1(x).mean((2, 3)))


def test_inserted_it_drops_behind_each_hidden_activation_and_strip_takes_it_out() -> None:
    vanilla = Stages()
    model = ws.convert(vanilla, "lwe", transplants=["max_dropout(insert=true)"])
    assert list(ws.convert(vanilla, "lwe").state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 5, 5)
    twin = ws.convert(vanilla, "none", transplants=["max_dropout(insert=true)"])
    seen = drop_largest(F.relu(vanilla.bn(vanilla.conv(x))), 0.3)
    seen = drop_largest(F.relu(vanilla.mix(seen)), 0.3)
    expected = vanilla.fc(vanilla.layer1(seen).mean((2, 3)))
    assert torch.equal(twin(x), expected)
    assert torch.equal(twin.eval()(x), copy.deepcopy(vanilla).eval()(x))
    stripped, report = ws.strip_with_report(model.eval(), example_inputs=x)
    assert report.transplants == 1
    assert not stripped.act._forward_hooks
    assert not ws.strip(twin).act._forward_hooks


def test_inserted_behind_the_modules_that_a_pattern_names() -> None:
    options = {"insert": True, "match": "layer?", "rate": 0.4}
    plan = ws.plan(Stages(), "none", transplants=[{"max_dropout": options}])
    assert [row.place for row in plan.transplants if row.attach] == ["layer1"]
    model = ws.convert(Stages(), plan=plan)
    inputs = torch.randn(2, 4, 3, 3)
    expected = drop_largest(nn.Sequential(*copy.deepcopy(model.layer1))(inputs), 0.4)
    assert torch.equal(copy.deepcopy(model.layer1)(inputs), expected)


def test_inserted_it_survives_a_file_and_may_stay(tmp_path: Path) -> None:
    options = {"insert": True, "always_on": True}
    model = ws.convert(Stages(), "none", transplants=[{"max_dropout": options}])
    ws.save(model, tmp_path / "model.pt")
    with pytest.raises(ws.InputError, match="trust"):
        ws.load(tmp_path / "model.pt", allow=[Stages.__module__])
    loaded = ws.load(tmp_path / "model.pt", trust=True)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
