"""The excited weights of a state dict, found by its keys."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from we_surgery.converted.proof import is_finite, refuse_non_finite
from we_surgery.errors import InputError, SurgeryError, quoted
from we_surgery.excitations import EXCITATIONS, Composition, Rescale, rebuild_excitation
from we_surgery.excitations.base import in_full_precision
from we_surgery.excitations.names import EXCITATION, RAW_PREFIX, excitation_name, raw_name
from we_surgery.excitations.record import RECORD_KEY, Record, is_record, read_record

_ALIGNMENT = 64


@dataclass(frozen=True)
class ExcitedEntry:
    """One excited weight in a state dict; the excitation's entries by their names in it."""

    layer: str
    parameter: str
    raw: Tensor
    excitation: dict[str, Tensor] = field(default_factory=dict)

    @property
    def vanilla_key(self) -> str:
        """The key of the folded weight."""
        return _join(self.layer, self.parameter)

    @property
    def raw_key(self) -> str:
        """The key of the raw weight."""
        return _join(self.layer, raw_name(self.parameter))

    @property
    def excitation_prefix(self) -> str:
        """What the keys of the excitation begin with."""
        return _join(self.layer, excitation_name(self.parameter)) + "."

    @property
    def display_name(self) -> str:
        """The layer's name in messages."""
        return self.layer or "(the model itself)"

    def identity(self) -> tuple[Any, ...]:
        """Equal for entries with the same memory, as of tied layers."""
        own = sorted(self.excitation.items())
        # Records are compared by content: a shared excitation has a new one per state dict entry.
        parts = (_text(v) if is_record(key) else tensor_identity(v) for key, v in own)
        return (tensor_identity(self.raw), *zip(sorted(self.excitation), parts, strict=True))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The excitation's entries without its record."""
        return {key: value for key, value in self.excitation.items() if not is_record(key)}

    def record(self) -> Record:
        """The excitation's record."""
        with self.named_errors():
            if RECORD_KEY not in self.excitation:
                raise no_record([self.raw_key])
            return read_record(self.excitation[RECORD_KEY])

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Adds the layer's name to errors."""
        try:
            yield
        except InputError as error:
            raise InputError(f"layer {self.display_name!r}: {error.cause}", error.cure) from error

    def rebuild(self) -> Composition:
        """The excitation, sharing memory with the state dict where that is aligned."""
        record = self.record()
        with self.named_errors():
            return rebuild_excitation({k: _aligned(v) for k, v in self.tensors.items()}, record)

    def fold(self, dtype: torch.dtype | None = None, *, in_place: bool = False) -> Tensor:
        """The excited weight, in the raw one's memory format.

        With a ``dtype`` for the result, half precision is excited in float32 and rounded once.
        ``in_place`` may use the raw weight's memory.
        """
        if self.raw.is_meta:
            raise InputError(
                f"the {self.parameter} of layer {self.display_name!r} has a shape but no values",
                "Save the model after its weights were loaded.",
            )
        self.refuse_no_weight()
        excitation = self.rebuild()
        raw = _aligned(self.raw)
        if dtype is not None:
            raw = in_full_precision(raw)
        if in_place and not _is_dense(raw):
            raw = raw.clone()
        is_own = in_place or raw.data_ptr() != self.raw.data_ptr()
        try:
            with torch.no_grad():
                folded = excitation.excite_in_place(raw) if is_own else excitation(raw)
                # It may have another memory format, or be the raw weight itself.
                is_raw = folded is raw
                if folded.stride() != raw.stride() or (not is_own if is_raw else folded._is_view()):
                    folded = torch.empty_like(raw).copy_(folded)
        except RuntimeError as error:
            raise SurgeryError(
                f"the excited {self.parameter} of layer {self.display_name!r} cannot be computed: "
                f"{error}",
                "The file is damaged, or mixes the tensors of two models.",
            ) from error
        refuse_non_finite(self.display_name, folded, "the folded weight")
        return cast(self.vanilla_key, folded, dtype)

    def refuse_no_weight(self) -> None:
        """Raises unless the raw weight is a tensor that can be excited; it needs no values."""
        raw = self.raw
        if raw.layout == torch.strided and raw.is_floating_point() and raw.dim() > 0:
            return
        layout = "" if raw.layout == torch.strided else f", {raw.layout}"
        raise InputError(
            f"the raw {self.parameter} of layer {self.display_name!r} is of shape "
            f"{tuple(raw.shape)} and {raw.dtype}{layout}; a weight must be a dense floating-point "
            "tensor with at least one axis",
            "The file is damaged or was edited; give the checkpoint that training saved.",
        )

    def replaced(self, replace: Callable[[str, Tensor], Tensor]) -> ExcitedEntry:
        """The entry with other tensors: what ``replace`` gives for each by its key."""
        prefix = self.excitation_prefix
        return ExcitedEntry(
            self.layer,
            self.parameter,
            replace(self.raw_key, self.raw),
            {key: replace(prefix + key, value) for key, value in self.excitation.items()},
        )


def is_excited_state_dict(state: Mapping[str, Any]) -> bool:
    """Whether a state dict holds excited weights, under whatever prefix."""
    return next(find_excited(state), None) is not None


def find_excited(state: Mapping[str, Any]) -> Iterator[ExcitedEntry]:
    """Each excited weight of a state dict, in its order.

    A ``raw_...`` entry without an excitation beside it is not one.
    """
    entries: dict[str, ExcitedEntry] = {}
    for key, value in state.items():
        layer, _, last = key.rpartition(".")
        parameter = last.removeprefix(RAW_PREFIX)
        if parameter and parameter != last and isinstance(value, Tensor):
            entry = ExcitedEntry(layer, parameter, value)
            entries[entry.excitation_prefix] = entry
    for key, value in state.items() if entries else ():
        prefix = excitation_of(key, entries)
        if prefix is not None and isinstance(value, Tensor):
            entries[prefix].excitation[key.removeprefix(prefix)] = value
    found = [entry for entry in entries.values() if entry.excitation]
    for entry in found:
        if entry.vanilla_key in state:
            raise InputError(
                f"the state dict holds both {entry.vanilla_key!r} and its excited form "
                f"{_join(entry.layer, raw_name(entry.parameter))!r}",
                "Give the state dict of one model, converted or vanilla.",
            )
        yield entry


def excitation_of(key: str, prefixes: Container[str]) -> str | None:
    """The first of the excitations' prefixes that a key begins with."""
    ending = f"{EXCITATION}."
    at = key.find(ending)
    while at >= 0:
        prefix = key[: at + len(ending)]
        if prefix in prefixes:
            return prefix
        at = key.find(ending, at + 1)
    return None


def no_record(keys: Iterable[str]) -> InputError:
    """The error for raw weights without a record of their excitation."""
    return InputError(
        f"nothing says how {quoted(keys)} were excited: the state dict has no record of it, as one "
        "that was made of `named_parameters()`",
        "Give the model's whole state dict, `model.state_dict()`. To strip an average of the "
        "parameters, load it into the converted model with `strict=False` and strip that.",
    )


def is_raw_weight(key: str) -> bool:
    """Whether a key is named as the raw weight of a layer."""
    last = key.rpartition(".")[2]
    return last.startswith(RAW_PREFIX) and last.endswith("weight")


def is_of_excitation(key: str) -> bool:
    """Whether a key is named as a tensor or the record of one of the known excitations."""
    owners = key.split(".")[:-1]
    if is_record(key) and owners and owners[-1].endswith(EXCITATION):
        return True
    return any(
        owner.endswith(EXCITATION) and inner in (*EXCITATIONS, Rescale.name)
        for owner, inner in pairwise(owners)
    )


def _text(record: Tensor) -> tuple[Any, ...]:
    return (id(record),) if record.is_meta else tuple(record.tolist())


def tensor_identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors with the same memory and layout."""
    if tensor.is_meta or tensor.numel() == 0 or tensor.layout != torch.strided:
        return (id(tensor),)
    storage = tensor.untyped_storage()
    layout = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
    return (tensor.device, storage.data_ptr(), *layout)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor detached, at an aligned address."""
    tensor = tensor.detach()
    # A file's reader lays tensors at any address, and matrix products round differently there:
    # the fold would not be bit-equal to what the trained model computes.
    return tensor if tensor.is_meta or tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _is_dense(tensor: Tensor) -> bool:
    """Whether each value has a place of its own, without gaps between them."""
    # torch does not keep the strides of any other tensor.
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in ``dtype`` if it is floating-point; ``name`` is its key, for the message."""
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    rounded = tensor.to(dtype)
    if tensor.is_meta or is_finite(rounded):
        return rounded
    if bool((rounded.isinf() & tensor.isfinite()).any()):
        largest = tensor[tensor.isfinite()].abs().max()
        raise SurgeryError(
            f"{name!r} has a value of {largest:g}, beyond the range of "
            f"{str(dtype).removeprefix('torch.')}",
            "Choose --dtype bfloat16 or float32 (`dtype=`).",
        )
    return rounded


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name
