"""The converted form: excited layers and graph nodes, convert, strip, and the proof of both.

May import: ``planning`` and the rooms below it. To add a kind of owner of excited weights:
``excite.py``, which knows layers (``layer.py``) and weights of torch.fx graphs (``graphs.py``).

Pickles name the excited classes by this package, ``we_surgery.converted``.
"""

from typing import Any

from we_surgery.converted.layer import find_excited_class


def __getattr__(name: str) -> Any:
    """The excited class of this name, for pickle; it is made on demand."""
    found = find_excited_class(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
