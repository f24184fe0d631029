"""One toolkit for discrete and 1D image tokenizers: load, encode, decode, train, eval."""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

# In a checkout the other packages sit beside this folder; in a wheel they sit inside it.
if not (_Path(__file__).parent / "quantizers").is_dir():
    __path__.append(str(_Path(__file__).resolve().parents[1]))

__version__ = "0.1.0"

if _TYPE_CHECKING:
    from tokenizers_vis.catalogue import list_presets as list_presets
    from tokenizers_vis.generator import Generator as Generator
    from tokenizers_vis.generator import load_generator as load_generator
    from tokenizers_vis.images import to_pil as to_pil
    from tokenizers_vis.latents import Latents as Latents
    from tokenizers_vis.presets import load as load
    from tokenizers_vis.token_file import TokenFileError as TokenFileError
    from tokenizers_vis.tokenizer import Tokenizer as Tokenizer
    from tokenizers_vis.tokens import Tokens as Tokens

# Public name -> the module that defines it. Each is imported when first asked for, so that the import itself is quick.
_HOME = {
    "load": "presets",
    "list_presets": "catalogue",
    "load_generator": "generator",
    "Generator": "generator",
    "Tokenizer": "tokenizer",
    "Tokens": "tokens",
    "Latents": "latents",
    "TokenFileError": "token_file",
    "to_pil": "images",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
