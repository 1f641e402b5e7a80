"""A YAML file -> a recipe: everything one experiment needs but the images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from we_surgery._util import shipped
from we_surgery._util.settings import filled, refuse_unknown
from we_surgery.analysis.variants import Initialization
from we_surgery.checkpoint import Architecture
from we_surgery.converted.sites import Init
from we_surgery.errors import InputError
from we_surgery.planning.config import make_policy, read_yaml

Task = Literal["classification", "segmentation", "video"]
Layout = Literal[
    "imagefolder", "cifar10", "cifar100", "tiny-imagenet", "voc", "cityscapes", "frames"
]
Crop = Literal["resized", "padded", "scaled", "random", "center"]
Precision = Literal["float32", "bfloat16", "float16"]
Form = Literal["attached", "converted"]

_HINT = "See the recipes in configs/recipes/."


@dataclass(frozen=True)
class Data:
    """The images of an experiment.

    Attributes:
        layout: how they lie in their folder; see :mod:`we_surgery.recipes.layouts`.
        classes: number of classes.
        input_size: channels, height, width of what the network sees.
        train: name of the training split.
        validation: name of the split that is evaluated.
        crop: training crops: ``resized`` (random area and ratio), ``padded`` (4 pixels around),
            ``scaled`` (random scale relative to the crop, for segmentation), ``random`` (no
            scaling, for segmentation), ``center`` (none at random).
        flip: whether training mirrors images left to right, in half of the cases.
        crop_pct: share of the resized image's side that the evaluation's centre crop keeps.
        color_jitter: strength of brightness, contrast and saturation changes.
        mean: of each channel, subtracted.
        std: of each channel, divided by.
        frames: number of frames in a clip of a video.
        sampling: ``dense`` takes neighbouring frames, ``strided`` one of each equal part.
    """

    layout: Layout
    classes: int
    input_size: tuple[int, int, int] = (3, 224, 224)
    train: str = "train"
    validation: str = "val"
    crop: Crop = "resized"
    flip: bool = True
    crop_pct: float = 0.875
    color_jitter: float = 0.0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    frames: int = 0
    sampling: Literal["dense", "strided"] = "dense"


@dataclass(frozen=True)
class Training:
    """How an experiment is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: over all processes and accumulated steps.
        optimizer: arguments of ``timm.optim.create_optimizer_v2``: ``opt``, ``lr``, ...
        decay_all: whether biases and norm scales are decayed like weights, as plain SGD does.
        schedule: arguments of ``timm.scheduler.create_scheduler_v2``: ``sched``, ...; a milestone
            of 31 gives 30 epochs before the decay.
        smoothing: label smoothing.
        sparsity: weight of :func:`we_surgery.sparsity_loss` in the loss; needs the converted form.
        excite_from: the first epoch with excitation; before it, it is paused.
        init: as in :func:`we_surgery.convert`.
        excitation_init: of the excitations' linear layers; ``default`` is torch's.
        ema_decay: of a moving average of the weights; None keeps none.
        precision: of the forward pass; half precision is mixed (AMP).
        backbone_lr_scale: what the learning rate of `model.backbone` is multiplied by.
    """

    epochs: int
    batch_size: int
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any] = field(default_factory=dict)
    decay_all: bool = True
    smoothing: float = 0.0
    sparsity: float = 0.0
    excite_from: int = 0
    init: Init | None = None
    excitation_init: Initialization = "default"
    ema_decay: float | None = None
    precision: Precision = "float32"
    backbone_lr_scale: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Attributes:
        name: its file's name without extension.
        title: what it is, in a few words.
        source: where the figures were published.
        task: decides on the loss and the metric.
        model: architecture by name, and the arguments of its factory.
        data: the images.
        training: how it is trained.
        published: the published figures by metric, in percent; empty where there are none.
        notes: what the source leaves open and how it was settled.
        surgery: a config as in ``configs/``, or None for a vanilla network.
        form: whether excitation is attached to the optimizer or converted into the layers; both
            train the same weights.
        backbone: whether ``--backbone`` gives the trained weights of ``model.backbone``.
    """

    name: str
    title: str
    source: str
    task: Task
    model: Architecture
    data: Data
    training: Training
    published: Mapping[str, float] = field(default_factory=dict)
    notes: str = ""
    surgery: Mapping[str, Any] | None = None
    form: Form = "attached"
    backbone: bool = False

    def replace(self, *, form: Form | None = None, **training: Any) -> Recipe:
        """This recipe in another form, or with other training settings."""
        settings = dataclasses.replace(self.training, **training)
        return dataclasses.replace(self, form=form or self.form, training=settings)


def load_recipe(path: str | Path) -> Recipe:
    """A recipe from a YAML file, or by the name of one that comes with the package.

    A file may begin with ``extends: OTHER.yaml``, a path from its own folder: mappings are
    merged key by key, and everything else is replaced.
    """
    path = shipped.check_recipe(path)
    settings = _merged(path, ())
    where = f"the recipe {path}"
    model = settings.pop("model", None)
    if isinstance(model, str):
        model = {"name": model}
    if not isinstance(model, Mapping) or not isinstance(model.get("name"), str):
        raise InputError(
            f"{where} does not name a model",
            "Write `model: torchvision:resnet50`, or a mapping of `name` and `arguments`.",
        )
    refuse_unknown(model, ("name", "arguments"), f"model in {where}")
    surgery = settings.get("surgery")
    if surgery is not None:
        make_policy(config=surgery)
    parts = {
        "name": path.stem,
        "model": Architecture.parse(model["name"], model.get("arguments")),
        "data": filled(Data, settings.pop("data", {}), f"data in {where}", _HINT),
        "training": filled(Training, settings.pop("training", {}), f"training in {where}", _HINT),
    }
    return filled(Recipe, settings | parts, where, _HINT)


def _merged(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise InputError(f"the recipe {path} extends itself", "Remove the circle of `extends`.")
    settings = read_yaml(path)
    if not isinstance(settings, Mapping):
        raise InputError(
            f"the recipe {path} is not a mapping but {type(settings).__name__}",
            _HINT,
        )
    settings = dict(settings)
    base = settings.pop("extends", None)
    if base is None:
        return settings
    return _merge(_merged(path.parent / str(base), (*seen, path.resolve())), settings)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merges ``over`` into ``base`` key by key; a surgery is replaced as a whole."""
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = value
        if isinstance(known, Mapping) and isinstance(value, Mapping) and key != "surgery":
            merged[key] = _merge(known, value)
    return merged
