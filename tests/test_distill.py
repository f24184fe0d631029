"""Distillation: the student comes near its teacher's guided walk in one step, with the same ids, in a normal file."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tokenizers_vis as tv
from tokenizers_vis.cli import main
from tokenizers_vis.config import ConfigError, override
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.train import loop
from tokenizers_vis.train.distill import DistillTask, student_of
from tokenizers_vis.train.loop import fit, read_recipe, resume
from tokenizers_vis.train.task import read_config

SHAPE = {"dim": 3, "max_tokens": 4, "size": 16, "patch": 4, "width": 32, "depth": 1, "heads": 2}
TEACHERS: dict[str, dict[str, Any]] = {
    "flow": {"predict": "picture", "guidance": 1.5},
    "flextok": {"guidance": 2.0},
    "patch_flow": {},
    "shortcut": {},
    "diffusion": {"guidance": 1.5},
}
TINY = ["precision=fp32", "device=cpu", "data.workers=0", "optim.batch_size=8", "optim.warmup=2", "loss.perceptual=0.0"]


def save_teacher(path: Path, decoder: dict[str, Any], encoder: dict[str, Any] | None = None) -> Path:
    """A tokenizer all of whose weights say something, as those of a trained one do."""
    torch.manual_seed(1)
    table = {
        "name": "tiny-teacher",
        "canvas": {"kind": "pixels", "size": 16},
        "encoder": {"kind": "flextok", **SHAPE, "lengths": {"kind": "pow2", "per": "image"}} | (encoder or {}),
        "quantizer": {"kind": "fsq", "levels": [8, 8, 8]},
        "decoder": {**SHAPE, **decoder},
    }
    tok = Tokenizer.from_config(table)
    with torch.no_grad():
        for name, parameter in tok.decoder.named_parameters():
            if any(
                part in name for part in ("modulation", "to_patches", "read_patches", "read_codes", "jump", "scale")
            ):
                parameter.normal_(std=0.15)
    tok.save(path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen smooth pictures 16 x 16: four random colours in the corners."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(16):
        corners = Image.fromarray(random.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        corners.resize((16, 16), Image.Resampling.BILINEAR).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "t.safetensors", {"kind": "flow", **TEACHERS["flow"]})


def recipe_of(teacher: Path, images: Path, *overrides: str) -> dict[str, Any]:
    given = [f'teacher.tokenizer="{teacher}"', f'data.train="{images}"', "loss.real=0.0"]
    return override(read_recipe("distill"), [*given, *TINY, *overrides])


def batch_of(task: DistillTask) -> Tensor:
    with task.batches(0, 0, 1) as stream:
        return next(stream).data


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("images_per")} for line in found if line["kind"] == kind]


@pytest.fixture(scope="module")
def distilled(teacher: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 80 steps."""
    folder = tmp_path_factory.mktemp("distilled") / "run"
    steps = ["optim.steps=80", "optim.lr=3e-3", f'data.val="{images}"', "log.every=40", "log.val_every=80"]
    assert fit(recipe_of(teacher, images, *steps, "name=tiny-student"), folder).finished
    return folder


# What comes out


@pytest.mark.parametrize("options", [{}, {"seed": list(range(100, 116))}], ids=["the usual noise", "other noise"])
@pytest.mark.parametrize("n", [1, 4])
def test_the_student_is_nearer_to_the_teacher(
    teacher: Path, distilled: Path, images: Path, n: int, options: dict[str, Any]
) -> None:
    """Than the teacher itself in one step: half the distance or less, also at a prefix, also from unseen noise."""
    before, after = tv.load(teacher, device="cpu"), tv.load(distilled, device="cpu")
    tokens = before.encode(sorted(images.glob("*.png")))[:, :n]
    wanted = before.decode(tokens, steps=8, **options)
    gaps = [
        (y - wanted).square().mean()
        for y in (before.decode(tokens, steps=1, **options), after.decode(tokens, **options))
    ]
    assert gaps[1] < 0.5 * gaps[0]


def test_the_result_is_a_normal_tokenizer_of_the_same_ids(
    teacher: Path, distilled: Path, images: Path, tmp_path: Path
) -> None:
    before, after = tv.load(teacher, device="cpu"), tv.load(distilled, device="cpu")
    assert (after.name, after.codes) == ("tiny-student", "tiny-teacher")
    changed = {"steps": 1, "guidance": 1.0, "solver": "euler", "null_rate": 0.0}
    assert after.config["decoder"] == before.config["decoder"] | changed
    pictures = sorted(images.glob("*.png"))
    assert torch.equal(after.encode(pictures).ids, before.encode(pictures).ids)
    before.encode(pictures[0]).save(tmp_path / "one.tok")
    evaluations = []
    after.decode(tv.Tokens.load(tmp_path / "one.tok"), callback=lambda *told: evaluations.append(told[:2]))
    assert evaluations == [(1, 1)]
    for part in ("canvas", "encoder", "quantizer"):
        one, other = (getattr(tok, part).state_dict() for tok in (before, after))
        assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ValueError, match="without a null token"):
        after.decode(before.encode(pictures[0]), guidance=2.0)


def test_a_student_goes_on_and_gets_convolutions(teacher: Path, distilled: Path, images: Path, tmp_path: Path) -> None:
    more = recipe_of(teacher, images, f"student.tokenizer={distilled}", "student.refine=4", "optim.steps=1")
    begun = student_of(tv.load(str(teacher), "cpu"), read_config(more))
    before = tv.load(str(distilled), "cpu")
    codes = torch.randn(2, 4, 3)
    torch.testing.assert_close(begun.eval().decoder(codes), before.decoder(codes))
    fit(more, tmp_path / "run")
    after = tv.load(str(tmp_path / "run"), "cpu")
    assert after.codes == before.codes and after.config["decoder"]["refine"] == 4
    assert after.decoder.refine.last.weight.abs().sum() > 0
    for line, message in (
        ("student.tokenizer=mini-flow", "decodes ids of 'mini', its teacher those of"),
        (
            f"student.tokenizer={save_teacher(tmp_path / 'wide.safetensors', {'kind': 'flow', 'width': 64})}",
            "is another",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            student_of(tv.load(str(teacher), "cpu"), read_config(override(more, [line])))


def test_a_student_of_fewer_tokens_grows(teacher: Path, distilled: Path, images: Path, tmp_path: Path) -> None:
    before, table = tv.load(str(distilled), "cpu"), tv.load(str(teacher), "cpu").config
    more = {part: table[part] | {"max_tokens": 6} for part in ("encoder", "decoder")}
    Tokenizer.from_config(table | more | {"codes": before.codes}).save(tmp_path / "more.safetensors")
    recipe = recipe_of(tmp_path / "more.safetensors", images, f"student.tokenizer={distilled}")
    begun = student_of(tv.load(str(tmp_path / "more.safetensors"), "cpu"), read_config(recipe)).eval()
    codes = torch.randn(2, 4, 3)
    torch.testing.assert_close(begun.decoder(codes), before.decoder(codes))
    assert begun.decoder(torch.randn(2, 6, 3)).shape == (2, 3, 16, 16)


def test_a_teacher_draws_only_where_a_loss_looks(teacher: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real pictures alone may teach, from some step or always; the terms of the teacher are then not there."""
    schedule = "loss.canvas={ start = 1.0, end = 0.0, from_step = 2, to_step = 2 }"
    task = DistillTask(read_config(recipe_of(teacher, images, "loss.real_l1=1.0", schedule)), torch.device("cpu"))
    walks = []
    forward = task._teacher[0].forward
    monkeypatch.setattr(task._teacher[0], "forward", lambda *a, **k: walks.append(task.step) or forward(*a, **k))
    said = []
    for task.step in range(4):
        said.append(set(task(batch_of(task)).parts))
    assert walks == [0, 1] and said == [{"canvas", "real_l1"}] * 2 + [{"real_l1"}] * 2


def test_validation_says_both(teacher: Path, distilled: Path, images: Path) -> None:
    (told,) = lines(distilled, "val")
    before, after = tv.load(teacher, device="cpu"), tv.load(distilled, device="cpu")
    assert {key for key in told if "psnr" in key} == {f"{who}psnr@{n}" for who in ("", "teacher_") for n in (1, 2, 4)}
    pictures = torch.stack([before.canvas.fit(tv.images.load_image(path)) for path in sorted(images.glob("*.png"))])
    for who, tok in (("", after), ("teacher_", before)):
        drawn = tok.reconstruct(pictures, 2)  # the teacher in the 25 steps of its own default
        expected = -10 * (drawn - pictures).square().mean(dim=(1, 2, 3)).log10()
        assert told[f"{who}psnr@2"] == pytest.approx(expected.mean().item(), abs=1e-3)
    (sheet,) = (distilled / "samples").iterdir()
    with Image.open(sheet) as picture:
        assert picture.width > 7 * 16  # the original, and two pictures for each of three lengths


def test_a_stopped_run_goes_on_without_its_teacher(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses and weights to the bit, when the teacher's file is gone and a critic plays along."""
    teacher = save_teacher(tmp_path / "teacher.safetensors", {"kind": "flow", **TEACHERS["flow"]})
    critic = ["loss.gan.weight=0.1", "loss.gan.width=8", "loss.gan.depth=1", "loss.gan.adaptive=picture"]
    table = recipe_of(
        teacher, images, "optim.steps=6", "log.every=1", "log.val_every=3", f'data.val="{images}"', *critic
    )
    assert fit(table, tmp_path / "whole").finished
    step = loop.Run.train_step

    def stop(run: loop.Run, data: Tensor) -> dict[str, float]:
        told = step(run, data)
        if run.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return told

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "train_step", stop)
        assert fit(table, tmp_path / "run").step == 4
    teacher.unlink()
    assert resume(tmp_path / "run").finished
    assert all(lines(tmp_path / "run", kind) == lines(tmp_path / "whole", kind) for kind in ("train", "val"))
    assert {"canvas", "gan", "gan_weight", "critic"} <= lines(tmp_path / "run", "train")[-1].keys()
    one, other = (tv.load(tmp_path / name, device="cpu").state_dict() for name in ("run", "whole"))
    assert all(torch.equal(one[key], other[key]) for key in one)


# What it works on


@pytest.mark.parametrize("kind", TEACHERS)
def test_every_decoder_that_starts_from_noise_is_a_teacher(kind: str, images: Path, tmp_path: Path) -> None:
    """At first the student is the teacher, in fewer steps and unguided; only its decoder gets a gradient."""
    path = save_teacher(tmp_path / "t.safetensors", {"kind": kind, **TEACHERS[kind]})
    config = read_config(recipe_of(path, images, "teacher.steps=2", "student.usual_noise=1.0"))
    task = DistillTask(config, torch.device("cpu"))
    task.set_modes()
    data = batch_of(task)
    torch.manual_seed(3)
    losses = task(data)
    torch.manual_seed(3)
    codes, lengths = task._codes(data / 255)
    tok = tv.load(path, device="cpu")
    with torch.no_grad():
        walks = [tok.decoder(codes, lengths, **options) for options in ({"steps": 2}, {"steps": 1, "guidance": 1.0})]
    assert lengths is not None and losses.total > 0
    assert losses.total.item() == pytest.approx((walks[0] - walks[1]).square().mean().item(), rel=1e-4)
    losses.total.backward()
    learning = {name.partition(".")[0] for name, p in task.model.named_parameters() if p.grad is not None}
    assert learning == {"decoder"}
    assert not any("teacher" in key for key in task.state_dict())


def test_a_student_of_several_scales(images: Path, tmp_path: Path) -> None:
    """Each scale answers for the means of the teacher's picture, and the file draws from coarse to fine."""
    path = save_teacher(tmp_path / "t.safetensors", {"kind": "flow", "scales": [8, 16], "predict": "picture"})
    config = read_config(recipe_of(path, images, "teacher.steps=[3, 1]", "student.steps=[1, 1]"))
    task = DistillTask(config, torch.device("cpu"))
    losses = task(batch_of(task))
    assert losses.parts.keys() == {"canvas", "canvas_8"}
    assert losses.total.item() == pytest.approx(sum(losses.parts.values()).item())
    losses.total.backward()
    assert task.model.decoder.scale.grad.abs().amax(dim=1).min() > 0  # both scales learn
    task.save(task.model, tmp_path)
    sizes = []
    student = tv.load(tmp_path / "tokenizer.safetensors", device="cpu")
    student.reconstruct(torch.rand(1, 3, 16, 16), callback=lambda step, steps, seen: sizes.append(seen.shape[-1]))
    assert sizes == [8, 16]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.steps=0"], "student.steps is a whole number from 1"),
        (["student.steps=[2, 0]"], "student.steps is a whole number from 1"),
        (["teacher.steps=2", "student.steps=3"], "a teacher of 2 steps has nothing to teach a student of 3"),
        (["teacher.tokenizer="], "teacher.tokenizer is empty: name"),
        (["teacher.tokenizer=mini"], "mini draws in one pass already .decoder 'vit'.: there is nothing to distil"),
        (["student.steps=[1, 1]"], "trained at 16 px alone"),
        (["student.usual_noise=1.5"], "a share from 0 to 1"),
        (["loss.canvas=0.0"], "no loss has a weight"),
        (["loss.l1=-1.0"], "l1 is a weight, 0 or more"),
        (["data.train="], "data.train is empty"),
        (["teacher.stebs=3"], "Did you mean 'steps'"),
    ],
)
def test_what_cannot_be_distilled(overrides: list[str], message: str, teacher: Path, images: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillTask(read_config(recipe_of(teacher, images, *overrides)), torch.device("cpu"))


def test_the_perceptual_distances(teacher: Path, images: Path, tmp_path: Path) -> None:
    """To the teacher's picture and to the real one, of the same features; the weights are those of the sum."""
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("mobilenetv2_100", pretrained=False).state_dict(), tmp_path / "net.safetensors")
    weights = ["loss.perceptual=0.5", "loss.real=0.25", "loss.l1=2.0", "loss.real_l1=3.0", "loss.net=mobilenetv2_100"]
    net = [f'loss.net_weights="{tmp_path / "net.safetensors"}"']
    task = DistillTask(read_config(recipe_of(teacher, images, *weights, *net)), torch.device("cpu"))
    y, wanted = (torch.rand(2, 3, 16, 16) * 2 - 1 for _ in range(2))
    real = torch.rand(2, 3, 16, 16)
    told = task.losses(y, [], wanted, real, 0)
    pictures, goal = (y + 1) / 2, (wanted + 1) / 2
    expected = {
        "canvas": (y - wanted).square().mean(),
        "l1": (pictures - goal).abs().mean(),
        "real_l1": (pictures - real).abs().mean(),
        "perceptual": task.losses.distance(pictures, goal).mean(),
        "real": task.losses.distance(pictures, real).mean(),
    }
    assert {key: value.item() for key, value in told.parts.items()} == pytest.approx(
        {key: value.item() for key, value in expected.items()}, rel=1e-5
    )
    levels = 2 * expected["l1"] + 3 * expected["real_l1"]
    sum_ = expected["canvas"] + levels + 0.5 * expected["perceptual"] + 0.25 * expected["real"]
    assert told.total.item() == pytest.approx(sum_.item(), rel=1e-5)


# The command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def ended(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main([str(word) for word in words])
        return (exit_.value.code or 0, *capsys.readouterr())

    return ended


def test_the_command(run: Callable[..., Any], teacher: Path, images: Path) -> None:
    settings = ["loss.real=0.0", *TINY, "optim.steps=2", "student.usual_noise=1.0"]
    words = ["distill", teacher, *settings, "--steps", 2, "--teacher-steps", 3, "--data", images]
    told = f"trained 2 steps; the tokenizer is {Path('runs/distilled/tokenizer.safetensors')}\n"
    assert run(*words)[:2] == (0, told)
    tok = tv.load("runs/distilled", device="cpu")
    assert tok.name == "distilled" and tok.config["decoder"]["steps"] == 2
    assert 'tokenizer = "' in Path("runs/distilled/recipe.toml").read_text()
    assert run("distill", "--resume", "runs/distilled")[:2] == (0, told)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill"], "name the TEACHER"),
        (["distill", "mini", "--data", "."], "mini draws in one pass already"),
        (["distill", "mini", "--resume", "runs/x"], "give --resume alone"),
        (["distill", "mini", "--recipe", "mini"], "mini is no recipe of distillation"),
        (["distill", "no-such", "--data", "."], "no-such"),
    ],
)
def test_the_command_refuses(
    run: Callable[..., Any], images: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    words = [str(images) if word == "." else word for word in words]
    code, _, err = run(*words)
    assert code == 1 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
