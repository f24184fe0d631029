"""Tokenizer = canvas + encoder + quantizer + decoder.

Letters: b batch, n tokens, d width of a code, k codebooks.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.decoders.base import Decoder, DecoderLoss
from tokenizers_vis.decoders.canvas import Canvas, Resize
from tokenizers_vis.encoders.base import Encoder
from tokenizers_vis.files import write_atomically
from tokenizers_vis.images import load_image, load_images
from tokenizers_vis.latents import Latents
from tokenizers_vis.quantizers.base import Quantized, Quantizer
from tokenizers_vis.tokens import Tokens
from tokenizers_vis.weights import CheckpointError, empty_weights, load_strictly, read_safetensors

if TYPE_CHECKING:
    from tokenizers_vis.vocabulary import Vocabulary

PARTS = ("canvas", "encoder", "quantizer", "decoder")
PER_IMAGE = ("noise", "text", "seed")  # sampling options with an entry for each image; a seed may be one for all


class TrainingPass(NamedTuple):
    """What one training pass gives to the losses."""

    quantized: Quantized
    decoded: DecoderLoss
    lengths: Tensor | None


class Tokenizer(nn.Module):
    """Images to discrete tokens and back. Comes from ``tv.load``; ``from_config`` builds an untrained one.

    ``config`` is the table of plain values that rebuilds it: ``name``, one table per part, and ``codes`` where its
    tokens are those of another tokenizer.
    """

    def __init__(
        self, *, canvas: Canvas, encoder: Encoder, quantizer: Quantizer, decoder: Decoder, config: Mapping[str, Any]
    ) -> None:
        super().__init__()
        if encoder.dim != quantizer.in_dim or quantizer.dim != decoder.dim:
            raise ConfigError(
                f"encoder, quantizer and decoder must agree on the width of a code; got {encoder.dim} from the "
                f"encoder, {quantizer.in_dim} into and {quantizer.dim} out of the quantizer, "
                f"{decoder.dim} into the decoder"
            )
        if quantizer.fixed_n not in (None, encoder.max_tokens):
            raise ConfigError(
                f"the quantizer takes {quantizer.fixed_n} vectors an image, the encoder gives {encoder.max_tokens}"
            )
        if encoder.max_tokens != decoder.max_tokens:
            raise ConfigError(f"the encoder makes {encoder.max_tokens} tokens, the decoder takes {decoder.max_tokens}")
        for name, part, side in zip(("encoder", "decoder"), (encoder, decoder), canvas.sides, strict=True):
            built = getattr(part, "side", None)  # a part of one's own may be any module
            if None not in (side, built) and side != built:
                raise ConfigError(
                    f"the canvas, of {canvas.image_size} px, is {side} x {side} where the {name} works, which is built "
                    f"for {built} x {built}: change the size of one (or the patch of a decoder of codes)"
                )
        self.canvas, self.encoder, self.quantizer, self.decoder = canvas, encoder, quantizer, decoder
        self.config = dict(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Tokenizer:
        """An untrained tokenizer from a preset table. Raises ``ConfigError``."""
        return cls._build(config, nullcontext)

    @classmethod
    def _build(cls, config: Mapping[str, Any], context: Callable[[], AbstractContextManager[None]]) -> Tokenizer:
        """Builds all parts but the quantizer inside a context."""
        missing = [part for part in ("name", *PARTS) if part not in config]
        if missing:
            raise ConfigError(f"a tokenizer's config needs {', '.join(missing)}")
        types = {"canvas": Canvas, "encoder": Encoder, "quantizer": Quantizer, "decoder": Decoder}
        parts = {}
        for part, kind in types.items():
            with nullcontext() if part == "quantizer" else context():
                parts[part] = build(kind, config[part], part)
        return cls(**parts, config={key: config[key] for key in ("name", "codes", *PARTS) if key in config})

    @classmethod
    def from_state(cls, config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> Tokenizer:
        """A tokenizer whose weights are ``state``, taken as they are and not copied; ``source`` names them in errors.

        Raises ``ConfigError`` or ``CheckpointError``.
        """
        tokenizer = cls._build(config, empty_weights)
        load_strictly(tokenizer, state, source)
        return tokenizer

    # What it is

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def codes(self) -> str:
        """The name its tokens carry: its own, or that of the tokenizer whose encoder and codebook it shares."""
        return self.config.get("codes", self.name)

    @property
    def image_size(self) -> int:
        """Height and width in pixels of what ``decode`` gives."""
        return self.canvas.image_size

    @property
    def max_tokens(self) -> int:
        return self.quantizer.id_count(self.encoder.max_tokens)

    @property
    def continuous(self) -> bool:
        """Whether tokens are vectors (``Latents``) and not ids: there is no codebook, or the ids do not hold all."""
        return not self.quantizer.discrete

    @property
    def nested(self) -> bool:
        """Whether a prefix of the tokens is a code of its own."""
        return self.encoder.nested

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return self.quantizer.codebook_sizes

    @property
    def vocab_size(self) -> int:
        """Distinct ids of ``Tokens.to_sequence()``; ids from here on are free for special tokens."""
        return sum(self.codebook_sizes)

    @property
    def vocabulary(self) -> Vocabulary:
        """Which integer means what in a sequence of its ids. ``Vocabulary.of`` adds classes, a mask, an offset."""
        from tokenizers_vis.vocabulary import Vocabulary

        return Vocabulary.of(self)

    @property
    def bits_per_token(self) -> int:
        """Bits that one token takes in a file; of a continuous one, in half precision."""
        if self.continuous:
            return 16 * self.quantizer.dim
        return sum((size - 1).bit_length() for size in self.codebook_sizes)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the encoder and decoder; quantizing is always float32."""
        return next(self.encoder.parameters()).dtype

    # Images -> tokens -> images

    @torch.no_grad()
    def encode(
        self,
        images: Any,
        n_tokens: int | Sequence[int] | None = None,
        *,
        resize: Resize | None = None,
        batch_size: int = 32,
    ) -> Tokens | Latents:
        """Images of any size -> ``Tokens`` with ids b n k; ``Latents`` b n d from a continuous tokenizer.

        images: path, PIL, uint8 array h w 3, tensor 3 h w or b 3 h w (uint8, or float in [0, 1]), a list.
        n_tokens: None for all, one number, or one per image; fewer than all needs a nested tokenizer.
        resize: "crop", "pad" or "exact"; None for the tokenizer's own.
        batch_size: images in memory at a time; a list of paths is read as it is encoded.

        Raises ``ValueError`` (``ImageError`` for an image that cannot be read).
        """
        _check_batch_size(batch_size)
        if isinstance(images, (list, tuple)):
            items = [part for item in images for part in (item if getattr(item, "ndim", 3) == 4 else [item])]
        else:
            items = load_images(images)
        if not items:
            raise ValueError("there are no images to encode: the list is empty")
        lengths = self._lengths(n_tokens, len(items))
        n = max(lengths) if self.nested else self.encoder.max_tokens
        found = []
        with _at_rest(self.encoder, self.quantizer):
            for batch in _chunks(items, batch_size):
                x = torch.stack([self.canvas.see(load_image(item), resize).to(self.device) for item in batch])
                z = self.encoder(self.canvas.read(x).to(self.dtype), n)
                quantized = self.quantizer(z)
                found.append(quantized.codes if self.continuous else quantized.ids)
        if self.continuous:
            return Latents(torch.cat(found), self.codes)
        all_ids = torch.cat(found)
        ragged = torch.tensor(lengths, device=self.device)
        if min(lengths) < n:
            past = torch.arange(n, device=self.device) >= ragged[:, None]
            all_ids = all_ids.masked_fill(past[..., None], -1)
        return Tokens(
            all_ids, codebook_sizes=self.codebook_sizes, tokenizer=self.codes, lengths=ragged, nested=self.nested
        )

    @torch.no_grad()
    def decode(self, tokens: Tokens | Latents | Tensor, *, batch_size: int = 32, **sampling: Any) -> Tensor:
        """Tokens, or ids b n k (b n where k is 1), or Latents -> images b 3 h w, float32 in [0, 1].

        sampling: nothing for a one-pass decoder (but text, b t w, for one that reads text). For a flow decoder steps,
            guidance (1 is none, or an object), guidance_kind, solver, schedule; seed (one, or one for each image),
            generator or noise (b c h w in the decoder's own space); callback(step, steps, estimate), which hears of
            each batch anew. docs/decoders.md tells of all.

        Raises ``ValueError`` for tokens of another tokenizer, ids out of range, or a length it cannot decode.
        """
        _check_batch_size(batch_size)
        tokens = self._own(tokens)
        sampling = {key: value for key, value in sampling.items() if key not in PER_IMAGE or value is not None}
        many = {key for key, value in sampling.items() if hasattr(value, "__getitem__") and getattr(value, "ndim", 1)}
        whole = {key: sampling.pop(key) for key in PER_IMAGE if key in many}
        for key, value in whole.items():
            if len(value) != len(tokens):
                raise ValueError(f"{key} is for {len(value)} images, tokens are {len(tokens)}")
        pictures = []
        for start in range(0, len(tokens), batch_size):
            part = tokens[start : start + batch_size].to(self.device)
            options = sampling | {key: value[start : start + batch_size] for key, value in whole.items()}
            if isinstance(part, Latents):
                codes, lengths = part.values.float(), None
            else:
                codes, lengths = self.quantizer.lookup(part.ids.clamp_min(0)), part.lengths
            pictures.append(self.canvas.paint(self.decoder(codes, lengths, **options)).float().clamp(0, 1))
        return torch.cat(pictures)

    def reconstruct(
        self, images: Any, n_tokens: int | Sequence[int] | None = None, *, resize: Resize | None = None, **sampling: Any
    ) -> Tensor:
        """``decode(encode(images, n_tokens))``: b 3 h w, float32 in [0, 1]."""
        return self.decode(self.encode(images, n_tokens, resize=resize), **sampling)

    def tokens_from_sequence(self, ids: Tensor, pad: int | None = None) -> Tokens:
        """The inverse of ``Tokens.to_sequence``: int64 b (n k), or (n k) for one image. Raises ``ValueError``."""
        return Tokens.from_sequence(ids, self.codebook_sizes, self.codes, pad=pad, nested=self.nested)

    # Training and files

    def training_pass(self, images: Tensor) -> TrainingPass:
        """images: b 3 h w, floats in [0, 1], already of ``image_size``. Draws lengths from the encoder's policy.

        A causal encoder makes the longest of these, another one all its tokens, and all are quantized: only what the
        decoder is told of them is short (One-D-Piece's tail drop).
        """
        encoder = self.encoder
        lengths = encoder.lengths.sample(len(images), encoder.max_tokens)
        n = encoder.max_tokens if lengths is None else int(lengths.max())
        x, target = self.canvas.views(images)
        quantized = self.quantizer(encoder(x, n if encoder.causal else encoder.max_tokens))
        ragged = None if lengths is None or bool((lengths == n).all()) else lengths.to(images.device)
        decoded = self.decoder.loss(quantized.codes[:, :n], target, ragged)
        return TrainingPass(quantized, decoded, lengths)

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes one safetensors file with the config as JSON in its header.

        dtype: of the stored floats (torch.float16 halves the file); None keeps each as it is. A tensor that holds
            larger numbers than the dtype can, such as the counts of a long training, is kept as it is too.
        The file appears whole or not at all.
        """
        from safetensors.torch import save_file

        def stored(value: Tensor) -> Tensor:
            if dtype and value.is_floating_point() and value.abs().amax() <= torch.finfo(dtype).max:
                value = value.to(dtype)
            # Cloned, because safetensors refuses tensors that share memory, as levels of a residual quantizer may.
            return value.detach().cpu().clone().contiguous()

        state = {key: stored(value) for key, value in self.state_dict().items()}
        header = {"format": "tokenizers_vis", "version": "1", "config": json.dumps(self.config)}
        write_atomically(Path(path), lambda target: save_file(state, target, metadata=header))

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Reads what ``save`` wrote, in float32. Raises ``CheckpointError``."""
        state, header = read_safetensors(path)
        if header.get("format") != "tokenizers_vis":
            raise CheckpointError(f"{path} is no tokenizers_vis checkpoint: its header does not say so")
        if header.get("version") != "1":
            raise CheckpointError(f"{path} is of version {header.get('version')}, this library reads version 1")
        try:
            return cls.from_state(json.loads(header["config"]), state, str(path))
        except KeyError as error:
            raise CheckpointError(f"{path} has no config in its header; save the tokenizer again") from error
        except CheckpointError:
            raise
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} has a config that cannot be built here: {error}") from error

    # How it shows itself

    def __repr__(self) -> str:
        k = len(self.codebook_sizes)
        books = f"{k} codebook{'s' * (k > 1)} of {', '.join(map(str, sorted(set(self.codebook_sizes))))}"
        books = f"{self.quantizer.dim} numbers each" if self.continuous else books
        order = "1 to " if self.nested else ""
        millions = sum(p.numel() for p in self.parameters()) / 1e6
        return (
            f"Tokenizer({self.name}: {order}{self.max_tokens} tokens, {books}, {self.image_size} px, "
            f"{millions:.1f} M parameters, {str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    def _repr_html_(self) -> str:
        facts = {key: html.escape(value) for key, value in self.describe().items()}
        rows = "".join(f"<tr><td>{key}</td><td><b>{value}</b></td></tr>" for key, value in facts.items())
        return f"<table><caption><b>{html.escape(self.name)}</b></caption>{rows}</table>"

    def describe(self) -> dict[str, str]:
        """What a person wants to know, as pairs of words."""
        bits = self.bits_per_token * self.max_tokens
        parts = (self.encoder, self.quantizer, self.decoder)
        return {
            "tokens": f"1 to {self.max_tokens}, ordered" if self.nested else f"{self.max_tokens}",
            "codebooks": " + ".join(f"{size:,}" for size in self.codebook_sizes) or "none, vectors",
            "bits per token": str(self.bits_per_token),
            "bytes per image": f"{-(-bits // 8)} at {self.max_tokens} tokens",
            "bits per pixel": f"{bits / self.image_size**2:.3f} at {self.max_tokens} tokens",
            "image size": f"{self.image_size} px, resize={self.canvas.resize!r}",
            "encoder, quantizer, decoder": ", ".join(self.config[part]["kind"] for part in PARTS[1:]),
            "parameters": " + ".join(f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f} M" for part in parts),
            "runs on": f"{self.device}, {str(self.dtype).removeprefix('torch.')}",
        }

    def _lengths(self, n_tokens: int | Sequence[int] | None, b: int) -> list[int]:
        if n_tokens is None:
            return [self.max_tokens] * b
        n_tokens = n_tokens.tolist() if hasattr(n_tokens, "tolist") else n_tokens  # an array, or a number of one
        many = not isinstance(n_tokens, (int, str)) and hasattr(n_tokens, "__len__")
        lengths = list(n_tokens) if many else [n_tokens] * b
        if len(lengths) != b:
            raise ValueError(f"n_tokens is one number or one per image: got {len(lengths)} for {b} images")
        lengths = [n.item() if isinstance(n, Tensor) else n for n in lengths]
        for n in lengths:
            if isinstance(n, bool) or not hasattr(n, "__index__") or not 1 <= n <= self.max_tokens:
                raise ValueError(f"n_tokens is a whole number from 1 to {self.max_tokens}, got {n!r}")
            if n != self.max_tokens and not self.nested:
                from tokenizers_vis.catalogue import nested_presets

                raise ValueError(
                    f"{self.name} always makes {self.max_tokens} tokens; n_tokens={n} needs a nested tokenizer "
                    f"such as {', '.join(nested_presets())}"
                )
        return [int(n) for n in lengths]

    def _own(self, tokens: Tokens | Latents | Tensor) -> Tokens | Latents:
        """``tokens`` as Tokens (or Latents) of this tokenizer, or ``ValueError``."""
        if self.continuous:
            if isinstance(tokens, Tensor):
                tokens = Latents(tokens, self.codes)
            if not isinstance(tokens, Latents) or tokens.tokenizer != self.codes:
                raise ValueError(f"{self.name} decodes its own Latents (its tokens are continuous), got {tokens!r}")
            n, d = tokens.values.shape[1:]
            if (n, d) != (self.max_tokens, self.quantizer.dim) and not (self.nested and n < self.max_tokens):
                raise ValueError(
                    f"{self.name} has {self.max_tokens} tokens of {self.quantizer.dim} numbers, got {n} of {d}"
                )
            return tokens
        if isinstance(tokens, Tensor):
            tokens = Tokens(tokens, codebook_sizes=self.codebook_sizes, tokenizer=self.codes, nested=self.nested)
        if not isinstance(tokens, Tokens):
            raise ValueError(f"decode takes Tokens or a tensor of ids b n k, got {type(tokens).__name__}")
        if tokens.tokenizer != self.codes or tokens.codebook_sizes != self.codebook_sizes:
            raise ValueError(
                f"these tokens are of {tokens.tokenizer!r} with codebooks {tokens.codebook_sizes}; this tokenizer is "
                f"{self.name!r}, which decodes {self.codes!r} with {self.codebook_sizes}. "
                f"Decode them with the tokenizer that made them"
            )
        n = tokens.ids.shape[1]
        if n > self.max_tokens:
            raise ValueError(f"{self.name} has at most {self.max_tokens} tokens an image, got {n}")
        if not self.nested and (n < self.max_tokens or tokens.lengths is not None):
            raise ValueError(f"{self.name} is not nested: it decodes {self.max_tokens} tokens an image, no fewer")
        return tokens


@contextmanager
def _at_rest(*parts: nn.Module) -> Iterator[None]:
    """In eval mode for the block: in training, running averages and codebooks learn from all that they are shown."""
    modes = {module: module.training for part in parts for module in part.modules()}
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _check_batch_size(batch_size: int) -> None:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size is a whole number from 1, got {batch_size!r}")


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
