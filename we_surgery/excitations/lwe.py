"""Location-based weight excitation: a learned multiplier for each (output, input) location."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from we_surgery.excitations.base import Affine, Device, DType, Excitation
from we_surgery.excitations.building import Stages, build_excitation
from we_surgery.excitations.functions import (
    ACTIVATIONS,
    check_choice,
    check_count,
    check_mapping,
    kernel_mean,
    linear,
    make_constant,
    spread,
    wake_units,
)
from we_surgery.excitations.layout import WeightLayout
from we_surgery.excitations.lwe_options import Option, one_of, optional, skip_of

Inner = str | Mapping[str, Mapping[str, Any]]


class Widths(NamedTuple):
    """The sizes that an attention's layers depend on."""

    filters: int
    channels: int
    hidden: int
    kernel: tuple[int, ...]


class LWE(Excitation):
    """``W_j * m_j`` with ``m_j = sigmoid(fc2(relu(fc1(mean_K(W_j)))))`` for each filter j.

    WE paper, section 3.2, eq. 1. ``mean_K`` averages each kernel to one value, so ``m_j`` has one
    multiplier in (0, 1) for each of the I input channels of filter j. All filters of a layer share
    ``fc1`` and ``fc2``. The paper's input is the standardized weight: compose with
    :class:`~we_surgery.excitations.Standardize`.

    The *attention* computes the multiplier. This class has the paper's, ``se``; every other
    attention is a subclass, whose ``takes`` lists its options.

    Args:
        in_channels: C, the layer's input channels over all groups.
        groups: the layer's groups; one filter sees I = C / groups channels.
        reduction: the hidden width is ``max(in_channels // reduction, 1)``, with all
            ``in_channels`` for grouped convs too (as ResNeXt50's 27.9 M parameters in Table 1
            imply).
        filters: O; only some attentions depend on it.
        kernel_size: K; empty for a linear layer.
        device, dtype: of the layer.
        options: further options of the attention. ``se`` has

            ``skip``: the multiplier is ``1 + m``. None selects the attention's own form, without
            skip for all but ``bam``.

            ``activation``: between ``fc1`` and ``fc2``; the thesis compares some in Table 6.10.

            ``gate``: after ``fc2``, instead of the sigmoid.

            ``inner``: excites the weights of ``fc1`` and ``fc2``, after standardizing them: stage
            names joined by ``+``, or a mapping of stages to options, which may hold another
            ``inner`` (thesis, chapter 8).

            ``repeat``: that many LWEs of this kind in sequence, each with its own layers (another
            reading of the thesis' chapter 8). All attentions have it.

            ``then``: another LWE, with these options, follows, such as ``{"attention": "se"}``
            after a global one. All attentions have it.

    Parameters are ``fc1`` (I -> hidden) and ``fc2`` (hidden -> I), both with bias, in torch's
    default initialization (supplement, section 1).

    Raises:
        ValueError: a size is not positive, groups do not divide in_channels, or an option or its
            value does not exist.
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
    """The classes by the values of the option ``attention``."""
    takes: ClassVar[Mapping[str, Option]] = {
        "reduction": Option(16, optional(check_count)),
        "skip": skip_of(False),
        "activation": Option("relu", one_of(ACTIVATIONS)),
        "gate": Option("sigmoid", one_of(ACTIVATIONS)),
        "inner": Option(None, lambda where, value: value),
    }
    """Its options besides :data:`FOR_ALL`; each is an attribute of the same name."""

    reduction: int | None
    """None in state dicts of the paper's public code, where only the layers' shapes show it."""
    skip: bool
    activation: str
    gate: str
    inner: Inner | None
    repeat: int
    then: Mapping[str, Any] | None
    fc1: nn.Linear
    fc2: nn.Linear
    further: nn.ModuleList

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
        filters: int = 1,
        kernel_size: tuple[int, ...] = (),
        device: Device = None,
        dtype: DType = None,
        **options: Any,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "groups": groups, "reduction": reduction}
        for name, value in {**sizes, "filters": filters}.items():
            check_count(f"lwe: {name}", value)
        if in_channels % groups:
            raise ValueError(f"lwe: {groups} groups do not divide {in_channels} in_channels")
        self._choose({"reduction": reduction, **options} if "reduction" in self.takes else options)
        hidden = max(in_channels // reduction, 1)
        widths = Widths(filters, in_channels // groups, hidden, kernel_size)
        self._check(widths)
        self._add_layers(widths, device, dtype)
        self.further = nn.ModuleList(
            kind(
                in_channels,
                groups,
                filters=filters,
                kernel_size=kernel_size,
                device=device,
                dtype=dtype,
                **chosen,
            )
            for kind, chosen in self._further()
        )
        self._hide_further()

    def _check(self, widths: Widths) -> None:
        """Raises a ``ValueError`` if the attention does not fit the layer."""
        unfit = self._unfit_kernel(widths.kernel)
        if unfit is not None:
            raise ValueError(f"lwe: attention {self.attention} cannot excite what {unfit}")

    def _choose(self, options: Mapping[str, Any]) -> None:
        self._refuse_unknown(options)
        for name, option in self._all_options().items():
            given = options.get(name, option.default)
            setattr(self, name, option.check(f"lwe: {name}", given))

    @classmethod
    def _refuse_unknown(cls, options: Mapping[str, Any]) -> None:
        for name in options:
            if name not in cls._all_options():
                raise ValueError(f"lwe: attention {cls.attention} has no option {name}")

    @classmethod
    def _all_options(cls) -> dict[str, Option]:
        return {**cls.takes, **FOR_ALL}

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The options of all attentions."""
        every = {n: o.default for kind in LWE.attentions.values() for n, o in kind.takes.items()}
        shared = {name: option.default for name, option in FOR_ALL.items()}
        return {"attention": LWE.attention, **every, **shared}

    @classmethod
    def completed(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        kind = LWE._kind_of(options.get("attention", cls.attention))
        defaults = {name: option.default for name, option in kind._all_options().items()}
        return {"attention": kind.attention, **defaults, **options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "further" not in self._modules:
            self.further = nn.ModuleList()

    def chosen_options(self) -> dict[str, Any]:
        chosen = {name: getattr(self, name) for name in self._all_options()}
        return {"attention": self.attention, **chosen}

    def _further(self) -> list[tuple[type[LWE], dict[str, Any]]]:
        """The LWEs that follow this one, with their options."""
        own = {name: getattr(self, name) for name in self.takes}
        found: list[tuple[type[LWE], dict[str, Any]]] = [(type(self), own)] * (self.repeat - 1)
        if self.then is not None:
            options = dict(self.then)
            found.append((LWE._kind_of(options.pop("attention", LWE.attention)), options))
        return found

    @property
    def _after(self) -> list[LWE]:
        return [lwe for lwe in self.further if isinstance(lwe, LWE)]

    def _hide_further(self) -> None:
        for lwe in self._after:
            lwe.is_part = True  # this one's record describes them

    def _add_layers(self, widths: Widths, device: Device, dtype: DType) -> None:
        self.fc1 = nn.Linear(widths.channels, widths.hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(widths.hidden, widths.channels, device=device, dtype=dtype)
        if self.inner is not None:
            self._excite_layers(self.inner, device, dtype)

    def _excite_layers(self, inner: Inner, device: Device, dtype: DType) -> None:
        if not isinstance(inner, str | Mapping) or not inner:
            raise ValueError(f"lwe: inner must name excitations, not {inner!r}")
        own: Mapping[str, Any] = (
            dict.fromkeys(inner.split("+")) if isinstance(inner, str) else inner
        )
        stages: Stages = [{"standardize": {}}, *({name: own[name] or {}} for name in own)]
        for name, fc in (("fc1", self.fc1), ("fc2", self.fc2)):
            layout = WeightLayout(tuple(fc.weight.shape))
            excitation = build_excitation(stages, layout, device=device, dtype=dtype)
            self.add_module(f"{name}_excitation", excitation)

    def closed_form_fields(self) -> dict[str, Any] | None:
        # Only eq. 1; subclasses compute something else.
        if type(self) is not LWE or self.further:
            return None
        if (self.skip, self.activation, self.gate, self.inner) != (False, "relu", "sigmoid", None):
            return None
        fields = {"fc1_weight": self.fc1.weight, "fc1_bias": self.fc1.bias}
        return fields | {"fc2_weight": self.fc2.weight, "fc2_bias": self.fc2.bias}

    def excite(self, weight: Tensor) -> Tensor:
        return weight * spread(self.multiplier(weight), weight)

    def multiplier(self, weight: Tensor) -> Tensor:
        """The location map of a weight ``[O, I, *K]`` of at least float32.

        Returns:
            ``[O, I]``, or ``[O, I, *K]`` if the attention distinguishes positions of a kernel.
        """
        total = self._multiplier(weight)
        for lwe in self._after:
            own = lwe.multiplier(weight * spread(total, weight))
            total = spread(total, own) * spread(own, total)
        return total

    def _multiplier(self, weight: Tensor) -> Tensor:
        """Of this LWE alone, without those that follow."""
        gated = self._gated(weight)
        return 1 + gated if self.skip else gated

    def _gated(self, weight: Tensor) -> Tensor:
        """The multiplier without skip."""
        return ACTIVATIONS[self.gate](self._mlp(self._pooled(weight)))

    def _mlp(self, pooled: Tensor) -> Tensor:
        """``fc2(activation(fc1(pooled)))``, in the shape of ``pooled``."""
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
        """Makes the multiplier one number for all kernels of ``weight``, which it returns.

        All parameters can still learn.
        """
        constant = self._start(weight)
        for lwe in self._after:
            constant *= lwe.start_constant(weight * constant)
        return constant

    def _start(self, weight: Tensor) -> float:
        """:meth:`start_constant` of this LWE alone.

        The last layer becomes zero. The first gets gradients once the last has left zero, but not
        for a hidden unit that is off for every filter: such a unit is mirrored.
        """
        if self.inner is not None:
            raise NotImplementedError("a stacked lwe cannot start as an identity")
        self._wake_units(weight)
        make_constant(self.fc2, self.start_bias)
        return self.skip + self.gate_at(self.start_bias)

    def _wake_units(self, weight: Tensor) -> None:
        wake_units(self.fc1, self._pooled(weight))

    def _pooled(self, weight: Tensor) -> Tensor:
        """All inputs of the layers, ``[N, I]``."""
        return kernel_mean(weight)

    @property
    def start_bias(self) -> float:
        """A start at which the gate is neither 0 nor flat."""
        return 0.0 if self.gate == "sigmoid" else 1.0

    def gate_at(self, value: float) -> float:
        """The gate's value for one number."""
        return ACTIVATIONS[self.gate](torch.tensor(value, dtype=torch.float64, device="cpu")).item()

    def share(self, parts: dict[Hashable, nn.Module]) -> None:
        for lwe in self._after:
            lwe.share(parts)

    @classmethod
    def unsupported_reason(cls, layout: WeightLayout, options: Mapping[str, Any]) -> str | None:
        """That of the attention, or of the one that follows it."""
        kind = LWE.attentions.get(str(options.get("attention", LWE.attention)), LWE)
        reason, then = kind._unfit_kernel(layout.kernel_size), options.get("then")
        if reason is None and isinstance(then, Mapping):
            return cls.unsupported_reason(layout, then)
        return reason

    @classmethod
    def _unfit_kernel(cls, kernel: tuple[int, ...]) -> str | None:
        """Why this attention cannot excite a weight with such kernels, or None."""
        return None

    @classmethod
    def for_layout(
        cls,
        layout: WeightLayout,
        *,
        device: Device,
        dtype: DType,
        attention: str = "se",
        **options: Any,
    ) -> Self:
        kind = cls._kind_of(attention)
        kind._refuse_unknown(options)
        return kind(
            layout.in_channels,
            layout.groups,
            filters=layout.out_channels,
            kernel_size=layout.kernel_size,
            device=device,
            dtype=dtype,
            **options,
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Self:
        chosen = dict(options)
        kind = cls._kind_of(chosen.pop("attention", LWE.attention))
        module = kind.__new__(kind)
        Excitation.__init__(module)
        module._choose(chosen)
        module._rebuild_layers(state)
        module.further = nn.ModuleList(
            own.from_state(
                _below(state, f"further.{index}."), {"attention": own.attention, **own_options}
            )
            for index, (own, own_options) in enumerate(module._further())
        )
        module._hide_further()
        return module

    @classmethod
    def _kind_of(cls, attention: object) -> type[Self]:
        known = LWE.attentions[check_choice("lwe: attention", attention, LWE.attentions)]
        return known if cls is LWE else cls  # type: ignore[return-value]

    def _rebuild_layers(self, state: Mapping[str, Tensor]) -> None:
        """Adds layers of the state dict's shapes, on meta, which draws no random numbers."""
        hidden, channels = state["fc1.weight"].shape
        meta, dtype = torch.device("meta"), state["fc1.weight"].dtype
        self._add_layers(Widths(1, channels, hidden, self._kernel_size(state)), meta, dtype)

    def _kernel_size(self, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        return ()


LWE.attentions[LWE.attention] = LWE

FOR_ALL: Mapping[str, Option] = {
    "repeat": Option(1, check_count),
    "then": Option(None, optional(check_mapping)),
}
"""The options of all attentions."""


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
