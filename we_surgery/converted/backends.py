"""Choosing who computes the excited weights of a model."""

from __future__ import annotations

from typing import get_args

from torch import nn

from we_surgery.errors import InputError, near_matches
from we_surgery.excitations import Backend, Composition
from we_surgery.excitations.compute.backends import has_triton


def set_backend(model: nn.Module, backend: Backend = "auto") -> None:
    """Chooses who computes the excited weights and their gradients.

    All do the same arithmetic in float32 and differ by rounding. Under ``torch.compile`` of the
    model the compiler sees the formulas, whatever is chosen here.

    Args:
        model: a converted model.
        backend: ``eager`` is torch's operations one by one. ``inductor`` compiles them for each
            shape of weight, which takes minutes for a network and gains little on a CPU.
            ``triton`` has kernels of its own, 2 to 7 launches a layer where eager has some
            sixty, or 7 for many layers (:func:`we_surgery.set_grouped`); they run on a GPU, and
            eager computes what they do not: float64, MWE with ``detach_max=False``, stages
            without a closed form, whatever is captured in a CUDA graph. ``auto`` takes the
            kernels on a GPU, if they run there and agree with eager on two small layers that
            are tried first, and eager everywhere else.

    Raises:
        InputError: there is no such backend, or it cannot be imported.

    Example:
        >>> model = ws.convert(model, mode="lwe")
        >>> ws.set_backend(model, "inductor")
    """
    check_backend(backend)
    for module in model.modules():
        if isinstance(module, Composition):
            module.forget()
            module.backend = backend


def check_backend(backend: str) -> None:
    """Raises an :class:`InputError` for a backend that there is not."""
    known = get_args(Backend)
    if backend not in known:
        raise InputError(
            f"there is no backend {backend!r}{near_matches(str(backend), known)}",
            f"Use one of: {', '.join(known)}.",
        )
    if backend == "triton" and not has_triton():
        raise InputError(
            "Triton is not installed, so its kernels cannot run",
            "Use `auto`, `eager` or `inductor`; Triton comes with torch on Linux.",
        )
