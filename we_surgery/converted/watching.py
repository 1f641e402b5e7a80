"""What an excited weight was computed from, and whether any of it has changed since.

That is asked at each read of a kept weight, between two layers of a model at work, when nothing
of it is in a cache: so it is few objects and short loops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


class UnwatchableError(Exception):
    """The excited weight depends on something that cannot be watched."""


@dataclass(eq=False, slots=True)
class Sources:
    """The parameters, buffers, submodules and adjustable options of an excitation, as they were.

    Attributes:
        owners: each dictionary that holds some of them, and its length: something may be added.
        members: the dictionary, the name and what was found there.
        tensors: those of the members that are tensors, their versions and addresses.
        aliases: their memory, which cannot be given to other tensors while this is here.
    """

    owners: list[tuple[dict[str, Any], int]]
    members: list[tuple[dict[str, Any], str, Any]]
    tensors: list[tuple[Tensor, int, int]]
    aliases: list[Tensor]

    @classmethod
    def of(cls, excitation: nn.Module) -> Sources:
        """All that an excitation computes from, as it is now.

        Raises:
            UnwatchableError: some of it is not a plain tensor.
            RuntimeError: some of it was made in inference mode and has no version.
        """
        found = cls([], [], [], [])
        for owner in _owners(excitation):
            found.owners.append((owner, len(owner)))
            for name, value in owner.items():
                found.members.append((owner, name, value))
                if isinstance(value, Tensor):
                    if type(value) not in (nn.Parameter, Tensor, FakeTensor):
                        raise UnwatchableError
                    found.tensors.append((value, value._version, address(value)))
                    found.aliases.append(value.detach())
        for module in excitation.modules():
            for name in getattr(module, "adjustable", ()):
                found.members.append((module.__dict__, name, module.__dict__.get(name)))
        return found

    def have_moved(self) -> bool:
        """Whether one was added, replaced, written to or given other memory."""
        for owner, length in self.owners:
            if len(owner) != length:
                return True
        for owner, name, value in self.members:
            if owner.get(name) is not value:
                return True
        for tensor, version, place in self.tensors:
            if tensor._version != version or address(tensor) != place:
                return True
        return False

    def require_gradients(self) -> list[bool]:
        """Which of the tensors do."""
        return [tensor.requires_grad for tensor, _, _ in self.tensors]


def _owners(excitation: nn.Module) -> Iterator[dict[str, Any]]:
    for module in excitation.modules():
        if "parametrizations" in module._modules:
            raise UnwatchableError
        for owner in (module._modules, module._parameters, module._buffers):
            if owner:
                yield owner


def address(tensor: Tensor) -> int:
    """Where the tensor's values are; 0 for one that has none."""
    return 0 if type(tensor) is FakeTensor else tensor.data_ptr()
