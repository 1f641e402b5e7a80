"""Excitation in the optimizer's step: the model stays vanilla, object for object.

Lives here: `attach` and everything that happens in a step. May import: excitations, reading,
planning and the converted form (for `converted()`). To support another wrapper of optimizers, add
its name in `optimizers`.
"""

from we_surgery.attached.attaching import attach as attach
from we_surgery.attached.excitation import AttachedExcitation as AttachedExcitation
