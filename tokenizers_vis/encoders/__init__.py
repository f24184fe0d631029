"""Encoders: one tokenizer family, one file."""

from tokenizers_vis.encoders.dual import DualEncoder
from tokenizers_vis.encoders.flextok import FlexTokEncoder
from tokenizers_vis.encoders.fqgan import FactorizedEncoder
from tokenizers_vis.encoders.grid import GridEncoder
from tokenizers_vis.encoders.titok import TiTokEncoder

ENCODERS = {
    "titok": TiTokEncoder,
    "flextok": FlexTokEncoder,
    "grid": GridEncoder,
    "fqgan": FactorizedEncoder,
    "dual": DualEncoder,
}
