"""Encoders: one tokenizer family, one file."""

from tokenizers_vis.encoders.flextok import FlexTokEncoder
from tokenizers_vis.encoders.titok import TiTokEncoder

ENCODERS = {"titok": TiTokEncoder, "flextok": FlexTokEncoder}
