import sys

import pytest
import torch
import torchvision
from torch import nn

from we_surgery.checkpoint import Architecture, looks_like_architecture, read
from we_surgery.errors import InputError


def from_file(name, **arguments):
    return Architecture.from_dict({"name": name, "arguments": arguments})


@pytest.fixture
def factory_module(tmp_path, monkeypatch):
    (tmp_path / "my_factories.py").write_text(
        "from torch import nn\n"
        "def make(width=2): return nn.Linear(width, width)\n"
        "def wrong(): return 3\n"
        "value = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "my_factories"
    sys.modules.pop("my_factories", None)


def test_names_are_told_from_files(tmp_path, monkeypatch):
    assert looks_like_architecture("torchvision:resnet50")
    assert looks_like_architecture("timm:anything.at_all")
    assert looks_like_architecture("package.module:factory")
    for source in (
        "model.pt",
        "a/b:c",
        "C:\\model.pt",
        "./x.py:f",
        "resnet50",
        "",
        ":",
        "a:",
        ":b",
    ):
        assert not looks_like_architecture(source)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "package.module:factory").write_text("")
    assert not looks_like_architecture("package.module:factory")


def test_a_torchvision_model_has_no_weights_of_its_own_accord(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("fetched weights")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    model = Architecture.parse("torchvision:resnet18", {"num_classes": 7}).build()
    assert model.fc.out_features == 7
    detector = Architecture.parse("torchvision:ssdlite320_mobilenet_v3_large", {"num_classes": 3})
    assert isinstance(detector.build(), torchvision.models.detection.ssd.SSD)


def test_a_timm_model_takes_its_arguments():
    model = Architecture.parse("timm:test_vit", {"num_classes": 5}).build()
    assert model.num_classes == 5


def test_a_factory_is_found_in_the_working_folder(factory_module):
    before = list(sys.path)
    model = Architecture.parse("my_factories:make", {"width": 3}).build()
    assert isinstance(model, nn.Linear)
    assert model.in_features == 3
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet5O", "torchvision has no model 'resnet5O'; did you mean 'resnet50'"),
        ("timm:mixer_s16_225", "timm has no model 'mixer_s16_225'; did you mean"),
        ("timm:hf-hub:timm/resnet18", "timm has no model"),
        ("timm:local-dir:/tmp", "timm has no model"),
        ("no_such_package.module:make", "cannot be imported"),
        ("my_factories:mkae", "did you mean 'make'"),
        ("my_factories:value", "is not callable"),
        ("my_factories:wrong", "returned int"),
    ],
)
def test_a_name_that_builds_nothing_says_why(name, message, factory_module):
    with pytest.raises(InputError, match=message):
        Architecture.parse(name).build()


def test_a_name_of_no_form_is_refused_with_what_it_may_have_meant():
    with pytest.raises(InputError, match="did you mean 'torchvision:resnet18' or 'timm:resnet18'"):
        Architecture.parse("resnet18")


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:test_vit", "my_factories:make"])
def test_arguments_it_does_not_take_are_named(name, factory_module):
    with pytest.raises(InputError, match=r"cannot be built with .*'colour': 3"):
        Architecture.parse(name, {"colour": 3}).build()


def test_it_survives_json_and_remembers_that_a_file_said_it():
    architecture = Architecture.parse("timm:test_vit", {"num_classes": 5})
    again = Architecture.from_dict(architecture.to_dict())
    assert again == architecture
    assert again.from_file
    assert not architecture.from_file
    assert again.to_dict() == architecture.to_dict()


def test_arguments_that_cannot_be_stored_are_refused():
    with pytest.raises(InputError, match="cannot be stored"):
        Architecture("torchvision:resnet18", {"norm_layer": nn.Identity}).to_dict()


def test_a_file_does_not_import_a_factory(tmp_path, monkeypatch):
    (tmp_path / "trap_factory.py").write_text("open('canary', 'w').close()\ndef make(): ...\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="code to import") as caught:
        from_file("trap_factory:make").build()
    assert "--arch trap_factory:make" in caught.value.cure
    with pytest.raises(InputError, match="code to import"):
        from_file("trap_factory:make").build(allow=["trap"])
    assert not (tmp_path / "canary").exists()


def test_a_file_may_name_a_factory_of_an_allowed_package(factory_module):
    assert isinstance(from_file("my_factories:make").build(allow=["my_factories"]), nn.Linear)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("torchvision:resnet18", {"weights": "DEFAULT"}),
        ("timm:test_vit", {"pretrained": True}),
        ("timm:test_vit", {"checkpoint_path": "/etc/passwd"}),
        ("timm:test_vit", {"pretrained_cfg": {"file": "/etc/passwd"}, "pretrained": True}),
        ("timm:test_vit", {"pretrained_cfg_overlay": {"url": "http://x"}, "cache_dir": "/tmp"}),
    ],
)
def test_a_file_fetches_nothing(name, arguments, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("fetched weights")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    monkeypatch.setattr("timm.models._factory.load_checkpoint", refuse)
    with pytest.raises(InputError, match=r"cannot be built|fetched"):
        Architecture.parse(name, arguments | {"pretrained": True}).build()
    from_file(name, num_classes=3, **arguments).build()


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("torchvision:googlenet", "weights"),
        ("torchvision:fasterrcnn_mobilenet_v3_large_fpn", "weights_backbone"),
    ],
)
def test_weights_that_shape_the_model_are_asked_of_the_caller(name, argument):
    # googlenet transforms its input only with weights, detectors freeze their norms.
    with pytest.raises(InputError, match=f"{argument}='DEFAULT'"):
        from_file(name, **{argument: "DEFAULT"}).build()


def test_an_architecture_is_read_like_a_file(factory_module):
    contents = read("torchvision:resnet18", arguments={"num_classes": 4})
    assert contents.kind == "architecture"
    assert contents.path is None
    assert contents.state_dict is None
    assert contents.model.fc.out_features == 4
    expected = Architecture("torchvision:resnet18", {"num_classes": 4})
    assert contents.metadata.architecture == expected
    assert read("my_factories:make").model.in_features == 2


def test_building_uses_the_callers_seed():
    torch.manual_seed(3)
    first = Architecture.parse("torchvision:resnet18").build()
    torch.manual_seed(3)
    second = torchvision.models.resnet18()
    assert torch.equal(first.conv1.weight, second.conv1.weight)
