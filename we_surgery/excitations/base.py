"""What every excitation has in common: its protocol, its precision, its options."""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from we_surgery.errors import InputError
from we_surgery.excitations.layout import WeightLayout
from we_surgery.excitations.record import (
    RECORD_KEY,
    SCHEMA_VERSION,
    Record,
    make_record,
    outline,
    read_record,
    to_tensor,
)

Device = torch.device | str | None
DType = torch.dtype | None

_HALF = (torch.float16, torch.bfloat16)


class Affine(NamedTuple):
    """``gain_j * W_j + shift_j`` for each filter j: ``[O]`` each, or one number for all filters."""

    gain: Tensor | float = 1.0
    shift: Tensor | float = 0.0


class Excitation(nn.Module, ABC):
    """A map from a weight ``[O, I, *K]`` to an excited weight of the same shape and dtype.

    It follows torch's parametrization protocol (``forward``, and ``right_inverse`` if the map has
    an inverse), so ``torch.nn.utils.parametrize`` accepts it. Half-precision weights are computed
    in float32 and rounded once, and autocast is off inside: bf16 autocast would change an excited
    weight by 0.4 %, and a fold in float32 would differ from what was trained.

    A subclass sets ``name`` (its key in state dicts and configs) and ``order`` (its place in a
    composition, which holds one excitation per place), and defines :meth:`excite`; all else has a
    default. Its ``__init__`` takes sizes of the layer (:meth:`sizes`, :meth:`sizes_in`), then its
    options, which have defaults, and the keywords ``device`` and ``dtype``. Each option is kept as
    an attribute of the same name. A state dict stores the options as text
    (:mod:`we_surgery.excitations.record`), and only what is trained or moves as tensors.
    """

    name: ClassVar[str]
    order: ClassVar[int]
    summary: ClassVar[str] = ""
    """What it does, in one line."""
    source: ClassVar[str] = ""
    """Paper and section."""
    published: ClassVar[tuple[str, ...]] = ()
    """The results in its paper, including those where it did not help."""
    deploys_to: ClassVar[str] = "the vanilla layer, bit-equal"
    forms: ClassVar[str] = "both"
    """The forms that train it, and the functions that need one of them."""
    takes_standardized: ClassVar[bool] = False
    """Whether its paper standardizes the weights of convs first."""
    adjustable: ClassVar[tuple[str, ...]] = ()
    """The options that loading a checkpoint may change, such as an epsilon.

    All others must be equal in model and checkpoint.
    """
    is_part: bool = False
    """Whether the record of a larger excitation describes it."""

    def __init__(self, *, device: Device = None, dtype: DType = None) -> None:
        super().__init__()

    def forward(self, weight: Tensor) -> Tensor:
        """The excited weight, in ``weight``'s shape, dtype and memory format."""
        return self._in_full_precision(self.excite, weight)

    @abstractmethod
    def excite(self, weight: Tensor) -> Tensor:
        """The excited weight; called in full precision with at least one element.

        It is a function of weight, parameters and buffers, to the bit. Update buffers and draw
        random numbers in :meth:`advance`.
        """

    def closed_form_fields(self) -> dict[str, Any] | None:
        """Its fields of :class:`~we_surgery.excitations.compute.inputs.ClosedFormInputs`.

        None if the closed form does not know it; autograd then differentiates the composition.
        """
        return None

    def advance(self, weight: Tensor) -> None:
        """Updates buffers during training, such as those of a power iteration; default: nothing.

        Called in training mode before an excited weight is computed for a gradient. Not called in
        eval mode, in a fold, or when a backward pass runs the stages again.

        Args:
            weight: the input of the next :meth:`excite`, detached.
        """

    @property
    def advances(self) -> bool:
        """Whether the class defines :meth:`advance`."""
        return type(self).advance is not Excitation.advance

    def right_inverse(self, excited: Tensor) -> Tensor:
        """A raw weight whose excitation is ``excited``.

        Raises:
            NotImplementedError: this excitation has no inverse in closed form.
        """
        return self._in_full_precision(self.invert, excited)

    def invert(self, excited: Tensor) -> Tensor:
        """The inverse of :meth:`excite`, if it has one in closed form."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse in closed form")

    @classmethod
    def sizes(cls, layout: WeightLayout) -> tuple[Any, ...]:
        """The arguments of ``__init__`` that come before its options; default: none."""
        return ()

    @classmethod
    def sizes_in(cls, state: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """The same arguments, from its tensors in a state dict."""
        return ()

    @classmethod
    def for_layout(
        cls, layout: WeightLayout, *, device: Device, dtype: DType, **options: Any
    ) -> Self:
        """A new excitation for a layer."""
        return cls(*cls.sizes(layout), **options, device=device, dtype=dtype)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Self:
        """An excitation with the shapes of ``state``; the caller then assigns the values.

        Args:
            state: its tensors.
            options: the saved :meth:`chosen_options`.
        """
        dtype = next((tensor.dtype for tensor in state.values()), None)
        return cls(*cls.sizes_in(state), **options, device="meta", dtype=dtype)

    @classmethod
    def unsupported_reason(cls, layout: WeightLayout, options: Mapping[str, Any]) -> str | None:
        """Why it cannot excite a weight of this layout, as in "has ..."; None if it can.

        The plan then leaves the stage out and gives the reason.

        Args:
            layout: the weight's shape.
            options: those that the user chose for the layer, not checked yet.
        """
        return None

    def prepare(self, weight: Tensor) -> None:
        """Initializes what depends on the weight, such as a norm; default: nothing.

        Called once, at conversion, without gradients and in full precision.

        Args:
            weight: the input of the first :meth:`excite`, ``[O, I, *K]``.
        """

    def share(self, parts: dict[Hashable, nn.Module]) -> None:
        """Takes the modules that all layers of a model share from ``parts``, or puts them there.

        Called once per excited layer.
        """

    def start_affine(self, weight: Tensor) -> Affine:
        """Initializes a stage that runs before :class:`Rescale` so that its effect can be undone.

        Args:
            weight: its input, ``[O, I, *K]``.

        Returns:
            The map from ``excite(weight)`` back to ``weight``. If the gain is a number, it also
            holds for every multiple of ``weight``.

        Raises:
            NotImplementedError: the stage cannot start this way.
        """
        raise NotImplementedError(f"{self.name} cannot start as an identity")

    def start_inverse(self, weight: Tensor) -> Tensor:
        """Initializes a stage that runs after :class:`Rescale` so that it can yield ``weight``.

        Returns:
            The input whose excitation is ``weight``.

        Raises:
            NotImplementedError: the stage cannot start this way.
        """
        try:
            return self.invert(weight)
        except NotImplementedError:
            raise NotImplementedError(f"{self.name} cannot start as an identity") from None

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The options with their defaults: what ``__init__`` need not be given."""
        found = {p.name: p.default for p in inspect.signature(cls).parameters.values()}
        return {
            name: default
            for name, default in found.items()
            if default is not inspect.Parameter.empty and name not in ("device", "dtype")
        }

    def chosen_options(self) -> dict[str, Any]:
        """Its present options, of JSON types; by default the attributes of their names."""
        return {name: getattr(self, name) for name in self.options()}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.chosen_options().items())

    @classmethod
    def completed(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of an earlier version's record, completed by defaults."""
        return {**cls.options(), **options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Reads pickles, including those of earlier versions, which lack newer options."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, value in self.completed({}).items():
            if not hasattr(self, name):
                setattr(self, name, value)

    @property
    def stages(self) -> tuple[Excitation, ...]:
        """What its record describes: itself, or the stages of a composition."""
        return (self,)

    @property
    def record(self) -> Record:
        """Stages and options as state dicts store them; :mod:`we_surgery.excitations.record`."""
        return make_record([{stage.name: stage.chosen_options()} for stage in self.stages])

    def adopt(self, saved: Tensor) -> Record:
        """Takes over the adjustable options of a saved record; an InputError if it differs."""
        mine, theirs = self.record, read_record(saved)
        try:
            if outline(mine) != outline(theirs):
                raise ValueError(f"the model has {outline(mine)}, the checkpoint {outline(theirs)}")
            for stage, said in zip(self.stages, theirs["stages"], strict=True):
                options = said[stage.name]
                is_old = theirs["schema"] < SCHEMA_VERSION
                stage.take_over(stage.completed(options) if is_old else options)
        except ValueError as error:
            raise InputError(
                str(error), "Convert the model in the way that the checkpoint's was converted."
            ) from error
        return theirs

    # Not `get_extra_state`: torch.distributed.checkpoint would call it on parts too.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.is_part:
            destination[prefix + RECORD_KEY] = to_tensor(self.record)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        *lists: list[str],
    ) -> None:
        missing_keys, _, error_msgs = lists
        if not self.is_part:
            key = prefix + RECORD_KEY
            try:
                if key in state_dict:
                    self.adopt(state_dict.pop(key))
                elif strict:
                    missing_keys.append(key)
            except InputError as error:
                error_msgs.append(f"{prefix.removesuffix('.')}: {error.cause}. {error.cure}")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Raises a ``ValueError`` if an :attr:`adjustable` option is out of range."""

    def take_over(self, options: Mapping[str, Any]) -> None:
        """Takes over adjustable options; a ``ValueError`` if another one differs. None: unknown."""
        own = self.chosen_options()
        for name in own.keys() | options.keys():
            mine, theirs = own.get(name), options.get(name)
            known = name in own and name in options
            if not known or (theirs is not None and theirs != mine and name not in self.adjustable):
                raise ValueError(
                    f"{self.name} has {name}={mine!r} in the model and {theirs!r} in the checkpoint"
                )
        self.check_options(options)
        for name in self.adjustable:
            setattr(self, name, options[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Casting or `to_empty` may move a buffer, and must not change its value: a temperature of
        # 0.1 would become 0.09998 in fp16.
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in buffers.items():
            after = self._buffers[name]
            if before is not None and after is not None:
                target = before.device if after.is_meta else after.device
                # A meta buffer has no value to keep; `to_empty` has just given it memory.
                kept = after if before.is_meta else before
                self._buffers[name] = kept.to(target, before.dtype)
        return self

    @staticmethod
    def _in_full_precision(compute: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
        if weight.numel() == 0:
            return weight
        with autocast_off(weight.device.type):
            return compute(in_full_precision(weight)).to(weight.dtype)


def in_full_precision(weight: Tensor) -> Tensor:
    """The weight in float32 if it is half precision, and itself otherwise."""
    return weight.float() if weight.dtype in _HALF else weight


def autocast_off(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast on that kind of device."""
    # A compiled backward pass runs under the autocast of its forward pass, which tracing does not
    # know yet.
    if device_type != "meta" and (
        torch.compiler.is_compiling() or torch.is_autocast_enabled(device_type)
    ):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
