"""One run of the quantization benchmark: training in float and quantization-aware, then int8."""

from __future__ import annotations

import copy
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import evidence_data
import torch
from evidence_data import Split
from evidence_networks import MobileNet, ResNet
from evidence_training import measure, train_step, warm_cosine
from torch import nn

import we_surgery as ws
from we_surgery.analysis.quantization import channel_errors, int8_error, round_weight

ARMS = {"vanilla": None, "lwe": "lwe", "mwe": "mwe", "lwe+mwe": "lwe+mwe"}
"""The modes of ``ws.attach``."""
SEEDS = range(5)
BITS = (8, 6, 5, 4, 3, 2)
ROUNDED_SEEDS = range(2)
"""Of these the weights of each layer are also rounded to fewer bits, a layer at a time."""
_CALIBRATION = 500
_LR, _DECAY = 0.05, 5e-4
_QAT_LR = 0.01


@dataclass(frozen=True)
class Run:
    """What makes a run."""

    case: str
    arm: str
    seed: int


@dataclass(frozen=True)
class Case:
    """A data set, a network, and for how many epochs it is trained, then quantization-aware."""

    title: str
    load: Callable[[], tuple[Split, Split]]
    build: Callable[[], nn.Module]
    images: int
    epochs: int
    qat_epochs: int
    batch: int
    mirror: bool


@cache
def load_digits() -> tuple[Split, Split]:
    """Scikit-learn's digits of 8 x 8 pixels: 1,200 to train, 597 to test."""
    from sklearn.datasets import load_digits as load

    found = load()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    split = Split((images - 4.88) / 6.02, torch.tensor(found.target))
    return split.part(order[:1200]), split.part(order[1200:])


@cache
def load_fashion() -> tuple[Split, Split]:
    """Fashion-MNIST of 14 x 14 pixels: a pool to draw from, 5,000 to test."""
    found = evidence_data.load()
    return found.pool, found.test.part(slice(0, 5000))


# On digits two blocks: torch does not average a quantized map of one pixel.
_DIGITS_RESNET = partial(ResNet, (16, 32))
_RESNET = partial(ResNet, (16, 32, 64))
_MOBILENET = partial(MobileNet, (16, 32, 64, 64))
CASES = {
    "digits_resnet": Case("digits, ResNet", load_digits, _DIGITS_RESNET, 1200, 10, 3, 32, False),
    "digits_mobilenet": Case("digits, MobileNet", load_digits, _MOBILENET, 1200, 10, 3, 32, False),
    "fashion_resnet": Case("Fashion-MNIST, ResNet", load_fashion, _RESNET, 3000, 5, 2, 64, True),
    "fashion_mobilenet": Case(
        "Fashion-MNIST, MobileNet", load_fashion, _MOBILENET, 3000, 5, 2, 64, True
    ),
}


def perform(run: Run) -> dict[str, Any]:
    """Trains and quantizes; accuracies in percent by scheme, None where one refuses the model."""
    torch.set_num_threads(1)
    start = time.process_time()
    case = CASES[run.case]
    pool, test = case.load()
    training = evidence_data.draw(pool, case.images, run.seed)
    torch.manual_seed(run.seed)
    model = case.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is about to leave torch
        _train(model, case, run, training, case.epochs, _LR, "paper")
        accuracies: dict[str, float | None] = {"float": measure(model, test)["accuracy"]}
        inputs = training.part(slice(0, _CALIBRATION)).images
        for name, quantize in SCHEMES.items():
            quantized = quantize(copy.deepcopy(model), inputs)
            accuracies[name] = None if quantized is None else measure(quantized, test)["accuracy"]
        aware = _prepared_for_qat(copy.deepcopy(model), inputs)
        _train(aware, case, run, training, case.qat_epochs, _QAT_LR, "preserve")
        accuracies["qat"] = measure(_fx().convert_fx(aware), test)["accuracy"]
    found = {"accuracies": accuracies, "layers": _layers(model)}
    if run.seed in ROUNDED_SEEDS:
        found["rounded"] = list(_rounded(model, test.part(slice(0, 2000))))
    return found | {"cpu_seconds": round(time.process_time() - start, 1)}


def _train(
    model: nn.Module, case: Case, run: Run, training: Split, epochs: int, lr: float, init: str
) -> None:
    optimizer = torch.optim.SGD(ws.param_groups(model, _DECAY), lr, momentum=0.9)
    mode = ARMS[run.arm]
    if mode is not None:
        ws.attach(model, optimizer, mode, init=init)
    steps = epochs * (case.images // case.batch)
    schedule = warm_cosine(optimizer, steps)
    feed = evidence_data.batches(training, case.batch, steps, run.seed, mirror=case.mirror)
    for images, labels in feed:
        train_step(model, optimizer, schedule, images, labels)
    model.eval()


def _fx() -> Any:
    from torch.ao.quantization import quantize_fx

    return quantize_fx


def _prepared_for_qat(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig_mapping

    mapping = get_default_qat_qconfig_mapping("x86")
    return _fx().prepare_qat_fx(model.train(), mapping, (inputs[:2],))


def _quantized_by_fx(mapping: Any, model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    prepared = _fx().prepare_fx(model, mapping, (inputs[:2],))
    with torch.no_grad():
        prepared(inputs)
    return _fx().convert_fx(prepared)


def _static_per_channel(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    from torch.ao.quantization import get_default_qconfig_mapping

    return _quantized_by_fx(get_default_qconfig_mapping("x86"), model, inputs)


def _static_per_tensor(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    from torch.ao.quantization import QConfigMapping, default_qconfig

    return _quantized_by_fx(QConfigMapping().set_global(default_qconfig), model, inputs)


def _dynamic(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig

    return _quantized_by_fx(QConfigMapping().set_global(default_dynamic_qconfig), model, inputs)


def _pt2e(model: nn.Module, inputs: torch.Tensor) -> nn.Module | None:
    """By torchao's quantizer for x86, which does not take a ReLU that is called twice."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    batch = torch.export.Dim.AUTO
    exported = torch.export.export(model, (inputs,), dynamic_shapes=({0: batch},)).module()
    try:
        prepared = prepare_pt2e(exported, quantizer)
    except ValueError:
        return None
    with torch.no_grad():
        prepared(inputs)
    return allow_exported_model_train_eval(convert_pt2e(prepared))


def _weight_only(model: nn.Module, inputs: torch.Tensor) -> nn.Module | None:
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


SCHEMES = {
    "static": _static_per_channel,
    "static_per_tensor": _static_per_tensor,
    "dynamic": _dynamic,
    "pt2e": _pt2e,
    "weight_only": _weight_only,
}
"""From a model in eval mode and calibration inputs to a quantized one."""


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            yield name, parameter


def _layers(model: nn.Module) -> dict[str, list[float]]:
    """Of each weight its peak over its root mean square, and both errors of int8."""
    found = {}
    for name, weight in _weights(model):
        error = int8_error(name, weight)
        values = (error.peak, error.per_tensor, error.per_channel)
        found[name] = [round(value, 5) for value in values]
    return found


@torch.no_grad()
def _rounded(model: nn.Module, test: Split) -> Iterator[dict[str, Any]]:
    """The accuracy that is lost where one weight has fewer bits, and two measures of its error."""
    baseline = measure(model, test)["accuracy"]
    for name, weight in _weights(model):
        kept = weight.detach().clone()
        for bits in BITS:
            rounded = round_weight(kept, bits)
            weight.copy_(rounded)
            yield {
                "layer": name,
                "bits": bits,
                "channels": round(channel_errors(kept, rounded).square().mean().sqrt().item(), 5),
                "whole": round(((rounded - kept).norm() / kept.norm()).item(), 5),
                "drop": round(baseline - measure(model, test)["accuracy"], 3),
            }
        weight.copy_(kept)
