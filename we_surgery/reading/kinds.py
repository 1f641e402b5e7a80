"""The kinds of modules: conv, linear, norm, attention gate, shift."""

from __future__ import annotations

import re

from torch import nn

from we_surgery._util.scripted import is_scripted

CONV_KINDS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}
KINDS = CONV_KINDS | {nn.Linear: "linear", nn.MultiheadAttention: "attention"}
WEIGHTED = tuple(KINDS)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

# By name, for classes of libraries that may not be installed. A frozen batch norm keeps its
# statistics, so it does not absorb a change of scale.
_NORM_NAME = re.compile(r"norm|^(BN|GN|LN)(\d|$)", re.IGNORECASE)
_NOT_A_NORM = re.compile(r"frozen|localresponse|standardized|spectral", re.IGNORECASE)
_EACH_CHANNEL_NAME = re.compile(r"batch|instance|filterresponse|^(BN|IN)(\d|$)", re.IGNORECASE)
_GATE_NAMES = frozenset(
    """
    se semodule selayer seblock seunit squeezeexcite squeezeexcitecl squeezeexcitation
    squeezeandexcitation quantizablesqueezeexcitation effectivesemodule effectivesqueezeexcite
    eca ecamodule ecalayer ecablock cecamodule cbam cbammodule lightcbammodule channelattn
    lightchannelattn spatialattn lightspatialattn channelgate spatialgate bam bammodule
    gatherexcite globalcontext coordattn simplecoordattn efficientlocalattn stripattn
    selectivekernelattn
    """.split()
)
_SHIFT_NAME = re.compile(r"^(TemporalShift|.*Shift(Conv)?\dx\d|GenericShift|Shift\dd|ShiftConv)")
_STANDARDIZING_NAME = re.compile(r"Std.*Conv|WSConv|WeightStandard", re.IGNORECASE)


def kind_of(module: nn.Module) -> str | None:
    """The kind of a weighted layer, or None for any other module."""
    if is_scripted(module):  # it has lost its class and kept the name
        name = str(module.original_name)
        return next((kind for base, kind in KINDS.items() if base.__name__ == name), None)
    return next((kind for base, kind in KINDS.items() if isinstance(module, base)), None)


def weights_of(module: nn.Module, kind: str) -> tuple[str, ...]:
    """The names of a weighted layer's own weights."""
    if kind != "attention":
        return ("weight",)
    return tuple(name for name in _ATTENTION_WEIGHTS if getattr(module, name, None) is not None)


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalizes its input, so that a conv's scale before it has no effect."""
    name = type(module).__name__
    if any(isinstance(child, WEIGHTED) for child in module.modules()):
        return False
    return bool(_NORM_NAME.search(name)) and not _NOT_A_NORM.search(name)


def normalizes_each_channel(norm: nn.Module) -> bool:
    """Whether a norm takes each channel by itself, and not several together as layer norm does."""
    parts = [base.__name__ for part in norm.modules() for base in type(part).__mro__]
    return any(_EACH_CHANNEL_NAME.search(name) for name in parts)


def is_gate(module: nn.Module) -> bool:
    """Whether the module is an attention gate (SE, CBAM, BAM, ECA and their kin) by its class."""
    return type(module).__name__.lower().replace("_", "") in _GATE_NAMES


def is_shift(module: nn.Module) -> bool:
    """Whether the module displaces channels, by its class name or a TSM module's attributes."""
    tsm = hasattr(module, "n_segment") and (hasattr(module, "fold_div") or hasattr(module, "n_div"))
    return tsm or bool(_SHIFT_NAME.search(type(module).__name__))


def standardizes_itself(module: nn.Module) -> bool:
    """Whether the class standardizes its own weight in forward, as timm's ``StdConv2d``."""
    return any(_STANDARDIZING_NAME.search(base.__name__) for base in type(module).__mro__)
