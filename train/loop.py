"""The training loop: a recipe becomes a model, on one process or many, and a killed run goes on exactly where it was.

A run folder holds ``recipe.toml`` (resolved), ``checkpoint.pt`` (everything needed to go on) and older ones beside it,
the averaged weights as users load them (``tokenizer.safetensors``; ``best.safetensors`` is the best validated one),
``metrics.jsonl``, ``samples/*.png``, TensorBoard's events, and ``skipped.txt`` where images could not be read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenizers_vis.config import ConfigError, did_you_mean, read_toml, to_toml
from tokenizers_vis.files import write_atomically
from tokenizers_vis.quantizers.base import NotFiniteError
from tokenizers_vis.train.checkpoints import NEWEST, Checkpoints, load_weights, read_checkpoint
from tokenizers_vis.train.health import alarms, peak_flops, training_flops
from tokenizers_vis.train.journal import Journal, stop_on_signal
from tokenizers_vis.train.losses import Losses
from tokenizers_vis.train.optim import Average, adamw, learning_rate
from tokenizers_vis.train.processes import Processes, transformer_blocks
from tokenizers_vis.train.task import RunConfig, RunError, read_config, task_type

# What a checkpoint cannot be gone on with when the recipe says another; the rest may be changed in recipe.toml.
FIXED = ("task", "seed", "name", "optim.batch_size", "tokenizer", "init", "model", "student", "teacher")
# fp16 loses a step now and then, when its loss scale was too large; so many in a row are no accident.
LOST_STEPS = 50


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

    Started by ``torchrun`` or ``accelerate launch``, every process calls this; one of them writes the folder.
    Ctrl-C or SIGTERM finishes the step at hand, writes a checkpoint and returns.
    """
    config = read_config(table)
    folder = Path(folder)
    processes = Processes(config)
    if any((folder / name).exists() for name in (NEWEST, "tokenizer.safetensors", "generator.safetensors")):
        raise RunError(f"{folder} already holds a run; go on with --resume {folder}, or choose another --out")
    run = Run(config, folder, processes)
    if processes.main:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "recipe.toml", to_toml(dataclasses.asdict(config)).encode())
    processes.wait()
    return run.train()


def resume(folder: str | Path, table: Mapping[str, Any] | None = None) -> Outcome:
    """Goes on with the run in ``folder``: the same losses, to the bit on a CPU, as if it had never stopped.

    table: a recipe that the run should be of; where it says another thing, ``RunError`` names the keys.
    """
    folder = Path(folder)
    if not (folder / NEWEST).is_file():
        raise RunError(f"{folder} holds no {NEWEST} to go on from; start the run anew with --out {folder}")
    config = read_config(read_toml(folder / "recipe.toml"))
    if table is not None:
        config = read_config(table)
    processes = Processes(config)
    state = read_checkpoint(folder, processes.say)
    changed = differences(state["recipe"], dataclasses.asdict(config))
    if fixed := [line for key, line in changed.items() if key.startswith(FIXED)]:
        raise RunError(
            f"the run in {folder} was started with another recipe: {'; '.join(fixed)}. Put these back, or start a new "
            "run with another --out"
        )
    for line in changed.values():
        processes.say(f"the recipe has changed: {line}")
    run = Run(config, folder, processes, state)
    return run.train()


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """key.sub -> ``key.sub was 1, is 2`` of two tables of plain values."""
    found: dict[str, str] = {}
    for key in sorted({*before, *now}):
        one, other = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found |= differences(one, other, f"{prefix}{key}.")
        elif _plain(one) != _plain(other):
            found[prefix + key] = f"{prefix}{key} was {one!r}, is {other!r}"
    return found


class Run:
    """The state of one run and its loop. ``state`` is a checkpoint to go on from."""

    def __init__(
        self, config: RunConfig, folder: Path, processes: Processes, state: Mapping[str, Any] | None = None
    ) -> None:
        self.config, self.folder, self.processes = config, folder, processes
        self.device = processes.device
        torch.manual_seed(config.seed)
        self.task = task_type(config.task)(config, self.device, state and state["built"]).to(self.device)
        self.step, self.skipped, self.best = 0, 0, -math.inf
        self.checkpoints = Checkpoints(folder, config.log.keep, state and state["step"])
        self.lost = 0
        self.history: deque[dict[str, float]] = deque(maxlen=100)
        if state is not None:
            self._check_data(state)
            load_weights(self.task, state["model"], folder)
        self.average = Average(self.task.model, config.optim.ema)
        if state is not None:
            load_weights(self.average.model, state["average"], folder)
        if config.compile or config.checkpointing:
            _prepare_blocks(self.task.model, config)
        self.wrapped, self.optimizer = processes.prepare(self.task, lambda task: adamw(task, config.optim))
        self.average.follow(self.task.model)
        self.critic, self.critic_optimizer = None, None
        if self.task.critic is not None:
            self.task.critic.to(self.device)
            if state is not None:
                load_weights(self.task.critic, state["critic"], folder)
            options = self.task.critic.optim(config.optim)
            # Small beside the model: never sharded.
            self.critic, self.critic_optimizer = processes.prepare(
                self.task.critic, lambda critic: adamw(critic, options), whole=True
            )
        if state is not None:
            self._restore(state)
        else:
            # Each process draws its own lengths, noise and dropout; the weights above were drawn from one seed.
            torch.manual_seed(config.seed + processes.rank)

    # The loop

    def train(self) -> Outcome:
        optim, log = self.config.optim, self.config.log
        self.task.set_modes()
        if self.processes.main:
            self.checkpoints.clean()
        batches = self.task.batches(self.step, self.processes.rank, self.processes.world)
        journal = Journal(self.folder, self.step, optim.steps, optim.batch_size, self.task.rows, self.processes.main)
        # Known for GPUs alone; a graph that was compiled hides its arithmetic.
        peak = None if self.config.compile else peak_flops(self.device, self.processes.dtype)
        start, told = self.step, []
        with journal, batches as stream, stop_on_signal() as stop:
            while self.step < optim.steps and not self.processes.any(stop.is_set()):
                batch = next(stream)
                self._note_skipped(batch.skipped, journal)
                due = (self.step + 1) % log.every == 0 or self.step + 1 == optim.steps
                if self.step == start and peak:
                    # The first step is counted as it is made.
                    flops = training_flops(lambda data=batch.data: told.append(self.train_step(data)))
                    journal.flops, scalars = flops / peak, told[0]
                else:
                    scalars = self.train_step(batch.data)
                journal.step(self.step, scalars)
                if due:
                    scalars |= self.task.scalars() | {"skipped": self.processes.total(self.skipped)}
                    journal.write(self.step, scalars)
                    for alarm in alarms(scalars, list(self.history)):
                        journal.alarm(self.step, alarm)
                    self.history.append(scalars)
                if self.step % log.val_every == 0 or self.step == optim.steps:
                    self.validate(journal)
                if self.step % log.save_every == 0 or self.step == optim.steps:
                    self.write_checkpoint()
            if self.checkpoints.saved != self.step:
                self.write_checkpoint()
        return Outcome(self.folder, self.step, self.step >= optim.steps)

    def train_step(self, data: Any) -> dict[str, float]:
        """One optimiser step on this process' rows. Returns what the log holds of it."""
        config, task = self.config, self.task
        lr = learning_rate(config.optim, self.step)
        set_rate(self.optimizer, lr)
        task.step = self.step
        rng = torch.get_rng_state()
        data = _to(data, self.device)
        pieces = _split(data, config.accumulate)
        kept: list[Losses] = []
        self.optimizer.zero_grad(set_to_none=True)
        for i, piece in enumerate(pieces):
            with self.processes.gathering(self.wrapped, last=i == len(pieces) - 1):
                try:
                    losses = self.wrapped(piece)
                except NotFiniteError as error:
                    raise self._broken(str(error), data, rng) from error
                self.processes.backward(losses.total / len(pieces))
            kept.append(_without_gradient(losses))
        norm = self.processes.clip(self.optimizer, config.optim.clip or math.inf)
        told = self._means({"loss": [losses.total for losses in kept]} | _by_name(kept)) | {
            "gradient_norm": norm.item()
        }
        # The gradient too: it can overflow under a finite loss, and one such step would spoil every weight.
        finite = math.isfinite(told["gradient_norm"])
        self.lost = 0 if finite else self.lost + 1
        if not math.isfinite(told["loss"]) or (self.lost > (LOST_STEPS if config.precision == "fp16" else 0)):
            what = f"the loss is {told['loss']} and its gradient's norm {told['gradient_norm']}"
            raise self._broken(what, data, rng)
        self.optimizer.step()
        if self.critic is not None:
            pairs = [(losses.fake, task.real(piece)) for losses, piece in zip(kept, pieces, strict=True)]
            told |= self._critic_step([(fake, real) for fake, real in pairs if fake is not None], lr)
        self.average.update(task.model, self.step)
        self.step += 1
        return told | {"lr": lr}

    def _critic_step(self, pairs: list[tuple[Tensor, Tensor]], lr: float) -> dict[str, float]:
        """The critic learns to tell the pictures of this step from real ones. Nothing before its start step."""
        if not pairs:
            return {}
        set_rate(self.critic_optimizer, lr * self.task.critic.rate)
        self.critic_optimizer.zero_grad(set_to_none=True)
        kept = []
        for i, (fake, real) in enumerate(pairs):
            with self.processes.gathering(self.critic, whole=True, last=i == len(pairs) - 1):
                losses = self.critic(fake, real)
                self.processes.backward(losses.total / len(pairs))
            kept.append(_without_gradient(losses))
        norm = self.processes.clip(self.critic_optimizer, self.config.optim.clip or math.inf)
        if torch.isfinite(norm):
            self.critic_optimizer.step()
        return self._means(_by_name(kept))

    def _means(self, named: dict[str, list[Tensor]]) -> dict[str, float]:
        """Each name's mean over pieces and processes, fetched from the device at once."""
        values = torch.stack([torch.stack(list(map(_scalar, values))).mean() for values in named.values()])
        return dict(zip(named, self.processes.mean(values).tolist(), strict=True))

    def _broken(self, what: str, data: Any, rng: Tensor) -> RunError:
        """The error to raise; the step is saved first, so that it can be looked at."""
        saved = self.checkpoints.saved
        kept = "no checkpoint was written yet" if saved is None else f"the checkpoint of step {saved} is kept"
        state = {"step": self.step, "data": data, "rng": rng, "model": self.task.state_dict(), "what": what}
        looked_at = ""
        if self.processes.sharded is False:
            name = f"broken-{self.processes.rank}.pt"
            with suppress(OSError, RuntimeError):
                write_atomically(self.folder / name, lambda path: torch.save(state, path))
                looked_at = f" (its pictures, weights and random state are in {name})"
        return RunError(
            f"{what} at step {self.step + 1}{looked_at}; {kept}. Try a lower optim.lr or a longer optim.warmup in "
            f"{self.folder / 'recipe.toml'}, then go on with --resume"
        )

    # Validation

    def validate(self, journal: Journal) -> None:
        """The averaged weights, judged by the first process while the others wait."""
        model = self.average.whole()
        if self.processes.main:
            precision = self.processes.dtype
            with torch.autocast(self.device.type, precision, enabled=precision is not torch.float32):
                found = self.task.validate(model)
            if found is not None:
                score = self.task.score(found.scalars)
                if score is not None and score > self.best:
                    self.best = score
                    save = functools.partial(self.task.save, model, self.folder, "best.safetensors")
                    self.checkpoints.guarded(self.step, save)
                journal.validation(self.step, found.scalars, found.sheet)
        self.processes.wait()

    # Data that could not be read

    def _note_skipped(self, names: list[str], journal: Journal) -> None:
        for name in names:
            self.skipped += 1
            journal.say(f"skipped a corrupt image: {name} ({self.skipped} so far)")
        if names:
            with (self.folder / "skipped.txt").open("a", encoding="utf-8") as file:
                file.writelines(f"{name}\n" for name in names)

    def _check_data(self, state: Mapping[str, Any]) -> None:
        if state["data"] != self.task.fingerprint:
            raise RunError(
                "the data are not those that this run was started on (their names or sizes differ); bring those back, "
                "or start a new run with another --out"
            )

    # Checkpoints

    def write_checkpoint(self) -> None:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        average = self.average.whole()
        state = {
            "step": self.step,
            "recipe": dataclasses.asdict(self.config),
            "built": self.task.built,
            "data": self.task.fingerprint,
            "best": self.best,
            "skipped": self.processes.gather(self.skipped),
            "rng": self.processes.gather(rng),
            "model": self.processes.state(self.task),
            "average": average.state_dict(),
            "optimizer": self.processes.optimizer_state(self.wrapped, self.optimizer),
            "scaler": self.processes.scaler_state(),
            "critic": None if self.critic is None else self.task.critic.state_dict(),
            "critic_optimizer": None if self.critic is None else self.critic_optimizer.state_dict(),
        }

        def write() -> None:
            self.checkpoints.save(state)
            self.task.save(average, self.folder)

        if self.processes.main:
            self.checkpoints.guarded(self.step, write)
        self.processes.wait()
        self.checkpoints.saved = self.step  # in every process, so that all agree on what is left to write

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Optimiser, counts and random states; the weights are loaded already."""
        processes = self.processes
        processes.load_optimizer(self.wrapped, self.optimizer, state["optimizer"])
        processes.load_scaler(state["scaler"])
        if self.critic is not None:
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.step = state["step"]
        self.best = state["best"]
        before, now = len(state["rng"]), processes.world
        self.skipped = state["skipped"][processes.rank] if before == now else sum(state["skipped"]) * processes.main
        if before == now:
            rng = state["rng"][processes.rank]
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and self.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], self.device)
            return
        processes.say(
            f"the run had {before} process{'es' * (before > 1)}, now it has {now}: it goes on with the same batches, "
            "but random draws (lengths, noise) are others than they would have been"
        )
        torch.manual_seed(hash((self.config.seed, self.step, processes.rank)) % 2**63)


def _prepare_blocks(model: nn.Module, config: RunConfig) -> None:
    """Compiles transformer blocks (encoder and decoder, where there are none), or lets them forget activations."""
    blocks = transformer_blocks(model)
    if config.checkpointing:
        if not blocks:
            raise ConfigError("checkpointing works on transformer blocks, and this model has none; leave it out")
        for block in blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if config.compile:
        whole = [getattr(model, part) for part in ("encoder", "decoder") if hasattr(model, part)] or [model]
        for module in blocks or whole:
            module.compile()


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """``lr`` for each group, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)


def _to(data: Any, device: torch.device) -> Any:
    """Tensors, and named tuples of tensors, onto a device."""
    if isinstance(data, Tensor):
        return data.to(device, non_blocking=True)
    return type(data)(*(_to(part, device) for part in data))


def _split(data: Any, pieces: int) -> list[Any]:
    """The rows in so many equal pieces."""
    if pieces == 1:
        return [data]
    if isinstance(data, Tensor):
        return list(data.chunk(pieces))
    return [type(data)(*parts) for parts in zip(*(_split(part, pieces) for part in data), strict=True)]


def _without_gradient(losses: Losses) -> Losses:
    """The graph is let go of before the next piece is computed."""
    fake = None if losses.fake is None else losses.fake.detach()
    return Losses(losses.total.detach(), {key: _scalar(value).detach() for key, value in losses.parts.items()}, fake)


def _by_name(kept: list[Losses]) -> dict[str, list[Tensor]]:
    return {key: [losses.parts[key] for losses in kept] for key in kept[0].parts}


def _scalar(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32)


def _plain(value: Any) -> Any:
    """Tuples and lists are alike in a recipe."""
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return value
