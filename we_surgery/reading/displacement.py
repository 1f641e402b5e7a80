"""Whether a tensor of position codes is a channel-wise shift of the tensor it came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ENOUGH_CODES = 20_000
_FEWEST_POSITIONS = 32


@dataclass(frozen=True)
class Shift:
    """Channels displaced by different translations of stride 1.

    Attributes:
        dims: the source's dimensions along which channels move.
        steps: the distinct displacements, one number per dimension.
    """

    dims: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        dims = " and ".join(map(str, self.dims))
        steps = ", ".join(
            "/".join(f"{step:+d}" if step else "0" for step in vector) for vector in self.steps
        )
        noun = "dims" if len(self.dims) > 1 else "dim"
        return f"channels displaced along {noun} {dims} by {steps}"


def position_codes(shape: tuple[int, ...]) -> Tensor:
    """A tensor of int64 codes, 1 + the position of each element; 0 is left for padding."""
    return torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape)


def find_shift(codes: Tensor, channel_dim: int, source_shape: tuple[int, ...]) -> Shift | None:
    """The shift that turned ``position_codes(source_shape)`` into ``codes``, or None.

    A shift moves each channel by one translation of stride 1, uses each source channel at most
    once, and moves at least two channels differently. The same translation of all channels (a roll,
    padding), a permutation of channels, patches gathered into channels (space-to-depth, unfold) and
    strided samples are not shifts. ``codes`` are 0 where nothing arrived.
    """
    moved = codes.movedim(channel_dim, 0)
    channels, positions = moved.shape[0], moved[0].numel()
    if positions < 2 or channels < 2:
        return None
    sample = _sample(positions, channels)
    flat = moved.reshape(channels, positions)[:, sample]
    arrived = flat > 0
    source = torch.stack(torch.unravel_index((flat - 1).clamp(min=0), source_shape))
    source_channel_dim = _channel_dim(source, arrived, source_shape)
    if source_channel_dim is None:
        return None
    own = _own_coordinates(sample, moved.shape[1:], source_shape, source_channel_dim)
    if own is None:
        return None
    rest = [dim for dim in range(len(source_shape)) if dim != source_channel_dim]
    steps = source[rest] - own.unsqueeze(1)
    filled = arrived.any(1)
    used = source[source_channel_dim].masked_fill(~arrived, -1).amax(1)[filled].tolist()
    vectors, share = _most_common(steps, arrived)
    if bool((share[filled] < 0.5).any()) or len(used) != len(set(used)):
        return None
    found = {tuple(vector) for vector in vectors.T[filled].tolist()}
    if len(found) < 2:
        return None
    moving = [i for i in range(len(rest)) if any(vector[i] for vector in found)]
    return Shift(
        dims=tuple(rest[i] for i in moving),
        steps=tuple(sorted({tuple(vector[i] for i in moving) for vector in found})),
    )


def _channel_dim(source: Tensor, arrived: Tensor, source_shape: tuple[int, ...]) -> int | None:
    """The source's dimension that is constant within each channel and differs the most."""
    best, best_distinct = None, 1
    for dim, size in enumerate(source_shape):
        if size < 2:
            continue
        coordinate = source[dim]
        low = torch.where(arrived, coordinate, size).amin(1)
        high = torch.where(arrived, coordinate, -1).amax(1)
        filled = arrived.any(1)
        if bool((low == high)[filled].all()):
            distinct = len(set(low[filled].tolist()))
            if distinct > best_distinct:
                best, best_distinct = dim, distinct
    return best


def _sample(positions: int, channels: int) -> Tensor:
    """All positions, or as many as tell a constant displacement from any other movement."""
    enough = max(_FEWEST_POSITIONS, _ENOUGH_CODES // channels)
    if positions <= enough:
        return torch.arange(positions)
    # Random positions: a regular stride could coincide with the length of a row.
    generator = torch.Generator().manual_seed(0)
    return torch.randint(positions, (enough,), generator=generator).sort().values


def _own_coordinates(
    positions: Tensor,
    shape: tuple[int, ...],
    source_shape: tuple[int, ...],
    source_channel_dim: int,
) -> Tensor | None:
    """The source position of each position if nothing were displaced.

    ``positions`` are flat ones in ``shape``, which excludes channels. The result is ``[source dims
    without channels, positions]``; None if neither number of dimensions nor of positions agrees.
    """
    rest = [size for dim, size in enumerate(source_shape) if dim != source_channel_dim]
    if len(rest) == len(shape):
        return torch.stack(torch.unravel_index(positions, shape))
    if torch.Size(rest).numel() == torch.Size(shape).numel():
        return torch.stack(torch.unravel_index(positions, rest))
    return None


def _most_common(steps: Tensor, arrived: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's most common displacement, ``[dims, channels]``, and its share, ``[channels]``.

    ``steps`` is ``[dims, channels, positions]``; only positions in ``arrived`` count.
    """
    span = 2 * int(steps.abs().amax()) + 1
    # One number per displacement, and another one per position that does not count.
    number = torch.zeros_like(steps[0])
    for step in steps:
        number = number * span + (step + span // 2)
    number = torch.where(arrived, number, -1 - torch.arange(number.shape[1]))
    common, index = number.mode(1)
    share = (number == common.unsqueeze(1)).sum(1) / arrived.sum(1).clamp(min=1)
    return steps.gather(2, index.expand(len(steps), -1).unsqueeze(2)).squeeze(2), share
