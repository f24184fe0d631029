"""The training loop: a recipe becomes a tokenizer, and a killed run goes on exactly where it was.

A run folder holds ``recipe.toml`` (resolved), ``checkpoint.pt`` (everything needed to go on), ``tokenizer.safetensors``
(the averaged weights, ready for ``tv.load``), ``log.jsonl``, ``samples/*.png`` and TensorBoard's events.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tokenizers_vis.config import ConfigError, build, did_you_mean, read_toml, to_toml
from tokenizers_vis.encoders.base import powers_of_two
from tokenizers_vis.eval.metrics import CodebookUsage, psnr
from tokenizers_vis.files import write_atomically
from tokenizers_vis.presets import load, usable_device
from tokenizers_vis.quantizers.base import NotFiniteError
from tokenizers_vis.sources import open_source
from tokenizers_vis.tokenizer import PARTS, Tokenizer
from tokenizers_vis.train.data import DataConfig, TrainBatches, val_batches
from tokenizers_vis.train.journal import Journal, stop_on_signal
from tokenizers_vis.train.losses import LossConfig, LossSum
from tokenizers_vis.train.optim import Average, OptimConfig, adamw, learning_rate


@dataclass(frozen=True)
class InitConfig:
    """What is taken from a trained tokenizer: a preset, file or run folder.

    parts: taken whole, config and weights; ``freeze`` keeps them as they are.
    adopt: parts of another architecture, which take over the weights of the same name and shape.
    """

    tokenizer: str = ""
    parts: tuple[Literal["encoder", "quantizer", "decoder"], ...] = ()
    freeze: bool = False
    adopt: tuple[Literal["encoder", "quantizer", "decoder"], ...] = ()

    def __post_init__(self) -> None:
        if bool(self.tokenizer) != bool(self.parts or self.adopt):
            raise ValueError("tokenizer comes with parts or adopt: which trained tokenizer, and which of its parts")
        if both := set(self.parts) & set(self.adopt):
            raise ValueError(f"{', '.join(both)} is either taken whole (parts) or adopted, not both")


@dataclass(frozen=True)
class LogConfig:
    """In optimiser steps: how often to log, to validate, and to write a checkpoint."""

    every: int = 20
    val_every: int = 500
    save_every: int = 250

    def __post_init__(self) -> None:
        if min(self.every, self.val_every, self.save_every) < 1:
            raise ValueError("every, val_every and save_every are at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """A run. ``tokenizer`` is a preset's table: canvas, encoder, quantizer, decoder."""

    name: str
    tokenizer: dict[str, Any]
    optim: OptimConfig
    data: DataConfig
    init: InitConfig = field(default_factory=InitConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    log: LogConfig = field(default_factory=LogConfig)
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    device: str = ""


class RunError(ValueError):
    """A run folder that cannot be started or gone on with."""


@dataclass(frozen=True)
class Outcome:
    """Where a call of ``fit`` ended: ``step`` optimiser steps done, ``finished`` or stopped on request."""

    folder: Path
    step: int
    finished: bool


def read_recipe(name: str | Path) -> dict[str, Any]:
    """The table of a recipe: the name of one that ships with the library, or a path. Raises ``ConfigError``."""
    path = Path(name)
    if path.suffix != ".toml":
        path = Path(__file__).parent / "recipes" / f"{name}.toml"
        if not path.is_file():
            raise ConfigError(
                f"there is no recipe {str(name)!r}.{did_you_mean(str(name), list_recipes())} "
                f"Recipes: {', '.join(list_recipes())}; or give a .toml file"
            )
    return read_toml(path)


def list_recipes() -> list[str]:
    """The names of the recipes that ship with the library."""
    return sorted(path.stem for path in (Path(__file__).parent / "recipes").glob("*.toml"))


def fit(table: Mapping[str, Any], folder: str | Path) -> Outcome:
    """Trains what the recipe ``table`` says, in a new run folder. Raises ``ConfigError``, ``RunError``, ``ValueError``.

    Ctrl-C or SIGTERM finishes the step at hand, writes a checkpoint and returns.
    """
    config = build(TrainConfig, table)
    folder = Path(folder)
    if (folder / "checkpoint.pt").exists() or (folder / "tokenizer.safetensors").exists():
        raise RunError(f"{folder} already holds a run; go on with --resume {folder}, or choose another --out")
    run = Run(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "recipe.toml", to_toml(dataclasses.asdict(config)).encode())
    return run.train()


def resume(folder: str | Path) -> Outcome:
    """Goes on with the run in ``folder``: the same losses, to the bit on a CPU, as if it had never stopped."""
    folder = Path(folder)
    if not (folder / "checkpoint.pt").is_file():
        raise RunError(f"{folder} holds no checkpoint.pt to go on from; start the run anew with --out {folder}")
    run = Run(build(TrainConfig, read_toml(folder / "recipe.toml")), folder)
    run.read_checkpoint()
    return run.train()


class Run:
    """The state of one run and its loop."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.device = usable_device(config.device or None)
        if not config.data.train:
            raise ConfigError("data.train is empty: say where the images are (--data PATH)")
        self.source = open_source(config.data.train)
        torch.manual_seed(config.seed)
        self.tokenizer = untrained(config).to(self.device)
        self.losses = LossSum(config.loss, self.device)
        if not any(p.requires_grad for p in self.tokenizer.parameters()):
            raise ConfigError("init.freeze leaves nothing to train: name fewer init.parts")
        self.optimizer = adamw(self.tokenizer, config.optim)
        self.average = Average(self.tokenizer, config.optim.ema)
        self.step = 0
        self.saved: int | None = None  # the step of the checkpoint in the folder
        self.skipped = 0

    # The loop

    def train(self) -> Outcome:
        optim, log = self.config.optim, self.config.log
        data = self.config.data
        batches = TrainBatches(
            self.source,
            image_size=self.tokenizer.image_size,
            batch_size=optim.batch_size,
            seed=self.config.seed,
            crop=data.crop,
            flip=data.flip,
            workers=data.workers,
            start=self.step,
        )
        self.set_modes()
        with (
            Journal(self.folder, self.step, optim.steps, optim.batch_size) as journal,
            batches,
            stop_on_signal() as stop,
        ):
            while self.step < optim.steps and not stop.is_set():
                images, skipped = next(batches)
                for name in skipped:
                    self.skipped += 1
                    journal.say(f"skipped a corrupt image: {name} ({self.skipped} so far)")
                scalars = self.train_step(images.to(self.device, non_blocking=True).float() / 255)
                scalars["skipped"] = self.skipped
                journal.step(self.step, scalars, write=self.step % log.every == 0 or self.step == optim.steps)
                if data.val and (self.step % log.val_every == 0 or self.step == optim.steps):
                    self.validate(journal)
                if self.step % log.save_every == 0 or self.step == optim.steps:
                    self.write_checkpoint()
            if self.saved != self.step:
                self.write_checkpoint()
        return Outcome(self.folder, self.step, self.step >= optim.steps)

    def train_step(self, images: Tensor) -> dict[str, float]:
        """One optimiser step. images: b 3 h w in [0, 1]. Returns what the log holds of it."""
        lr = learning_rate(self.config.optim, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            try:
                done = self.tokenizer.training_pass(images)
            except NotFiniteError as error:
                raise self._broken(str(error)) from error
        losses = self.losses(done, images, self.tokenizer.canvas.paint)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, self.config.optim.clip or math.inf)
        # The gradient too: it can overflow under a finite loss, and one such step would spoil every weight.
        if not (torch.isfinite(losses.total) and torch.isfinite(norm)):
            raise self._broken(f"the loss is {losses.total.item()} and its gradient's norm {norm.item()}")
        self.optimizer.step()
        self.average.update(self.tokenizer, self.step)
        self.step += 1
        parts = {key: value.item() for key, value in losses.parts.items()}
        return {"loss": losses.total.item(), **parts, "gradient_norm": norm.item(), "lr": lr}

    def _broken(self, what: str) -> RunError:
        kept = "no checkpoint was written yet" if self.saved is None else f"the checkpoint of step {self.saved} is kept"
        return RunError(
            f"{what} at step {self.step + 1}; {kept}. Try a lower optim.lr or a longer optim.warmup in "
            f"{self.folder / 'recipe.toml'}"
        )

    def set_modes(self) -> None:
        self.tokenizer.train()
        if self.config.init.freeze:
            for part in self.config.init.parts:
                getattr(self.tokenizer, part).eval()

    # Validation

    @torch.no_grad()
    def validate(self, journal: Journal) -> None:
        """PSNR (and the perceptual distance) of the averaged weights at each length, codebook use, and a picture."""
        model, config = self.average.model, self.config
        lengths = powers_of_two(model.max_tokens) if model.nested else [model.max_tokens]
        if len(lengths) > 4 and not model.decoder.one_pass:
            # Each length is a whole sampling run.
            lengths = sorted({*lengths[2::2], lengths[-1]})
        sums: dict[str, float] = {}
        count, first = 0, None
        usage = CodebookUsage(model.codebook_sizes)
        batches = val_batches(open_source(config.data.val), model.image_size, config.data.val_images, 64)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            for batch in batches:
                images = batch.to(self.device).float() / 255
                tokens = model.encode(images, batch_size=64)
                usage.update(tokens.ids)
                count += len(images)
                for n in lengths:
                    pictures = model.decode(tokens[:, :n], batch_size=64)
                    scores = {f"psnr@{n}": psnr(pictures, images)}
                    if self.losses.distance is not None:
                        with torch.autocast(self.device.type, enabled=False):
                            scores[f"perceptual@{n}"] = self.losses.distance(pictures, images)
                    for key, value in scores.items():
                        sums[key] = sums.get(key, 0.0) + value.sum().item()
                first = images[:8].cpu() if first is None else first
        scalars = {key: value / count for key, value in sums.items()}
        for k, used in enumerate(usage.compute()):
            scalars[f"codebook_use/{k}"] = used.used
        journal.validation(self.step, scalars, self.sample_sheet(first, lengths))

    def sample_sheet(self, images: Tensor, lengths: list[int]) -> Any:
        from tokenizers_vis.pictures import contact_sheet

        model = self.average.model
        tokens = model.encode(images)
        columns = [model.decode(tokens[:, :n]).cpu() for n in lengths]
        rows = [[*(column[i] for column in columns), images[i]] for i in range(len(images))]
        return contact_sheet(rows, columns=[*(f"{n} tokens" for n in lengths), "original"])

    # Checkpoints

    def write_checkpoint(self) -> None:
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "data": self.source.fingerprint,
            "model": self.tokenizer.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [],
        }
        try:
            write_atomically(self.folder / "checkpoint.pt", lambda path: torch.save(state, path))
            self.saved = self.step
            self.average.model.save(self.folder / "tokenizer.safetensors")
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer in C++ raises RuntimeError
            kept = "there is none yet" if self.saved is None else f"that of step {self.saved} is whole"
            raise RunError(
                f"cannot write the checkpoint of step {self.step} in {self.folder}, {kept}: "
                f"{first_line(error)}. Make room on the disk, then go on with --resume"
            ) from error

    def read_checkpoint(self) -> None:
        file = self.folder / "checkpoint.pt"
        try:
            state = torch.load(file, map_location=self.device, weights_only=True)
        except Exception as error:  # on damaged bytes torch raises nearly anything
            raise RunError(
                f"{file} is damaged and cannot be read: {first_line(error)}. Start a new run; its init.tokenizer may "
                f"be {self.folder}, whose averaged weights are in a file of their own"
            ) from error
        try:
            if state["data"] != self.source.fingerprint:
                raise RunError(
                    f"{self.config.data.train} does not hold the images that this run was started on (their names "
                    f"or sizes differ); bring those back, or start a new run with init.tokenizer={self.folder}"
                )
            self.tokenizer.load_state_dict(state["model"])
            self.average.model.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.skipped = state["step"], state["skipped"]
            self.saved = self.step
            torch.set_rng_state(state["rng"].cpu())
            if state["cuda_rng"] and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"][0].cpu(), self.device)
        except RunError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(
                f"{file} is not of the run that recipe.toml beside it describes: {first_line(error)}"
            ) from error


def untrained(config: TrainConfig) -> Tokenizer:
    """The tokenizer of a recipe, with the parts that ``init`` names taken from a trained one."""
    for part in config.tokenizer:
        if part not in PARTS:
            raise ConfigError(f"a tokenizer has no {part!r}.{did_you_mean(part, PARTS)} It has: {', '.join(PARTS)}.")
    table = {"name": config.name, **config.tokenizer}
    init = config.init
    if not init.tokenizer:
        return Tokenizer.from_config(table)
    source = load(init.tokenizer, device="cpu")
    for part in ("canvas", *init.parts):
        if table.setdefault(part, source.config[part]) != source.config[part]:
            raise ConfigError(f"tokenizer.{part} differs from that of {init.tokenizer}, which init takes; leave it out")
    if init.freeze and {"encoder", "quantizer"} <= set(init.parts):
        table["codes"] = source.codes  # the same ids: either decodes the other's files
    tokenizer = Tokenizer.from_config(table)
    for part in init.parts:
        getattr(tokenizer, part).load_state_dict(getattr(source, part).state_dict())
        getattr(tokenizer, part).requires_grad_(not init.freeze)
    for part in init.adopt:
        own, other = (getattr(t, part).state_dict() for t in (tokenizer, source))
        fitting = {key: value for key, value in other.items() if key in own and own[key].shape == value.shape}
        if not fitting:
            raise ConfigError(f"init.adopt: the {part} of {init.tokenizer} has no weight of the same name and shape")
        getattr(tokenizer, part).load_state_dict({**own, **fitting})
    return tokenizer


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
