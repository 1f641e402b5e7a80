"""Bytes in and out: reading, stripping and writing files, hostile until they are read.

``contents.read`` opens anything (torch's pickles by ``safe_pickle``, tensors in files by
``shards``), ``folding`` strips state dicts, ``staging`` writes files whole or not at all. May
import: ``attached`` and what lies below. Trainers' ways to wrap a state dict are in ``unwrap``.
To add a layout of files: ``shards``.
"""

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
from we_surgery.checkpoint.folding import strip_state_dict as strip_state_dict
from we_surgery.checkpoint.folding import (
    strip_state_dict_with_report as strip_state_dict_with_report,
)
from we_surgery.checkpoint.folding_to_files import save_stripped as save_stripped
from we_surgery.checkpoint.folding_to_files import strip_sharded as strip_sharded
from we_surgery.checkpoint.metadata import Metadata as Metadata
from we_surgery.checkpoint.model_folder import ModelFolder as ModelFolder
from we_surgery.checkpoint.opening import load as load
from we_surgery.checkpoint.opening import model_from as model_from
from we_surgery.checkpoint.opening import save as save
from we_surgery.checkpoint.plan_check import check_plan as check_plan
from we_surgery.checkpoint.quantized import is_quantized as is_quantized
from we_surgery.checkpoint.staging import Staging as Staging
from we_surgery.checkpoint.staging import check_target as check_target
from we_surgery.checkpoint.staging import staged as staged
from we_surgery.checkpoint.staging import staged_together as staged_together
from we_surgery.checkpoint.unwrap import Weights as Weights
from we_surgery.checkpoint.vanilla_loading import LoadedKeys as LoadedKeys
from we_surgery.checkpoint.vanilla_loading import load_vanilla as load_vanilla
from we_surgery.checkpoint.writing import write as write
from we_surgery.checkpoint.writing import write_bytes as write_bytes
from we_surgery.checkpoint.writing import write_to as write_to
