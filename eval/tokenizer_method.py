"""A tokenizer as a method: pictures of any shape through ids and back, with what that costs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenizers_vis.catalogue import list_presets, preset
from tokenizers_vis.decoders.scales import cost
from tokenizers_vis.eval.memory import peak_memory
from tokenizers_vis.eval.method import Method, Reconstruction, check_images, some_of
from tokenizers_vis.eval.squares import fit_square, placement, unfit_square

if TYPE_CHECKING:
    import torch

    from tokenizers_vis.tokenizer import Tokenizer
    from tokenizers_vis.tokens import Tokens


class LazyTokenizer:
    """A tokenizer that is loaded when it is first asked for, once."""

    def __init__(self, target: str, device: str | torch.device | None = None) -> None:
        """target: as ``tv.load`` takes it. ``table`` is what is known of it beforehand: that of a preset, or empty."""
        self.target, self.device = target, device
        self.table: dict[str, Any] = preset(target) if target in list_presets() else {}
        self._loaded: Tokenizer | None = None

    def get(self) -> Tokenizer:
        """Raises ``ValueError`` as ``tv.load`` does."""
        if self._loaded is None:
            from tokenizers_vis.presets import load

            self._loaded = load(self.target, self.device)
            # From a file they come as they are first touched: that is not to count as what the first batch takes.
            for weights in self._loaded.parameters():
                weights.sum()
        return self._loaded

    def release(self) -> None:
        """Lets go of the loaded one; ``get`` loads it again."""
        self._loaded = None


class TokenizerMethod(Method):
    """A tokenizer at one number of tokens.

    Pictures of any shape are fitted into a black square of the tokenizer's size, and cut out of it again, as TokBench
    does (``squares``). Methods of one tokenizer share the loaded one.
    """

    kind = "tokenizer"

    def __init__(
        self, label: str, source: LazyTokenizer, n_tokens: int | None = None, sampling: Mapping[str, Any] | None = None
    ) -> None:
        """n_tokens: None is all. sampling: options of ``decode``, used where the decoder is no one-pass decoder."""
        self.label, self.source, self.n_tokens, self._sampling = label, source, n_tokens, dict(sampling or {})

    @property
    def sampling(self) -> dict[str, Any]:
        """The options that its decoder is called with."""
        return {} if self.source.get().decoder.one_pass else self._sampling

    def prepare(self, names: Sequence[str] = ()) -> None:
        tok = self.source.get()
        n = self.n_tokens
        if n is not None and (not 1 <= n <= tok.max_tokens or (n < tok.max_tokens and not tok.nested)):
            allowed = f"1 to {tok.max_tokens}" if tok.nested else f"{tok.max_tokens}, no fewer"
            raise ValueError(f"{self.label}: {tok.name} makes {allowed} tokens, asked for {n}")

    def reconstruct(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Reconstruction]:
        import torch
        from einops import rearrange

        from tokenizers_vis.tokens import Tokens

        check_images(images, names)
        if not images:
            return []
        self.prepare()
        tok = self.source.get()
        fitted = [fit_square(image, tok.image_size) for image in images]
        x = torch.from_numpy(rearrange(np.stack([square for square, _ in fitted]), "b h w c -> b c h w"))
        with peak_memory(tok.device) as peak:
            start = _clock(tok)
            tokens = tok.encode(x, self.n_tokens)
            encoded = _clock(tok)
            decoded = tok.decode(tokens, **self.sampling)
            done = _clock(tok)
        squares = self._squares(decoded, names)
        discrete = isinstance(tokens, Tokens)
        bits = tokens.n_tokens * (sum(map(math.log2, tok.codebook_sizes)) if discrete else tok.bits_per_token)
        nbytes = -(-tokens.n_tokens * tok.bits_per_token // 8)
        held = sum(t.numel() * t.element_size() for t in (*tok.parameters(), *tok.buffers()))
        return [
            Reconstruction(
                pixels=np.array(unfit_square(square, place)),
                nbytes=nbytes,
                bits=float(bits),
                encode_seconds=(encoded - start) / len(images),
                decode_seconds=(done - encoded) / len(images),
                ids=tokens.ids[i].cpu() if discrete else None,
                peak_bytes=None if peak.bytes is None else peak.bytes + held,
            )
            for i, (square, (_, place)) in enumerate(zip(squares, fitted, strict=True))
        ]

    def decode(self, tokens: Tokens, sizes: Sequence[tuple[int, int]], names: Sequence[str]) -> list[np.ndarray]:
        """Pictures, uint8 h w 3, of tokens that need not be those of a picture, such as perturbed ones.

        sizes: (h, w) of the pictures that were encoded; names: theirs.
        """
        tok = self.source.get()
        squares = self._squares(tok.decode(tokens, **self.sampling), names)
        places = [placement(w, h, tok.image_size) for h, w in sizes]
        return [unfit_square(square, place) for square, place in zip(squares, places, strict=True)]

    def release(self) -> None:
        self.source.release()

    def _squares(self, decoded: torch.Tensor, names: Sequence[str]) -> np.ndarray:
        """b 3 h w in [0, 1] -> b h w 3, uint8. Raises ``ValueError`` for what is not finite."""
        import torch
        from einops import rearrange

        if bad := [name for name, picture in zip(names, decoded, strict=True) if not picture.isfinite().all()]:
            dtype = self.source.get().dtype
            raise ValueError(
                f"{self.label} decodes {some_of(bad)} to NaN: its weights, or its dtype {dtype}, are at fault"
            )
        return rearrange((decoded * 255).round().to(torch.uint8), "b c h w -> b h w c").cpu().numpy()

    def describe(self) -> dict[str, Any]:
        tok = self.source.get()
        n = self.n_tokens or tok.max_tokens
        table = self.source.table
        return super().describe() | {
            "tokenizer": tok.name,
            "source": self.source.target,
            "tokens": n,
            "max_tokens": tok.max_tokens,
            "nested": tok.nested,
            "codebook_sizes": list(tok.codebook_sizes),
            "bits_per_token": tok.bits_per_token,
            "image_size": tok.image_size,
            "parameters": sum(p.numel() for p in tok.parameters()),
            "encode_passes": 1,
            "decode_passes": 1 if tok.decoder.one_pass else _flow_passes({**tok.decoder.defaults, **self.sampling}),
            "sampling": {} if tok.decoder.one_pass else {**tok.decoder.defaults, **self.sampling},
            "device": str(tok.device),
            "dtype": str(tok.dtype).removeprefix("torch."),
            "licence": table.get("licence"),
            "commercial": table.get("commercial"),
            "paper": table.get("paper"),
        }


def _flow_passes(options: Mapping[str, Any]) -> float:
    """Evaluations of the network for one picture, each weighted by its share of the picture's pixels."""
    guided = options.get("guidance", 1) != 1
    return cost(options.get("steps", 1), options.get("solver", "euler"), guided=guided)


def _clock(tok: Tokenizer) -> float:
    """Seconds, when the device has done all that it was told."""
    import torch

    if tok.device.type in ("cuda", "mps"):
        getattr(torch, tok.device.type).synchronize()
    return time.perf_counter()
