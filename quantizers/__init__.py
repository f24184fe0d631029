"""Quantizers by the name that a config gives them."""

from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.quantizers.bernoulli import Bernoulli
from tokenizers_vis.quantizers.bsq import BSQ
from tokenizers_vis.quantizers.compose import Product, Residual
from tokenizers_vis.quantizers.frozen_table import VQGANLC, SimVQ
from tokenizers_vis.quantizers.fsq import FSQ
from tokenizers_vis.quantizers.gaussian import Gaussian
from tokenizers_vis.quantizers.ibq import IBQ
from tokenizers_vis.quantizers.lfq import GFQ, LFQ
from tokenizers_vis.quantizers.library import Library
from tokenizers_vis.quantizers.multi_scale import MultiScale
from tokenizers_vis.quantizers.opt_vq import OptVQ
from tokenizers_vis.quantizers.perturb import Perturb
from tokenizers_vis.quantizers.random_projection import RandomProjection
from tokenizers_vis.quantizers.shared_index import SharedIndex
from tokenizers_vis.quantizers.soft_vq import SoftVQ
from tokenizers_vis.quantizers.token_bridge import TokenBridge
from tokenizers_vis.quantizers.vq import VQ

QUANTIZERS: dict[str, type[Quantizer]] = {
    "vq": VQ,
    "sim_vq": SimVQ,
    "vqgan_lc": VQGANLC,
    "perturb": Perturb,
    "gaussian": Gaussian,
    "fsq": FSQ,
    "token_bridge": TokenBridge,
    "random_projection": RandomProjection,
    "library": Library,
    "product": Product,
    "residual": Residual,
    "shared_index": SharedIndex,
    "multi_scale": MultiScale,
    "lfq": LFQ,
    "gfq": GFQ,
    "bsq": BSQ,
    "bernoulli": Bernoulli,
    "ibq": IBQ,
    "opt_vq": OptVQ,
    "soft_vq": SoftVQ,
}
