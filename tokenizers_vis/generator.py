"""Generator = a model of token sequences, and whose tokens they are: class labels in, ``Tokens`` out.

Letters: b batch, n tokens, k codebooks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.config import ConfigError, build, did_you_mean
from tokenizers_vis.files import write_atomically
from tokenizers_vis.generators.base import Space, TokenModel
from tokenizers_vis.generators.sampling import Sampling, uniforms
from tokenizers_vis.presets import load, usable_device
from tokenizers_vis.token_shards import codes_hash, makes
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.tokens import Tokens
from tokenizers_vis.weights import CheckpointError, empty_weights, load_strictly, read_safetensors

if TYPE_CHECKING:
    from tokenizers_vis.generators.speculative import Relaxation, Speculated

FORMAT = "tokenizers_vis.generator"
FILE = "generator.safetensors"
FOLDER = Path(__file__).parent / "generators"
Label = int | str | None
_KEYS = ("name", "tokenizer", "hash", "codebook_sizes", "nested", "max_tokens", "classes", "class_names", "model")


def load_generator(
    name: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Generator:
    """A trained generator, ready to sample from.

    name: one that comes with the library, a file (.safetensors), or a folder that holds ``generator.safetensors``, as a
        training run leaves it.
    device: None is the best at hand (cuda, mps, cpu). dtype: None is float32.

    It comes in eval mode. Raises ``ValueError`` (``CheckpointError`` for a file that is missing or does not fit).
    """
    target, path = usable_device(device), Path(name)
    if path.is_dir():
        path = path / FILE
    elif not path.is_file() and path.suffix != ".safetensors":
        known = list_generators()
        if str(name) not in known:
            raise CheckpointError(
                f"there is no generator {str(name)!r}.{did_you_mean(name, known)} There are: "
                f"{', '.join(known) or 'none'}; or give a file, or the folder of a training run"
            )
        path = FOLDER / f"{name}.safetensors"
    generator = Generator.from_file(path).eval().requires_grad_(False).to(target)
    return generator if dtype is None else generator.to(dtype)


def list_generators() -> list[str]:
    """The names of the generators that come with the library."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


class Generator(nn.Module):
    """Draws tokens. Comes from ``tv.load_generator``; ``from_config`` builds an untrained one.

    ``config`` is the table of plain values that rebuilds it:
    name: its own. tokenizer, hash, codebook_sizes, nested, max_tokens: of whose tokens it draws (``codes_hash``).
    classes: how many. class_names: in the order of their numbers, or ().
    model: table of a ``TokenModel``: kind, backbone, codes and what else the kind takes.
    sampling: options that ``sample`` takes where a caller does not say otherwise.
    """

    def __init__(self, *, model: TokenModel, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.config = model, dict(config)
        self._options({})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Generator:
        """An untrained generator. Raises ``ConfigError``."""
        return cls._build(config, nullcontext)

    @classmethod
    def _build(cls, config: Mapping[str, Any], context: Callable[[], AbstractContextManager[None]]) -> Generator:
        known = (*_KEYS, "sampling")
        if wrong := [key for key in config if key not in known]:
            raise ConfigError(f"a generator has no {wrong[0]!r}.{did_you_mean(wrong[0], known)} It takes: {known}")
        if missing := [key for key in _KEYS if key not in config]:
            raise ConfigError(f"a generator's config needs {', '.join(missing)}")
        if len(config["class_names"]) not in (0, config["classes"]):
            raise ConfigError(f"{config['classes']} classes have {len(config['class_names'])} names")
        space = build(Space, {key: config[key] for key in ("codebook_sizes", "max_tokens", "classes")})
        table = dict(config["model"])
        backbone = table.get("backbone")
        if not isinstance(backbone, Mapping) or "width" not in backbone:
            raise ConfigError("model.backbone is a table with width, depth and heads")
        own = {"width": backbone["width"], "codebook_sizes": space.codebook_sizes}
        table["codes"] = {"kind": "table", **table.get("codes", {}), **own}
        with context():
            model = build(TokenModel, {**table, "space": space}, "model")
        return cls(model=model, config={"sampling": {}, **config})

    # What it is

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def tokenizer(self) -> str:
        """The name that its tokens carry."""
        return self.config["tokenizer"]

    @property
    def hash(self) -> str:
        """Of the tokenizer whose ids it was trained on: ``token_shards.codes_hash``."""
        return self.config["hash"]

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return self.model.space.codebook_sizes

    @property
    def max_tokens(self) -> int:
        return self.model.space.max_tokens

    @property
    def nested(self) -> bool:
        """Whether fewer tokens than all are an image."""
        return self.config["nested"]

    @property
    def classes(self) -> int:
        """How many classes; labels are from 0 to below it."""
        return self.model.space.classes

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.config["class_names"])

    @property
    def device(self) -> torch.device:
        return self.model.places.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.places.dtype

    # Sampling

    @torch.no_grad()
    def sample(
        self,
        labels: Label | Sequence[Label] | Tensor,
        n_tokens: int | None = None,
        *,
        seed: int | Sequence[int] = 0,
        prefix: Tokens | None = None,
        batch_size: int = 64,
        **sampling: Any,
    ) -> Tokens:
        """Draws the tokens of an image for each label.

        labels: one or several, each a number from 0, a class's name, or None for no class.
        n_tokens: None is all; fewer needs a nested tokenizer, and with the same seed is a prefix of the same image.
        seed: sample i is drawn with seed + i, or with the i-th of several. It depends on nothing else: not on the other
            samples, not on batch_size, not on the device (but for rounding, where two ids are equally likely).
        prefix: tokens to go on from, one image for each label, or one for all.
        sampling: ``temperature``, ``top_k``, ``top_p``, ``guidance`` (a scale, 1 is none, or a schedule of
            ``generators.guidance``, or its table); ``steps`` and ``choice_temperature`` of a masked generator.

        Raises ``ValueError``.
        """
        options = self._options(sampling)
        rows = self.label_rows(labels)
        n = self._length(n_tokens)
        seeds = self._seeds(seed, len(rows))
        given = None if prefix is None else self._prefix(prefix, len(rows), n)
        if batch_size < 1:
            raise ValueError(f"batch_size is a whole number from 1, got {batch_size!r}")
        if self.training:
            raise ValueError("a generator in training mode drops parts of what it knows; call .eval() before sample")
        drawn = []
        shape = self.model.randoms(options)
        for start in range(0, len(rows), batch_size):
            part = slice(start, start + batch_size)
            here = None if given is None else given[part]
            drawn.append(self.model.draw(rows[part], n, options, uniforms(seeds[part], shape), here))
        return self._tokens(torch.cat(drawn))

    @torch.no_grad()
    def speculate(
        self,
        labels: Label | Sequence[Label] | Tensor,
        draft: Generator,
        n_tokens: int | None = None,
        *,
        lookahead: int = 4,
        relax: Relaxation | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 1,
        **sampling: Any,
    ) -> Speculated:
        """As ``sample``, with tokens that a smaller generator proposes: the same law from fewer passes.

        draft: of the same tokenizer's tokens. lookahead: tokens it proposes at a time.
        relax: how far the law may go from this generator's (``generators.speculative.Relaxation``); None is not at all.
        batch_size: a batch waits for the image whose proposals fall first, so that small ones gain most.

        The seeds' samples are not those of ``sample``. They depend on neither lookahead nor batch_size.
        Raises ``ValueError``.
        """
        from tokenizers_vis.generators import speculative

        relax = speculative.EXACTLY if relax is None else relax
        whose = ("tokenizer", "hash", "codebook_sizes", "max_tokens", "classes")
        if unlike := [key for key in whose if getattr(self, key) != getattr(draft, key)]:
            raise ValueError(
                f"the draft {draft.name} has another {unlike[0]} than {self.name}: {getattr(draft, unlike[0])!r}, "
                f"not {getattr(self, unlike[0])!r}; both are trained on the same tokens"
            )
        speculative.check_draft(self.model, draft.model, lookahead, relax)
        options, rows, n = self._options(sampling), self.label_rows(labels), self._length(n_tokens)
        seeds = self._seeds(seed, len(rows))
        if batch_size < 1:
            raise ValueError(f"batch_size is a whole number from 1, got {batch_size!r}")
        if self.training or draft.training:
            raise ValueError("a generator in training mode drops parts of what it knows; call .eval() on both")
        shape = (self.model.length, self.model.codes.draws, speculative.DRAWS)
        drawn = [
            speculative.speculate(
                self.model, draft.model, rows[part], n, options, uniforms(seeds[part], shape), lookahead, relax
            )
            for part in (slice(start, start + batch_size) for start in range(0, len(rows), batch_size))
        ]
        stood = torch.cat([torch.cat(one.stood) for one in drawn])
        return speculative.Speculated(
            self._tokens(torch.cat([one.ids for one in drawn])),
            stood.double().mean().item(),
            sum(one.target_passes for one in drawn),
            sum(one.draft_passes for one in drawn),
        )

    @torch.no_grad()
    def bits(self, tokens: Tokens, labels: Label | Sequence[Label] | Tensor = None) -> Tensor:
        """What each token costs under this generator: -log2 p given the class and what it goes by; b n, float32.

        The sum over an image is its length in bits under an ideal code. A masked generator gives an estimate that in
        the mean is above it. Tokens of an ordered tokenizer after ``max_tokens`` cost what even odds cost, as in a file
        (``Prior``). labels: one for all, or one each. Raises ``ValueError`` for tokens of another tokenizer.
        """
        every = self._own(tokens, longer=True)
        ids = every[:, : self.max_tokens]
        rows = self.label_rows(labels)
        if len(rows) not in (1, len(ids)):
            raise ValueError(f"labels are one for all or one each: got {len(rows)} for {len(ids)} images")
        bits = -self.model.log_prob(ids, rows.expand(len(ids))) / math.log(2)
        return F.pad(bits, (0, every.shape[1] - ids.shape[1]), value=sum(map(math.log2, self.codebook_sizes)))

    def forward_passes(self, n_tokens: int | None = None, *, given: int = 0, **sampling: Any) -> int:
        """How often ``sample`` runs the transformer for a batch, with a prefix of so many given tokens."""
        self.model.check_prefix(given)
        return self.model.forward_passes(self._length(n_tokens), self._options(sampling), given)

    # Whose tokens

    def check(self, tok: Tokenizer) -> None:
        """Raises ``ValueError`` unless ``tok`` makes and decodes the ids that this generator was trained on."""
        if tok.codebook_sizes == self.codebook_sizes:
            # Weights in half precision hash to another value; there the name has to do.
            if makes(tok, self.hash, self.max_tokens) or (tok.dtype != torch.float32 and tok.codes == self.tokenizer):
                return
        raise ValueError(
            f"{self.name} draws ids of {self.tokenizer!r} (hash {self.hash}, codebooks {self.codebook_sizes}); this "
            f"tokenizer is {tok.codes!r} (hash {codes_hash(tok)}, codebooks {tok.codebook_sizes}), whose ids mean "
            f"other things. Load the tokenizer it was trained with, or train a generator on the ids of this one"
        )

    def load_tokenizer(self, name: str | Path | None = None, device: str | torch.device | None = None) -> Tokenizer:
        """The tokenizer that decodes its samples: the one of that name, or from where it lies. ``check`` sees to it."""
        tok = load(self.tokenizer if name is None else name, self.device if device is None else device)
        self.check(tok)
        return tok

    # Files

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes one safetensors file with the config as JSON in its header, whole or not at all.

        dtype: of the stored floats (torch.float16 halves the file); None keeps each as it is.
        """
        from safetensors.torch import save_file

        state = {
            key: (value.to(dtype) if dtype and value.is_floating_point() else value).detach().cpu().contiguous()
            for key, value in self.state_dict().items()
        }
        header = {"format": FORMAT, "version": "1", "config": json.dumps(self.config)}
        write_atomically(Path(path), lambda target: save_file(state, target, metadata=header))

    @classmethod
    def from_file(cls, path: str | Path) -> Generator:
        """Reads what ``save`` wrote, in float32. Raises ``CheckpointError``."""
        state, header = read_safetensors(path)
        if header.get("format") != FORMAT or header.get("version") != "1":
            raise CheckpointError(
                f"{path} is no generator of this library's version 1: its header says format "
                f"{header.get('format')!r}, version {header.get('version')!r}"
            )
        try:
            generator = cls._build(json.loads(header["config"]), empty_weights)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} has a config that cannot be built here: {error}") from error
        load_strictly(generator, state, str(path))
        return generator

    # How it shows itself

    def __repr__(self) -> str:
        millions = sum(p.numel() for p in self.parameters()) / 1e6
        return (
            f"Generator({self.name}: {self.config['model']['kind']}, {self.max_tokens} tokens of {self.tokenizer}, "
            f"{self.classes} classes, {self.forward_passes()} passes, {millions:.1f} M parameters, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    # What callers hand in

    def _options(self, given: Mapping[str, Any]) -> Sampling:
        return build(self.model.options, {**self.config["sampling"], **given}, "sampling")

    def label_rows(self, labels: Any) -> Tensor:
        """b, int64, on the device; no class is the last row of the table."""
        labels = labels.tolist() if hasattr(labels, "tolist") else labels
        items = list(labels) if isinstance(labels, (list, tuple, range)) else [labels]
        if not items:
            raise ValueError("there is nothing to draw: no labels were given")
        return torch.tensor([self._label(item) for item in items], device=self.device)

    def _label(self, label: Any) -> int:
        if label is None:
            return self.classes
        if isinstance(label, str):
            if label not in self.class_names:
                raise ValueError(
                    f"{self.name} knows no class {label!r}.{did_you_mean(label, self.class_names)} "
                    f"It has {self.classes}{', by number only' * (not self.class_names)}"
                )
            return self.class_names.index(label)
        if isinstance(label, bool) or not hasattr(label, "__index__") or not 0 <= int(label) < self.classes:
            raise ValueError(
                f"a label of {self.name} is a whole number from 0 to {self.classes - 1}, a class's name or None for no "
                f"class; got {label!r}"
            )
        return int(label)

    def _length(self, n_tokens: int | None) -> int:
        n = self.max_tokens if n_tokens is None else n_tokens
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= self.max_tokens:
            raise ValueError(f"n_tokens is a whole number from 1 to {self.max_tokens}, got {n_tokens!r}")
        if n < self.max_tokens and not self.nested:
            raise ValueError(
                f"{self.tokenizer} is not nested: an image is all of its {self.max_tokens} tokens, got n_tokens={n}"
            )
        return n

    def _seeds(self, seed: int | Sequence[int], b: int) -> list[int]:
        seeds = [seed + i for i in range(b)] if isinstance(seed, int) else [int(one) for one in seed]
        if len(seeds) != b or min(seeds) < 0:
            raise ValueError(f"seed is one number from 0, or one for each of {b} labels; got {seed!r}")
        return seeds

    def _prefix(self, prefix: Tokens, b: int, n: int) -> Tensor:
        ids = self._own(prefix)
        if len(ids) not in (1, b):
            raise ValueError(f"prefix is one image for all or one each: got {len(ids)} for {b} labels")
        if ids.shape[1] >= n:
            raise ValueError(
                f"prefix has {ids.shape[1]} tokens, which leaves nothing of {n} to draw; "
                f"take a shorter one, such as prefix[:, :{max(1, n // 2)}]"
            )
        self.model.check_prefix(ids.shape[1])
        return ids.expand(b, -1, -1)

    def _own(self, tokens: Tokens, longer: bool = False) -> Tensor:
        """The ids of tokens of its tokenizer: b n k, on the device. longer: an ordered tokenizer's may be too many."""
        if not isinstance(tokens, Tokens):
            raise ValueError(f"a generator takes Tokens, got {type(tokens).__name__}; tv.Tokens(ids, ...) makes them")
        if tokens.tokenizer != self.tokenizer or tokens.codebook_sizes != self.codebook_sizes:
            raise ValueError(
                f"these tokens are of {tokens.tokenizer!r} with codebooks {tokens.codebook_sizes}; {self.name} knows "
                f"those of {self.tokenizer!r} with {self.codebook_sizes}"
            )
        if tokens.lengths is not None:
            raise ValueError("these images have unlike numbers of tokens; go image by image, or take a common prefix")
        if tokens.n_tokens > self.max_tokens and not (longer and tokens.nested):
            prefix = f"; it knows their prefix, tokens[:, :{self.max_tokens}]" if tokens.nested else ""
            raise ValueError(f"{self.name} goes up to {self.max_tokens} tokens an image, got {tokens.n_tokens}{prefix}")
        return tokens.ids.to(self.device)

    def _tokens(self, ids: Tensor) -> Tokens:
        return Tokens(ids, codebook_sizes=self.codebook_sizes, tokenizer=self.tokenizer, nested=self.nested)
