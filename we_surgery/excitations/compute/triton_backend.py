"""The closed form of many layers by the Triton kernels, in at most seven launches.

Importing this module needs Triton.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from we_surgery.excitations.compute import triton_backward as backward
from we_surgery.excitations.compute import triton_forward as forward
from we_surgery.excitations.compute import triton_tiles as tiles
from we_surgery.excitations.compute.inputs import ClosedFormInputs, Kept, Pullback

ROWS, COLUMNS, UNITS, BLOCK = 16, 32, 32, 4096
_FCS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")

Shapes = dict[str, tuple[int, ...]]


def supports(filters: Tensor, inputs: ClosedFormInputs) -> bool:
    """Whether the kernels compute this composition; otherwise eager does."""
    return filters.dtype == torch.float32 and (inputs.mwe_epsilon is None or inputs.detach_max)


def excite(layers: Sequence[tuple[Tensor, ClosedFormInputs]]) -> list[tuple[Tensor, Kept]]:
    """As :func:`we_surgery.excitations.compute.formulas.excite`, of float32 weights."""
    found: dict[int, tuple[Tensor, Kept]] = {}
    for places in _by_device(filters for filters, _ in layers):
        group = [_Layer(*layers[place]) for place in places]
        _excite(group)
        for place, layer in zip(places, group, strict=True):
            kept = Kept(*map(layer.tensors.get, Kept._fields))
            found[place] = layer.tensors["result"], kept
    return [found[place] for place in range(len(layers))]


def differentiate(layers: Sequence[Pullback]) -> list[tuple[Tensor | None, ...]]:
    """As :func:`we_surgery.excitations.compute.formulas.differentiate`."""
    found: dict[int, tuple[Tensor | None, ...]] = {}
    for places in _by_device(layer.weight for layer in layers):
        group = [_Layer(layers[place].weight, layers[place].inputs) for place in places]
        _differentiate(group, [layers[place] for place in places])
        for place, layer in zip(places, group, strict=True):
            results = map(layer.tensors.get, ("result", *(f"by_{name}" for name in _FCS)))
            needed = layers[place].needed
            found[place] = tuple(r if n else None for r, n in zip(results, needed, strict=True))
    return [found[place] for place in range(len(layers))]


def _by_device(tensors: Iterable[Tensor]) -> list[list[int]]:
    """The places of the weights that one launch can do."""
    places: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(place)
    return list(places.values())


class _Stages(NamedTuple):
    """Which stages a layer has, or any layer of a launch."""

    standardize: bool
    lwe: bool
    rescale: bool
    mwe: bool

    @classmethod
    def of_any(cls, layers: Iterable[_Layer]) -> _Stages:
        return cls(*map(any, zip(*(layer.stages for layer in layers), strict=True)))

    def constants(self) -> dict[str, Any]:
        """The kernels' constants."""
        stages = {name.upper(): value for name, value in self._asdict().items()}
        return stages | {"ROWS": ROWS, "COLUMNS": COLUMNS, "UNITS": UNITS, "BLOCK": BLOCK}


class _Layer:
    """A layer as the kernels read it: its tensors, its sizes, its tiles."""

    def __init__(self, filters: Tensor, inputs: ClosedFormInputs) -> None:
        self.stages = _Stages(
            standardize=inputs.standardize_epsilon is not None,
            lwe=inputs.fc1_bias is not None,
            rescale=inputs.gain is not None,
            mwe=inputs.mwe_epsilon is not None,
        )
        self.is_summed = self.stages.standardize or self.stages.lwe
        self.filters = _dense(filters)
        self.out_channels, self.channels = filters.shape[:2]
        self.positions = math.prod(filters.shape[2:])
        self.hidden_channels = 0 if inputs.fc1_bias is None else inputs.fc1_bias.shape[0]
        self.row_tiles = math.ceil(self.out_channels / ROWS)
        self.column_tiles = math.ceil(self.channels / COLUMNS)
        self.tiles = self.row_tiles * self.column_tiles
        # Held here, because some may be copies.
        self.tensors: dict[str, Tensor] = {"weight": self.filters}
        for name, value in inputs._asdict().items():
            if isinstance(value, Tensor):
                self.tensors[name] = value.to(torch.float32).contiguous()
            elif isinstance(value, float):
                self.tensors[name] = _number_on(filters.device, value)

    def row(self) -> tiles.Row:
        is_channels_last = self.positions > 1 and not self.filters.is_contiguous()
        return tiles.Row(
            **{name: tensor.data_ptr() for name, tensor in self.tensors.items()},
            out_channels=self.out_channels,
            channels=self.channels,
            positions=self.positions,
            channel_step=1 if is_channels_last else self.positions,
            position_step=self.channels if is_channels_last else 1,
            hidden_channels=self.hidden_channels,
        )

    def programs(self, needed: Sequence[bool]) -> tuple[int, ...]:
        """How many programs each deal gives this layer."""
        unit_tiles = self.column_tiles * math.ceil(self.hidden_channels / UNITS)
        return (
            self.row_tiles if self.is_summed else 0,
            self.tiles,
            self.tiles if self.is_summed else 0,
            self.tiles if needed[0] else 0,
            unit_tiles if any(needed[1:]) else 0,
            math.ceil(self.filters.numel() / BLOCK) if self.stages.mwe else 0,
        )


def _excite(group: Sequence[_Layer]) -> None:
    for layer in group:
        layer.tensors["result"] = torch.empty_like(layer.filters)
    _allocate(group, [_kept_shapes(layer) for layer in group])
    programs = _Programs(group, [(False,) * 5] * len(group))
    programs.launch(forward.summarize, tiles.BY_FILTERS)
    programs.launch(forward.multiply, tiles.BY_TILES)
    programs.launch(forward.amplify, tiles.BY_BLOCKS)


def _kept_shapes(layer: _Layer) -> Shapes:
    stages, rows, shapes = layer.stages, layer.out_channels, Shapes()
    if stages.standardize:
        shapes["mean"] = (rows, *[1] * (layer.filters.ndim - 1))
        shapes |= {"norm": (rows, 1), "scale": (rows, 1)}
    if stages.lwe:
        shapes["hidden"] = (rows, layer.hidden_channels)
    if stages.mwe:
        shapes |= {"limit": (), "maxima": (layer.tiles,)}
    return shapes


def _differentiate(group: Sequence[_Layer], asked: Sequence[Pullback]) -> None:
    for layer, (gradient, weight, _, kept, needed, target) in zip(group, asked, strict=True):
        if gradient.stride() != layer.filters.stride():
            gradient = torch.empty_like(layer.filters).copy_(gradient)
        layer.tensors["gradient"] = gradient
        # Eager may have computed them, and leaves some transposed.
        held = {name: v.contiguous() for name, v in kept._asdict().items() if v is not None}
        layer.tensors |= held
        if needed[0]:
            if target is None or layer.filters is not weight:
                target = torch.empty_like(layer.filters)
            layer.tensors["result"] = target
    by_fcs: list[Shapes] = [
        {f"by_{name}": layer.tensors[name].shape for name in _FCS} if any(one.needed[1:]) else {}
        for layer, one in zip(group, asked, strict=True)
    ]
    _allocate(group, by_fcs)
    _allocate(group, [_scratch_shapes(layer) for layer in group])
    programs = _Programs(group, [one.needed for one in asked])
    programs.launch(backward.sum_tiles, tiles.BY_SUMMED_TILES)
    programs.launch(backward.sum_filters, tiles.BY_FILTERS)
    programs.launch(backward.by_weight, tiles.BY_TRAINED_TILES)
    programs.launch(backward.by_fcs, tiles.BY_UNITS)


def _scratch_shapes(layer: _Layer) -> Shapes:
    stages, rows, columns, shapes = layer.stages, layer.out_channels, layer.channels, Shapes()
    if layer.is_summed:
        shapes |= dict.fromkeys(("partial_t", "partial_total"), (layer.column_tiles, rows))
    if stages.lwe:
        shapes |= dict.fromkeys(("z", "sums"), (rows, columns))
        shapes["v"] = (rows, layer.hidden_channels)
    if stages.standardize:
        shapes |= dict.fromkeys(("f", "average"), (rows,))
    return shapes


def _allocate(group: Sequence[_Layer], shapes: Sequence[Shapes]) -> None:
    """Gives the layers float32 tensors of these shapes, all in one piece of memory."""
    sizes = [math.prod(shape) for layer in shapes for shape in layer.values()]
    space = torch.empty(sum(sizes), dtype=torch.float32, device=group[0].filters.device)
    pieces = iter(torch.split(space, sizes))
    for layer, named in zip(group, shapes, strict=True):
        for name, shape in named.items():
            layer.tensors[name] = next(pieces).view(shape)


class _Programs:
    """The table of a group on its device, and how many programs each kernel has."""

    def __init__(self, group: Sequence[_Layer], needed: Sequence[Sequence[bool]]) -> None:
        # A power of two, as Triton requires of what is loaded at once.
        layers = 1 << (len(group) - 1).bit_length()
        dealt = zip(*map(_Layer.programs, group, needed), strict=True)
        firsts = [list(accumulate(counts, initial=0)) for counts in dealt]
        self.counts = [deal[-1] for deal in firsts]
        padded = (deal[:-1] + deal[-1:] * (layers - len(group)) for deal in firsts)
        content = array("q", chain(*padded, *(layer.row() for layer in group)))
        table = torch.frombuffer(content, dtype=torch.int64)
        device = group[0].filters.device
        if device.type == "cuda":
            table = table.pin_memory().to(device, non_blocking=True)
        self.table = table
        self.constants = _Stages.of_any(group).constants() | {"LAYERS": layers}

    def launch(self, kernel: Any, deal: Any) -> None:
        if self.counts[deal.value]:
            constants = {name: self.constants[name] for name in kernel.arg_names[1:]}
            launch(kernel, (self.counts[deal.value],), self.table, **constants)


def launch(kernel: Any, grid: tuple[int, ...], table: Tensor, **constants: Any) -> None:
    """Runs one kernel; tests count the launches here."""
    with torch.cuda.device_of(table):  # type: ignore[no-untyped-call]
        kernel[grid](table, **constants)


@functools.cache
def _number_on(device: torch.device, value: float) -> Tensor:
    """An epsilon in the device's memory, one tensor for all layers."""
    return torch.full((), value, dtype=torch.float32, device=device)


def _dense(filters: Tensor) -> Tensor:
    """The same weight, filter after filter, contiguous or channels_last within each."""
    if filters.is_contiguous():
        return filters
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats.get(filters.ndim)
    if memory_format is not None and filters.is_contiguous(memory_format=memory_format):
        return filters
    return filters.contiguous()
