"""Put weight excitation into any PyTorch model, and take it out again before deployment."""

__version__ = "0.1.0"

from we_surgery.backends import set_backend as set_backend
from we_surgery.checkpoint import Architecture as Architecture
from we_surgery.checkpoint import load as load
from we_surgery.checkpoint import save as save
from we_surgery.checkpoint import strip_sharded as strip_sharded
from we_surgery.checkpoint import strip_state_dict as strip_state_dict
from we_surgery.config import make_policy as make_policy
from we_surgery.errors import AlreadyConvertedWarning as AlreadyConvertedWarning
from we_surgery.errors import ExcitationError as ExcitationError
from we_surgery.errors import InputError as InputError
from we_surgery.errors import NothingToStripWarning as NothingToStripWarning
from we_surgery.errors import SurgeryError as SurgeryError
from we_surgery.errors import WESurgeryError as WESurgeryError
from we_surgery.excitations import EXCITATIONS as EXCITATIONS
from we_surgery.excitations import Excitation as Excitation
from we_surgery.excitations import WeightLayout as WeightLayout
from we_surgery.excitations import average_location_nets as average_location_nets
from we_surgery.excitations import harden as harden
from we_surgery.excitations import register_excitation as register_excitation
from we_surgery.excitations import sparsity_loss as sparsity_loss
from we_surgery.grouping import set_grouped as set_grouped
from we_surgery.layers import set_recompute as set_recompute
from we_surgery.planning import plan as plan
from we_surgery.plans import Decision as Decision
from we_surgery.plans import Plan as Plan
from we_surgery.policy import MODES as MODES
from we_surgery.policy import Mode as Mode
from we_surgery.policy import Policy as Policy
from we_surgery.proof import StripReport as StripReport
from we_surgery.rules import Rule as Rule
from we_surgery.surgery import convert as convert
from we_surgery.surgery import strip as strip
from we_surgery.surgery import strip_with_report as strip_with_report
from we_surgery.training import ShiftAttentionSchedule as ShiftAttentionSchedule
from we_surgery.training import StaleOptimizerWarning as StaleOptimizerWarning
from we_surgery.training import WESchedule as WESchedule
from we_surgery.training import add_to_optimizer as add_to_optimizer
from we_surgery.training import norm_loss as norm_loss
from we_surgery.training import param_groups as param_groups
from we_surgery.training import remove_from_optimizer as remove_from_optimizer
from we_surgery.training import resume as resume
from we_surgery.training import shift_attention_words as shift_attention_words
from we_surgery.transplants import TRANSPLANTS as TRANSPLANTS
from we_surgery.transplants import Transplant as Transplant
