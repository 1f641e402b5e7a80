"""Layer-for-layer methods of the papers that are not weight excitation, a file a method."""

from we_surgery.transplants.base import Site as Site
from we_surgery.transplants.base import Transplant as Transplant
from we_surgery.transplants.registry import TRANSPLANTS as TRANSPLANTS
from we_surgery.transplants.registry import build_transplant as build_transplant
from we_surgery.transplants.registry import parse_transplants as parse_transplants
