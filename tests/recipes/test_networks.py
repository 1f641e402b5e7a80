import pytest
import torch
import torchvision
from torch import nn

from we_surgery.recipes.networks import (
    ResNeXt29,
    TemporalShift,
    TSMResNet50,
    WideResNet,
    deeplabv3_resnet50,
    resnet18_for_small_images,
    resnet50_with_group_norm,
    resnet50_without_norm,
    vgg19_for_small_images,
)


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: ResNeXt29(), 68_247_460),
        (lambda: WideResNet(16, 8), 10_961_370),
        (lambda: WideResNet(28, 10), 36_479_194),
        (lambda: vgg19_for_small_images(), 20_086_692),
        (lambda: resnet18_for_small_images(), 11_173_962),
        (lambda: resnet50_with_group_norm(), 25_557_032),
        (lambda: resnet50_without_norm(), 25_557_032 - 53_120),
    ],
)
def test_the_networks_have_their_known_sizes(build, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == parameters


def test_small_images_go_through():
    images = torch.randn(2, 3, 32, 32)
    assert ResNeXt29(cardinality=2, base_width=8, num_classes=5)(images).shape == (2, 5)
    assert WideResNet(10, 1, num_classes=5, dropout=0.3)(images).shape == (2, 5)
    assert vgg19_for_small_images(5)(images).shape == (2, 5)


def test_deeplab_has_a_sixteenth_of_the_image_and_torchvisions_names():
    with torch.device("meta"):
        model = deeplabv3_resnet50(21)
        torchvisions = torchvision.models.segmentation.deeplabv3_resnet50(weights_backbone=None)
        assert model.backbone(torch.empty(1, 3, 64, 64))["out"].shape == (1, 2048, 4, 4)
    assert [
        module.dilation for module in model.classifier.modules() if isinstance(module, nn.Conv2d)
    ][1:4] == [(6, 6), (12, 12), (18, 18)]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in torchvisions.state_dict().items()}


def test_a_wide_network_of_no_such_depth_is_refused():
    with pytest.raises(ValueError, match="6n \\+ 4, not 17"):
        WideResNet(17)


def test_the_temporal_shift_moves_an_eighth_each_way():
    frames = torch.arange(1.0, 4).view(3, 1, 1, 1).expand(3, 8, 1, 1)
    shifted = TemporalShift(nn.Identity(), n_segment=3)(frames)
    expected = torch.tensor([[2, 0, *[1] * 6], [3, 1, *[2] * 6], [0, 2, *[3] * 6]])
    assert torch.equal(shifted.flatten(1), expected.float())


def test_clips_go_through_the_temporal_shift_network():
    with torch.device("meta"):
        model = TSMResNet50(num_classes=4, frames=3)
        assert model(torch.randn(2, 3, 3, 64, 64)).shape == (2, 4)
