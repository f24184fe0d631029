"""The text that TA-TiTok's decoder reads: the last hidden states of CLIP's text encoder, one vector per text token.

Radford et al. 2021, arXiv 2103.00020; Kim et al. 2025, arXiv 2501.07730. Needs the extra ``text``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

MODEL, WEIGHTS = "ViT-L-14-336", "openai"


@torch.no_grad()
def clip_text(texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
    """Texts -> b 77 768, float32, of all tokens, after the last norm and not projected.

    TA-TiTok's numbers are for "A photo of a {class}." The weights are downloaded once. Raises ``ValueError`` when
    ``open_clip`` is not installed, or for anything but texts.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"texts are a list of strings, one for each image, got {texts!r}")
    model, tokenize = _model(torch.device(device))
    return hidden_states(model, tokenize(list(texts)).to(device))


def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """What the last norm of an open_clip model's text encoder gives for text ids b t: b t w, float32."""
    # Taken where it comes out: how the layers before it order their axes changed between versions of open_clip.
    found: list[Tensor] = []
    handle = model.ln_final.register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        model.encode_text(ids)
    finally:
        handle.remove()
    return found[0].float()


@cache
def _model(device: torch.device) -> tuple[Any, Any]:
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(
            "texts become vectors by open_clip, which is not installed: pip install 'tokenizers-vis[text]'; or hand in "
            "the vectors, floats b 77 768"
        ) from error
    model, _, _ = open_clip.create_model_and_transforms(MODEL, pretrained=WEIGHTS, device=device)
    model.visual = None  # its weights are the larger half
    return model.eval().requires_grad_(False), open_clip.get_tokenizer(MODEL)
