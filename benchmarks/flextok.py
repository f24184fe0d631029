"""FlexTok's flow decoder against the authors', from one set of random weights, side by side in one run.

    python benchmarks/flextok.py [--original CHECKOUT] [--depth 12] [--kept 64] [--steps 4] [--calls 5] [--threads N]

Both draw VAE latents of 32 x 32 from ``--kept`` of 256 tokens with adaptive projected guidance; the VAE, which is the
same for both, has no part in it. --original is a checkout of https://github.com/apple/ml-flextok whose requirements are
installed; its attention runs on its own fallback, scaled_dot_product_attention, which needs no compiler. Without it,
ours with every register spelled out, as the original has them, stands in. The runs of all take turns; the ratio is that
of the medians. A width is 64 times its depth.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tokenizers_vis.config import build
from tokenizers_vis.convert import convert
from tokenizers_vis.decoders.base import Decoder
from tokenizers_vis.decoders.flextok import FlexTokDecoder, Registers
from tokenizers_vis.quantizers.fsq import FSQ
from tokenizers_vis.weights import load_strictly

RECORDING = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "flextok.safetensors"
GRID, REGISTERS, CHANNELS, GUIDANCE = 16, 256, 16, 7.5
LEVELS = (8, 8, 8, 5, 5, 5)


class Plain(FlexTokDecoder):
    """With every register spelled out."""

    def _registers(self, codes: Tensor, lengths: Tensor | None, dropped: Tensor | None = None) -> Registers:
        n = codes.shape[1] if lengths is None else int(lengths.max())
        tokens = self.mask_token.repeat(len(codes), self.max_tokens, 1)
        tokens[:, :n] = self.read_codes(codes.to(tokens.dtype)) + self.token_positions[:n]
        return Registers(tokens, None)

    def _nothing(self) -> Registers:
        return Registers(self.null_token.repeat(1, self.max_tokens, 1), None)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Prints a table and gives the seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, help="a checkout of apple/ml-flextok")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the decoder (default: 12)")
    parser.add_argument("--kept", type=int, default=64, help="tokens of each image (default: 64)")
    parser.add_argument("--images", type=int, default=1, help="in a batch (default: 1)")
    parser.add_argument("--steps", type=int, default=4, help="solver steps (default: 4)")
    parser.add_argument("--calls", type=int, default=5, help="calls to take the median of (default: 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    options = parser.parse_args(arguments)
    if min(options.depth, options.kept, options.images, options.steps, options.calls, options.threads) < 1:
        parser.error("--depth, --kept, --images, --steps, --calls and --threads are at least 1")
    if options.kept > REGISTERS:
        parser.error(f"--kept is at most {REGISTERS}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    runs = contestants(options)
    pictures = {name: run() for name, run in runs.items()}  # this first call, which fills caches, does not count
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.calls):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    first = next(iter(runs))
    print(
        f"d{options.depth}, {options.images} x {options.kept} tokens, {options.steps} steps, "
        f"{options.threads} threads, torch {torch.__version__}\n"
    )
    print("| | seconds | times as fast | differs by at most |\n| --- | ---: | ---: | ---: |")
    for name, seconds in medians.items():
        worst = (pictures[name] - pictures[first]).abs().max().item()
        print(f"| {name} | {seconds:.2f} | {medians[first] / seconds:.2f} | {worst:.1e} |")
    return medians


@torch.no_grad()
def contestants(options: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """The slow one first; each draws latents b c h w of the same codes from the same noise."""
    config = official(1, options.depth)
    quantizer = FSQ(levels=LEVELS)
    ids = torch.randint(0, quantizer.codebook_sizes[0], (options.images, options.kept, 1))
    noise = torch.randn(options.images, CHANNELS, 2 * GRID, 2 * GRID)
    sampling = {"steps": options.steps, "guidance": GUIDANCE, "guidance_kind": "apg", "noise": noise}
    runs: dict[str, Callable[[], Tensor]] = {}
    if options.original:
        theirs = original(options.original, config)
        state = {f"decoder.{key}": value for key, value in theirs.state_dict().items()}
        runs["original, float32"] = partial(draw_theirs, theirs, config, quantizer.lookup(ids), noise, options.steps)
    converted = convert("flextok", {"config": config}, state if options.original else {})
    table = converted.config["decoder"]
    ours = build(Decoder, table).eval()
    if options.original:
        load_strictly(ours, {k.removeprefix("decoder."): v for k, v in converted.state.items()}, str(options.original))
    else:
        randomise(ours)
        plain = Plain(**{key: value for key, value in table.items() if key != "kind"}).eval()
        plain.load_state_dict(ours.state_dict())
        runs["ours, spelled out, float32"] = torch.no_grad()(partial(plain, quantizer.lookup(ids), **sampling))
    half = copy.deepcopy(ours).to(torch.bfloat16)
    for name, decoder in {"ours, float32": ours, "ours, bfloat16": half}.items():
        runs[name] = torch.no_grad()(partial(decoder, quantizer.lookup(ids), **sampling))
    return runs


def official(encoder: int, decoder: int) -> dict[str, Any]:
    """A config as the authors' checkpoints have it, of an encoder and a decoder of so many blocks."""
    with safe_open(RECORDING, framework="pt") as file:
        config = json.loads(file.metadata()["options"])["config"]
    sizes = {"head_dim": 64, "n_min": REGISTERS, "n_max": REGISTERS, "channels_in": CHANNELS, "channels_out": CHANNELS}
    sizes |= {"levels": list(LEVELS), "frequency_embedding_size": 256, "out_channels": CHANNELS}
    config["vae"] |= {"hf_hub_path": None, "scaling_factor": 1.0}
    for section, blocks in (("encoder", encoder), ("decoder", decoder)):
        resize(config[section], sizes | {"depth": blocks, "dim": 64 * blocks})
    return config


def resize(tree: dict[str, Any], sizes: dict[str, Any]) -> None:
    for key, value in tree.items():
        if key == "max_sizes":
            tree[key] = [GRID] * 2 if len(value) == 2 else [REGISTERS]
        elif key in sizes:
            tree[key] = sizes[key]
        elif isinstance(value, dict):
            resize(value, sizes)


def original(checkout: Path, config: dict[str, Any]) -> torch.nn.Module:
    """Their decoder with random weights, built from their classes."""
    sys.path.insert(0, str(checkout))
    decoder = instantiate(config["decoder"]).eval()
    randomise(decoder)
    for module in decoder.modules():
        if hasattr(module, "use_flex_attention"):
            module.use_flex_attention = False
    return decoder


def draw_theirs(decoder: torch.nn.Module, config: dict[str, Any], codes: Tensor, noise: Tensor, steps: int) -> Tensor:
    names = config["pipeline"]
    pipeline = instantiate({**names, "noise_read_key": "noise"})(model=decoder)
    kept = config["decoder"]["module_dict"]["dec_nested_dropout"]["eval_keep_k_read_key"]
    data = {
        # Their detokenize pads with the id 0 to all registers and masks again what it padded.
        names["latents_read_key"]: list(torch.nn.functional.pad(codes, (0, 0, 0, REGISTERS - codes.shape[1])).split(1)),
        kept: [codes.shape[1]] * len(codes),
        "noise": list(noise.split(1)),
    }
    options = {"guidance_scale": GUIDANCE, "perform_norm_guidance": True, "verbose": False}
    data = pipeline(data, timesteps=steps, vae_image_sizes=noise.shape[-1], **options)
    return torch.cat(data[names["reconst_write_key"]])


def instantiate(tree: Any) -> Any:
    """Builds their objects from a config of ours."""
    if not isinstance(tree, dict):
        return tree
    options = {key: instantiate(value) for key, value in tree.items() if key not in ("_target_", "_partial_")}
    if "_target_" not in tree:
        return options
    module, _, name = tree["_target_"].rpartition(".")
    made = partial(getattr(importlib.import_module(module), name), **options)
    return made if tree.get("_partial_") else made()


def randomise(module: torch.nn.Module) -> None:
    """Weights of variance 1 / fan-in, small biases. At first many are zero, and nothing would differ."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02)


if __name__ == "__main__":
    main()
