"""Maps from weight to weight. No module here knows a model.

Lives here: what excitations have in common (``base``), one file per method, their ``composition``
in a layer, the ``record`` in state dicts, ``building`` by name; ``compute`` has the closed form.
May import: ``errors``. To add a method: one file, and one line in ``registry.py``.
"""

from we_surgery.excitations import registry as registry  # registers the family
from we_surgery.excitations.base import Excitation as Excitation
from we_surgery.excitations.building import EXCITATIONS as EXCITATIONS
from we_surgery.excitations.building import Stages as Stages
from we_surgery.excitations.building import build_excitation as build_excitation
from we_surgery.excitations.building import check_stage as check_stage
from we_surgery.excitations.building import load_plugins as load_plugins
from we_surgery.excitations.building import rebuild_excitation as rebuild_excitation
from we_surgery.excitations.building import register_excitation as register_excitation
from we_surgery.excitations.composition import Composition as Composition
from we_surgery.excitations.compute.backends import Backend as Backend
from we_surgery.excitations.dynamic_sparse import DynamicSparse as DynamicSparse
from we_surgery.excitations.layout import WeightLayout as WeightLayout
from we_surgery.excitations.lwe import LWE as LWE
from we_surgery.excitations.lwe_attentions import BAMLWE as BAMLWE
from we_surgery.excitations.lwe_attentions import CBAMLWE as CBAMLWE
from we_surgery.excitations.lwe_attentions import TripletLWE as TripletLWE
from we_surgery.excitations.lwe_direct import DirectLWE as DirectLWE
from we_surgery.excitations.lwe_global import GlobalLWE as GlobalLWE
from we_surgery.excitations.lwe_heads import HeadsLWE as HeadsLWE
from we_surgery.excitations.lwe_position import PositionLWE as PositionLWE
from we_surgery.excitations.mwe import MWE as MWE
from we_surgery.excitations.shift_attention import ShiftAttention as ShiftAttention
from we_surgery.excitations.spectral_norm import SpectralNorm as SpectralNorm
from we_surgery.excitations.standardize import Rescale as Rescale
from we_surgery.excitations.standardize import Standardize as Standardize
from we_surgery.excitations.weight_align import WeightAlign as WeightAlign
from we_surgery.excitations.weight_norm import WeightNorm as WeightNorm
