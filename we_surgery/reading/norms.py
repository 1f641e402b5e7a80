"""Whether a norm follows an operation, in a recorded or traced graph.

Standardizing a weight makes its layer's output larger by an order of magnitude. A norm removes
this scale, if it comes before anything that depends on the scale: an addition, a product of two
maps, another layer, or a non-linearity that is not scale-equivariant. Scale-equivariant operations
pass the scale on: views, padding, pooling, dropout, ReLU, constant factors. A concatenation passes
it on to norms per channel; for other norms it weighs the maps against each other, as an addition
does. So a conv of a pre-activation network whose output is first added to the shortcut is not
followed by a norm.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import fx

from we_surgery.reading.graph import ModelGraph

_SCALED_ALIKE = frozenset(
    """
    avgpool1d avgpool2d avgpool3d adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d
    maxpool1d maxpool2d maxpool3d maxpool2dwithindices maxpool3dwithindices adaptivemaxpool1d
    adaptivemaxpool2d adaptivemaxpool3d roll flip pad constantpadnd reflectionpad1d
    reflectionpad2d replicationpad1d replicationpad2d zeropad2d constantpad2d index indexselect
    gather pixelshuffle pixelunshuffle channelshuffle interpolate upsample upsamplenearest1d
    upsamplenearest2d upsamplenearest3d upsamplebilinear2d upsamplebicubic2d unfold im2col
    dropout dropout1d dropout2d dropout3d nativedropout featuredropout droppath stochasticdepth
    permute flatten unflatten relu leakyrelu prelu prelukernel rrelu rreluwithnoise abs neg
    """.split()
)
_JOINS = frozenset("cat concat concatenate stack hstack".split())
# Per channel for one map; in a concatenation they mix the maps.
_SUMS = frozenset(["mean", "sum"])
_FACTORS = frozenset("mul imul div idiv truediv itruediv".split())


class After(NamedTuple):
    """What comes after an operation.

    Attributes:
        is_norm: whether every path meets a norm first; None if the graph does not show it.
        evidence: what one path meets.
    """

    is_norm: bool | None
    evidence: str

    @property
    def reason(self) -> str:
        """The evidence in the words of a plan."""
        return f"{self.evidence} follows" if self.is_norm else self.evidence

    @classmethod
    def all_of(cls, found: Iterable[After]) -> After:
        """What comes after a weight's operations, from what comes after each."""
        each = {one.is_norm: one for one in reversed(list(found))}
        return next(
            (each[verdict] for verdict in (False, None, True) if verdict in each), cls(False, "")
        )


def after(node: fx.Node, graph: ModelGraph) -> After:
    """Whether every path from ``node`` meets a norm before anything that notices its scale."""
    unseen: After | None = None
    met: After | None = None
    pending = [(user, False) for user in graph.consumers(node)]
    visited = set()
    while pending:
        user, is_joined = pending.pop(0)
        if (user, is_joined) in visited:
            continue
        visited.add((user, is_joined))
        if graph.is_norm(user, before=node):
            if is_joined and not graph.normalizes_each_channel(user):
                return After(False, f"{graph.describe(user)}, over what several layers return,")
            met = met or After(True, graph.describe(user))
        elif _passes_scale(user, graph, is_joined):
            is_joined |= graph.operation(user) in _JOINS and len(graph.fed_sources(user)) > 1
            pending.extend((later, is_joined) for later in graph.consumers(user))
        elif graph.is_unseen(user):
            unseen = unseen or After(None, graph.describe(user))
        else:
            return After(False, graph.describe(user))
    return unseen or met or After(False, "")


def _passes_scale(node: fx.Node, graph: ModelGraph, is_joined: bool) -> bool:
    operation = graph.operation(node)
    if operation in _FACTORS:
        return len(graph.fed_sources(node)) == 1
    if operation in _SUMS:
        return not is_joined
    return graph.is_view(node) or operation in _SCALED_ALIKE or operation in _JOINS
