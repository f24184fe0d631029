"""A canvas of VQGAN codes takes its weights from a trained tokenizer: TiTok's two stages begin so.

Yu et al. 2024, "An Image is Worth 32 Tokens for Reconstruction and Generation", arXiv 2406.07550, section 3.3.
"""

from __future__ import annotations

from torch import Tensor

from tokenizers_vis.config import ConfigError
from tokenizers_vis.decoders.canvas import Canvas, Pixels
from tokenizers_vis.decoders.conv import GridDecoder
from tokenizers_vis.decoders.vqgan_codes import VQGANCodes
from tokenizers_vis.encoders.grid import GridEncoder
from tokenizers_vis.quantizers.vq import VQ
from tokenizers_vis.tokenizer import PARTS, Tokenizer
from tokenizers_vis.weights import load_strictly


def adopt_canvas(canvas: Canvas, source: Tokenizer, name: str) -> None:
    """All weights of ``canvas``: from the source's own canvas of VQGAN codes (the second stage's from the first's,
    which also has the VQGAN's encoder), or from the source itself where that is a 2D VQGAN (the first stage's).

    name: of the source, for messages. Raises ``ConfigError`` for another source, ``CheckpointError`` for other shapes.
    """
    if not isinstance(canvas, VQGANCodes):
        raise ConfigError(
            f"init.adopt: a canvas of kind 'vqgan_codes' adopts weights, {type(canvas).__name__} does not; name canvas "
            f"in init.parts to take that of {name} as it is"
        )
    state = source.canvas.state_dict() if isinstance(source.canvas, VQGANCodes) else _of_vqgan(source, name)
    if canvas.encoder is None:
        state = {key: value for key, value in state.items() if not key.startswith("encoder.")}
    load_strictly(canvas, state, f"the canvas of {name}")


def _of_vqgan(source: Tokenizer, name: str) -> dict[str, Tensor]:
    canvas, encoder, quantizer, decoder = source.canvas, source.encoder, source.quantizer, source.decoder
    fits = (
        isinstance(canvas, Pixels)
        and canvas.span == "unit"
        and isinstance(encoder, GridEncoder)
        and isinstance(quantizer, VQ)
        and quantizer.distance == "euclidean"
        and isinstance(decoder, GridDecoder)
    )
    if not fits:
        kinds = ", ".join(str(source.config[part].get("kind")) for part in PARTS)
        raise ConfigError(
            f"init.adopt: a canvas of VQGAN codes comes from another one, or from a 2D VQGAN in MaskGIT's way: pixels "
            f"of span 'unit', encoder 'grid', quantizer 'vq' with euclidean distance, decoder 'conv'; {name} has "
            f"{kinds}"
        )
    nets = {"encoder": encoder.net, "decoder": decoder.net}
    state = {f"{part}.{key}": value for part, net in nets.items() for key, value in net.state_dict().items()}
    return {"codebook": quantizer.codebook.detach(), **state}
