"""A state dict says in words what was excited, and nothing folds to what it does not say."""

import copy
import json

import pytest
import safetensors.torch
import timm.utils
import torch
from click.testing import CliRunner
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel
from toys import ConvNet

import we_surgery as ws
from we_surgery.cli import strip_command
from we_surgery.excitations.record import is_record, read_record, to_tensor

RECORD = "stem.excitation._extra_state"


def run_strip(*arguments: object):
    return CliRunner().invoke(strip_command, [str(argument) for argument in arguments])


def assert_folds_as(model: nn.Module, stripped: dict) -> None:
    expected = ws.strip(model).state_dict()
    assert list(stripped) == list(expected)
    assert all(torch.equal(stripped[key], value) for key, value in expected.items())


def test_a_record_says_every_stage_with_its_options_in_order():
    options = {"lwe": {"reduction": 8}, "mwe": {"epsilon": 0.2}}
    config = {"conv": "lwe+mwe", "standardize": "on", **options}
    model = ws.convert(nn.Sequential(nn.Conv2d(16, 4, 3)), config=config)
    record = read_record(model.state_dict()["0.excitation._extra_state"])
    assert [*map(list, record["stages"])] == [["standardize"], ["lwe"], ["mwe"]]
    assert record["stages"][0] == {"standardize": {"epsilon": 1e-5}}
    assert record["stages"][1]["lwe"]["reduction"] == 8
    assert record["stages"][2]["mwe"]["epsilon"] == 0.2
    assert not list(model.buffers())


# What is lost is missed.


@pytest.mark.parametrize("mode", ["lwe", "mwe", "lwe+mwe"])
def test_an_average_of_named_parameters_is_refused_with_what_to_give_instead(mode, tmp_path):
    model = ws.convert(ConvNet(), mode)
    average = {name: value.detach() for name, value in model.named_parameters()}
    torch.save({"model": model.state_dict(), "ema": average}, tmp_path / "last.pt")
    with pytest.raises(ws.InputError, match="nothing says how") as caught:
        ws.strip_state_dict(average)
    assert "strict=False" in caught.value.cure
    result = run_strip(tmp_path / "last.pt", "--ema")
    assert result.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    # What the message says to do instead.
    model.load_state_dict(average, strict=False)
    assert_folds_as(model, ws.strip_state_dict(model.state_dict()))


@pytest.mark.parametrize("key", [RECORD, "stem.excitation.lwe.fc1.bias", "stem.raw_weight"])
def test_what_is_lost_of_one_layer_is_refused(key, converted):
    state = dict(converted.state_dict())
    del state[key]
    with pytest.raises(ws.InputError, match="stem"):
        ws.strip_state_dict(state)


def test_a_tensor_that_no_record_explains_is_refused(converted):
    state = dict(converted.state_dict()) | {"stem.excitation.mwe.epsilon": torch.tensor(0.1)}
    with pytest.raises(ws.InputError, match=r"mwe\.epsilon"):
        ws.strip_state_dict(state)


def other_record(state: dict, old: str, new: str) -> dict:
    text = json.dumps(read_record(state[RECORD]))
    assert old in text
    return {**state, RECORD: to_tensor(json.loads(text.replace(old, new)))}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('{"standardize": {"epsilon": 1e-05}}, ', ""),
        ('"gate": "sigmoid"', '"gate": "tanh"'),
        ('"detach_max": true', '"detach_max": false'),
    ],
)
@pytest.mark.parametrize("verify", [(), ("--verify", "--input-shape", "2,3,8,8")], ids=len)
def test_a_record_that_the_files_plan_contradicts_is_refused(old, new, verify, tmp_path):
    model = ws.convert(ConvNet(), "lwe+mwe")
    ws.save(model, tmp_path / "model.pt", architecture="toys:ConvNet")
    checkpoint = torch.load(tmp_path / "model.pt")
    checkpoint["state_dict"] = other_record(checkpoint["state_dict"], old, new)
    torch.save(checkpoint, tmp_path / "edited.pt")
    assert run_strip(tmp_path / "model.pt", *verify, "--allow", "toys").exit_code == 0
    result = run_strip(tmp_path / "edited.pt", *verify, "--allow", "toys")
    assert result.exit_code == 2
    assert "plan gives layer 'stem'" in result.stderr
    with pytest.raises(ws.InputError, match="plan gives layer 'stem'"):
        ws.load(tmp_path / "edited.pt", allow="toys")


# What other tools do to state dicts leaves a record as it is.


def records_of(state: dict) -> dict:
    found = {
        key.removeprefix("module."): read_record(value)
        for key, value in state.items()
        if is_record(key)
    }
    assert found
    return found


def through_safetensors(model, path):
    safetensors.torch.save_file(model.state_dict(), path / "model.safetensors")
    return safetensors.torch.load_file(path / "model.safetensors")


def through_weights_only(model, path):
    torch.save(model.state_dict(), path / "model.pt")
    return torch.load(path / "model.pt", weights_only=True)


def through_dcp(model, path):
    torch.distributed.checkpoint.save(get_model_state_dict(model), checkpoint_id=path / "dcp")
    other = copy.deepcopy(model)
    state = get_model_state_dict(other)
    torch.distributed.checkpoint.load(state, checkpoint_id=path / "dcp")
    assert set_model_state_dict(other, state) == ([], [])
    return other.state_dict()


def averaged_by(make):
    def average(model, _):
        averaged = make(model)
        for _ in range(3):
            (getattr(averaged, "update", None) or averaged.update_parameters)(model)
        return (averaged.ema if hasattr(averaged, "ema") else averaged.module).state_dict()

    return average


def averaged_by_hand(model, _):
    first, second = model.state_dict(), model.state_dict()
    return {key: 0.9 * value + 0.1 * second[key] for key, value in first.items()}


WAYS = {
    "safetensors": through_safetensors,
    "weights_only": through_weights_only,
    "torch.distributed.checkpoint": through_dcp,
    "half": lambda model, _: copy.deepcopy(model).half().state_dict(),
    "cast by hand": lambda model, _: {k: v.bfloat16() for k, v in model.state_dict().items()},
    "averaged by hand": averaged_by_hand,
    "ModelEma": averaged_by(timm.utils.ModelEma),
    "ModelEmaV2": averaged_by(timm.utils.ModelEmaV2),
    "ModelEmaV3": averaged_by(timm.utils.ModelEmaV3),
    "AveragedModel": averaged_by(AveragedModel),
    "with buffers": averaged_by(lambda model: AveragedModel(model, use_buffers=True)),
    "meta": lambda model, _: copy.deepcopy(model).to("meta").state_dict(),
    "functional_call": lambda model, _: (
        torch.func.functional_call(model, dict(model.state_dict()), torch.randn(2, 3, 8, 8)),
        model.state_dict(),
    )[1],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_record_is_left_alone(way, converted, tmp_path):
    assert records_of(WAYS[way](converted, tmp_path)) == records_of(converted.state_dict())


def test_bytes_that_were_truncated_are_no_record(converted):
    state = {key: value.clone() for key, value in converted.state_dict().items()}
    state[RECORD] -= 1
    for use in (ws.strip_state_dict, converted.load_state_dict):
        with pytest.raises((ws.InputError, RuntimeError), match="record of an excitation cannot"):
            use(state)


@pytest.mark.parametrize("tied", [False, True])
def test_shared_tensors_are_written_to_safetensors(tied, tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    if tied:
        model[1].weight = model[0].weight
    config = {"linear": "lwe", "lwe": {"attention": "se" if tied else "global"}}
    model = ws.convert(model, config=config)
    if not tied:
        assert model[0].excitation.lwe.net is model[1].excitation.lwe.net
        safetensors.torch.save_file(model.state_dict(), tmp_path / "file.safetensors")
        state = safetensors.torch.load_file(tmp_path / "file.safetensors")
        assert_folds_as(model, ws.strip_state_dict({key: state[key] for key in model.state_dict()}))
        model.load_state_dict(state)
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    result = run_strip(tmp_path / "model.safetensors")
    assert result.exit_code == 0, result.output
    found = safetensors.torch.load_file(tmp_path / "model.stripped.safetensors")
    expected = ws.strip(model).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert "0.weight" in found


# Into a model.


def test_a_number_of_the_checkpoint_is_taken_and_another_choice_is_an_error():
    def make(**options):
        return ws.convert(nn.Linear(4, 4), config={"linear": "mwe", "mwe": options})

    model = make()
    model.load_state_dict(make(epsilon=0.2).state_dict())
    assert model.excitation.mwe.epsilon == 0.2
    assert_folds_as(model, ws.strip_state_dict(model.state_dict()))
    with pytest.raises(RuntimeError, match="curve='atanh' in the model and 'tanh'"):
        model.load_state_dict(make(curve="tanh").state_dict())


def test_a_changed_epsilon_is_seen_by_the_next_read():
    model = ws.convert(nn.Linear(4, 4), "mwe").eval()
    before = model.weight.clone()
    model.excitation.mwe.epsilon = 0.5
    assert not torch.equal(model.weight, before)


def test_a_plan_does_not_stand_in_for_records_that_a_file_has_lost(tmp_path):
    # As a stage without tensors, a pause is in the record alone.
    config = {"conv": "lwe", "standardize": "off", "linear": "skip"}
    model = ws.convert(ConvNet(), config=config, start="paused")
    ws.save(model, tmp_path / "model.pt", architecture="toys:ConvNet")
    checkpoint = torch.load(tmp_path / "model.pt")
    average = {name: value.detach() for name, value in model.named_parameters()}
    torch.save(checkpoint | {"ema": average}, tmp_path / "last.pt")
    result = run_strip(tmp_path / "last.pt", "--ema")
    assert result.exit_code == 2
    assert "nothing says how" in result.stderr
    assert run_strip(tmp_path / "last.pt", "--raw").exit_code == 0
