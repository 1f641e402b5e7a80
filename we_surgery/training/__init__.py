"""Converted models in real training: parameter groups, optimizers, frameworks.

The integrations with frameworks are modules of their own (``we_surgery.training.lightning``,
``we_surgery.training.transformers``), which import their framework; nothing here does.
"""

from we_surgery.training.filters import norm_loss as norm_loss
from we_surgery.training.filters import project as project
from we_surgery.training.optimizers import StaleOptimizerWarning as StaleOptimizerWarning
from we_surgery.training.optimizers import add_to_optimizer as add_to_optimizer
from we_surgery.training.optimizers import remove_from_optimizer as remove_from_optimizer
from we_surgery.training.param_groups import param_groups as param_groups
from we_surgery.training.schedule import WESchedule as WESchedule
from we_surgery.training.schedule import resume as resume
from we_surgery.training.stages import ShiftAttentionSchedule as ShiftAttentionSchedule
from we_surgery.training.stages import average_location_nets as average_location_nets
from we_surgery.training.stages import harden as harden
from we_surgery.training.stages import shift_attention_words as shift_attention_words
from we_surgery.training.stages import sparsity_loss as sparsity_loss
