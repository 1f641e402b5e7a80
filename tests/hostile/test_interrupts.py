"""A part of the interrupts that `python tests/hostile/interrupts.py` tries all of."""

import interrupts
import pytest

POINTS = 20


@pytest.mark.parametrize("surgery", interrupts.SURGERY)
@pytest.mark.parametrize("model", interrupts.MODELS)
def test_an_interrupt_leaves_a_model_as_it_was_or_done(model: str, surgery: str) -> None:
    numbers = interrupts.points(model, surgery, everything=False)
    chosen = numbers[:: max(len(numbers) // POINTS, 1)]
    assert len(chosen) >= POINTS
    assert list(interrupts.faults(model, surgery, chosen, everything=False)) == []
