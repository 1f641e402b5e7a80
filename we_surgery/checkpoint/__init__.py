"""Files in, files out, state dicts."""

from we_surgery.checkpoint.architecture import Architecture as Architecture
from we_surgery.checkpoint.architecture import looks_like_architecture as looks_like_architecture
from we_surgery.checkpoint.contents import Contents as Contents
from we_surgery.checkpoint.contents import read as read
from we_surgery.checkpoint.excited_entry import ExcitedEntry as ExcitedEntry
from we_surgery.checkpoint.excited_entry import cast as cast
from we_surgery.checkpoint.excited_entry import find_excited as find_excited
from we_surgery.checkpoint.excited_entry import is_excited_state_dict as is_excited_state_dict
from we_surgery.checkpoint.excited_entry import tensor_identity as tensor_identity
from we_surgery.checkpoint.folding import StateDictReport as StateDictReport
from we_surgery.checkpoint.folding import nothing_to_strip as nothing_to_strip
from we_surgery.checkpoint.folding import refuse_vanilla as refuse_vanilla
from we_surgery.checkpoint.folding import save_stripped as save_stripped
from we_surgery.checkpoint.folding import strip_sharded as strip_sharded
from we_surgery.checkpoint.folding import strip_state_dict as strip_state_dict
from we_surgery.checkpoint.folding import (
    strip_state_dict_with_report as strip_state_dict_with_report,
)
from we_surgery.checkpoint.metadata import Metadata as Metadata
from we_surgery.checkpoint.opening import load as load
from we_surgery.checkpoint.opening import model_from as model_from
from we_surgery.checkpoint.opening import save as save
from we_surgery.checkpoint.settling import settled as settled
from we_surgery.checkpoint.staging import Staging as Staging
from we_surgery.checkpoint.staging import check_target as check_target
from we_surgery.checkpoint.staging import staged as staged
from we_surgery.checkpoint.staging import staged_together as staged_together
from we_surgery.checkpoint.unwrap import Weights as Weights
from we_surgery.checkpoint.writing import save_module as save_module
from we_surgery.checkpoint.writing import save_safetensors as save_safetensors
from we_surgery.checkpoint.writing import save_state_dict as save_state_dict
from we_surgery.checkpoint.writing import write_bytes as write_bytes
from we_surgery.checkpoint.writing import write_module as write_module
from we_surgery.checkpoint.writing import write_safetensors as write_safetensors
from we_surgery.checkpoint.writing import write_state_dict as write_state_dict
