"""Distilling a sampler: a decoder that starts from noise learns to draw in a step or few what it drew in many.

The student starts as its teacher and learns, from the same noise, the picture that the teacher's guided walk ends in:
Luhman and Luhman 2021, "Knowledge Distillation in Iterative Generative Models", arXiv 2101.02388. Distances in feature
nets keep it sharp (Kim et al. 2024, arXiv 2310.02279), the one to the real picture lets it surpass its teacher, and a
critic may join them. Canvas, encoder and quantizer are the teacher's and stay, so that the ids do too.

Letters: b batch, n tokens, d width of a code, y b c h w on the canvas.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.decoders.base import Decoder
from tokenizers_vis.decoders.sampling import Sampling
from tokenizers_vis.encoders.base import powers_of_two
from tokenizers_vis.eval.metrics import psnr
from tokenizers_vis.presets import load
from tokenizers_vis.sources import open_source
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train.adversary import Critic
from tokenizers_vis.train.data import DataConfig, TrainBatches, val_batches
from tokenizers_vis.train.distill_losses import DistillLoss, DistillSum
from tokenizers_vis.train.task import RunConfig, Task, Validation
from tokenizers_vis.train.terms import Losses
from tokenizers_vis.train.tokenizer_task import with_rows

Steps = int | tuple[int, ...]


@dataclass(frozen=True)
class TeacherConfig:
    """tokenizer: a preset, file or run folder, whose decoder starts from noise. weights: for a preset, its file.

    steps: of the walks that are learned from, or one number for each scale. The other options are the teacher's own
    defaults where they are not given.
    """

    tokenizer: str = ""
    weights: str = ""
    steps: Steps = 8
    guidance: float | None = None
    guidance_kind: str | None = None
    solver: str | None = None
    schedule: str | None = None

    def __post_init__(self) -> None:
        total("teacher.steps", self.steps)

    @property
    def options(self) -> dict[str, Any]:
        """What was given beside ``steps``, as ``decode`` takes it."""
        names = ("guidance", "guidance_kind", "solver", "schedule")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class StudentConfig:
    """steps: of its walk, which become its default; or one number for each scale that the teacher was trained at.

    usual_noise: share of training images that start from the one noise that ``decode`` starts from where no seed is
        given; the others start from noise of their own.
    tokenizer: an earlier student of the same tokens, or of the first of them, whose decoder goes on learning; "" starts
        from the teacher's.
    refine: channels of the convolutions that follow its patches, where the decoder can have some (``Refine``); 0 leaves
        them as the teacher has them.
    """

    steps: Steps = 1
    usual_noise: float = 0.5
    tokenizer: str = ""
    refine: int = 0

    def __post_init__(self) -> None:
        total("student.steps", self.steps)
        if not 0 <= self.usual_noise <= 1:
            raise ValueError(f"usual_noise is a share from 0 to 1, got {self.usual_noise}")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RunConfig):
    task: str = "distill"
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig
    loss: DistillLoss = field(default_factory=DistillLoss)

    def __post_init__(self) -> None:
        super().__post_init__()
        if total("teacher.steps", self.teacher.steps) < total("student.steps", self.student.steps):
            raise ValueError(
                f"a teacher of {self.teacher.steps} steps has nothing to teach a student of {self.student.steps}: give "
                "teacher.steps more, or student.steps fewer"
            )


class DistillTask(Task):
    """See ``Task``. The checkpoint holds the teacher's decoder, so that a resumed run needs no other file."""

    config_type = DistillConfig

    def __init__(self, config: DistillConfig, device: torch.device, built: Mapping[str, Any] | None = None) -> None:
        super().__init__(config, device, built)
        if not config.data.train:
            raise ConfigError("data.train is empty: say where the images are (--data PATH)")
        self.source = open_source(config.data.train)
        self.fingerprint = self.source.fingerprint
        if built is None:
            teacher = find_teacher(config.teacher)
            self.model = student_of(teacher, config)
            self._table, decoder = teacher.config["decoder"], teacher.decoder
        else:
            self.model = Tokenizer.from_config(built["student"])
            self._table, decoder = built["teacher"], build(Decoder, built["teacher"], "decoder")
            decoder.load_state_dict(built["weights"])
        for part in self._frozen:
            part.requires_grad_(False)
        # In a tuple, which registers nothing: it is neither trained nor saved with the student.
        self._teacher = (decoder.to(device).eval().requires_grad_(False),)
        self._usual = Sampling(steps=1).start(1, decoder.shape).to(device)
        # The teacher's scores do not change: what they are is computed once, and what it drew for the sheet.
        self._taught: tuple[dict[str, float], dict[int, Tensor]] | None = None
        self.losses = DistillSum(config.loss, self.model, device)

    @property
    def _frozen(self) -> tuple[torch.nn.Module, ...]:
        return self.model.canvas, self.model.encoder, self.model.quantizer

    @property
    def critic(self) -> Critic | None:  # no attribute, which would register it here
        return self.losses.critic

    @property
    def built(self) -> dict[str, Any]:
        return {"student": self.model.config, "teacher": self._table, "weights": self._teacher[0].state_dict()}

    def batches(self, start: int, rank: int, world: int) -> TrainBatches:
        size, batch_size, seed = self.model.image_size, self.config.optim.batch_size, self.config.seed
        place = {"start": start, "rank": rank, "world": world}
        return TrainBatches.of(
            self.source, self.config.data, image_size=size, batch_size=batch_size, seed=seed, **place
        )

    def set_modes(self) -> None:
        self.train()
        for part in self._frozen:
            part.eval()

    def forward(self, data: Tensor) -> Losses:
        """data: b 3 h w, uint8."""
        images = data.float() / 255
        config = self.config
        with torch.no_grad():
            codes, lengths = self._codes(images)
            noise = self._noise(len(images))
            wanted = None
            if config.loss.of_teacher(self.step):
                options = config.teacher.options | {"steps": config.teacher.steps, "noise": noise}
                wanted = self._teacher[0](codes, lengths, **options)
        seen: dict[int, Tensor] = {}  # what the last step at each size made of the picture

        def watch(step: int, steps: int, estimate: Tensor) -> None:
            seen[estimate.shape[-1]] = estimate

        y = self.model.decoder(codes, lengths, noise=noise, callback=watch)
        coarse = [estimate for size, estimate in seen.items() if size < y.shape[-1]]
        return self.losses(y, coarse, wanted, images, self.step)

    def _codes(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes b n d at lengths of the encoder's policy, as ``Tokenizer.training_pass`` draws them."""
        encoder = self.model.encoder
        lengths = encoder.lengths.sample(len(images), encoder.max_tokens)
        n = encoder.max_tokens if lengths is None else int(lengths.max())
        z = encoder(self.model.canvas.read(images), n if encoder.causal else encoder.max_tokens)
        ragged = None if lengths is None or bool((lengths == n).all()) else lengths.to(images.device)
        return self.model.quantizer(z).codes[:, :n], ragged

    def _noise(self, b: int) -> Tensor:
        """b c h w."""
        usual = self._usual
        noise = torch.randn(b, *usual.shape[1:], device=usual.device)
        as_usual = torch.rand(b, 1, 1, 1, device=usual.device) < self.config.student.usual_noise
        return torch.where(as_usual, usual, noise)

    def real(self, data: Tensor) -> Tensor:
        return data.float() / 255

    @torch.no_grad()
    def validate(self, model: Tokenizer) -> Validation | None:
        """PSNR (and the perceptual distance) to the original at some lengths: the student's, and as ``teacher_...``
        those of the teacher with the steps of its own default. In the sheet both beside the original."""
        data = self.config.data
        if not data.val:
            return None
        lengths = powers_of_two(model.max_tokens) if model.nested else [model.max_tokens]
        if len(lengths) > 4:
            # Each length is a whole sampling run.
            lengths = sorted({*lengths[2::2], lengths[-1]})
        learned = self._judge(model, lengths, {})
        if self._taught is None:
            parts = {"canvas": model.canvas, "encoder": model.encoder, "quantizer": model.quantizer}
            teacher = Tokenizer(**parts, decoder=self._teacher[0], config=model.config | {"decoder": self._table})
            self._taught = self._judge(teacher, lengths, self.config.teacher.options)
        scalars = learned[0] | {f"teacher_{key}": value for key, value in self._taught[0].items()}
        from tokenizers_vis.pictures import contact_sheet

        columns, heads = [learned[1][0]], ["original"]
        for n in lengths:
            columns += [self._taught[1][n], learned[1][n]]
            heads += [f"{who}, {n} token{'s' * (n > 1)}" for who in ("teacher", "student")]
        return Validation(scalars, contact_sheet(list(zip(*columns, strict=True)), columns=heads))

    def _judge(
        self, tokenizer: Tokenizer, lengths: list[int], options: Mapping[str, Any]
    ) -> tuple[dict[str, float], dict[int, Tensor]]:
        """The mean scores, and the first pictures by length; the originals are those of length 0."""
        data = self.config.data
        sums: dict[str, float] = {}
        pictures: dict[int, Tensor] = {}
        count = 0
        for batch in val_batches(open_source(data.val), tokenizer.image_size, data.val_images, 64):
            images = batch.to(tokenizer.device).float() / 255
            tokens = tokenizer.encode(images, batch_size=64)
            pictures.setdefault(0, images[:8].cpu())
            for n in lengths:
                drawn = tokenizer.decode(tokens[:, :n], batch_size=64, **options)
                pictures.setdefault(n, drawn[:8].cpu())
                scores = {f"psnr@{n}": psnr(drawn, images)}
                if self.losses.distance is not None:
                    with torch.autocast(images.device.type, enabled=False):
                        scores[f"perceptual@{n}"] = self.losses.distance(drawn, images)
                for key, value in scores.items():
                    sums[key] = sums.get(key, 0.0) + value.sum().item()
            count += len(images)
        return {key: value / count for key, value in sums.items()}, pictures

    def score(self, scalars: Mapping[str, float]) -> float | None:
        """The perceptual distance with all tokens where there is one, else PSNR."""
        n = self.model.max_tokens
        return -scalars[f"perceptual@{n}"] if f"perceptual@{n}" in scalars else scalars.get(f"psnr@{n}")

    def save(self, model: Tokenizer, folder: Path, name: str | None = None) -> None:
        model.save(folder / (name or "tokenizer.safetensors"))


def find_teacher(config: TeacherConfig) -> Tokenizer:
    """The teacher, on the CPU. Raises ``ConfigError`` for one that draws in one pass, and as ``load`` does."""
    if not config.tokenizer:
        raise ConfigError("teacher.tokenizer is empty: name a preset, a checkpoint or a run folder to distil")
    teacher = load(config.tokenizer, "cpu", weights=config.weights or None)
    if teacher.decoder.one_pass:
        kind = teacher.config["decoder"]["kind"]
        raise ConfigError(
            f"{config.tokenizer} draws in one pass already (decoder {kind!r}): there is nothing to distil. A teacher's "
            "decoder starts from noise: flow, diffusion, patch_flow, shortcut, flextok"
        )
    return teacher


def student_of(teacher: Tokenizer, config: DistillConfig) -> Tokenizer:
    """A copy of the teacher that draws in the student's steps without guidance. Its tokens are the teacher's."""
    # What it was told in guidance it knows by itself; a null token, which it does not train on, would mislead.
    changed = {"steps": config.student.steps, "guidance": 1.0, "solver": "euler", "null_rate": 0.0}
    takes = inspect.signature(type(teacher.decoder)).parameters
    if config.student.refine:
        changed["refine"] = config.student.refine
        if "refine" not in takes:
            raise ConfigError(
                f"student.refine: a decoder of kind {teacher.config['decoder']['kind']!r} has no such part"
            )
    decoder = teacher.config["decoder"] | {key: value for key, value in changed.items() if key in takes}
    student = Tokenizer.from_config(teacher.config | {"name": config.name, "codes": teacher.codes, "decoder": decoder})
    start = teacher
    if config.student.tokenizer:
        start = load(config.student.tokenizer, "cpu")
        if start.codes != teacher.codes:
            raise ConfigError(
                f"student.tokenizer decodes ids of {start.codes!r}, its teacher those of {teacher.codes!r}"
            )
    try:
        # Convolutions that are new begin as nothing.
        fresh = {key: value for key, value in student.state_dict().items() if key.startswith("decoder.refine.")}
        drawn = with_rows(start.decoder.state_dict(), teacher.decoder.state_dict(), teacher.decoder.tables)
        drawn = {f"decoder.{key}": value for key, value in drawn.items()}
        student.load_state_dict(fresh | teacher.state_dict() | drawn)
    except RuntimeError as error:
        raise ConfigError(
            f"student.tokenizer: the decoder of {start.name} is another than its teacher's: {error}"
        ) from None
    return student


def total(name: str, steps: Steps) -> int:
    """All steps of a walk. Raises ``ValueError``."""
    many = [steps] if isinstance(steps, int) else list(steps)
    if not many or min(many) < 1:
        raise ValueError(f"{name} is a whole number from 1, or one for each scale; got {steps!r}")
    return sum(many)
