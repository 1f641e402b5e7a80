"""MONAI: each of its networks at a small size, on pictures or volumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from monai.networks import nets
from torch import Tensor, nn
from zoo_models import Candidate

from zoo_libraries.filling import noise, on, whole

Maker = Callable[..., nn.Module]
_STEPS = {"channels": (4, 8, 16), "strides": (2, 2)}
_DIFFUSION: dict[str, Any] = {
    "num_res_blocks": 1,
    "channels": (8, 16),
    "attention_levels": (False, True),
    "norm_num_groups": 4,
}


def _flat(maker: Maker, size: int = 64, planes: int = 1, **options: Any) -> tuple[Any, Tensor]:
    return (lambda: maker(**options)), noise(2, planes, size, size)


def _solid(maker: Maker, size: int = 32, planes: int = 1, **options: Any) -> tuple[Any, Tensor]:
    return (lambda: maker(**options)), noise(1, planes, size, size, size)


def _both(maker: Maker, planes: int = 1, **options: Any) -> dict[str, tuple[Any, ...]]:
    return {
        f"{maker.__name__}-{d}d": (_flat if d == 2 else _solid)(
            maker, planes=planes, spatial_dims=d, **options
        )
        for d in (2, 3)
    }


_ONE = {"in_channels": 1, "out_channels": 2}
_MODELS: dict[str, tuple[Any, ...]] = {
    **_both(nets.AttentionUnet, **_ONE, **_STEPS),
    **_both(nets.AutoEncoder, **_ONE, channels=(4, 8), strides=(2, 2)),
    **_both(nets.UNet, **_ONE, **_STEPS),
    "UNet-residual": _flat(nets.UNet, spatial_dims=2, num_res_units=2, **_ONE, **_STEPS),
    **_both(nets.BasicUNet, **_ONE, features=(8, 8, 16, 16, 32, 8)),
    **_both(nets.BasicUNetPlusPlus, **_ONE, features=(8, 8, 16, 16, 32, 8)),
    **_both(nets.DynUNet, **_ONE, kernel_size=[3, 3, 3], strides=[1, 2, 2],
            upsample_kernel_size=[2, 2], filters=[8, 16, 32]),
    **_both(nets.SegResNet, **_ONE),
    **_both(nets.SegResNetDS, **_ONE, init_filters=8),
    **_both(nets.SegResNetDS2, **_ONE, init_filters=8),
    **_both(nets.VNet, in_channels=1, out_channels=2, dropout_dim=2),
    **_both(nets.HighResNet, **_ONE),
    **_both(nets.MedNeXt, **_ONE, init_filters=8),
    **_both(nets.DenseNet, **_ONE, init_features=8, growth_rate=8, block_config=(2, 2)),
    **_both(nets.RegUNet, in_channels=1, num_channel_initial=4, depth=2),
    **_both(nets.VoxelMorphUNet, planes=2, in_channels=2, unet_out_channels=8,
            channels=(8, 8, 8, 8), final_conv_channels=(8,)),
    **_both(nets.PatchDiscriminator, channels=8, in_channels=1, num_layers_d=2),
    **_both(nets.MultiScalePatchDiscriminator, num_d=2, num_layers_d=2, channels=8, in_channels=1),
    **_both(nets.AutoencoderKL, in_channels=1, out_channels=1, latent_channels=4, **_DIFFUSION),
    **_both(nets.VQVAE, in_channels=1, out_channels=1, channels=(8, 16), num_res_layers=1,
            num_res_channels=(8, 16), downsample_parameters=((2, 4, 1, 1),) * 2,
            upsample_parameters=((2, 4, 1, 1, 0),) * 2, num_embeddings=16, embedding_dim=8),
    "AHNet-2d": _flat(nets.AHNet, size=128, spatial_dims=2, upsample_mode="transpose"),
    "DAF3D": _solid(nets.DAF3D, in_channels=1, out_channels=2),
    "EfficientNetBN-b0": _flat(nets.EfficientNetBN, model_name="efficientnet-b0",
                               pretrained=False, in_channels=1, num_classes=3),
    "EfficientNetBNFeatures": _flat(nets.EfficientNetBNFeatures, model_name="efficientnet-b0",
                                    pretrained=False, in_channels=1),
    "FlexibleUNet": _flat(nets.FlexibleUNet, **_ONE, backbone="efficientnet-b0"),
    "FlexibleUNet-resnet": _flat(nets.FlexibleUNet, **_ONE, backbone="resnet18"),
    "LocalNet": _flat(nets.LocalNet, spatial_dims=2, in_channels=1, num_channel_initial=4,
                      extract_levels=(0, 1, 2)),
    "GlobalNet": _flat(nets.GlobalNet, image_size=[64, 64], spatial_dims=2, in_channels=1,
                       num_channel_initial=4, depth=2),
    "MILModel": ((lambda: nets.MILModel(num_classes=2, pretrained=False, mil_mode="att_trans",
                                         backbone="resnet18")), noise(2, 3, 3, 64, 64)),
    "MaskedAutoEncoderViT": _flat(nets.MaskedAutoEncoderViT, in_channels=1, img_size=(64, 64),
                                  patch_size=(16, 16), hidden_size=48, mlp_dim=96, num_layers=2,
                                  num_heads=4, spatial_dims=2, decoder_hidden_size=48,
                                  decoder_mlp_dim=96, decoder_num_layers=1, decoder_num_heads=4),
    "Quicknat": _flat(nets.Quicknat, num_classes=3, num_filters=8),
    "ResNet-3d": ((lambda: nets.resnet10(spatial_dims=3, n_input_channels=1, num_classes=3)),
                  noise(2, 1, 32, 32, 32)),
    "ResNet-2d": ((lambda: nets.resnet18(spatial_dims=2, n_input_channels=1, num_classes=3)),
                  noise(2, 1, 64, 64)),
    "SEResNet50": _flat(nets.SEResNet50, spatial_dims=2, in_channels=1, num_classes=3,
                        layers=(1, 1, 1, 1)),
    "SENet154": _flat(nets.SENet154, spatial_dims=2, in_channels=1, num_classes=3,
                      layers=(1, 1, 1, 1), groups=4),
    "SEResNeXt50": _flat(nets.SEResNeXt50, spatial_dims=2, in_channels=1, num_classes=3,
                         layers=(1, 1, 1, 1)),
    "SegResNetVAE": _flat(nets.SegResNetVAE, input_image_size=(64, 64), spatial_dims=2, **_ONE),
    "SwinUNETR": _flat(nets.SwinUNETR, spatial_dims=2, **_ONE, feature_size=12,
                       depths=(1, 1, 1, 1)),
    "SwinUNETR-3d": _solid(nets.SwinUNETR, size=64, spatial_dims=3, **_ONE, feature_size=12,
                           depths=(1, 1, 1, 1)),
    "UNETR": _solid(nets.UNETR, **_ONE, img_size=(32, 32, 32), hidden_size=48, mlp_dim=96,
                    num_heads=4, feature_size=8),
    "ViT": _flat(nets.ViT, in_channels=1, img_size=(64, 64), patch_size=(16, 16), hidden_size=48,
                 mlp_dim=96, num_layers=2, num_heads=4, spatial_dims=2, classification=True),
    "ViTAutoEnc": _flat(nets.ViTAutoEnc, in_channels=1, img_size=(64, 64), patch_size=(16, 16),
                        hidden_size=48, mlp_dim=96, num_layers=2, num_heads=4, spatial_dims=2),
    "TorchVisionFCModel": _flat(nets.TorchVisionFCModel, planes=3, model_name="resnet18",
                                num_classes=3, pretrained=False, size=224),
    "VarAutoEncoder": _flat(nets.VarAutoEncoder, spatial_dims=2, in_shape=(1, 64, 64),
                            out_channels=1, latent_size=8, channels=(4, 8), strides=(2, 2)),
    "Classifier": _flat(nets.Classifier, in_shape=(1, 64, 64), classes=3, channels=(4, 8),
                        strides=(2, 2)),
    "Regressor": _flat(nets.Regressor, in_shape=(1, 64, 64), out_shape=(3,), channels=(4, 8),
                       strides=(2, 2)),
    "Discriminator": _flat(nets.Discriminator, in_shape=(1, 64, 64), channels=(4, 8),
                           strides=(2, 2)),
    "Critic": _flat(nets.Critic, in_shape=(1, 64, 64), channels=(4, 8), strides=(2, 2)),
    "Generator": ((lambda: nets.Generator(latent_shape=(8,), start_shape=(8, 8, 8),
                                          channels=(8, 4, 1), strides=(2, 2, 1))), noise(2, 8)),
    "FullyConnectedNet": ((lambda: nets.FullyConnectedNet(16, 4, [8, 8])), noise(2, 16)),
    "DiffusionModelUNet": ((lambda: nets.DiffusionModelUNet(
        spatial_dims=2, in_channels=1, out_channels=1, num_head_channels=8, **_DIFFUSION)),
        noise(2, 1, 32, 32), whole(9, 2)),
    "ControlNet": ((lambda: nets.ControlNet(
        spatial_dims=2, in_channels=1, num_head_channels=8, **_DIFFUSION,
        conditioning_embedding_num_channels=(8,))),
        noise(2, 1, 32, 32), whole(9, 2), noise(2, 1, 32, 32)),
    "SPADENet": ((lambda: nets.SPADENet(spatial_dims=2, in_channels=1, out_channels=1, label_nc=3,
                                        input_shape=[32, 32], channels=[8, 16], z_dim=8)),
                 noise(2, 3, 32, 32), noise(2, 1, 32, 32)),
    "SPADEAutoencoderKL": ((lambda: nets.SPADEAutoencoderKL(
        spatial_dims=2, label_nc=3, latent_channels=4, **_DIFFUSION)),
        noise(2, 1, 32, 32), noise(2, 3, 32, 32)),
    "SPADEDiffusionModelUNet": ((lambda: nets.SPADEDiffusionModelUNet(
        spatial_dims=2, in_channels=1, out_channels=1, label_nc=3, num_head_channels=8,
        **_DIFFUSION)), noise(2, 1, 32, 32), whole(9, 2), noise(2, 3, 32, 32)),
    "DecoderOnlyTransformer": ((lambda: nets.DecoderOnlyTransformer(
        num_tokens=32, max_seq_len=16, attn_layers_dim=32, attn_layers_depth=2,
        attn_layers_heads=4)), whole(32, 2, 12)),
}  # fmt: skip


def names() -> list[str]:
    """All that are listed here."""
    return list(_MODELS)


def build(name: str) -> nn.Module:
    """The network."""
    model: nn.Module = _MODELS[name][0]()
    return model


def candidates(name: str, model: nn.Module) -> Iterator[Candidate]:
    """What it is listed with."""
    yield on(*_MODELS[name][1:])
