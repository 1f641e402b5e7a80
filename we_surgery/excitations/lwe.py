"""Location-based weight excitation: a learned multiplier for each (output, input) location."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from we_surgery.excitations.base import Affine, Device, DType, Excitation
from we_surgery.excitations.functions import (
    ACTIVATIONS,
    check_choice,
    check_count,
    check_flag,
    kernel_mean,
    linear,
    spread,
)
from we_surgery.excitations.layout import WeightLayout

Inner = str | Mapping[str, Mapping[str, Any]]


class LWE(Excitation):
    """``W_j * m_j`` with ``m_j = sigmoid(fc2(relu(fc1(mean_K(W_j)))))`` for each filter j.

    WE paper, section 3.2, eq. 1. ``mean_K`` averages each kernel to one value,
    whatever its rank, so ``m_j`` holds one multiplier in (0, 1) for each of the
    I input channels of filter j. All filters of a layer share ``fc1`` and ``fc2``.
    The paper feeds the standardized weight: compose with
    :class:`~we_surgery.excitations.Standardize`.

    What computes the multiplier is its *attention*; this class is that of the paper, ``se``, and
    each other one is a subclass of its own.

    Args:
        in_channels: C, the layer's input channels over all groups.
        groups: the layer's groups; one filter sees I = C / groups channels.
        reduction: hidden width is ``max(in_channels // reduction, 1)``, from the
            full ``in_channels`` also for grouped convs (only so does ResNeXt50
            reach the 27.9 M parameters of Table 1).
        kernel_size: K of the layer's weight; empty for a linear layer.
        skip: the multiplier is ``1 + m``; None is the attention's own form, which is
            without for all but ``bam``.
        activation: between ``fc1`` and ``fc2``; Table 6.10 of the thesis compares some.
        gate: after ``fc2``, in the place of the sigmoid.
        inner: excites the weights of ``fc1`` and ``fc2`` themselves, standardized first: stage
            names joined by ``+``, or a mapping of stages to options, which may hold a further
            ``inner`` (thesis, chapter 8).
        device, dtype: those of the layer.
        further: options of one attention alone.

    Parameters are ``fc1`` (I -> hidden) and ``fc2`` (hidden -> I), both with bias,
    in torch's default initialization (supplement, section 1).

    Raises:
        ValueError: a width is not positive, groups do not divide in_channels, or there is no
            such activation or gate.
    """

    name: ClassVar[str] = "lwe"
    order: ClassVar[int] = 10
    summary: ClassVar[str] = "a learned multiplier for each (output, input) location of a kernel"
    source: ClassVar[str] = "WE paper, section 3.2, eq. 1"
    published: ClassVar[tuple[str, ...]] = (
        "ImageNet, ResNet50: 75.8 -> 77.1 top-1 (WE paper, Table 1)",
        "ImageNet, ResNet18: 70.6 -> 71.0 top-1 (WE paper, Table 1)",
    )
    takes_standardized: ClassVar[bool] = True

    attention: ClassVar[str] = "se"
    attentions: ClassVar[dict[str, type[LWE]]] = {}
    """Each class by the name of its attention, as the option takes it."""
    has_own_skip: ClassVar[bool] = False
    lacks: ClassVar[tuple[str, ...]] = ("resize", "averaged")
    """The options that mean nothing to this attention."""

    reduction: int | None
    """None where nobody said it; the layers have their shapes in any case."""
    skip: bool
    activation: str
    gate: str
    inner: Inner | None
    fc1: nn.Linear
    fc2: nn.Linear

    def __init_subclass__(cls, *, attention: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if attention is not None:
            cls.attention = attention
            LWE.attentions[attention] = cls

    def __init__(
        self,
        in_channels: int,
        groups: int = 1,
        reduction: int = 16,
        *,
        kernel_size: tuple[int, ...] = (),
        skip: bool | None = None,
        activation: str = "relu",
        gate: str = "sigmoid",
        inner: Inner | None = None,
        device: Device = None,
        dtype: DType = None,
        **further: Any,
    ) -> None:
        super().__init__()
        widths = {"in_channels": in_channels, "groups": groups, "reduction": reduction}
        for name, value in widths.items():
            check_count(f"lwe: {name}", value)
        if in_channels % groups:
            raise ValueError(f"lwe: {groups} groups do not divide {in_channels} in_channels")
        self._choose(reduction, skip, activation, gate, inner, **further)
        hidden = max(in_channels // reduction, 1)
        self._add_layers(in_channels // groups, hidden, kernel_size, device, dtype)
        self._excite_layers(device, dtype)

    def _choose(
        self,
        reduction: int | None = None,
        skip: bool | None = None,
        activation: str = "relu",
        gate: str = "sigmoid",
        inner: Inner | None = None,
    ) -> None:
        self.reduction = reduction
        self.skip = self.has_own_skip if skip is None else check_flag("lwe: skip", skip)
        self.activation = check_choice("lwe: activation", activation, ACTIVATIONS)
        self.gate = check_choice("lwe: gate", gate, ACTIVATIONS)
        self.inner = inner

    @classmethod
    def completed(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        lacks = cls._kind_of(options.get("attention", "se")).lacks
        return {k: v for k, v in super().completed(options).items() if k not in lacks}

    def chosen_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.options() if name not in self.lacks}

    def _add_layers(
        self, channels: int, hidden: int, kernel: tuple[int, ...], device: Device, dtype: DType
    ) -> None:
        self.fc1 = nn.Linear(channels, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, channels, device=device, dtype=dtype)

    def _excite_layers(self, device: Device, dtype: DType) -> None:
        if self.inner is None:
            return
        # Within: the registry lists this class.
        from we_surgery.excitations.registry import build_excitation

        if not isinstance(self.inner, str | Mapping) or not self.inner:
            raise ValueError(f"lwe: inner must name excitations, not {self.inner!r}")
        stages: Mapping[str, Any] = (
            dict.fromkeys(self.inner.split("+")) if isinstance(self.inner, str) else self.inner
        )
        recipe: list[Mapping[str, Any]] = [{"standardize": {}}]
        recipe += [{stage: options or {}} for stage, options in stages.items()]
        for name, fc in (("fc1", self.fc1), ("fc2", self.fc2)):
            layout = WeightLayout(tuple(fc.weight.shape))
            excitation = build_excitation(recipe, layout, device=device, dtype=dtype)
            self.add_module(f"{name}_excitation", excitation)

    @property
    def is_paper_form(self) -> bool:
        """Whether it is what eq. 1 says, which the closed form knows."""
        choices = (self.skip, self.activation, self.gate, self.inner)
        return type(self) is LWE and choices == (False, "relu", "sigmoid", None)

    def excite(self, weight: Tensor) -> Tensor:
        return weight * spread(self.multiplier(weight), weight)

    def multiplier(self, weight: Tensor) -> Tensor:
        """The location map of a weight ``[O, I, *K]`` of at least float32.

        Returns:
            ``[O, I]``, or ``[O, I, *K]`` where the attention tells positions of a kernel apart.
        """
        gated = self._gated(weight)
        return 1 + gated if self.skip else gated

    def _gated(self, weight: Tensor) -> Tensor:
        """The multiplier without a skip."""
        return ACTIVATIONS[self.gate](self._mlp(kernel_mean(weight)))

    def _mlp(self, pooled: Tensor) -> Tensor:
        """``fc2(activation(fc1(p)))`` of ``[O, I]``."""
        return self._fc("fc2", ACTIVATIONS[self.activation](self._fc("fc1", pooled)))

    def _fc(self, name: str, inputs: Tensor) -> Tensor:
        fc, excitation = self._modules[name], self._modules.get(f"{name}_excitation")
        assert isinstance(fc, nn.Linear)
        weight = fc.weight.to(inputs.dtype)
        if isinstance(excitation, Excitation):
            weight = excitation.excite(weight)
        return linear(inputs, weight, fc.bias)

    def start_affine(self, weight: Tensor) -> Affine:
        return Affine(1 / self.start_constant(weight))

    @torch.no_grad()
    def start_constant(self, weight: Tensor) -> float:
        """Makes the multiplier of ``weight`` the same for all kernels, able to learn; returns it.

        The last layer becomes zero. The first has no gradient until the last has left zero, and
        none for good where a hidden unit is off for every filter: such a unit is mirrored.
        """
        if self.inner is not None:
            raise NotImplementedError("a stacked lwe cannot start as an identity")
        self._wake_units(weight)
        make_constant(self.fc2, self.start_bias)
        return self.skip + self.gate_at(self.start_bias)

    def _wake_units(self, weight: Tensor) -> None:
        hidden = linear(self._pooled(weight), self.fc1.weight, self.fc1.bias)
        sign = torch.where((hidden <= 0).all(0), -1.0, 1.0).to(self.fc1.weight.dtype)
        self.fc1.weight.mul_(sign.unsqueeze(1))
        self.fc1.bias.mul_(sign)

    def _pooled(self, weight: Tensor) -> Tensor:
        """All that the layers are fed, ``[N, I]``."""
        return kernel_mean(weight)

    @property
    def start_bias(self) -> float:
        """Where the gate starts so that it is neither 0 nor flat."""
        return 0.0 if self.gate == "sigmoid" else 1.0

    def gate_at(self, value: float) -> float:
        """The gate of one number."""
        return ACTIVATIONS[self.gate](torch.tensor(value, dtype=torch.float64, device="cpu")).item()

    @classmethod
    def for_layout(
        cls,
        layout: WeightLayout,
        *,
        device: Device,
        dtype: DType,
        attention: str = "se",
        reduction: int = 16,
        skip: bool | None = None,
        activation: str = "relu",
        gate: str = "sigmoid",
        inner: Inner | None = None,
        resize: str = "linear",
        averaged: bool = False,
    ) -> Self:
        options: dict[str, Any] = {
            "reduction": reduction,
            "skip": skip,
            "activation": activation,
            "gate": gate,
            "inner": inner,
            "resize": resize,
            "averaged": averaged,
        }
        kind = cls._kind_of(attention)
        defaults = cls.options()
        for name in kind.lacks:
            if options.pop(name) != defaults[name]:
                raise ValueError(f"lwe: attention {attention} has no option {name}")
        options |= {"kernel_size": layout.kernel_size, "device": device, "dtype": dtype}
        return kind(layout.in_channels, layout.groups, **options)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Self:
        chosen = dict(options)
        kind = cls._kind_of(chosen.pop("attention", "se"))
        module = kind.__new__(kind)
        Excitation.__init__(module)
        module._choose(**chosen)
        module._rebuild_layers(state)
        return module

    @classmethod
    def _kind_of(cls, attention: object) -> type[Self]:
        known = LWE.attentions[check_choice("lwe: attention", attention, LWE.attentions)]
        return known if cls is LWE else cls  # type: ignore[return-value]

    def _rebuild_layers(self, state: Mapping[str, Tensor]) -> None:
        """The layers in the shapes that the state dict has, on meta: no random numbers drawn."""
        hidden, channels = state["fc1.weight"].shape
        meta, dtype = torch.device("meta"), state["fc1.weight"].dtype
        self._add_layers(channels, hidden, self._kernel_size(state), meta, dtype)
        self._excite_layers(meta, dtype)

    def _kernel_size(self, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        return ()

    def extra_repr(self) -> str:
        choices = f"attention={self.attention}, skip={self.skip}"
        return f"{choices}, activation={self.activation}, gate={self.gate}"


LWE.attentions[LWE.attention] = LWE


@torch.no_grad()
def make_constant(layer: Any, value: float) -> None:
    """Makes a linear or conv layer give ``value`` for every input."""
    layer.weight.zero_()
    layer.bias.fill_(value)


def located(
    weight: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> Tensor:
    """Eq. 1 for a weight ``[O, I, *K]`` of at least float32, as the closed form needs it."""
    hidden = F.relu(linear(kernel_mean(weight), fc1_weight, fc1_bias))
    return weight * spread(torch.sigmoid(linear(hidden, fc2_weight, fc2_bias)), weight)
