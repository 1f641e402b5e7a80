"""LWE's attentions against forms written down a second time, kernel by kernel."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import we_surgery as ws
from we_surgery.excitations import LWE, GlobalLWE, WeightLayout, build_excitation
from we_surgery.excitations.standardize import standardized

F64 = torch.float64
SHAPE = (5, 8, 3, 3)


def made(options: dict[str, object], shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, LWE]:
    torch.manual_seed(1)
    stage = build_excitation([{"lwe": options}], WeightLayout(shape), dtype=F64).stages[0]
    return torch.randn(shape, dtype=F64), stage


def mlp(stage: LWE, activation: Callable[[Tensor], Tensor] = torch.relu) -> Callable[..., Tensor]:
    return lambda x: stage.fc2(activation(stage.fc1(x)))


def cbam_maps(weight: Tensor, stage: LWE, activation: nn.Module, skip: bool) -> list[Tensor]:
    """W' filter by filter as equations 3.1 to 3.4 and 4.1 to 4.4 of the thesis have it."""
    excited = []
    for one in weight:
        flat = one.flatten(1)
        total = mlp(stage, activation)(flat.mean(1)) + mlp(stage, activation)(flat.max(1).values)
        c = total.sigmoid().view(-1, 1, 1)
        first = one + one * c if skip else one * c
        pools = torch.stack([first.max(0).values, first.mean(0)])
        s = stage.spatial(pools[None])[0].sigmoid()
        excited.append(first + one * c + first * s if skip else first * s)
    return excited


@pytest.mark.parametrize("skip", [False, True])
def test_cbam_is_what_the_thesis_writes(skip: bool) -> None:
    options = {"attention": "cbam", "skip": skip, "activation": "leaky_relu", "reduction": 2}
    weight, stage = made(options)
    stage.spatial.padding = 1
    expected = torch.stack(cbam_maps(weight, stage, nn.LeakyReLU(), skip))
    torch.testing.assert_close(stage(weight), expected)


def test_the_skips_of_the_thesis_make_no_weight_smaller() -> None:
    weight, stage = made({"attention": "cbam", "skip": True})
    multiplier = stage.multiplier(weight)
    assert multiplier.shape == weight.shape
    assert multiplier.min() > 1
    assert multiplier.max() < 5


def test_cbam_on_a_linear_weight_is_its_channels_part() -> None:
    weight, stage = made({"attention": "cbam"}, (5, 8))
    expected = weight * torch.sigmoid(2 * mlp(stage)(weight))
    torch.testing.assert_close(stage(weight), expected)
    assert not hasattr(stage, "spatial")


def test_bam_is_what_the_thesis_writes() -> None:
    weight, stage = made({"attention": "bam", "reduction": 2})
    channel, spatial = (nn.BatchNorm1d(8, dtype=F64), nn.BatchNorm2d(1, dtype=F64))
    with torch.no_grad():
        for norm, name in ((channel, "channel"), (spatial, "spatial")):
            for end, values in (("scale", norm.weight), ("shift", norm.bias)):
                values.copy_(torch.randn_like(values))
                getattr(stage, f"{name}_{end}").copy_(values)
    for conv in (stage.spatial[1], stage.spatial[2]):
        conv.padding = 1
    by_channel = channel(mlp(stage)(weight.mean((2, 3))))
    maps = nn.Sequential(
        *(stage.spatial[0], nn.ReLU(), stage.spatial[1], nn.ReLU(), stage.spatial[2]),
        *(nn.ReLU(), stage.spatial[3], spatial),
    )(weight)
    gate = torch.sigmoid(by_channel[:, :, None, None] + maps)
    torch.testing.assert_close(stage(weight), weight + weight * gate)
    assert torch.equal(stage.eval()(weight), stage.train()(weight))


def test_triplet_is_the_mean_of_three_gates() -> None:
    weight, stage = made({"attention": "triplet"})
    stage.spatial.padding = 1

    def gate(maps: Tensor) -> Tensor:
        """Of ``[a, *, *]``, pooled over its first axis."""
        return stage.spatial(torch.stack([maps.amax(0), maps.mean(0)])[None])[0, 0].sigmoid()

    for excited, one in zip(stage(weight), weight, strict=True):
        by_position = gate(one)[None]
        by_column = gate(one.permute(1, 0, 2))[:, None]
        by_row = gate(one.permute(2, 1, 0)).T[:, :, None]
        expected = one * (by_position + by_column + by_row) / 3
        torch.testing.assert_close(excited, expected)


@pytest.mark.parametrize("channels", [16, 64, 128, 256])
@pytest.mark.parametrize("resize", ["linear", "area"])
def test_the_global_net_sees_64_channels(resize: str, channels: int) -> None:
    weight, stage = made({"attention": "global", "resize": resize}, (3, channels, 3, 3))
    for excited, one in zip(stage(weight), weight, strict=True):
        row = one.mean((1, 2))[None, None]
        if resize == "linear":
            seen = nn.functional.interpolate(row, 64, mode="linear", align_corners=False)
        else:
            seen = nn.functional.adaptive_avg_pool1d(row, 64)
        gate = torch.sigmoid(stage.net.fc2(torch.relu(stage.net.fc1(seen))))
        back = (
            nn.functional.interpolate(gate, channels, mode="linear", align_corners=False)
            if resize == "linear"
            else nn.functional.adaptive_avg_pool1d(gate, channels)
        )
        torch.testing.assert_close(excited, one * back[0, 0][:, None, None])


def test_linear_resizing_sees_a_half_of_256_channels_and_area_all() -> None:
    seen = {}
    for resize in ("linear", "area"):
        weight, stage = made({"attention": "global", "resize": resize}, (1, 256))
        weight.requires_grad_()
        stage.multiplier(weight).sum().backward()
        seen[resize] = int((weight.grad != 0).sum())
    assert seen == {"linear": 128, "area": 256}


@pytest.mark.parametrize(
    ("activation", "gate"),
    [
        ("relu", "sigmoid"),
        ("swish", "relu"),
        ("relu", "tanh"),
        ("relu", "swish"),
        ("swish", "swish"),
        ("leaky_relu", "tanh"),
        ("swish", "sigmoid"),
        ("leaky_relu", "sigmoid"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_the_activations_of_table_6_10(activation: str, gate: str, skip: bool) -> None:
    functions = {
        "relu": nn.ReLU(),
        "leaky_relu": nn.LeakyReLU(0.01),
        "swish": nn.SiLU(),
        "tanh": nn.Tanh(),
        "sigmoid": nn.Sigmoid(),
    }
    weight, stage = made({"activation": activation, "gate": gate, "skip": skip, "reduction": 2})
    m = functions[gate](mlp(stage, functions[activation])(weight.mean((2, 3))))
    torch.testing.assert_close(stage(weight), weight * (m + skip)[:, :, None, None])


def test_cbam_has_the_7x7_conv_of_the_text() -> None:
    weight, stage = made({"attention": "cbam", "kernel": 7, "reduction": 2})
    assert stage.spatial.weight.shape == (1, 2, 7, 7)
    stage.spatial.padding = 3
    expected = torch.stack(cbam_maps(weight, stage, nn.ReLU(), skip=False))
    torch.testing.assert_close(stage(weight), expected)


def test_triplet_may_have_a_conv_and_a_norm_for_each_branch() -> None:
    weight, stage = made({"attention": "triplet", "separate": True, "kernel": 7})
    gates = []
    for axis, (conv, scale, shift) in enumerate(
        zip(stage.spatial, stage.norm_scale, stage.norm_shift, strict=True)
    ):
        norm = nn.BatchNorm2d(1, dtype=F64)
        with torch.no_grad():
            for values, own in ((norm.weight, scale), (norm.bias, shift)):
                own.copy_(torch.randn_like(own))
                values.copy_(own)
        rotated = weight.movedim(axis + 1, 1)  # the pooled axis first
        others = [d for d in (1, 2, 3) if d != axis + 1]
        pooled = torch.stack([rotated.amax(1), rotated.mean(1)], 1)
        if axis == 1:  # the branch whose maps are I x kw
            assert others == [1, 3]
        if axis == 2:  # the authors turn this one around: kh x I
            pooled = pooled.transpose(2, 3)
        gate = norm(nn.functional.conv2d(pooled, conv.weight, padding=3)).sigmoid()[:, 0]
        if axis == 2:
            gate = gate.transpose(1, 2)
        gates.append(gate.unsqueeze(axis + 1))
    torch.testing.assert_close(stage(weight), weight * (gates[0] + gates[1] + gates[2]) / 3)
    assert torch.equal(stage.eval()(weight), stage.train()(weight))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("skip", [False, True])
def test_a_direct_map_has_one_multiplier_for_each_location(rank: int | None, skip: bool) -> None:
    weight, stage = made({"attention": "direct", "rank": rank, "skip": skip})
    torch.testing.assert_close(stage(weight), weight * (0.5 + skip))
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.copy_(torch.randn_like(parameter))
    for o in range(5):
        for i in range(8):
            if rank is None:
                logit = stage.map[o, i]
            else:
                logit = sum(stage.by_filter[o, r] * stage.by_channel.weight[i, r] for r in (0, 1))
            m = 1 / (1 + torch.exp(-logit)) + skip
            torch.testing.assert_close(stage(weight)[o, i], weight[o, i] * m)


def test_a_direct_map_costs_what_the_paper_says() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    vanilla = sum(p.numel() for p in model.parameters())
    config = {"linear": "skip", "lwe": {"attention": "direct"}}
    added = ws.plan(model, config=config).added_parameters
    assert added == 13_385_920
    with_head = added + model.fc.weight.numel()
    assert round(100 * added / vanilla, 1) == 52.4
    assert round(100 * with_head / vanilla, 1) == 60.4  # "around 60 %"


def test_lwe_is_repeated_with_layers_of_its_own() -> None:
    weight, stage = made({"repeat": 3, "reduction": 2})
    expected = weight
    for one in (stage, *stage.further):
        expected = expected * mlp(one)(expected.mean((2, 3))).sigmoid()[:, :, None, None]
    torch.testing.assert_close(stage(weight), expected)
    torch.testing.assert_close(stage.multiplier(weight)[:, :, None, None] * weight, expected)
    assert not torch.equal(stage.further[0].fc1.weight, stage.further[1].fc1.weight)


def test_a_local_attention_comes_after_a_global_one() -> None:
    options = {"attention": "global", "then": {"attention": "se", "reduction": 2}}
    weight, stage = made(options, (5, 64, 3, 3))
    by_net = nn.Sequential(stage.net.fc1, nn.ReLU(), stage.net.fc2, nn.Sigmoid())
    located = weight * by_net(weight.mean((2, 3)))[:, :, None, None]
    own = mlp(stage.further[0])(located.mean((2, 3))).sigmoid()
    torch.testing.assert_close(stage(weight), located * own[:, :, None, None])


def test_a_chain_takes_maps_over_kernels_and_over_positions() -> None:
    weight, stage = made({"then": {"attention": "cbam"}})
    first = weight * mlp(stage)(weight.mean((2, 3))).sigmoid()[:, :, None, None]
    torch.testing.assert_close(stage(weight), stage.further[0](first))
    assert stage.multiplier(weight).shape == weight.shape


@pytest.mark.parametrize("inner", ["lwe", "mwe"])
def test_a_stacked_lwe_excites_its_own_layers(inner: str) -> None:
    weight, stage = made({"inner": inner, "reduction": 2})
    pooled = weight.mean((2, 3))
    layers = []
    for name in ("fc1", "fc2"):
        fc, own = getattr(stage, name), getattr(stage, f"{name}_excitation").stages[1]
        hat = standardized(fc.weight, torch.tensor(1e-5, dtype=F64))
        if inner == "mwe":
            limit = 1.1 * hat.abs().max()
            layers.append((limit * torch.atanh(hat / limit), fc.bias))
        else:
            layers.append((hat * torch.sigmoid(mlp(own)(hat)), fc.bias))
    hidden = torch.relu(pooled @ layers[0][0].T + layers[0][1])
    m = torch.sigmoid(hidden @ layers[1][0].T + layers[1][1])
    torch.testing.assert_close(stage(weight), weight * m[:, :, None, None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "sse"}, "lwe: attention must be one of se, cbam, bam, triplet, direct"),
        ({"gate": "swihs"}, "lwe: gate must be one of"),
        ({"activation": 3}, "lwe: activation must be one of"),
        ({"skip": "yes"}, "lwe: skip must be true or false"),
        ({"inner": "lew"}, "no excitation called 'lew'"),
        ({"inner": []}, "lwe: inner must name excitations"),
        ({"inner": {"lwe": {"reductoin": 2}}}, "no option 'reductoin'"),
        ({"attention": "triplet", "reduction": 8}, "attention triplet has no option reduction"),
        ({"attention": "global", "inner": "lwe"}, "attention global has no option inner"),
        ({"resize": "area"}, "attention se has no option resize"),
        ({"attention": "cbam", "averaged": True}, "attention cbam has no option averaged"),
        ({"attention": "global", "resize": "cubic"}, "lwe: resize must be one of linear, area"),
        ({"attention": "global", "averaged": 1}, "lwe: averaged must be true or false"),
        ({"attention": "direct", "gate": "tanh"}, "attention direct has no option gate"),
        ({"attention": "direct", "rank": 0}, "lwe: rank must be an integer of at least 1"),
        ({"repeat": True}, "lwe: repeat must be an integer of at least 1"),
        ({"then": "se"}, "lwe: then must be a mapping of options"),
        ({"then": {"rank": 2}}, "attention se has no option rank"),
    ],
)
def test_an_option_that_means_nothing_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ws.InputError, match=message):
        made(options)


@pytest.mark.parametrize(
    ("options", "added"),
    [
        ({}, 156_666),
        ({"skip": True}, 156_666),
        ({"attention": "cbam"}, 157_078),
        ({"attention": "triplet"}, 412),
        ({"inner": "lwe"}, 314_270),
        ({"inner": "mwe"}, 156_666),
        ({"attention": "global"}, 580),
        ({"attention": "global", "averaged": True}, 11_600),
        ({"repeat": 2}, 2 * 156_666),
        ({"attention": "global", "then": {}}, 580 + 156_666),
        ({"attention": "triplet", "separate": True, "kernel": 7}, 20 * (3 * 2 * 49 + 6)),
    ],
    ids=str,
)
def test_resnet18_gains_the_parameters_of_the_specification(
    options: dict[str, object], added: int
) -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    config = {"linear": "skip", "lwe": options}
    assert ws.plan(model, config=config).added_parameters == added
    converted = ws.convert(model, config=config)
    total = sum(p.numel() for p in converted.parameters())
    assert total - sum(p.numel() for p in model.parameters()) == added


class Two(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))


def shared_net(model: nn.Module) -> GlobalLWE:
    first, second = (m for m in model.modules() if isinstance(m, GlobalLWE))
    assert first.net is second.net
    return first.net


def test_the_global_net_stays_one_through_copies_moves_and_files(tmp_path: object) -> None:
    model = ws.convert(Two(), config={"lwe": {"attention": "global"}})
    net = shared_net(model)
    groups = ws.param_groups(model)
    assert sum(p is net.fc1.weight for group in groups for p in group["params"]) == 1
    ws.save(model, f"{tmp_path}/model.pt")
    for other in (
        torch.load(f"{tmp_path}/model.pt", weights_only=False),
        ws.convert(Two(), config={"lwe": {"attention": "global"}}).double(),
        ws.convert(Two(), config={"lwe": {"attention": "global"}}).to("meta"),
    ):
        assert shared_net(other) is not net
    other = ws.convert(Two(), config={"lwe": {"attention": "global"}})
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_file_of_weights_alone_gives_one_global_net_back(ending: str, tmp_path: object) -> None:
    architecture = "torchvision:squeezenet1_1"
    model = ws.convert(
        torchvision.models.squeezenet1_1(), config={"conv": "lwe", "lwe": {"attention": "global"}}
    )
    ws.save(model, f"{tmp_path}/weights.{ending}", architecture=architecture)
    loaded = ws.load(f"{tmp_path}/weights.{ending}")
    nets = {id(m.net) for m in loaded.modules() if isinstance(m, GlobalLWE)}
    assert len(nets) == 1
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    assert torch.equal(loaded.eval()(x := torch.randn(1, 3, 64, 64)), model.eval()(x))


def test_two_conversions_have_two_global_nets() -> None:
    first, second = (ws.convert(Two(), config={"lwe": {"attention": "global"}}) for _ in "ab")
    assert shared_net(first) is not shared_net(second)


def test_the_global_net_gets_the_gradients_of_all_layers() -> None:
    model = ws.convert(Two(), config={"lwe": {"attention": "global"}})
    net = shared_net(model)
    gradients = []
    for layer in (model[0], model[2]):
        weight = layer.weight
        gradients.append(torch.autograd.grad(weight.square().sum(), net.fc2.bias)[0])
    (model[0].weight.square().sum() + model[2].weight.square().sum()).backward()
    torch.testing.assert_close(net.fc2.bias.grad, sum(gradients))


def test_averaging_makes_the_weights_of_the_nets_one_and_leaves_their_biases() -> None:
    model = ws.convert(Two(), config={"lwe": {"attention": "global", "averaged": True}})
    first, second = (m.net for m in model.modules() if isinstance(m, GlobalLWE))
    before = [(n.fc1.weight.clone(), n.fc1.bias.clone()) for n in (first, second)]
    assert ws.average_location_nets(model) == 2
    for net, (_, bias) in zip((first, second), before, strict=True):
        torch.testing.assert_close(net.fc1.weight, (before[0][0] + before[1][0]) / 2)
        assert torch.equal(net.fc1.bias, bias)
    assert torch.equal(first.fc2.weight, second.fc2.weight)
    assert ws.average_location_nets(ws.convert(Two())) == 0


def test_a_state_dict_of_another_attention_is_refused_by_a_layer() -> None:
    first, second = (
        build_excitation([{"lwe": {"gate": gate}}], WeightLayout(SHAPE))
        for gate in ("sigmoid", "tanh")
    )
    with pytest.raises(RuntimeError, match="gate='sigmoid' in the model and 'tanh'"):
        first.load_state_dict(second.state_dict())
