"""The closed form of many layers by the Triton kernels, in at most seven launches.

Imported where it is used alone: it needs Triton.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from we_surgery.excitations.compute import triton_backward as backward
from we_surgery.excitations.compute import triton_forward as forward
from we_surgery.excitations.compute import triton_tiles as tables
from we_surgery.excitations.compute.inputs import ClosedFormInputs, Kept, Pullback

ROWS, COLUMNS, UNITS, BLOCK = 16, 32, 32, 4096


def supports(filters: Tensor, inputs: ClosedFormInputs) -> bool:
    """Whether the kernels compute this composition; otherwise eager does."""
    return filters.dtype == torch.float32 and (inputs.mwe_epsilon is None or inputs.detach_max)


def excite(layers: Sequence[tuple[Tensor, ClosedFormInputs]]) -> list[tuple[Tensor, Kept]]:
    """As :func:`we_surgery.excitations.compute.formulas.excite`, of float32 weights."""
    found: dict[int, tuple[Tensor, Kept]] = {}
    for stages, places in _alike(layers):
        group = [_Layer(*layers[place]) for place in places]
        found |= zip(places, _excite(stages, group), strict=True)
    return [found[place] for place in range(len(layers))]


def differentiate(layers: Sequence[Pullback]) -> list[tuple[Tensor | None, ...]]:
    """As :func:`we_surgery.excitations.compute.formulas.differentiate`."""
    found: dict[int, tuple[Tensor | None, ...]] = {}
    for stages, places in _alike((layer.weight, layer.inputs) for layer in layers):
        group = [_Layer(layers[place].weight, layers[place].inputs) for place in places]
        asked = [layers[place] for place in places]
        found |= zip(places, _differentiate(stages, group, asked), strict=True)
    return [found[place] for place in range(len(layers))]


class _Stages(NamedTuple):
    """What the layers of one launch have in common."""

    device: torch.device
    standardize: bool
    lwe: bool
    rescale: bool
    mwe: bool

    def constants(self) -> dict[str, Any]:
        """The kernels' constants."""
        stages = {name.upper(): value for name, value in self._asdict().items()}
        return stages | {"ROWS": ROWS, "COLUMNS": COLUMNS, "UNITS": UNITS, "BLOCK": BLOCK}


def _alike(
    layers: Iterable[tuple[Tensor, ClosedFormInputs]],
) -> Iterator[tuple[_Stages, list[int]]]:
    """The places of the layers that one launch can do."""
    places: dict[_Stages, list[int]] = {}
    for place, (filters, inputs) in enumerate(layers):
        stages = _Stages(
            filters.device,
            standardize=inputs.standardize_epsilon is not None,
            lwe=inputs.fc1_bias is not None,
            rescale=inputs.gain is not None,
            mwe=inputs.mwe_epsilon is not None,
        )
        places.setdefault(stages, []).append(place)
    yield from places.items()


class _Layer:
    """A layer as the kernels read it: its tensors, its sizes, its tiles."""

    def __init__(self, filters: Tensor, inputs: ClosedFormInputs) -> None:
        self.filters = _dense(filters)
        self.out_channels, self.channels = filters.shape[:2]
        self.positions = math.prod(filters.shape[2:])
        self.hidden_channels = 0 if inputs.fc1_bias is None else inputs.fc1_bias.shape[0]
        self.row_tiles = math.ceil(self.out_channels / ROWS)
        self.column_tiles = math.ceil(self.channels / COLUMNS)
        self.tiles = self.row_tiles * self.column_tiles
        # Held here, for some may be copies.
        self.tensors: dict[str, Tensor] = {"weight": self.filters}
        for name, term in zip(ClosedFormInputs._fields, inputs, strict=True):
            if isinstance(term, Tensor):
                self.tensors[name] = term.to(torch.float32).contiguous()
            elif isinstance(term, float):
                self.tensors[name] = _number_on(filters.device, term)

    def row(self, anchors: dict[str, Tensor]) -> tables.Row:
        places = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        for name, anchor in _ANCHORED.items():
            if name in places:
                places[name] = (places[name] - anchors[anchor].data_ptr()) // 4
        is_channels_last = self.positions > 1 and not self.filters.is_contiguous()
        steps = (1, self.channels) if is_channels_last else (self.positions, 1)
        return tables.Row(
            **places,
            out_channels=self.out_channels,
            channels=self.channels,
            positions=self.positions,
            channel_step=steps[0],
            position_step=steps[1],
            hidden_channels=self.hidden_channels,
        )

    def programs(self, needed: Sequence[bool]) -> tuple[int, ...]:
        """How many programs work for this layer in each of the kernels' deals."""
        unit_tiles = self.column_tiles * math.ceil(self.hidden_channels / UNITS)
        return (
            self.row_tiles,
            self.tiles,
            self.tiles if needed[0] else 0,
            unit_tiles if any(needed[1:]) else 0,
            math.ceil(self.filters.numel() / BLOCK),
        )


def _excite(stages: _Stages, group: Sequence[_Layer]) -> Iterator[tuple[Tensor, Kept]]:
    shapes: list[dict[str, tuple[int, ...]]] = []
    for layer in group:
        layer.tensors["result"] = torch.empty_like(layer.filters)
        rows, ndim = layer.out_channels, layer.filters.ndim
        shapes.append({})
        if stages.standardize:
            shapes[-1] |= {"mean": (rows, *[1] * (ndim - 1)), "norm": (rows, 1), "scale": (rows, 1)}
        if stages.lwe:
            shapes[-1]["hidden"] = (rows, layer.hidden_channels)
        if stages.mwe:
            shapes[-1] |= {"limit": (), "maxima": (layer.tiles,)}
    _allocate(group, shapes)
    programs = _Programs(stages, group, [(False,) * 5] * len(group))
    if stages.standardize or stages.lwe:
        programs.launch(forward.summarize, tables.BY_FILTERS)
    programs.launch(forward.multiply, tables.BY_TILES)
    if stages.mwe:
        programs.launch(forward.amplify, tables.BY_BLOCKS)
    for layer in group:
        yield layer.tensors["result"], Kept(*map(layer.tensors.get, Kept._fields))


def _differentiate(
    stages: _Stages, group: Sequence[_Layer], asked: Sequence[Pullback]
) -> Iterator[tuple[Tensor | None, ...]]:
    shapes: list[dict[str, tuple[int, ...]]] = []
    fc_shapes: list[dict[str, tuple[int, ...]]] = []
    for layer, (gradient, _, inputs, kept, needed) in zip(group, asked, strict=True):
        if gradient.stride() != layer.filters.stride():
            gradient = torch.empty_like(layer.filters).copy_(gradient)
        layer.tensors["gradient"] = gradient
        for name, value in kept._asdict().items():
            if value is not None:
                layer.tensors[name] = value
        if needed[0]:
            layer.tensors["result"] = torch.empty_like(layer.filters)
        fc_shapes.append({})
        if any(needed[1:]):
            fc_shapes[-1] |= {f"by_{name}": getattr(inputs, name).shape for name in _FCS}
        rows, columns = layer.out_channels, layer.channels
        shapes.append({})
        if stages.standardize or stages.lwe:
            partial = (layer.column_tiles, rows)
            shapes[-1] |= {"partial_t": partial, "partial_total": partial}
        if stages.lwe:
            shapes[-1] |= dict.fromkeys(("z", "sums"), (rows, columns))
            shapes[-1]["v"] = (rows, layer.hidden_channels)
        if stages.standardize:
            shapes[-1] |= dict.fromkeys(("f", "average"), (rows,))
    _allocate(group, shapes)
    _allocate(group, fc_shapes)
    programs = _Programs(stages, group, [pullback.needed for pullback in asked])
    if stages.standardize or stages.lwe:
        programs.launch(backward.sum_tiles, tables.BY_TILES)
        programs.launch(backward.sum_filters, tables.BY_FILTERS)
    programs.launch(backward.by_weight, tables.BY_TRAINED_TILES)
    if stages.lwe:
        programs.launch(backward.by_fcs, tables.BY_UNITS)
    for layer, pullback in zip(group, asked, strict=True):
        names = ("result", *(f"by_{name}" for name in _FCS))
        yield tuple(
            layer.tensors.get(name) if is_needed else None
            for name, is_needed in zip(names, pullback.needed, strict=True)
        )


_FCS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
_KEPT = (*Kept._fields, "maxima")
_SCRATCH = ("partial_t", "partial_total", "z", "sums", "v", "f", "average")
_ANCHORED = {
    "result": "result",
    "gradient": "gradient",
    **dict.fromkeys(_KEPT, "kept"),
    **dict.fromkeys(_SCRATCH, "scratch"),
    **dict.fromkeys((f"by_{name}" for name in _FCS), "fcs"),
}
"""By which of a kernel's arguments a tensor that moves is found."""


def _allocate(group: Sequence[_Layer], shapes: Sequence[dict[str, tuple[int, ...]]]) -> None:
    """Gives the layers float32 tensors of these shapes, all in one piece of memory."""
    sizes = [math.prod(shape) for layer in shapes for shape in layer.values()]
    space = torch.empty(sum(sizes), dtype=torch.float32, device=group[0].filters.device)
    pieces = iter(torch.split(space, sizes))
    for layer, named in zip(group, shapes, strict=True):
        for name, shape in named.items():
            layer.tensors[name] = next(pieces).view(shape)


class _Programs:
    """The table of a group on its device, and how many programs each kernel has."""

    def __init__(
        self, stages: _Stages, group: Sequence[_Layer], needed: Sequence[Sequence[bool]]
    ) -> None:
        # A power of two, as whatever a kernel loads at once.
        layers = 1 << (len(group) - 1).bit_length()
        dealt = zip(*(map(_Layer.programs, group, needed)), strict=True)
        firsts = [list(accumulate(counts, initial=0)) for counts in dealt]
        self.counts = [deal[-1] for deal in firsts]
        padded = (deal[:-1] + deal[-1:] * (layers - len(group)) for deal in firsts)
        # Whatever a kernel has no use for is given the weight.
        self.anchors = dict.fromkeys(_ANCHORED.values(), group[0].filters)
        for layer in reversed(group):
            tensors = reversed(layer.tensors.items())
            self.anchors |= {_ANCHORED[name]: t for name, t in tensors if name in _ANCHORED}
        content = array("q", chain(*padded, *(layer.row(self.anchors) for layer in group)))
        device = stages.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        self.table = _table(content.tobytes(), device, stream)
        self.constants = stages.constants() | {"LAYERS": layers}

    def launch(self, kernel: Any, deal: Any) -> None:
        given = self.anchors | self.constants
        if self.counts[deal.value]:
            grid = (self.counts[deal.value],)
            launch(kernel, grid, self.table, **{name: given[name] for name in kernel.arg_names[1:]})


@functools.lru_cache(maxsize=1024)
def _table(content: bytes, device: torch.device, stream: int) -> Tensor:
    """A table on its device, kept as long as layers stay where they are.

    The copy is ordered within the stream and nobody waits for it.
    """
    table = torch.frombuffer(bytearray(content), dtype=torch.int64)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def launch(kernel: Any, grid: tuple[int, ...], table: Tensor, **others: Any) -> None:
    """Runs one kernel; every launch goes through here, to be counted."""
    with torch.cuda.device_of(table):  # type: ignore[no-untyped-call]
        kernel[grid](table, **others)


@functools.cache
def _number_on(device: torch.device, value: float) -> Tensor:
    """An epsilon where the kernels read it, one for all layers."""
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
