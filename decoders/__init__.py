"""Decoders, what turns codes into a picture on a canvas, and the canvases."""

from tokenizers_vis.decoders.canvas import Pixels
from tokenizers_vis.decoders.code_scores import CodeScores
from tokenizers_vis.decoders.conv import GridDecoder
from tokenizers_vis.decoders.diffusion import DiffusionDecoder
from tokenizers_vis.decoders.dual import DualDecoder
from tokenizers_vis.decoders.flextok import FlexTokDecoder
from tokenizers_vis.decoders.flow import FlowDecoder
from tokenizers_vis.decoders.patch_flow import PatchFlowDecoder
from tokenizers_vis.decoders.shortcut import ShortcutDecoder
from tokenizers_vis.decoders.titok import TiTokDecoder
from tokenizers_vis.decoders.vae import VAELatents
from tokenizers_vis.decoders.vit import ViTDecoder
from tokenizers_vis.decoders.vqgan_codes import VQGANCodes

DECODERS = {
    "vit": ViTDecoder,
    "flow": FlowDecoder,
    "diffusion": DiffusionDecoder,
    "patch_flow": PatchFlowDecoder,
    "shortcut": ShortcutDecoder,
    "flextok": FlexTokDecoder,
    "conv": GridDecoder,
    "titok": TiTokDecoder,
    "dual": DualDecoder,
}
CANVASES = {"pixels": Pixels, "vae": VAELatents, "vqgan_codes": VQGANCodes, "code_scores": CodeScores}
