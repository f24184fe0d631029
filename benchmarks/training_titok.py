"""Training images a second of TiTok-S-128 at 256 px: ours against its authors' code, from the same random weights.

    git clone https://github.com/bytedance/1d-tokenizer
    python benchmarks/training_titok.py --original 1d-tokenizer [--parts stage1 single stage2] [--threads N]

A step is the model's forward pass, the loss, backward, gradient clipping, AdamW and the moving average, as either
repository's training does it. What is trained:

    stage1  the first stage as it is: codes of MaskGIT's VQGAN are the target, cross entropy and quantizer loss
    single  one stage: the decoder paints pixels, squared error and quantizer loss
    stage2  the second stage: the decoder and the VQGAN's, behind a frozen encoder, squared error

Perceptual net and critic, which single and stage2 have besides, are left out on both sides: they are the same nets, and
two of them are a download. bfloat16 is autocast, the precision that both trainings use. Each round calls every variant
once, so that a busy machine is busy for all of them; numbers are medians over the rounds, of the processor time over
all threads and of the time on the clock. The losses of the first step are compared. Needs omegaconf and accelerate.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

import tokenizers_vis as tv
from tokenizers_vis.catalogue import preset
from tokenizers_vis.convert import convert
from tokenizers_vis.convert.titok import PROXY_FILE
from tokenizers_vis.images import load_images
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train.losses import LossConfig, LossSum
from tokenizers_vis.train.optim import Average, OptimConfig, adamw

NAME = "titok-s-128"
PHOTOS = sorted((Path(tv.__file__).parent / "photos").glob("*.jpg"))
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of configs/training/TiTok: what their config says of each part beside the model's shape, and our losses.
PARTS: dict[str, tuple[dict[str, Any], LossConfig]] = {
    "stage1": ({"finetune_decoder": False, "commitment_cost": 0.25}, LossConfig()),
    "single": ({"finetune_decoder": False, "is_legacy": False, "commitment_cost": 0.25}, LossConfig()),
    "stage2": ({"finetune_decoder": True, "commitment_cost": 0.0}, LossConfig(quantizer=0.0, l2=1.0)),
}
OPTIM = OptimConfig(steps=1_000_000, batch_size=1, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4, clip=1.0)

Step = Callable[[Tensor, torch.dtype], float]  # images b 3 h w and the precision -> the loss


class Times(NamedTuple):
    """Seconds of one step: medians, on the clock and of the processor."""

    wall: float
    processor: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="a checkout of bytedance/1d-tokenizer")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--rounds", type=int, default=5, help="to take the median of (default: 5)")
    parser.add_argument("--batch", type=int, default=4, help="images of a step (default: 4)")
    options = parser.parse_args()
    if min(options.threads, options.rounds, options.batch) < 1:
        parser.error("--threads, --rounds and --batch are at least 1")
    torch.set_num_threads(options.threads)
    sys.path.insert(0, str(options.original))
    images = photographs(options.batch)
    print(f"{platform.processor() or platform.machine()}, threads: {options.threads}, torch {torch.__version__}")
    print(f"batch {options.batch}, medians of {options.rounds} rounds\n")
    print("| training | precision | | original | ours | |\n|---|---|---|---:|---:|---:|")
    for part in options.parts:
        steps = pair(part)
        first = [step(images, torch.float32) for step in steps]
        times = interleaved(steps, images, options.rounds, part)
        for name in PRECISIONS:
            theirs, ours = times[name]
            for clock in ("processor", "wall"):
                a, b = getattr(theirs, clock), getattr(ours, clock)
                speeds = f"{options.batch / a:.3f} | {options.batch / b:.3f}"
                print(f"| {part} | {name} | images a second, {clock} time | {speeds} | {a / b:.2f}x |", flush=True)
        gap = abs(first[0] - first[1]) / first[0]
        print(f"| {part} | float32 | loss of the first step | {first[0]:.5f} | {first[1]:.5f} | {gap:.0e} apart |")


def pair(part: str) -> tuple[Step, Step]:
    """The original's training step and ours."""
    official = copy.deepcopy(preset(NAME)["official"])
    options, losses = PARTS[part]
    official["model"]["vq_model"] |= options
    with tempfile.TemporaryDirectory() as folder:
        proxy = Path(folder) / PROXY_FILE if part == "stage1" else None
        model, proxy_codes = the_original(official, proxy)
        converted = convert("titok", official | {"_folder": folder}, model.state_dict())
        state = {key: value.clone() for key, value in converted.state.items()}
    tok = Tokenizer.from_state({"name": NAME, **converted.config}, state, "the original")
    if part == "stage1":
        tok.canvas.requires_grad_(False)
    if part == "stage2":
        tok.encoder.requires_grad_(False)
        tok.quantizer.requires_grad_(False)
    return their_step(model, proxy_codes), our_step(tok, losses)


def the_original(official: dict[str, Any], proxy: Path | None) -> tuple[nn.Module, nn.Module | None]:
    """Their model and, for a first stage, their VQGAN, whose random weights are written to the file ``proxy``."""
    try:
        from modeling.titok import PretrainedTokenizer, TiTok
    except ImportError as error:
        raise SystemExit(
            f"the original cannot be imported ({error}); --original is a checkout of "
            f"https://github.com/bytedance/1d-tokenizer, and needs omegaconf and accelerate"
        ) from error
    torch.manual_seed(0)
    model = TiTok(official).train()
    if proxy is None:
        return model, None
    whole = TiTok(preset(NAME)["official"])  # has a VQGAN's decoder and codebook; the encoder is built by its class
    from modeling.modules.maskgit_vqgan import Encoder

    encoder = Encoder(whole.pixel_decoder.config)
    parts = {"encoder": encoder, "decoder": whole.pixel_decoder, "quantize": whole.pixel_quantize}
    state = {f"{name}.{key}": value for name, module in parts.items() for key, value in module.state_dict().items()}
    torch.save(state, proxy)
    return model, PretrainedTokenizer(str(proxy))


def their_step(model: nn.Module, proxy_codes: nn.Module | None) -> Step:
    """utils/train_utils.py, train_one_epoch, with what its accelerator does on one process."""
    from modeling.modules import EMAModel

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=OPTIM.lr, betas=OPTIM.betas, weight_decay=OPTIM.weight_decay)
    average = EMAModel(model.parameters(), decay=0.999)

    def step(images: Tensor, dtype: torch.dtype) -> float:
        codes = None if proxy_codes is None else proxy_codes.encode(images)
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            picture, extra = model(images)
        picture = picture.float()
        if codes is not None:
            # ReconstructionLoss_Stage1
            b, k = picture.shape[:2]
            loss = F.cross_entropy(picture.contiguous().view(b, k, -1), codes.view(b, -1)) + extra["quantizer_loss"]
        else:
            # ReconstructionLoss_Stage2 and _Single_Stage, without perceptual net and critic
            loss = F.mse_loss(images, picture) + extra["quantizer_loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.step(model.parameters())
        return loss.item()

    return step


def our_step(tok: Tokenizer, losses: LossConfig) -> Step:
    """train/loop.py, Run.train_step, on one process."""
    tok.train()
    loss_sum = LossSum(losses, tok, torch.device("cpu"))
    optimizer, average = adamw(tok, OPTIM), Average(tok, OPTIM.ema)

    def step(images: Tensor, dtype: torch.dtype) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            loss = loss_sum(tok.training_pass(images), images, 0).total
        loss.backward()
        nn.utils.clip_grad_norm_(tok.parameters(), OPTIM.clip)
        optimizer.step()
        average.update(tok, 1000)
        return loss.item()

    return step


def photographs(count: int) -> Tensor:
    """count 3 256 256, in [0, 1]: the bundled photographs, mirrored where there are more."""
    photos = torch.stack(load_images(PHOTOS)).float() / 255
    photos = torch.cat([photos, photos.flip(-1)])
    return photos[torch.arange(count) % len(photos)].contiguous()


def interleaved(steps: tuple[Step, Step], images: Tensor, rounds: int, what: str) -> dict[str, list[Times]]:
    """Precision -> times of the original and ours. A first round warms up."""
    spent: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for turn in track(range(rounds + 1), what, disable=not sys.stderr.isatty()):
        for name, dtype in PRECISIONS.items():
            for i, step in enumerate(steps):
                clock, processor = time.perf_counter(), time.process_time()
                step(images, dtype)
                if turn:
                    found = time.perf_counter() - clock, time.process_time() - processor
                    spent.setdefault((name, i), []).append(found)
    medians = {key: Times(*map(statistics.median, zip(*found, strict=True))) for key, found in spent.items()}
    return {name: [medians[name, i] for i in range(len(steps))] for name in PRECISIONS}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # the original's torch.cuda.amp.autocast
    main()
