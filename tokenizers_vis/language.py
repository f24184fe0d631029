"""A text model that also reads and writes images: image ids after its own, with markers around each image.

The recipe of SEED-LLaMA (https://arxiv.org/abs/2310.01218): ids of an image tokenizer appended to the vocabulary, and
next-word prediction on interleaved text and images. Needs transformers (generate extra).

Letters: v ids, d width of an embedding, c width of a code, l ids of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenizers_vis.processor import LegalIds
from tokenizers_vis.quantizers.base import check_option
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.tokens import Tokens
from tokenizers_vis.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase

_SPREAD = 0.1  # how far new rows start from the mean of the text's, in standard deviations of these
_CHUNK = 65536  # codes looked up at a time


@dataclass(frozen=True, eq=False)
class Mixed:
    """Text and images as one stream of ids. ``extend_vocabulary`` makes it.

    text_tokenizer: of transformers. tok: of the images. vocabulary: of the images, its ``first`` after the text's ids.
    """

    text_tokenizer: PreTrainedTokenizerBase
    tok: Tokenizer
    vocabulary: Vocabulary

    @property
    def text(self) -> range:
        """The ids of the text."""
        return range(len(self.text_tokenizer))

    def encode(self, parts: Sequence[str | Tokens | Any], n_tokens: int | None = None) -> Tensor:
        """parts, in their order, as one stream: l, int64.

        A ``str`` is text, ``Tokens`` are one image, and anything else is an image in a form that ``tok.encode`` takes;
        a file is a ``Path``. Text is encoded without the special tokens that its tokenizer may add; write them where
        they belong. n_tokens: of each image that is not Tokens yet.
        Raises ``ValueError``.
        """
        if isinstance(parts, (str, Tensor, Tokens)) or not isinstance(parts, Sequence) or not parts:
            raise ValueError(f"encode takes a list of texts and images, got {type(parts).__name__}")
        pieces = []
        for part in parts:
            if isinstance(part, str):
                ids = self.text_tokenizer(part, add_special_tokens=False)["input_ids"]
                pieces.append(torch.tensor(ids, dtype=torch.int64))
                continue
            tokens = part if isinstance(part, Tokens) else self.tok.encode(part, n_tokens)
            if len(tokens) != 1:
                raise ValueError(f"a part is one image, got {len(tokens)}; list them one by one")
            pieces.append(self.vocabulary.encode(tokens)[0].cpu())
        return torch.cat(pieces)

    def batch(
        self,
        rows: Sequence[Sequence[str | Tokens | Any]],
        n_tokens: int | None = None,
        padding_side: Literal["left", "right"] = "right",
    ) -> BatchFeature:
        """Several streams as ``input_ids`` and ``attention_mask``, both b l. To generate, pad on the left."""
        from torch.nn.utils.rnn import pad_sequence
        from transformers import BatchFeature

        streams = [self.encode(parts, n_tokens) for parts in rows]
        if not streams:
            raise ValueError("a batch holds at least one stream, got none")
        ids = pad_sequence(streams, True, self.vocabulary.pad, padding_side)
        return BatchFeature({"input_ids": ids, "attention_mask": self.vocabulary.attention_mask(ids)})

    def decode(self, ids: Tensor) -> list[str | Tokens]:
        """One stream, l, as texts and images in turn; pad at either side is left out, neighbouring texts are one.

        An image that the stream breaks off in counts where it may have so many tokens. Raises ``ValueError`` for an
        image that is not whole, and for an image id outside of an image.
        """
        ids = torch.as_tensor(ids).cpu()
        if ids.ndim != 1 or ids.is_floating_point():
            raise ValueError(f"decode takes one stream of ids, l; got {tuple(ids.shape)} {ids.dtype}")
        kept = (ids != self.vocabulary.pad).nonzero().flatten().tolist()
        place, stop = (kept[0], kept[-1] + 1) if kept else (0, 0)
        stream, parts = ids.tolist(), []
        while place < stop:
            inside = stream[place] == self.vocabulary.begin
            closing = self.vocabulary.end if inside else self.vocabulary.begin
            until = stream.index(closing, place, stop) + inside if closing in stream[place:stop] else stop
            parts.append(self._image(ids, place, until) if inside else self._text(stream, place, until))
            place = until
        return parts

    def legal_ids(self, n_tokens: int | None = None) -> LegalIds:
        """A logits processor for ``generate``: text, and whole images of ``n_tokens`` tokens (None: of any number)."""
        return LegalIds(self.vocabulary, n_tokens, self.text)

    def _image(self, ids: Tensor, start: int, stop: int) -> Tokens:
        try:
            return self.vocabulary.decode(ids[start:stop])
        except ValueError as error:
            raise ValueError(f"the image that begins at place {start}: {error}") from error

    def _text(self, stream: list[int], start: int, stop: int) -> str:
        for place in range(start, stop):
            if stream[place] not in self.text:
                raise ValueError(
                    f"id {stream[place]} at place {place} is outside of an image, where ids are text, "
                    f"0 to {self.text.stop - 1}, or {self.vocabulary.begin}, which begins an image"
                )
        return self.text_tokenizer.decode(stream[start:stop], clean_up_tokenization_spaces=False)


def extend_vocabulary(
    llm: PreTrainedModel,
    text_tokenizer: PreTrainedTokenizerBase,
    tok: Tokenizer,
    *,
    init: Literal["mean", "codebook"] = "mean",
    bits_per_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Mixed:
    """Gives a causal language model, in place, rows for the image ids of ``tok``, and what encodes and decodes for it.

    llm: of transformers, its embeddings tied or not. The new ids come after all its rows, also those that its text
        tokenizer leaves unused. ``llm.config.image_vocabulary`` keeps what was added: a model that was saved and loaded
        again is not extended twice.
    init: "mean" starts new rows near the mean of the text's, which changes what the model says of text least.
        "codebook" starts the input rows as a random projection of the codes, with the text's mean and deviation, so
        that codes that are alike start alike; output rows, where they are others, still start at the mean.
    bits_per_id: cuts the bits of a token into ids of so many bits, see ``Vocabulary``.
    generator: of the random numbers, on the CPU; torch's global one when None.

    Raises ``ValueError``, also for a model that was extended for another tokenizer.
    """
    check_option(init in ("mean", "codebook"), "init is 'mean' or 'codebook'", init)
    known = getattr(llm.config, "image_vocabulary", None)
    rows = llm.get_input_embeddings().num_embeddings
    if len(text_tokenizer) > (known["first"] if known else rows):
        raise ValueError(
            f"the text tokenizer has {len(text_tokenizer)} ids, the model {rows} rows; resize the model for it first"
        )
    vocabulary = Vocabulary.of(tok, first=known["first"] if known else rows, bits_per_id=bits_per_id)
    facts = {
        "first": vocabulary.first,
        "tokenizer": vocabulary.tokenizer,
        "codebook_sizes": list(vocabulary.codebook_sizes),
        "bits_per_id": bits_per_id,
    }
    if known:
        if known != facts:
            raise ValueError(f"this model was extended for {known}, not for {facts}; load the text model anew")
        return Mixed(text_tokenizer, tok, vocabulary)

    codes = _code_features(tok, vocabulary) if init == "codebook" else None
    llm.resize_token_embeddings(vocabulary.stop, mean_resizing=False)
    table, out = llm.get_input_embeddings().weight, llm.get_output_embeddings().weight
    with torch.no_grad():
        if out is not table:
            _fill(out, vocabulary, None, generator)
        _fill(table, vocabulary, codes, generator)
    llm.config.image_vocabulary = facts
    return Mixed(text_tokenizer, tok, vocabulary)


def _fill(table: Tensor, vocabulary: Vocabulary, codes: Tensor | None, generator: torch.Generator | None) -> None:
    """Writes the new rows of a table v d, in place. codes: v c, standardized, for the first of the new rows."""
    text = table[: vocabulary.first].float()
    mean, deviation = text.mean(dim=0), text.std(dim=0)
    rows = _SPREAD * torch.randn(vocabulary.total, table.shape[1], generator=generator)
    if codes is not None:
        rows[: len(codes)] = codes @ torch.randn(codes.shape[1], table.shape[1], generator=generator)
    table[vocabulary.first :] = (mean + deviation * rows.to(table.device)).to(table.dtype)


def _code_features(tok: Tokenizer, vocabulary: Vocabulary) -> Tensor:
    """What each image id means to the decoder: v c, on the CPU; for each codebook of mean 0 and mean square length 1.

    A codebook's ids are looked up with those of the other codebooks at 0, which its mean takes off again.
    """
    if vocabulary.bits_per_id is not None or tok.quantizer.fixed_n is not None:
        raise ValueError(f"init='codebook' needs one code for each id, which {tok.name} has not so; take init='mean'")
    features = []
    for j, size in enumerate(tok.codebook_sizes):
        ids = torch.zeros(1, size, len(tok.codebook_sizes), dtype=torch.int64, device=tok.device)
        ids[0, :, j] = torch.arange(size, device=tok.device)
        with torch.no_grad():
            codes = torch.cat([tok.quantizer.lookup(part)[0] for part in ids.split(_CHUNK, dim=1)]).float().cpu()
        codes = codes - codes.mean(dim=0)
        features.append(codes / codes.square().sum(dim=1).mean().sqrt().clamp_min(1e-12))
    return torch.cat(features)
