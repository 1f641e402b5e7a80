"""Ctrl-C held back while weights are not what they were."""

from __future__ import annotations

import signal
import threading
from typing import Any


class HeldInterrupt:
    """While installed, SIGINT is held back, but for the stretches that let it through.

    Python raises ``KeyboardInterrupt`` between any two instructions, also between those of a
    ``finally``, so a second Ctrl-C could end a restoration halfway. Here the interrupt that is
    let through closes the door behind it in the same step as it raises: from then on all that
    comes is held until :meth:`remove`, which delivers it.

    Elsewhere than in the main thread nothing is installed: there no interrupt is raised.
    """

    def __init__(self) -> None:
        self._is_open = False
        self._is_installed = False
        self._held: tuple[int, Any] | None = None
        self._previous: Any = None

    def install(self) -> None:
        """Holds interrupts back from here on."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._previous = signal.getsignal(signal.SIGINT)
        if callable(self._previous):
            # Said before it is done: an interrupt may come between the two.
            self._is_installed = True
            signal.signal(signal.SIGINT, self._handle)

    def let_through(self) -> None:
        """Opens the door, and lets one in that was waiting."""
        self._is_open = True
        if self._held is not None:
            waiting, self._held = self._held, None
            self._handle(*waiting)

    def hold(self) -> None:
        """Closes the door."""
        self._is_open = False

    def remove(self) -> None:
        """Gives the signal its handler back, and delivers what was held."""
        if self._is_installed:
            signal.signal(signal.SIGINT, self._previous)
            if self._held is not None:
                held, self._held = self._held, None
                self._previous(*held)

    def _handle(self, number: int, frame: Any) -> None:
        if self._is_open:
            self._is_open = False
            self._previous(number, frame)
        else:
            self._held = (number, frame)
