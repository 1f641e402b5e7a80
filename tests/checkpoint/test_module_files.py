"""Pickled modules: whole real models, without trust, bit-equal; and what opens ours."""

import functools
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
import torchvision
from timm.models.resnetv2 import ResNetV2
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer

import we_surgery as ws
from we_surgery.checkpoint import read, write
from we_surgery.checkpoint.safe_pickle.permissions import permit
from we_surgery.checkpoint.safe_pickle.scan import Actions, Name
from we_surgery.errors import InputError

MODELS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=3),
    # The classes and helpers of vit_b_16 and swin_t, in little memory.
    "vit": lambda: VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=3),
    "swin": lambda: SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=3),
    "inception-like heads": lambda: torchvision.models.mnasnet0_5(num_classes=3),
    "raft's function": lambda: nn.Sequential(
        torchvision.models.optical_flow.raft.RecurrentBlock(
            input_size=4, hidden_size=4, kernel_size=((3, 3),), padding=((1, 1),)
        )
    ),
    "detector helpers": lambda: torchvision.models.detection.rpn.RegionProposalNetwork(
        torchvision.models.detection.anchor_utils.AnchorGenerator(),
        torchvision.models.detection.rpn.RPNHead(4, 3),
        0.7, 0.3, 8, 0.5, {"training": 4, "testing": 4}, {"training": 4, "testing": 4}, 0.7,
    ),
    "StdConv": lambda: ResNetV2([1], channels=(128,), stem_chs=32, num_classes=3),
    "timm vit": lambda: timm.create_model("test_vit"),
    "timm efficientnet": lambda: timm.create_model("test_efficientnet"),
    "timm nfnet": lambda: timm.create_model("test_nfnet"),
    "timm mixer": lambda: timm.models.mlp_mixer.MlpMixer(3, 32, 16, num_blocks=1, embed_dim=16),
    "attention and transposed conv": lambda: nn.ModuleList(
        [nn.MultiheadAttention(8, 2), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.GRU(2, 2)]
    ),
}  # fmt: skip


@pytest.fixture(params=MODELS, ids=list(MODELS))
def model(request):
    return MODELS[request.param]()


def assert_same(found, expected):
    assert [type(module) for module in found.modules()] == [
        type(module) for module in expected.modules()
    ]
    states = found.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for key, value in states[1].items():
        assert states[0][key].dtype == value.dtype
        assert torch.equal(states[0][key], value), key


def test_a_vanilla_module_comes_back_bit_equal_without_trust(model, tmp_path):
    write(model, tmp_path / "model.pt", "module")
    contents = read(tmp_path / "model.pt")
    assert contents.kind == "module"
    assert contents.metadata is None
    assert_same(contents.model, model)


def test_a_converted_module_comes_back_bit_equal_without_trust(model, tmp_path):
    converted = ws.convert(model, config={"mode": "lwe+mwe", "depthwise": "mwe"})
    write(converted, tmp_path / "model.pt", "module")
    contents = read(tmp_path / "model.pt")
    assert_same(contents.model, converted)
    plan = ws.Plan.from_dict(contents.metadata.plan)
    assert [row.layer for row in plan.excited]


def test_a_partial_over_a_layer_comes_back(tmp_path):
    model = nn.Linear(2, 2)
    model.norm_layer = functools.partial(nn.LayerNorm, eps=1e-6)
    write(model, tmp_path / "model.pt", "module")
    found = read(tmp_path / "model.pt").model.norm_layer
    assert found.func is nn.LayerNorm
    assert found.keywords == {"eps": 1e-6}


def test_a_module_inside_data_parallel_is_taken_out(tmp_path):
    inner = nn.Linear(2, 2)
    torch.save(nn.DataParallel(inner), tmp_path / "model.pt")
    contents = read(tmp_path / "model.pt")
    assert_same(contents.model, inner)
    assert any("DataParallel" in note for note in contents.notes)


def test_a_compiled_module_is_refused_with_what_to_save_instead(tmp_path):
    torch.save(torch.compile(nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(InputError, match="OptimizedModule") as caught:
        read(tmp_path / "model.pt")
    assert "_orig_mod" in caught.value.cure


def test_a_traced_module_is_refused_with_what_to_save_instead(tmp_path):
    torch.save(torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())), tmp_path / "model.pt")
    with pytest.raises(InputError, match="graph_module") as caught:
        read(tmp_path / "model.pt")
    assert "eager" in caught.value.cure


def test_a_key_does_not_fit_a_module(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(InputError, match="no key 'ema'"):
        read(tmp_path / "model.pt", key="ema")


def run_elsewhere(program, *arguments):
    """Runs a program in a fresh process, in which this package is not yet imported."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_converted_file_needs_nothing_but_torch_load(tmp_path):
    model = nn.Sequential(timm.layers.Conv2dSame(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    x = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)
    model(x)
    converted = ws.convert(model, mode="lwe+mwe")
    write(converted, tmp_path / "model.pt", "module")
    torch.save((x, converted(x).detach()), tmp_path / "expected.pt")
    result = run_elsewhere(
        """
        import sys, torch
        torch.set_num_threads(1)
        model = torch.load(sys.argv[1], weights_only=False)
        x, expected = torch.load(sys.argv[2])
        assert torch.equal(model(x), expected)
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        """,
        tmp_path / "model.pt",
        tmp_path / "expected.pt",
    )
    assert result.returncode == 0, result.stderr


def test_a_stripped_file_opens_where_this_package_is_not_installed(tmp_path):
    model = ws.convert(MODELS["StdConv"](), mode="lwe+mwe")
    write(ws.strip(model), tmp_path / "model.pt", "module")
    write(model, tmp_path / "excited.pt", "module")
    result = run_elsewhere(
        """
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "we_surgery":
                    raise ModuleNotFoundError("blocked: " + name)

        sys.meta_path.insert(0, Blocker())
        import torch
        torch.load(sys.argv[1], weights_only=False)
        try:
            torch.load(sys.argv[2], weights_only=False)
        except ModuleNotFoundError as error:
            assert "blocked" in str(error)
        else:
            raise SystemExit("the block does not hold")
        """,
        tmp_path / "model.pt",
        tmp_path / "excited.pt",
    )
    assert result.returncode == 0, result.stderr


def test_a_wrapper_without_a_model_in_it_is_refused(tmp_path):
    wrapper = nn.DataParallel(nn.Linear(2, 2))
    for inner in (None, "absent"):
        wrapper._modules["module"] = inner
        if inner == "absent":
            del wrapper._modules["module"]
        torch.save(wrapper, tmp_path / "model.pt")
        with pytest.raises(InputError, match="without a model in it"):
            read(tmp_path / "model.pt")


NAMES = ("a:b", "c%3A", "two words", "0", "d/e")


class Named(nn.Module):
    """Weights under names that are no identifiers."""

    def __init__(self):
        super().__init__()
        for name in NAMES:
            self.register_parameter(name, nn.Parameter(torch.randn(6, 6)))

    def forward(self, x):
        for name in NAMES:
            x = nn.functional.linear(x, getattr(self, name))
        return x


def test_parameters_of_any_name_come_back(tmp_path):
    x = torch.randn(2, 6)
    model = ws.convert(nn.Sequential(Named()), "mwe", example_inputs=x)
    assert model[0].excited_parameters == NAMES
    ws.save(model, tmp_path / "model.pt")
    loaded = ws.load(tmp_path / "model.pt", allow=__name__)
    assert torch.equal(loaded(x), model(x))
    assert type(loaded[0]) is type(model[0])


@pytest.mark.parametrize("name", ["forward", "__len__", "a.b", "", "%66orward", "%61"])
def test_a_class_for_a_parameter_that_is_none_is_refused(name):
    asked = Name("we_surgery.converted", f"torch/nn/modules/linear:Linear:{name}")
    found = permit(Actions(names={asked.path: asked}), unsafe={asked.path})
    assert len(found.refusals) == 1
