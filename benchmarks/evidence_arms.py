"""What is compared: networks, arms, and the settings that the tuning may choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from evidence_networks import MobileNet, ResNet, SignalNet, mixer
from torch import nn

import we_surgery as ws

Init = Literal["paper", "preserve"]
COUNTED = range(30)
TUNING = range(9000, 9003)
"""Seeds that choose the settings and are never counted."""


@dataclass(frozen=True)
class Arm:
    """One way to train a network.

    Attributes:
        title: its name in tables.
        config: what ``ws.attach`` gets; None attaches nothing.
        options: of the network's builder.
        longer: training steps over those of plain.
        decays: instead of the network's.
        se: SE modules by the library's transplant.
        init: of ``ws.attach``; None is the network's.
        begins: the share of the steps after which excitation starts.
    """

    title: str
    config: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    longer: float = 1.0
    decays: tuple[float, ...] | None = None
    se: bool = False
    init: Init | None = None
    begins: float = 0.0


@dataclass(frozen=True)
class Experiment:
    """A network, how it is trained, and its arms.

    Attributes:
        pretrained: training begins with weights that were trained on half the classes.
        signals: MNIST-1D in place of Fashion-MNIST; nothing is mirrored.
    """

    title: str
    build: Callable[..., nn.Module]
    arms: Mapping[str, Arm]
    optimizer: str = "sgd"
    lrs: tuple[float, ...] = (0.01, 0.03, 0.1)
    decays: tuple[float, ...] = (5e-4, 5e-3)
    images: int = 4000
    epochs: int = 6
    batch: int = 64
    pretrained: bool = False
    signals: bool = False

    def steps(self, arm: str) -> int:
        """Optimizer steps of an arm."""
        return round(self.epochs * self.steps_per_epoch * self.arms[arm].longer)

    @property
    def steps_per_epoch(self) -> int:
        """Complete batches of the training images."""
        return self.images // self.batch

    def settings(self, arm: str) -> list[tuple[float, float]]:
        """The learning rates and decays that the tuning tries."""
        decays = self.arms[arm].decays or self.decays
        return [(lr, decay) for lr in self.lrs for decay in decays]

    def make_optimizer(self, model: nn.Module, lr: float, decay: float) -> torch.optim.Optimizer:
        """Weights are decayed; biases and the parameters of norms are not."""
        groups = ws.param_groups(model, decay)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr)
        return torch.optim.SGD(groups, lr, momentum=0.9)


def _conv(mode: str, **options: Any) -> dict[str, Any]:
    return {"mode": mode, "linear": "skip", **options}


def _on_gradients(**options: Any) -> dict[str, Any]:
    return _conv("mwe", conv="mwe_gradient", depthwise="mwe_gradient") | options


_CBAM_SKIP = {"attention": "cbam", "skip": True, "activation": "leaky_relu"}
_PLAIN = Arm("plain")
_STANDARDIZE = Arm("standardization alone", _conv("lwe", conv="standardize"))

CONV_ARMS = {
    "plain": _PLAIN,
    "longer": Arm("plain, trained longer", longer=1.3),
    "standardize": _STANDARDIZE,
    "lwe": Arm("LWE", _conv("lwe")),
    "lwe-raw": Arm("LWE, not standardized", _conv("lwe", standardize="off")),
    "mwe": Arm("MWE", _conv("mwe")),
    "lwe+mwe": Arm("LWE and MWE", _conv("lwe+mwe")),
    "default": Arm("LWE, MWE on the linear layer (mode `lwe`)", {"mode": "lwe"}),
    "cbam-skip": Arm("the thesis' LWE", _conv("lwe", lwe=_CBAM_SKIP)),
    "mwe-gradient": Arm("standardization, MWE on gradients only", _on_gradients()),
    "se": Arm("SE", se=True),
    "dropout": Arm("plain, dropout 0.3", options={"dropout": 0.3}),
    "decay": Arm("plain, stronger decay", decays=(1e-2, 3e-2)),
    "wider": Arm("plain, LWE's parameters", options={"widths": (32, 64, 130)}),
}
_SKIPPED = [{"match": f"re:^({name})", "excite": "skip"} for name in ("conv1", "blocks.[01]")]
SETTINGS = {
    "plain": _PLAIN,
    "preserve": Arm('LWE, `init="preserve"`', _conv("lwe"), init="preserve"),
    "reduction": Arm("LWE, reduction 4 in place of 16", _conv("lwe", lwe={"reduction": 4})),
    "last-block": Arm("LWE in the last block alone", _conv("lwe", rules=_SKIPPED)),
    "late": Arm("LWE in the second half alone", _conv("lwe"), init="preserve", begins=0.5),
}
"""How LWE could be used otherwise."""
FEW_ARMS = {name: CONV_ARMS[name] for name in ("plain", "standardize", "lwe", "mwe", "default")}


def _linear(stages: str, **options: Any) -> dict[str, Any]:
    return {"mode": "lwe", "conv": "skip", "linear": stages, **options}


_MWE = {"epsilon": 0.2}
MIXER_ARMS = {
    "plain": _PLAIN,
    "longer": Arm("plain, trained longer", longer=1.1),
    "standardize": Arm("scaled standardization alone", _linear("weight_align")),
    "lwe": Arm("scaled standardization, LWE", _linear("weight_align+lwe")),
    "lwe-raw": Arm("LWE, not standardized", _linear("lwe")),
    "mwe": Arm("MWE (the thesis' Mixer)", {"mode": "mwe", "standardize": "off", "mwe": _MWE}),
    "lwe+mwe": Arm("LWE and MWE, not standardized", _linear("lwe+mwe", mwe=_MWE)),
    "default": Arm("MWE on linear layers (mode `lwe`)", {"mode": "lwe"}),
    "cbam-skip": Arm("the thesis' LWE, not standardized", _linear("lwe", lwe=_CBAM_SKIP)),
    "mwe-gradient": Arm(
        "MWE on gradients only",
        _on_gradients(linear="mwe_gradient", standardize="off", mwe_gradient=_MWE),
    ),
    "se": Arm("SE on tokens", options={"se": True}),
    "dropout": Arm("plain, dropout 0.1", options={"dropout": 0.1}),
    "decay": Arm("plain, stronger decay", decays=(1.0, 3.0)),
    "wider": Arm("plain, LWE's parameters", options={"width": 70}),
}

EXPERIMENTS = {
    "resnet_bn": Experiment("ResNet, batch norm", ResNet, CONV_ARMS),
    "settings": Experiment("ResNet, batch norm, other uses of LWE", ResNet, SETTINGS),
    "mixer": Experiment(
        "MLP-Mixer",
        mixer,
        MIXER_ARMS,
        optimizer="adamw",
        lrs=(0.01, 0.02, 0.04),
        decays=(0.05, 0.5),
    ),
    "resnet_gn": Experiment("ResNet, group norm", partial(ResNet, norm="group"), FEW_ARMS),
    "mobilenet": Experiment(
        "MobileNet",
        MobileNet,
        {**FEW_ARMS, "default": Arm("mode `we`", {"mode": "we"})},
        lrs=(0.03, 0.1, 0.3),
    ),
    "finetune": Experiment(
        "ResNet, batch norm, fine-tuned",
        ResNet,
        FEW_ARMS,
        lrs=(0.03, 0.1, 0.3),
        images=1000,
        epochs=16,
        pretrained=True,
    ),
    "signals": Experiment(
        "1-d network, MNIST-1D",
        SignalNet,
        FEW_ARMS,
        lrs=(0.03, 0.1, 0.3),
        images=1000,
        epochs=40,
        signals=True,
    ),
}
