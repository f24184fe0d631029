"""Images as a transformers model takes them, and ``generate`` kept to what decodes. Needs the generate extra.

Letters: b batch, l ids of a sequence, v size of a model's vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BatchFeature, LogitsProcessor

from tokenizers_vis.catalogue import list_presets
from tokenizers_vis.files import write_atomically
from tokenizers_vis.presets import load
from tokenizers_vis.quantizers.base import check_option
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.vocabulary import Vocabulary

CONFIG = "processor_config.json"
WEIGHTS = "tokenizer.safetensors"


class TokenizerProcessor:
    """Images to ``input_ids`` and back, as transformers' processors do it.

    tok: the tokenizer.
    classes: how many classes the labels have; 0 is none. With any, every image needs a label.
    bits_per_id: cuts the bits of a token into ids of so many bits, see ``Vocabulary``.
    """

    def __init__(self, tok: Tokenizer, *, classes: int = 0, bits_per_id: int | None = None) -> None:
        self.tok = tok
        self.vocabulary = Vocabulary.of(tok, classes=classes, bits_per_id=bits_per_id)

    def __call__(
        self,
        images: Any,
        labels: int | Sequence[int] | Tensor | None = None,
        n_tokens: int | Sequence[int] | None = None,
        return_tensors: Literal["pt", "np"] = "pt",
        **encoding: Any,
    ) -> BatchFeature:
        """``input_ids`` and ``attention_mask``, both b l: ``begin [label] codes end``, padded at the end.

        images: in any form that ``tok.encode`` takes. labels: a class for all, or one each. n_tokens: None for all, one
            number, or one per image. encoding: resize and batch_size of ``tok.encode``.
        Raises ``ValueError``.
        """
        check_option(return_tensors in ("pt", "np"), "return_tensors is 'pt' or 'np'", return_tensors)
        tokens = self.tok.encode(images, n_tokens, **encoding)
        ids = self.vocabulary.encode(tokens, labels)
        data = {"input_ids": ids, "attention_mask": self.vocabulary.attention_mask(ids)}
        if return_tensors == "np":
            data = {key: value.cpu().numpy() for key, value in data.items()}
        return BatchFeature(data)

    def prompt(self, labels: int | Sequence[int] | Tensor | None = None, b: int | None = None) -> BatchFeature:
        """What ``generate`` continues into images: begin, and the labels where there are classes."""
        ids = self.vocabulary.prompt(labels, b)
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, input_ids: Tensor, **sampling: Any) -> Tensor:
        """One sequence l -> an image 3 h w; sequences b l -> b 3 h w, float32 in [0, 1].

        sampling: as ``tok.decode`` takes it. Raises ``ValueError`` for what is no sequence of whole images.
        """
        images = self.tok.decode(self.vocabulary.decode(torch.as_tensor(input_ids)), **sampling)
        return images[0] if torch.as_tensor(input_ids).ndim == 1 else images

    def batch_decode(self, input_ids: Tensor, **sampling: Any) -> Tensor:
        """Sequences b l -> images b 3 h w, as ``decode``."""
        if torch.as_tensor(input_ids).ndim != 2:
            raise ValueError(f"batch_decode takes sequences b l, got {tuple(torch.as_tensor(input_ids).shape)}")
        return self.decode(input_ids, **sampling)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask"]

    def save_pretrained(self, folder: str | Path, by_name: bool = False) -> list[str]:
        """Writes ``processor_config.json`` and the tokenizer's weights into a folder; the files that it wrote.

        by_name: keeps only the name of a preset in place of its weights. Raises ``ValueError`` where it is none.
        """
        folder, name = Path(folder), self.tok.name
        if by_name and name not in list_presets():
            raise ValueError(f"{name} is no preset, so its name alone does not find it again; leave out by_name")
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "processor_class": type(self).__name__,
            "tokenizer": name if by_name else WEIGHTS,
            "classes": self.vocabulary.classes,
            "bits_per_id": self.vocabulary.bits_per_id,
        }
        written = [folder / CONFIG] if by_name else [folder / WEIGHTS, folder / CONFIG]
        if not by_name:
            self.tok.save(folder / WEIGHTS)
        write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        return [str(path) for path in written]

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> TokenizerProcessor:
        """Reads what ``save_pretrained`` wrote. device, dtype: as ``tv.load`` takes them. Raises ``ValueError``."""
        path = Path(folder) / CONFIG
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            name, options = config["tokenizer"], {key: config[key] for key in ("classes", "bits_per_id")}
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no config of a TokenizerProcessor: {error!r}") from error
        return cls(load(Path(folder) / name if name == WEIGHTS else name, device, dtype), **options)

    def __repr__(self) -> str:
        return f"TokenizerProcessor({self.vocabulary!r})"


class LegalIds(LogitsProcessor):
    """Lets a model generate only what decodes: the right codebook at each place, end after a legal number of tokens.

    vocabulary: of the images.
    n_tokens: exactly so many tokens an image; None for any number that an image may have.
    text: ids that may stand outside of images, as in a language model with an image vocabulary; None where a sequence
        is one image: there begin comes first, and after end only pad.

    Between begin and end, what may stand at a place follows from the places since begin alone, so a batch may hold rows
    in unlike states and prompts padded on the left. Raises ``ValueError`` for an impossible n_tokens, and for scores of
    a vocabulary that is too small.
    """

    def __init__(self, vocabulary: Vocabulary, n_tokens: int | None = None, text: range | None = None) -> None:
        if n_tokens is not None and n_tokens not in vocabulary.lengths:
            allowed = f"1 to {vocabulary.max_tokens}" if vocabulary.nested else str(vocabulary.max_tokens)
            raise ValueError(f"n_tokens is {allowed} for {vocabulary.tokenizer}, or None; got {n_tokens!r}")
        if text is not None and text.start < vocabulary.stop and vocabulary.first < text.stop:
            raise ValueError(f"text and image ids overlap: {text}, and {vocabulary.first} to {vocabulary.stop - 1}")
        self.vocabulary, self.text = vocabulary, text
        self.most = vocabulary.max_tokens if n_tokens is None else n_tokens
        self.least = vocabulary.lengths.start if n_tokens is None else n_tokens
        self._table: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: b l, scores: b v -> scores with -inf where an id may not follow."""
        if scores.shape[-1] < self.vocabulary.stop:
            raise ValueError(
                f"the model has {scores.shape[-1]} ids, this vocabulary goes up to {self.vocabulary.stop - 1}; give "
                f"the model vocab_size={self.vocabulary.stop}, or extend it (tokenizers_vis.language)"
            )
        if self._table is None or self._table.shape[1] != scores.shape[1] or self._table.device != scores.device:
            self._table = self._states(scores.shape[1]).to(scores.device)
        return scores.masked_fill(~self._table[self._state_of(input_ids)], float("-inf"))

    def _states(self, v: int) -> Tensor:
        """What each state allows: s v, bool. States: m places of a token, then those named below."""
        vocabulary = self.vocabulary
        m, labels = len(vocabulary.codes), vocabulary.labels
        table = torch.zeros(m + 5, v, dtype=torch.bool)
        for place, codes in enumerate(vocabulary.codes):
            table[place, codes.start : codes.stop] = True
        code_or_end, end, label, outside, finished = range(m, m + 5)
        table[code_or_end] = table[0]
        table[[code_or_end, end], vocabulary.end] = True
        table[label, labels.start : labels.stop] = True
        table[outside, vocabulary.begin] = True
        if self.text is None:
            table[finished, vocabulary.pad] = True
        else:
            table[[outside, finished], vocabulary.begin] = True
            table[[outside, finished], self.text.start : self.text.stop] = True
        return table

    def _state_of(self, input_ids: Tensor) -> Tensor:
        """The row of the table for each sequence: b."""
        vocabulary = self.vocabulary
        m, has_label = len(vocabulary.codes), int(vocabulary.classes > 0)
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        begun = ((input_ids == vocabulary.begin) * places).amax(dim=1)  # 0 where there is none
        ended = ((input_ids == vocabulary.end) * places).amax(dim=1)
        codes = input_ids.shape[1] - begun - has_label  # -1 where the label is still to come
        tokens, place = codes // m, codes % m
        state = torch.where((place == 0) & (tokens >= self.least), m, place)
        state = torch.where(tokens >= self.most, m + 1, state)
        state = torch.where(codes < 0, m + 2, state)
        return torch.where(begun > ended, state, torch.where(ended > 0, m + 4, m + 3))
