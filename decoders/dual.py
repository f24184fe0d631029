"""A decoder of pictures that also tells a teacher's features from parts of the codes.

FQGAN (Bai et al. 2024, arXiv 2411.16681): all of a code becomes pixels, and its semantic factors foretell DINO's and
CLIP's features. TokenFlow (Qu et al. 2024, arXiv 2412.03069): the last numbers of a code become pixels, the first
become CLIP's or SigLIP's features.

Letters: b batch, n codes of the grid in raster order, d width of a code, w width of a feature.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.decoders.base import Decoder, DecoderLoss
from tokenizers_vis.decoders.conv import GridDecoder
from tokenizers_vis.decoders.vision import Blocks, resized


class FeatureHead(nn.Module):
    """Codes b n d -> features b m w of a teacher, by a small transformer over a class token and the grid.

    start, dim: it sees the numbers ``start`` to ``start + dim`` of a code.
    grid: side of the grid of codes. positions: side of the grid that its positions were learned on; 0 is ``grid``.
    width, depth, heads: of the transformer. out: w.

    style        "fqgan"                                   "tokenflow"
    in           Linear, ReLU, Linear, and a layer norm    Linear
    out          as they are, so out is width              Linear, Tanh, Linear
    m            1 + n, the class token's feature first    n
    norms' eps   1e-5                                      1e-6
    """

    def __init__(
        self,
        *,
        dim: int,
        grid: int,
        width: int,
        heads: int,
        out: int,
        start: int = 0,
        positions: int = 0,
        depth: int = 3,
        style: Literal["fqgan", "tokenflow"] = "fqgan",
    ) -> None:
        super().__init__()
        if style == "fqgan" and out != width:
            raise ValueError(f"style 'fqgan' gives features as wide as its transformer, {width}; got out {out}")
        fqgan = style == "fqgan"
        self.start, self.dim, self.grid, self.style = start, dim, grid, style
        eps = 1e-5 if fqgan else 1e-6
        self.read = (
            nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width)) if fqgan else nn.Linear(dim, width)
        )
        self.class_token = nn.Parameter(torch.randn(1, width) * width**-0.5)
        self.positions = nn.Parameter(torch.randn(1 + (positions or grid) ** 2, width) * width**-0.5)
        self.norm_in = nn.LayerNorm(width, eps=eps) if fqgan else nn.Identity()
        self.transformer = Blocks(width, depth, heads, hidden=4 * width, gelu="exact", eps=eps)
        self.norm_out = nn.LayerNorm(width, eps=eps)
        self.write = (
            nn.Identity() if fqgan else nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))
        )

    def forward(self, codes: Tensor) -> Tensor:
        seen = codes[..., self.start : self.start + self.dim].to(self.class_token.dtype)
        first = self.class_token.expand(len(codes), -1, -1)
        x = torch.cat([first, self.read(seen)], dim=1) + resized(self.positions, self.grid)
        x = self.norm_out(self.transformer(self.norm_in(x)))
        return self.write(x if self.style == "fqgan" else x[:, 1:])


class DualDecoder(Decoder):
    """dim: width of a code. size: height and width of the canvas; a picture of another size is resized, bicubic.

    pixels: paints the picture from the last ``pixels.dim`` numbers of each code. heads: what ``features`` gives.
    """

    one_pass = True

    def __init__(self, *, dim: int, size: int, pixels: GridDecoder, heads: tuple[FeatureHead, ...] = ()) -> None:
        super().__init__()
        for what, end in [("pixels", pixels.dim), *(("heads", head.start + head.dim) for head in heads)]:
            if end > dim:
                raise ValueError(f"a code has dim {dim} numbers, and {what} would see {end}")
        if any(head.grid != pixels.grid for head in heads):
            raise ValueError(f"heads see the grid of the pixels, of side {pixels.grid}; got {[h.grid for h in heads]}")
        self.dim, self.side, self.max_tokens = dim, size, pixels.max_tokens
        self.pixels = pixels
        self.heads = nn.ModuleList(heads)

    def forward(self, codes: Tensor, lengths: Tensor | None = None, **sampling: Any) -> Tensor:
        self.check_codes(codes)
        y = self.pixels(codes[..., -self.pixels.dim :], lengths, **sampling)
        if y.shape[-1] != self.side:
            y = F.interpolate(y, size=(self.side, self.side), mode="bicubic")
        return y

    def features(self, codes: Tensor) -> tuple[Tensor, ...]:
        """Codes b n d, of a whole grid -> what each head tells from them, b m w."""
        self.check_codes(codes)
        if codes.shape[1] != self.max_tokens:
            raise ValueError(f"features are those of a whole grid, of {self.max_tokens} codes; got {codes.shape[1]}")
        return tuple(head(codes) for head in self.heads)

    def loss(self, codes: Tensor, target: Tensor, lengths: Tensor | None = None) -> DecoderLoss:
        estimate = self(codes, lengths).float()
        return DecoderLoss(self.pixels.objective(estimate, target.float()), estimate, target.new_ones(len(target)))
