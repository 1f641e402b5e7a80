"""Methods of the papers that change layers instead of weights, one file per method."""

from we_surgery.transplants.base import Site as Site
from we_surgery.transplants.base import Transplant as Transplant
from we_surgery.transplants.registry import TRANSPLANTS as TRANSPLANTS
from we_surgery.transplants.registry import build_transplant as build_transplant
from we_surgery.transplants.registry import parse_transplants as parse_transplants
