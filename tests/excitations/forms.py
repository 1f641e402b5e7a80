"""A stage by itself, and as a layer runs it: in a composition."""

from collections.abc import Callable

import pytest

from we_surgery.excitations import Composition, Excitation

Form = Callable[[Excitation], Excitation]

BOTH_FORMS = pytest.mark.parametrize(
    "form", [lambda stage: stage, lambda stage: Composition([stage])], ids=["stage", "composition"]
)
