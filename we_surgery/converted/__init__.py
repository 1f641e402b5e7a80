"""The converted form: excited layers and graph nodes, convert, strip, and the proof of both.

May import: ``planning`` and the rooms below it. To add a kind of owner of excited weights:
``excite.py``, which knows layers (``layer.py``) and weights of torch.fx graphs (``graphs.py``).

Pickles name the excited classes by this package, ``we_surgery.converted``.
"""

from typing import Any

from we_surgery.converted.layer import WEConv1d as WEConv1d
from we_surgery.converted.layer import WEConv2d as WEConv2d
from we_surgery.converted.layer import WEConv3d as WEConv3d
from we_surgery.converted.layer import WEConvTranspose1d as WEConvTranspose1d
from we_surgery.converted.layer import WEConvTranspose2d as WEConvTranspose2d
from we_surgery.converted.layer import WEConvTranspose3d as WEConvTranspose3d
from we_surgery.converted.layer import WELinear as WELinear
from we_surgery.converted.layer import find_made_class


def __getattr__(name: str) -> Any:
    """Finds a class that another process made on demand, for pickle."""
    found = find_made_class(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
