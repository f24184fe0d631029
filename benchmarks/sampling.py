"""What the exact speed-ups of a flow decoder's sampler are worth: plain against sped-up, same weights, one run.

    python benchmarks/sampling.py [--width 256] [--depth 4] [--images 1] [--kept 64] [--steps 25] [--guidance 1.5]

plain: times are embedded and become modulations for each image at each step, and the last block computes tokens that
nobody reads. times once: what ``FlowDecoder`` does; modulations of all steps from one pass for all images. One batch:
predictions with and without codes from one pass. The runs take turns; seconds are processor time over all threads
(on a GPU, of the clock), the median of the calls.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_vis.decoders.flow import FlowDecoder
from tokenizers_vis.decoders.paths import velocity_of
from tokenizers_vis.decoders.sampling import Branches, Stage
from tokenizers_vis.decoders.transformer import modulate, patchify, unpatchify


class Plain(FlowDecoder):
    """Nothing is kept from one step to the next but the tokens."""

    def branches(self, codes: Tensor, lengths: Tensor | None, stage: Stage) -> Branches:
        tokens, mask = self._tokens(codes, lengths)
        nothing = self.null_token.expand(len(codes), 1, -1)

        def velocity(x: Tensor, t: float, tokens: Tensor, mask: Tensor | None) -> Tensor:
            times = torch.full((len(x),), t, device=x.device)
            condition = self._condition(times, stage.size)
            patches = self.read_patches(patchify(x, self.patch)) + (self.mask_token + self.positions)
            out = self.transformer(torch.cat([patches, tokens], dim=1), mask, condition)[:, : patches.shape[1]]
            shift, scale = self.modulation(F.silu(condition)).unsqueeze(1).chunk(2, dim=-1)
            out = self.to_patches(modulate(self.norm(out), shift, scale))
            return velocity_of(self.smooth(unpatchify(out, self.patch, self.grid)), x, times, self.predict)

        told, untold = (lambda x, t: velocity(x, t, tokens, mask)), (lambda x, t: velocity(x, t, nothing, None))
        return Branches(told, untold, lambda x, t: (told(x, t), untold(x, t)))


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Prints a table and gives the seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="of the decoder (default: 256, that of mini-flow)")
    parser.add_argument("--depth", type=int, default=4, help="blocks of the decoder (default: 4)")
    parser.add_argument("--images", type=int, default=1, help="in a batch (default: 1)")
    parser.add_argument("--kept", type=int, default=64, help="tokens of each image, up to 64 (default: 64)")
    parser.add_argument("--steps", type=int, default=25, help="solver steps (default: 25)")
    parser.add_argument("--guidance", type=float, default=1.5, help="scale; 1 is none (default: 1.5)")
    parser.add_argument("--calls", type=int, default=5, help="calls to take the median of (default: 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if min(options.width, options.depth, options.images, options.kept, options.steps, options.calls) < 1:
        parser.error("--width, --depth, --images, --kept, --steps and --calls are at least 1")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    runs = contestants(options)
    pictures = {name: run() for name, run in runs.items()}  # this first call, which fills caches, does not count
    times: dict[str, list[float]] = {name: [] for name in runs}
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    for _ in range(options.calls):
        for name, run in runs.items():
            start = clock()
            run().cpu()
            times[name].append(clock() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(
        f"width {options.width}, {options.depth} blocks, {options.images} x {options.kept} tokens, 64 px, "
        f"{options.steps} steps, guidance {options.guidance}, {options.device}, {options.threads} threads, "
        f"torch {torch.__version__}\n"
    )
    print("| | seconds | times as fast | differs by at most |\n| --- | ---: | ---: | ---: |")
    for name, seconds in medians.items():
        worst = (pictures[name] - pictures["plain"]).abs().max().item()
        print(f"| {name} | {seconds:.3f} | {medians['plain'] / max(seconds, 1e-9):.2f} | {worst:.1e} |")
    return medians


@torch.no_grad()
def contestants(options: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """The plain one first; each draws the same codes from the same noise."""
    shape = dict(dim=4, max_tokens=64, size=64, patch=8, width=options.width, depth=options.depth, mlp_ratio=3.0)
    made = FlowDecoder(**shape, heads=max(1, options.width // 64), predict="picture").to(options.device).eval()
    for name, parameter in made.named_parameters():
        if any(part in name for part in ("modulation", "to_patches", "read_patches")):
            # At first these are zero or one, and nothing would differ.
            parameter.normal_(std=0.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    plain = Plain(**shape, heads=max(1, options.width // 64), predict="picture").to(options.device).eval()
    plain.load_state_dict(made.state_dict())
    codes = torch.randn(options.images, options.kept, 4, device=options.device)
    sampling = {"steps": options.steps, "guidance": options.guidance, "seed": 0}
    runs = {
        "plain": partial(plain, codes, **sampling, batched=False),
        "times once": partial(made, codes, **sampling, batched=False),
    }
    if options.guidance != 1:
        runs["times once, guidance in one batch"] = partial(made, codes, **sampling, batched=True)
    return {name: torch.no_grad()(run) for name, run in runs.items()}


if __name__ == "__main__":
    main()
