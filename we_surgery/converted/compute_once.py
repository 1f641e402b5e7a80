"""An excited weight that is read many times is computed once.

Two reads share one tensor as long as everything it was computed from is as it was:

* In eval mode, with nothing to differentiate, the tensor is kept until something moves. Inference
  then costs what it costs without excitation.
* Where a graph is recorded, the tensor is only known by a weak reference: whoever used it (a conv
  that saved it for its backward pass) keeps it alive, and a second read finds it. Nothing
  outlives its graph, and two passes may share it because the closed form's node can be walked
  back through more than once. Where nobody keeps it (autocast saves a half-precision copy), a
  layer that turns out to be read again holds it until its gradient has arrived. What a group
  of layers (:mod:`we_surgery.converted.grouping`) has computed is held until it is first read.

Everything is: the raw weight, the excitation's parameters, buffers and submodules (the same
objects, at the same version, at the same address), whether they require gradients, the CUDA
stream. Under ``torch.compile``, ``torch.func``, tracing, capture and any dispatch or function
mode each read computes, and so it does where an excitation carries hooks. A recording of the
reading is the one mode that says it may be shared under, so that it shows what is shared.

Torch keeps no version for writes through ``tensor.data`` or a NumPy alias: in eval mode, and
between two forward passes whose graphs both live, call ``model.eval()`` or ``model.train()`` after
them, which forget what was kept. So does a gradient that arrives.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import TensorWeakRef

from we_surgery.converted.watching import Sources, UnwatchableError, address
from we_surgery.excitations import Excitation

_OUTDATED = -1
"""A version that no tensor has."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Kept:
    """One excited weight and all that it was computed from."""

    raw: Tensor
    raw_version: int
    raw_alias: Tensor
    """The raw weight's memory, which cannot be given to another tensor while this is here."""
    sources: Sources
    stream: int | None
    required: tuple[bool, ...] | None
    """Which tensors, the raw one first, required a gradient; None where none got any."""
    excited: TensorWeakRef
    excited_version: int
    held: Tensor | None
    is_waiting: bool
    """Whether a gradient may still arrive."""
    is_read_often: bool

    def is_current(self, raw: Tensor) -> bool:
        if raw is not self.raw or raw._version != self.raw_version:
            return False
        if address(raw) != address(self.raw_alias) or self.sources.have_moved():
            return False
        return _required(raw, self.sources) == self.required and _stream(raw) == self.stream

    def value(self) -> Tensor | None:
        """The excited weight, unless nobody kept it or somebody wrote into it."""
        excited: Tensor | None = self.excited() if self.held is None else self.held
        if excited is None or excited._version != self.excited_version:
            return None
        return excited

    def read(self) -> Tensor | None:
        """:meth:`value`, which from now on is held by its readers alone where it can be."""
        excited = self.value()
        if self.required is not None and not self.is_read_often:
            self.held = None
        return excited

    @property
    def is_left(self) -> bool:
        """Whether the excited weight is there, or was handed out and may get a gradient."""
        return self.is_waiting or self.value() is not None


def excited_weight(excitation: Excitation, raw: Tensor, *, may_hold: bool = True) -> Tensor:
    """``excitation(raw)``, computed anew only where something has changed since the last time.

    Args:
        excitation: of an excited layer.
        raw: the layer's raw weight, ``[O, I, *K]``.
        may_hold: whether a weight that needs a gradient may be held although nobody else does.
    """
    if not may_share(excitation, raw):
        return excitation(raw)  # type: ignore[no-any-return]
    if excitation.group is not None and may_hold:
        excitation.group.compute(excitation, raw)
    kept: _Kept | None = excitation.kept
    is_read_often = False
    if kept is not None:
        is_read_often = kept.is_read_often
        if kept.is_current(raw):
            known = kept.read()
            if known is not None:
                return known
            is_read_often = may_hold and (is_read_often or kept.is_waiting)
    excitation.forget()
    return _compute(excitation, raw, is_read_often)


def is_outdated(excitation: Excitation, raw: Tensor) -> bool:
    """Whether a read would compute, and not because the same pass has read before."""
    kept: _Kept | None = excitation.kept
    return kept is None or not kept.is_current(raw) or not kept.is_left


def outdate(excitation: Excitation) -> None:
    """Makes the next read compute anew, as after a step of the optimizer."""
    kept: _Kept | None = excitation.kept
    if kept is not None:
        kept.raw_version = _OUTDATED


def may_share(excitation: Excitation, raw: Tensor) -> bool:
    """Whether two reads may get one tensor here."""
    if torch.compiler.is_compiling() or not _is_parameter(raw) or raw.numel() == 0:
        return False
    if torch._C._len_torch_function_stack() or _is_watched():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return False
    if excitation._forward_hooks or excitation._forward_pre_hooks or excitation._backward_hooks:
        return False
    # What a capture replays must be computed within it.
    return not (raw.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_parameter(raw: Tensor) -> bool:
    return type(raw) is nn.Parameter or (type(raw) is FakeTensor and isinstance(raw, nn.Parameter))


def _is_watched() -> bool:
    """Whether a dispatch mode is on that is to see each computation."""
    modes = torch._C._len_torch_dispatch_stack()
    if not modes:
        return False
    innermost = torch._C._get_dispatch_stack_at(modes - 1)
    return not getattr(innermost, "shares_excited_weights", False)


def _compute(excitation: Excitation, raw: Tensor, is_read_often: bool) -> Tensor:
    watched = watch(excitation, raw)
    if watched is None or (excitation.training and watched.required is None):
        return excitation(raw)  # type: ignore[no-any-return]
    if watched.required is not None:
        excited: Tensor = excitation(raw)
        # A graph of the stages' own operations can be walked back through only once.
        if not getattr(excited.grad_fn, "is_repeatable", False):
            return excited
        if watched.sources.have_moved():  # a stage advanced its buffers
            watched.sources = Sources.of(excitation)
    else:
        # Made in inference mode, it could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            excited = excitation(raw)
    kept = keep(watched, excited, is_read_often=is_read_often)
    if watched.required is not None and not is_read_often:
        kept.held = None
    return excited


@dataclass(slots=True)
class Watched:
    """A weight that can be kept, as it was before it was excited."""

    excitation: Excitation
    raw: Tensor
    raw_version: int
    sources: Sources
    required: tuple[bool, ...] | None


def watch(excitation: Excitation, raw: Tensor) -> Watched | None:
    """What an excited weight is going to be computed from; None where that cannot be watched."""
    try:
        sources = Sources.of(excitation)
        raw_version = raw._version
    except (UnwatchableError, RuntimeError):  # a tensor made in inference mode has no version
        return None
    if _is_shared(raw):
        return None
    return Watched(excitation, raw, raw_version, sources, _required(raw, sources))


def keep(watched: Watched, excited: Tensor, *, is_read_often: bool | None = None) -> _Kept:
    """Keeps an excited weight for those who will read it, and holds it until the first does.

    Args:
        watched: what it was computed from.
        excited: the weight.
        is_read_often: whether to hold it until its gradient has arrived; None: as before.
    """
    excitation, raw = watched.excitation, watched.raw
    if is_read_often is None:
        is_read_often = excitation.kept is not None and excitation.kept.is_read_often
    kept = _Kept(
        raw=raw,
        raw_version=watched.raw_version,
        raw_alias=raw.detach(),
        sources=watched.sources,
        stream=_stream(raw),
        required=watched.required,
        excited=TensorWeakRef(excited),
        excited_version=excited._version,
        held=excited,
        is_waiting=watched.required is not None,
        is_read_often=is_read_often,
    )
    if watched.required is not None:
        excited.register_hook(  # type: ignore[no-untyped-call]
            functools.partial(_let_go, weakref.ref(kept))
        )
    excitation.__dict__["kept"] = kept
    # Not to be read from there again: another thread may have read, or forgotten it, by now.
    return kept


def _let_go(reference: weakref.ref[_Kept], gradient: Tensor | None) -> None:
    kept = reference()
    if kept is not None:
        kept.held = None
        kept.is_waiting = False
        # A step may come now, and one that writes to `data` would not be seen.
        kept.raw_version = _OUTDATED


def _required(raw: Tensor, sources: Sources) -> tuple[bool, ...] | None:
    if not torch.is_grad_enabled():
        return None
    required = (raw.requires_grad, *sources.require_gradients())
    return required if any(required) else None


def _is_shared(raw: Tensor) -> bool:
    """Whether another process may write to the weight."""
    is_shared: bool = raw.is_shared()  # type: ignore[no-untyped-call]
    return is_shared and raw.device.type == "cpu"  # on CUDA it is always said to be


def _stream(raw: Tensor) -> int | None:
    return torch.cuda.current_stream(raw.device).cuda_stream if raw.is_cuda else None
