"""Models of token sequences: what a generator draws from. One idea, one file."""

from __future__ import annotations

from tokenizers_vis.generators.base import TokenModel
from tokenizers_vis.generators.causal import Causal
from tokenizers_vis.generators.levels import Levels
from tokenizers_vis.generators.masked import Masked
from tokenizers_vis.generators.random_order import RandomOrder

MODELS: dict[str, type[TokenModel]] = {
    "causal": Causal,
    "random_order": RandomOrder,
    "masked": Masked,
    "levels": Levels,
}
