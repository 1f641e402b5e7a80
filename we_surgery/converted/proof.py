"""The proof of a strip: folded weights bit-equal to the excited ones, outputs compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from we_surgery._util.copies import deep_copy
from we_surgery.errors import InputError, SurgeryError
from we_surgery.reading.running import call, copied, fixed_seed, with_tensors

RELATIVE_TOLERANCE = 1e-5

_PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)
_HAVE_EXTREMES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StripReport:
    """The result of a strip and of its checks.

    Attributes:
        layers: weights that were folded, each found bit-equal to the excited one.
        removed_parameters: parameters of excitations that were removed.
        parameters: parameters of the stripped model.
        output_difference: largest absolute difference of the outputs of the excited and
            the stripped model in eval mode; None without example inputs.
        relative_difference: the same over the larger of 1 and the largest output.
        transplants: transplants that were taken out.
        deployed: layers that were put into another form than the vanilla one.
    """

    layers: int
    removed_parameters: int
    parameters: int
    output_difference: float | None = None
    relative_difference: float | None = None
    transplants: int = 0
    deployed: int = 0


def check_fold(name: str, excited: Tensor, folded: Tensor) -> None:
    """Raises unless ``folded`` is finite and bit-equal to ``excited``."""
    if folded.is_meta:
        return
    refuse_non_finite(name, folded, "the folded weight")
    same = excited.dtype == folded.dtype and torch.equal(excited, folded)
    if not same:
        raise not_deterministic(name)


def not_deterministic(name: str) -> SurgeryError:
    """The error for an excited weight that was computed twice with different results."""
    return SurgeryError(
        f"the folded weight of layer {name!r} is not bit-equal to its excited weight",
        "Its excitation is not deterministic, or its raw weight was tied to that of a layer "
        "with another excitation; nothing was changed.",
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal dtype, shape and bits, including NaNs."""
    if _form(a) != _form(b):
        return False
    return all(map(torch.equal, bits_of(a), bits_of(b)))


def bits_of(tensor: Tensor) -> list[Tensor]:
    """A tensor's content as vectors of bytes: one, several if sparse or quantized, none on meta."""
    tensor = tensor.detach()
    if tensor.is_meta:
        return []
    parts = _parts(tensor)
    if parts:
        return [bits for part in parts for bits in bits_of(part)]
    # A lazily conjugated or negated view has a flag beside its memory.
    plain = tensor.resolve_conj().resolve_neg().contiguous().flatten()
    return [plain.view(torch.uint8)]


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a sparse or quantized one is made of; none of a plain one."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    # A view of its memory as bytes crashes the process.
    if tensor.is_quantized and _scheme(tensor) in _PER_TENSOR:
        scale = torch.tensor(tensor.q_scale(), dtype=torch.float64)
        return [tensor.int_repr(), scale, torch.tensor(tensor.q_zero_point())]
    if tensor.is_quantized:
        scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        return [tensor.int_repr(), scales, zeros, torch.tensor(tensor.q_per_channel_axis())]
    return []


def _scheme(tensor: Tensor) -> torch.qscheme | None:
    return tensor.qscheme() if tensor.is_quantized else None


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.layout, tensor.is_meta, _scheme(tensor)


def check_preserved(name: str, weight: Tensor, excited: Tensor) -> None:
    """Raises unless an excitation starts as the identity."""
    if weight.is_meta or weight.numel() == 0:
        return
    tolerance = max(1e-5, 8 * torch.finfo(weight.dtype).eps)
    largest = weight.abs().max().double()
    difference = (excited.double() - weight.double()).abs().max()
    if not difference <= tolerance * largest:
        raise SurgeryError(
            f"layer {name!r} would start {difference / largest:.1g} away from its weight",
            "Convert with `init='paper'`, or leave the layer alone by a rule.",
        )


def refuse_non_finite(name: str, weight: Tensor, what: str) -> None:
    """Raises a :class:`SurgeryError` that names the layer if ``weight`` holds Inf or NaN."""
    if weight.is_meta or is_finite(weight):
        return
    count = int((~torch.isfinite(weight)).sum())
    raise SurgeryError(
        f"{what} of layer {name!r} holds {count} non-finite values of {weight.numel()}",
        "Training has diverged or the file is damaged; go back to an earlier checkpoint.",
    )


def is_finite(weight: Tensor) -> bool:
    """Whether a tensor holds neither Inf nor NaN."""
    if weight.dtype not in _HAVE_EXTREMES or weight.numel() == 0:
        return bool(torch.isfinite(weight).all())
    # Extremes are NaN if anything is, take a tenth of the time, and no memory.
    return bool(torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all())


def run_in_eval(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The tensors a model returns in eval mode, without gradients and with a fixed seed.

    A copy of the model runs, with the same Parameters: a forward pass may write to its input, count
    its calls, keep a state, or fill a cache.
    """
    with torch.no_grad(), fixed_seed(model):
        try:
            copy = deep_copy(model, {id(parameter): parameter for parameter in model.parameters()})
            with eval_mode(copy):
                outputs = call(copy, with_tensors(example_inputs, copied))
        except Exception as error:
            raise InputError(
                f"the model fails on the example inputs: {type(error).__name__}: {error}",
                "Give inputs of the shape and dtype the model was made for.",
            ) from error
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if not tensors:
        raise InputError(
            f"the model returns no tensor but {type(outputs).__name__}, so nothing can be compared",
            "Strip without example inputs; the weights are compared in any case.",
        )
    return tensors


def largest_differences(before: list[Tensor], after: list[Tensor]) -> tuple[float, float]:
    """The largest absolute and relative difference between two lists of outputs."""
    if [t.shape for t in before] != [t.shape for t in after]:
        raise SurgeryError(
            "the stripped model returns other shapes than the excited one",
            "Report this with the model's name; nothing was changed.",
        )
    absolute = relative = 0.0
    for old, new in zip(before, after, strict=True):
        if old.numel() == 0:
            continue
        old, new = _as_double(old), _as_double(new)
        # NaN on both sides is equal. NaN on one side gives a difference of NaN, which fails every
        # tolerance.
        unlike = ~((old == new) | (old.isnan() & new.isnan()))
        if not bool(unlike.any()):
            continue
        difference = float((old - new)[unlike].abs().max())
        finite = old[old.isfinite()].abs()
        scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
        absolute = _larger(absolute, difference)
        relative = _larger(relative, difference / scale)
    return absolute, relative


def _as_double(tensor: Tensor) -> Tensor:
    return (
        torch.view_as_real(tensor.to(torch.complex128)) if tensor.is_complex() else tensor.double()
    )


def _larger(a: float, b: float) -> float:
    return b if b != b or b > a else a


def check_outputs(before: list[Tensor], after: list[Tensor]) -> tuple[float, float]:
    """The largest differences, within the tolerance."""
    absolute, relative = largest_differences(before, after)
    if not relative <= RELATIVE_TOLERANCE:
        raise SurgeryError(
            f"the stripped model's outputs differ by {absolute:.3g} ({relative:.3g} relative, "
            f"over {RELATIVE_TOLERANCE:g})",
            "A layer reads its weight in a way the fold does not cover, or the model is random "
            "in eval mode; nothing was changed.",
        )
    return absolute, relative


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts all modules in eval mode, and restores each one's mode.

    A graph traced or exported in train mode stays in it and updates its running statistics; these
    are restored too.
    """
    flags = {module: module.training for module in model.modules()}
    graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    buffers = [buffer for module in graphs for buffer in module.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    try:
        _to_eval(model)
        yield
    finally:
        for module, training in flags.items():
            module.training = training
        with torch.no_grad():
            for buffer, values in zip(buffers, kept, strict=True):
                buffer.copy_(values)


def _to_eval(module: nn.Module) -> None:
    try:
        module.eval()
    except NotImplementedError:
        # An exported program, here or inside, has a fixed mode and refuses to change it.
        for child in module.children():
            _to_eval(child)
