"""Parameter groups: what is decayed, and that makers of groups see the vanilla model."""

from functools import partial

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.distributed.fsdp import fully_shard
from toys import EVERYTHING, ConvNet

import we_surgery as ws
from we_surgery.converted.graphs import excited_weights
from we_surgery.training.vanilla_view import vanilla_view


def by_name(model: nn.Module, groups: list[dict]) -> dict[str, dict]:
    """The options of each parameter's group, by the parameter's name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: {k: v for k, v in group.items() if k != "params"}
        for group in groups
        for parameter in group["params"]
    }
    assert len(found) == sum(len(group["params"]) for group in groups), "one in two groups"
    return found


def is_excitations(name: str) -> bool:
    return "excitation." in name


@pytest.fixture
def model() -> nn.Module:
    return ws.convert(ConvNet(), config=EVERYTHING)


def test_weights_of_layers_and_excitations_are_decayed_and_nothing_of_one_dimension(model):
    found = by_name(model, ws.param_groups(model, 0.1))
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert found[name] == {"weight_decay": 0.1 if parameter.ndim > 1 else 0.0}, name
    assert found["stem.excitation.lwe.fc1.weight"] == {"weight_decay": 0.1}
    assert found["stem.excitation.lwe.fc2.bias"] == {"weight_decay": 0.0}
    assert found["head.raw_weight"] == {"weight_decay": 0.1}


def test_the_default_is_the_papers_decay(model):
    assert {g["weight_decay"] for g in ws.param_groups(model)} == {1e-4, 0.0}


def test_excitations_can_be_spared_the_decay(model):
    found = by_name(model, ws.param_groups(model, 0.1, decay_excitations=False))
    for name, options in found.items():
        expected = (
            0.1 if not is_excitations(name) and "weight" in name and "norm" not in name else 0
        )
        assert options == {"weight_decay": expected}, name


def test_excitations_can_have_a_learning_rate_of_their_own(model):
    groups = ws.param_groups(model, 0.1, excitation_lr=0.5)
    assert len(groups) == 4
    for name, options in by_name(model, groups).items():
        assert options.get("lr") == (0.5 if is_excitations(name) else None), name
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1, 0.5}


def test_in_each_group_the_excitations_come_last(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in ws.param_groups(model):
        flags = [is_excitations(names[id(parameter)]) for parameter in group["params"]]
        assert flags == sorted(flags)
        assert any(flags)
        assert not all(flags)


def test_a_vanilla_model_has_groups_too():
    model = ConvNet()
    found = by_name(model, ws.param_groups(model, 0.1))
    assert found["stem.weight"] == {"weight_decay": 0.1}
    assert found["norm.weight"] == {"weight_decay": 0.0}
    assert len(found) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out_and_a_frozen_weights_excitation_is_not(model):
    model.stem.raw_weight.requires_grad_(False)
    model.norm.requires_grad_(False)
    found = by_name(model, ws.param_groups(model))
    assert "stem.raw_weight" not in found
    assert "norm.weight" not in found
    assert "stem.excitation.lwe.fc1.weight" in found


def test_the_models_own_list_goes_by_vanilla_names(model):
    found = by_name(
        model, ws.param_groups(model, 0.1, no_weight_decay=["stem.weight", "gr*.weight"])
    )
    assert found["stem.raw_weight"] == {"weight_decay": 0.0}
    assert found["grouped.raw_weight"] == {"weight_decay": 0.0}
    assert found["head.raw_weight"] == {"weight_decay": 0.1}
    assert found["stem.excitation.lwe.fc1.weight"] == {"weight_decay": 0.0}
    model.no_weight_decay = lambda: {"head.weight"}
    assert by_name(model, ws.param_groups(model, 0.1))["head.raw_weight"] == {"weight_decay": 0.0}


def test_base_groups_may_be_a_list_that_knows_nothing_of_excitations(model):
    base = [
        {"params": [model.stem.raw_weight], "lr": 0.3, "weight_decay": 0.1},
        {"params": model.head.parameters(), "lr": 0.7},
    ]
    found = by_name(model, ws.param_groups(model, base=base))
    assert found["stem.excitation.lwe.fc1.weight"] == {"lr": 0.3, "weight_decay": 0.1}
    assert found["stem.excitation.lwe.fc1.bias"] == {"lr": 0.3, "weight_decay": 0.0}
    assert found["head.excitation.lwe.fc2.weight"] == {"lr": 0.7}
    assert found["head.excitation.lwe.fc2.bias"] == {"lr": 0.7, "weight_decay": 0.0}
    assert not any(name.startswith("grouped") for name in found)


def test_base_groups_may_come_with_names(model):
    groups = ws.param_groups(model, base=lambda vanilla: vanilla.named_parameters())
    names = [name for group in groups for name, _ in group["params"]]
    assert "head.excitation.lwe.fc1.bias" in names
    assert torch.optim.SGD(groups, lr=0.1).param_groups[0]["param_names"][0] == "stem.weight"


def test_base_and_its_own_rules_exclude_each_other(model):
    with pytest.raises(ws.InputError, match="both `base`"):
        ws.param_groups(model, 0.1, base=param_groups_weight_decay)
    with pytest.raises(ws.InputError, match="both `base`"):
        ws.param_groups(model, no_weight_decay=["x"], base=param_groups_weight_decay)


def test_groups_of_the_model_that_was_copied_are_refused():
    vanilla = ConvNet()
    converted = ws.convert(vanilla)
    with pytest.raises(ws.InputError, match="none of the model's parameters") as caught:
        ws.param_groups(converted, base=param_groups_weight_decay(vanilla))
    assert "inplace=True" in caught.value.cure


def test_the_view_is_the_vanilla_model_around_the_same_parameters():
    vanilla = ConvNet()
    names, classes = (
        [n for n, _ in vanilla.named_parameters()],
        [type(m) for m in vanilla.modules()],
    )
    held = [id(parameter) for parameter in vanilla.parameters()]
    ws.convert(vanilla, config=EVERYTHING, inplace=True)
    before = [name for name, _ in vanilla.named_parameters()]
    view = vanilla_view(vanilla)
    assert [name for name, _ in view.named_parameters()] == names
    assert [id(parameter) for parameter in view.parameters()] == held
    assert [type(module) for module in view.modules()] == classes
    assert [name for name, _ in vanilla.named_parameters()] == before
    assert next(excited_weights(vanilla)) is not None


def test_a_graph_module_and_a_wrapped_model_have_groups():
    traced = ws.convert(torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3))), "lwe")
    assert len(by_name(traced, ws.param_groups(traced))) == 6
    model = ws.convert(ConvNet())
    expected = ws.param_groups(model)
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        found = ws.param_groups(wrapped)
        assert [[id(p) for p in g["params"]] for g in found] == [
            [id(p) for p in g["params"]] for g in expected
        ]


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
def test_a_sharded_model_which_cannot_be_copied_has_groups(tmp_path):
    rendezvous = (tmp_path / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model = ws.convert(ConvNet())
        expected = [len(group["params"]) for group in ws.param_groups(model)]
        fully_shard(model.stem, mesh=mesh)
        fully_shard(model, mesh=mesh)
        groups = ws.param_groups(model)
        assert [len(group["params"]) for group in groups] == expected
        held = {id(parameter) for group in groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in model.parameters()}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "convnext_atto", "swinv2_cr_tiny_ns_224", "without_matcher"]
)
def test_timms_groups_are_those_of_the_vanilla_model(name):
    with torch.device("meta"):
        if name == "without_matcher":
            # timm then cuts the list of parameters into parts of equal number.
            vanilla = torchvision.models.resnet18()
            vanilla.pretrained_cfg = {"classifier": "fc"}
        else:
            vanilla = timm.create_model(name)
    spared = vanilla.no_weight_decay() if hasattr(vanilla, "no_weight_decay") else ()
    model = ws.convert(vanilla, config={"mode": "lwe", "linear": "lwe", "standardize": "off"})
    for maker in (
        partial(param_groups_layer_decay, layer_decay=0.5, no_weight_decay_list=spared),
        partial(param_groups_weight_decay, weight_decay=0.05, no_weight_decay_list=spared),
    ):
        expected = by_name(vanilla, maker(vanilla))
        found = by_name(model, ws.param_groups(model, base=maker))
        vanilla_names = {}
        for weight in excited_weights(model):
            prefix = f"{weight.module}." if weight.module else ""
            vanilla_name = prefix + weight.parameter
            vanilla_names[f"{prefix}raw_{weight.parameter}"] = vanilla_name
            home = expected[vanilla_name]
            stem = prefix + weight.parameter.removesuffix("weight")
            for inner, parameter in weight.excitation.named_parameters():
                joined = home if parameter.ndim > 1 else {**home, "weight_decay": 0.0}
                assert found[f"{stem}excitation.{inner}"] == joined
        assert len(vanilla_names) > 3
        assert expected == {
            vanilla_names.get(key, key): options
            for key, options in found.items()
            if not is_excitations(key)
        }


def test_a_layer_that_the_base_leaves_out_is_left_out_with_its_excitation():
    model = ws.convert(timm.create_model("convnext_atto", num_classes=5))
    base = partial(param_groups_layer_decay, layer_decay=0.5, no_opt_scale=0.01)
    found = by_name(model, ws.param_groups(model, base=base))
    assert not any(name.startswith("stem") for name in found)
    assert any(is_excitations(name) for name in found)
    assert any(name.startswith("head") for name in found)


def test_what_layers_share_goes_with_the_first_of_them_in_the_base():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3))
    model = ws.convert(model, config={"conv": "lwe", "lwe": {"attention": "global"}})
    base = [{"params": [model[2].raw_weight], "lr": 0.3, "weight_decay": 0.1}]
    found = by_name(model, ws.param_groups(model, base=base))
    shared = [name for name, _ in model.named_parameters() if ".net." in name]
    assert shared
    for name in shared:
        decay = 0.0 if name.endswith("bias") else 0.1
        assert found[name] == {"lr": 0.3, "weight_decay": decay}
    assert not any(name.startswith("0.") for name in found.keys() - set(shared))


def test_timms_optimizer_factory_takes_them(model):
    optimizer = create_optimizer_v2(
        model, "adamw", lr=1e-3, param_group_fn=partial(ws.param_groups, weight_decay=0.1)
    )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
