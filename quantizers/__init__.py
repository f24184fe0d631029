"""Quantizers by the name that a config gives them."""

from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.quantizers.fsq import FSQ
from tokenizers_vis.quantizers.library import Library
from tokenizers_vis.quantizers.vq import VQ

QUANTIZERS: dict[str, type[Quantizer]] = {"vq": VQ, "fsq": FSQ, "library": Library}
