"""Where a run happens."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """One process of a run.

    Attributes:
        device: of this process.
        rank: number of this process.
        processes: how many there are.
    """

    device: torch.device
    rank: int = 0
    processes: int = 1
