"""Decoders: what turns codes into a picture on a canvas."""

from tokenizers_vis.decoders.flow import FlowDecoder
from tokenizers_vis.decoders.vit import ViTDecoder

DECODERS = {"vit": ViTDecoder, "flow": FlowDecoder}
