"""What every excitation has in common: its protocol, its precision, its hyper-parameters."""

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
from we_surgery.excitations.legacy import upgrade_state
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

    It follows torch's parametrization protocol (``forward`` and, where one exists,
    ``right_inverse``), so it can also be registered by ``torch.nn.utils.parametrize``.
    Half-precision weights are computed in float32 and rounded once, and autocast is off inside:
    under bf16 autocast an excited weight would differ from its float32 value by 0.4 %, and a fold
    in float32 would no longer be what was trained.

    Subclasses set ``name`` (their key in a state dict and in a config) and ``order`` (their place
    when several are composed; two of one place exclude each other), write :meth:`excite`, and
    give :meth:`for_layout` and :meth:`from_state`; the rest has a default. Each option of
    :meth:`for_layout` is an attribute of its name: a state dict says the options in words
    (:mod:`we_surgery.excitations.record`), and in tensors only what is trained or moves.
    """

    name: ClassVar[str]
    order: ClassVar[int]
    summary: ClassVar[str] = ""
    """What it does, in a line, for listings."""
    source: ClassVar[str] = ""
    """The paper and section it is from."""
    published: ClassVar[tuple[str, ...]] = ()
    """The results its authors print, also those where it did not help."""
    deploys_to: ClassVar[str] = "the vanilla layer, bit-equal"
    forms: ClassVar[str] = "both"
    """Which form trains it: attached, converted or both, and what of it needs one of them."""
    takes_standardized: ClassVar[bool] = False
    """Whether its paper standardizes the weights of convs first."""
    adjustable: ClassVar[tuple[str, ...]] = ()
    """The attributes that a checkpoint may change when it is loaded, such as an epsilon.

    All other options say what is computed, and have to be equal in model and checkpoint.
    """
    is_part: bool = False
    """Whether it is a stage of a composition, whose record says what it is."""

    def forward(self, weight: Tensor) -> Tensor:
        """The excited weight, in ``weight``'s shape, dtype and memory format."""
        return self._in_full_precision(self.excite, weight)

    @abstractmethod
    def excite(self, weight: Tensor) -> Tensor:
        """The excited weight; called in full precision with at least one element.

        The same weight, parameters and buffers give the same bits each time: a buffer that
        moves, or a random number, belongs in :meth:`advance`.
        """

    def closed_form_fields(self) -> dict[str, Any] | None:
        """Its fields of :class:`~we_surgery.excitations.compute.inputs.ClosedFormInputs`.

        None where the closed form does not compute what :meth:`excite` does; autograd then
        differentiates the whole composition.
        """
        return None

    def advance(self, weight: Tensor) -> None:
        """Moves the buffers that follow training, such as a power iteration's; mostly nothing.

        Called in training mode before each excited weight that is computed for a gradient, and
        never in eval mode, in a fold or in the second run of a backward pass, which has the
        buffers of the first.

        Args:
            weight: what :meth:`excite` will be given, detached.
        """

    @property
    def advances(self) -> bool:
        """Whether :meth:`advance` does anything."""
        return type(self).advance is not Excitation.advance

    def right_inverse(self, excited: Tensor) -> Tensor:
        """A raw weight whose excitation is ``excited``.

        Raises:
            NotImplementedError: this excitation has no inverse in closed form.
        """
        return self._in_full_precision(self.invert, excited)

    def invert(self, excited: Tensor) -> Tensor:
        """The inverse of :meth:`excite`, where one exists."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse in closed form")

    @classmethod
    @abstractmethod
    def for_layout(cls, layout: WeightLayout, *, device: Device, dtype: DType) -> Self:
        """A new excitation for a layer; further keyword arguments are the method's options."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Self:
        """An excitation shaped as its state dict says; parameter values are assigned after.

        Args:
            state: its tensors.
            options: what :meth:`chosen_options` said when they were saved.
        """

    @classmethod
    def unsupported_reason(cls, layout: WeightLayout) -> str | None:
        """Why this can do nothing for a weight of that layout, as a sentence's end; None if it can.

        The plan then leaves this stage out, with that reason.
        """
        return None

    def prepare(self, weight: Tensor) -> None:
        """Takes what it starts from, such as a norm, from the weight it is going to excite.

        Called once, at the conversion, without gradients and in full precision.

        Args:
            weight: ``[O, I, *K]``, as :meth:`excite` will get it.
        """

    def share(self, parts: dict[Hashable, nn.Module]) -> None:
        """Takes the modules that all layers of a model have in common from ``parts``.

        Or puts them there, for the layers after it. Called once for each layer of a conversion.
        """

    def start_affine(self, weight: Tensor) -> Affine:
        """Starts a stage that comes before :class:`Rescale` so that its effect can be undone.

        Args:
            weight: what it is fed, ``[O, I, *K]``.

        Returns:
            What makes ``weight`` of ``excite(weight)``. A gain that is a number says that this
            holds for any other multiple of ``weight`` as well.

        Raises:
            NotImplementedError: there is no such start.
        """
        raise NotImplementedError(f"{self.name} cannot start as an identity")

    def start_inverse(self, weight: Tensor) -> Tensor:
        """Starts a stage that comes after :class:`Rescale` so that it can yield ``weight``.

        Returns:
            What it has to be fed for that.

        Raises:
            NotImplementedError: there is no such start.
        """
        try:
            return self.invert(weight)
        except NotImplementedError:
            raise NotImplementedError(f"{self.name} cannot start as an identity") from None

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The names and defaults of the options :meth:`for_layout` takes."""
        parameters = inspect.signature(cls.for_layout).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def chosen_options(self) -> dict[str, Any]:
        """The options it has now, of JSON types: all that no tensor shows.

        By default the attributes that are called as the options of :meth:`for_layout`.
        """
        return {name: getattr(self, name) for name in self.options()}

    @classmethod
    def completed(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a record of an earlier version, with defaults for those it lacks."""
        return {**cls.options(), **options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Reads a pickle, also that of an earlier version, which lacks the options since then."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, value in self.completed({}).items():
            if not hasattr(self, name):
                setattr(self, name, value)

    @property
    def stages(self) -> tuple[Excitation, ...]:
        """What its record speaks of: itself, or the stages of a composition."""
        return (self,)

    @property
    def record(self) -> Record:
        """What it is, in words; see :mod:`we_surgery.excitations.record`."""
        return make_record([{stage.name: stage.chosen_options()} for stage in self.stages])

    def adopt(self, saved: Tensor) -> Record:
        """Takes what a checkpoint may change, such as an epsilon, from its record.

        Raises:
            InputError: the record is of another excitation, or cannot be read.
        """
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

    # Not by `get_extra_state`: torch.distributed.checkpoint would ask the class for that of a part.
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
                if key not in state_dict:
                    upgrade_state(state_dict, prefix)
                if key in state_dict:
                    self.adopt(state_dict.pop(key))
                elif strict:
                    missing_keys.append(key)
            except InputError as error:
                error_msgs.append(f"{prefix.removesuffix('.')}: {error.cause}. {error.cure}")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Raises a ``ValueError`` where one of :attr:`adjustable` is out of range."""

    def take_over(self, options: Mapping[str, Any]) -> None:
        """Takes the adjustable options that a checkpoint has.

        Args:
            options: what :meth:`chosen_options` said when it was saved; None is not known.

        Raises:
            ValueError: another option differs, so the checkpoint is of another excitation.
        """
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
        # Casting a model to half precision, or materializing it with `to_empty`, must move a
        # buffer and never change its value: a temperature of 0.1 is not 0.09998 in fp16.
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in buffers.items():
            after = self._buffers[name]
            if before is not None and after is not None:
                target = before.device if after.is_meta else after.device
                # One without memory has no value to keep; `to_empty` has just given it memory.
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
    # A compiled backward pass runs under the autocast of its forward pass, which is not known yet
    # while it is traced.
    if device_type != "meta" and (
        torch.compiler.is_compiling() or torch.is_autocast_enabled(device_type)
    ):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
