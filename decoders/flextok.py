"""FlexTok's decoder: a rectified flow in VAE latents, told by registers what to draw.

Bachmann et al. 2025, "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length", arXiv 2502.13967.

Registers past an image's length all hold one learned vector, the mask token, with no position; so they stay equal to
each other through every layer, and n of them are exactly one whose attention logits are raised by log n. The same holds
for the unconditional branch, where all are the null token. That makes the sequences as short as what they say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vis.decoders.base import Decoder, DecoderLoss
from tokenizers_vis.decoders.paths import interpolate, logit_normal, mode_sampled, stratified_logit_normal
from tokenizers_vis.decoders.sampling import Branches, Sampling, Stage, draw
from tokenizers_vis.decoders.transformer import (
    ALL,
    MLP,
    Attention,
    grid_of,
    init_branches,
    init_linear,
    learned,
    patchify,
    scattered,
    sincos_2d,
    unpatchify,
)


class Registers(NamedTuple):
    """tokens: b r d, what the patches listen to. bias: b 1 1 (p + r), added to the attention logits; None is zero."""

    tokens: Tensor
    bias: Tensor | None


class FlexTokBlock(nn.Module):
    """Attention and MLP, modulated by time (adaLN-zero, arXiv 2212.09748), in another way for patches and registers."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp: Literal["gelu", "swiglu"],
        mlp_ratio: float,
        qk_norm: bool,
        attention_scale: float | None,
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, qk_norm=qk_norm, bias=False, scale=attention_scale)
        self.mlp = MLP(width, kind=mlp, ratio=mlp_ratio, bias=False)
        self.modulation = nn.Linear(width, 2 * 6 * width)

    def forward(self, x: Tensor, modulation: Tensor, p: int, bias: Tensor | None, keep: slice = ALL) -> Tensor:
        """x: b (p + r) d, p patches and r registers. modulation: b 2 6 1 d, or one for all. keep: what comes out."""
        gate_a, gate_m, shift_a, scale_a, shift_m, scale_m = modulation.unbind(2)
        attended = self.attention(modulate(normed(x), shift_a, scale_a, p), bias, keep)
        x = add_gated(x[:, keep], attended, gate_a, p)
        return add_gated(x, self.mlp(modulate(normed(x), shift_m, scale_m, p)), gate_m, p)


class FlexTokDecoder(Decoder):
    """dim: width of a code. size: height and width of the canvas.

    attention_scale: of the attention logits, None is (width / heads) ** -0.5.
    time_width, max_timestep: features of the time, and the time that they count as 1000.
    times, mode_scale: how training draws them: "mode" (mode_scale 0 is uniform), "logit_normal", or "stratified", which
        is logit-normal spread evenly over a batch.
    null_rate: share of training images whose registers are replaced by the null token.
    steps, guidance, guidance_kind, solver: the defaults of ``forward``, those of the release.

    The table of patch positions is stored with the weights.
    """

    one_pass = False

    def __init__(
        self,
        *,
        dim: int,
        max_tokens: int,
        size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        channels: int = 3,
        mlp: Literal["gelu", "swiglu"] = "swiglu",
        mlp_ratio: float = 4.0,
        qk_norm: bool = True,
        attention_scale: float | None = None,
        time_width: int = 256,
        max_timestep: float = 1000.0,
        times: Literal["mode", "logit_normal", "stratified"] = "mode",
        mode_scale: float = 0.25,
        null_rate: float = 0.1,
        steps: int = 25,
        guidance: float = 7.5,
        guidance_kind: Literal["cfg", "apg"] = "apg",
        solver: Literal["euler", "heun", "dpm++", "unipc"] = "euler",
    ) -> None:
        super().__init__()
        self.dim, self.max_tokens, self.patch, self.grid = dim, max_tokens, patch, grid_of(size, patch)
        self.shape, self.side = (channels, size, size), size
        self.sizes = (size,)
        self.time_width, self.max_timestep = time_width, max_timestep
        self.times, self.mode_scale, self.null_rate = times, mode_scale, null_rate
        self.defaults = dict(steps=steps, guidance=guidance, guidance_kind=guidance_kind, solver=solver)
        self.read_codes = nn.Linear(dim, width)
        self.token_positions = scattered(max_tokens, self.grid, width)
        self.mask_token = learned(width)
        self.null_token = learned(width)
        self.read_patches = nn.Linear(patch * patch * channels, width)
        self.register_buffer("positions", sincos_2d(self.grid, self.grid, width))
        self.time = nn.Sequential(nn.Linear(time_width, width), nn.SiLU(), nn.Linear(width, width))
        options = dict(mlp=mlp, mlp_ratio=mlp_ratio, qk_norm=qk_norm, attention_scale=attention_scale)
        self.blocks = nn.ModuleList(FlexTokBlock(width, heads, **options) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.to_patches = nn.Linear(width, patch * patch * channels)
        self.apply(init_linear)
        for block in self.blocks:
            init_branches(block.attention, block.mlp, depth)
            # At first time changes nothing: gates are open, nothing is shifted or scaled.
            nn.init.zeros_(block.modulation.weight)
            rearrange(block.modulation.bias.data, "(s k d) -> s k d", s=2, k=6)[:, :2] = 1.0
        for layer in (self.modulation, self.to_patches):
            nn.init.zeros_(layer.weight)

    def forward(self, codes: Tensor, lengths: Tensor | None = None, **sampling: Any) -> Tensor:
        """Draws pictures y: b c h w for codes: b n d. The options are those of ``Sampling``."""
        return draw(self, codes, lengths, Sampling.of(self.defaults, sampling))

    def branches(self, codes: Tensor, lengths: Tensor | None, stage: Stage) -> Branches:
        """What ``draw`` draws with."""
        registers, nothing = self._registers(codes, lengths), self._nothing()
        # All at once, because half of the weights are those of the modulations.
        rows = self._modulations(torch.tensor(stage.asked, device=codes.device))
        row_of = {t: slice(i, i + 1) for i, t in enumerate(stage.asked)}

        def velocity(x: Tensor, t: float, registers: Registers) -> Tensor:
            return self._velocity(x, [row[row_of[t]] for row in rows], registers)

        def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            return velocity(x.repeat(2, 1, 1, 1), t, self._and_nothing(registers)).chunk(2)

        return Branches(lambda x, t: velocity(x, t, registers), lambda x, t: velocity(x, t, nothing), both)

    def loss(self, codes: Tensor, target: Tensor, lengths: Tensor | None = None) -> DecoderLoss:
        """Mean squared error of the velocity, at a random time per image."""
        self.check_codes(codes)
        target = target.float()
        b, device = len(target), target.device
        t = {
            "mode": lambda: mode_sampled(b, self.mode_scale, device),
            "logit_normal": lambda: logit_normal(b, 0.0, 1.0, device),
            "stratified": lambda: stratified_logit_normal(b, device),
        }[self.times]()
        noise = torch.randn_like(target)
        x = interpolate(target, noise, t)
        dropped = torch.rand(b, device=device) < self.null_rate
        velocity = self.velocity(x, t, codes, lengths, dropped)
        estimate = x - t.view(-1, 1, 1, 1) * velocity
        return DecoderLoss(F.mse_loss(velocity, noise - target), estimate, (1 - t) * ~dropped)

    def velocity(
        self, x: Tensor, t: Tensor, codes: Tensor, lengths: Tensor | None = None, dropped: Tensor | None = None
    ) -> Tensor:
        """What the network says of x: b c h w at times t: b; noise minus picture, b c h w, float32.

        dropped: b, bool, the images whose codes are not told.
        """
        return self._velocity(x, self._modulations(t), self._registers(codes, lengths, dropped))

    @contextmanager
    def features(self, block: int = 1) -> Iterator[list[Tensor]]:
        """Collects what the patches hold after a block, b (h w) d with gradient, once for each pass in the context.

        For an alignment with the features of another net (REPA, Yu et al. 2024, arXiv 2410.06940).
        """
        kept: list[Tensor] = []
        handle = self.blocks[block].register_forward_hook(
            lambda module, inputs, output: kept.append(output[:, : self.grid**2])
        )
        try:
            yield kept
        finally:
            handle.remove()

    def _velocity(self, x: Tensor, modulations: list[Tensor], registers: Registers) -> Tensor:
        """x: b c h w. modulations: as ``_modulations`` gives them, one for each image or one for all."""
        p = self.grid**2
        patches = self.read_patches(patchify(x, self.patch).to(self.null_token.dtype))
        patches = patches + self.positions.to(patches.dtype)
        z = torch.cat([patches, registers.tokens.to(patches.dtype).expand(len(x), -1, -1)], dim=1)
        *rows, last = modulations
        for i, (block, row) in enumerate(zip(self.blocks, rows, strict=True), 1):
            # Of the last block only the patches are wanted.
            z = block(z, row, p, registers.bias, slice(p) if i == len(self.blocks) else ALL)
        shift, scale = last.unbind(1)
        out = self.to_patches(torch.addcmul(shift, normed(z), 1 + scale))
        return unpatchify(out, self.patch, self.grid).float()

    def _modulations(self, t: Tensor) -> list[Tensor]:
        """t: n -> n 2 6 1 d for each block, and n 2 1 d for the head."""
        dtype = self.null_token.dtype
        condition = F.silu(self.time(flextok_time(t, self.time_width, self.max_timestep).to(dtype)))
        rows = [rearrange(block.modulation(condition), "n (s k d) -> n s k 1 d", s=2, k=6) for block in self.blocks]
        return [*rows, rearrange(self.modulation(condition), "n (k d) -> n k 1 d", k=2)]

    def _registers(self, codes: Tensor, lengths: Tensor | None, dropped: Tensor | None = None) -> Registers:
        """The tokens that say something, then one that stands for all others of its image."""
        b, n, _ = codes.shape
        tokens = self.read_codes(codes.to(self.null_token.dtype)) + self.token_positions[:n]
        if lengths is None:
            lengths = torch.full((b,), n, device=codes.device)
        rest = self.mask_token.expand(b, -1)
        if dropped is not None:
            lengths = lengths.masked_fill(dropped, 0)
            rest = torch.where(dropped[:, None], self.null_token, rest)
        if bool((lengths == self.max_tokens).all()):
            return Registers(tokens, None)
        kept = int(lengths.max())
        rest = rearrange(rest.to(tokens.dtype), "b d -> b 1 d")
        said = torch.arange(kept, device=codes.device) < lengths[:, None]
        logs = torch.cat([said.float().log(), (self.max_tokens - lengths).float().log()[:, None]], dim=1)
        return Registers(torch.cat([tokens[:, :kept], rest], dim=1), self._bias(logs))

    def _nothing(self) -> Registers:
        """The registers of the unconditional branch, the same for every image."""
        logs = torch.full((1, 1), math.log(self.max_tokens), device=self.null_token.device)
        return Registers(rearrange(self.null_token, "d -> 1 1 d"), self._bias(logs))

    def _and_nothing(self, registers: Registers) -> Registers:
        """Those of a batch, then as many for its unconditional branch: each stands for its share of the null tokens."""
        b, r, _ = registers.tokens.shape
        nothing = rearrange(self.null_token, "d -> 1 1 d").expand(b, r, -1)
        logs = torch.full((b, r), math.log(self.max_tokens / r), device=nothing.device)
        untold = self._bias(logs)
        told = torch.zeros_like(untold) if registers.bias is None else registers.bias
        return Registers(torch.cat([registers.tokens, nothing.to(registers.tokens.dtype)]), torch.cat([told, untold]))

    def _bias(self, logs: Tensor) -> Tensor:
        """Logs of how many each register stands for, b r -> what is added to the logits, b 1 1 (p + r)."""
        # A bias that is more exact than queries and keys of half precision is for the CPU alone.
        dtype = self.null_token.dtype
        logs = logs if logs.device.type == "cpu" and dtype.itemsize == 2 else logs.to(dtype)
        return rearrange(F.pad(logs, (self.grid**2, 0)), "b n -> b 1 1 n")


def flextok_time(t: Tensor, width: int, max_timestep: float) -> Tensor:
    """t: n -> n width, cosines then sines of 1000 t / max_timestep at periods up to 256 times the first one's."""
    half = width // 2
    # The order of these roundings is the original's: with max_timestep 1 the angles reach 1000.
    rate = 1000.0 / max_timestep * torch.exp(-math.log(256) * torch.arange(half, dtype=torch.float32) / half)
    angle = t.float()[:, None] * rate.to(t.device)
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, width % 2))


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def modulate(x: Tensor, shift: Tensor, scale: Tensor, p: int) -> Tensor:
    """x: b (p + r) d. shift, scale: b 2 1 d, of patches and of registers."""
    parts = zip((x[:, :p], x[:, p:]), shift.unbind(1), (1 + scale).unbind(1), strict=True)
    return torch.cat([torch.addcmul(b, part, a) for part, b, a in parts], dim=1)


def add_gated(x: Tensor, y: Tensor, gate: Tensor, p: int) -> Tensor:
    """x + gate y. x, y: b (p + r) d, gate: b 2 1 d."""
    parts = zip((x[:, :p], x[:, p:]), (y[:, :p], y[:, p:]), gate.unbind(1), strict=True)
    return torch.cat([torch.addcmul(part, other, g) for part, other, g in parts], dim=1)
