"""Training: it learns, a stopped run goes on to the bit, and whatever goes wrong leaves a run that can go on."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import tokenizers_vis as tv
from tokenizers_vis.config import ConfigError, build, override, read_toml
from tokenizers_vis.images import load_image
from tokenizers_vis.train import loop
from tokenizers_vis.train.loop import RunError, fit, list_recipes, read_recipe, resume
from tokenizers_vis.train.optim import Average, OptimConfig, adamw, learning_rate
from tokenizers_vis.train.tokenizer_task import TrainConfig, untrained

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
# Forking is the loader's own choice; newer Pythons and machines of one core each have a word to say about it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

BASE = """
name = "tiny"
precision = "fp32"
device = "cpu"
[tokenizer]
canvas = { kind = "pixels", size = 16 }
[tokenizer.encoder]
kind = "flextok"
dim = 3
max_tokens = 4
size = 16
patch = 8
width = 32
depth = 1
heads = 2
[optim]
steps = 12
batch_size = 4
lr = 3e-3
warmup = 2
ema = 0.9
[data]
workers = 0
[log]
every = 1
val_every = 6
save_every = 5
"""
FSQ = ["tokenizer.quantizer.kind=fsq", "tokenizer.quantizer.levels=[8, 8, 8]"]
EMA_VQ = [
    "tokenizer.quantizer.kind=vq",
    "tokenizer.quantizer.dim=3",
    "tokenizer.quantizer.codebook_size=16",
    "tokenizer.quantizer.update=ema",
    "tokenizer.quantizer.kmeans_start=true",
    "tokenizer.quantizer.revive_after=2",
]
SHAPE = {"dim": 3, "max_tokens": 4, "size": 16, "patch": 8, "width": 32, "depth": 1, "heads": 2}
VIT = [f"tokenizer.decoder.{key}={value}" for key, value in {"kind": "vit", **SHAPE}.items()]
FLOW = [f"tokenizer.decoder.{key}={value}" for key, value in {"kind": "flow", **SHAPE, "steps": 4}.items()]
KINDS = {
    "vit, EMA-VQ": [*EMA_VQ, *VIT],
    "flow, null and nested dropout": [
        *FSQ,
        *FLOW,
        "tokenizer.decoder.null_rate=0.3",
        'tokenizer.encoder.lengths={ kind = "uniform", per = "image" }',
    ],
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums are added in one order here and in subprocesses."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_images(folder: Path, count: int, seed: int = 0) -> Path:
    """Smooth pictures 16 x 16: four random colours in the corners."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        corners = Image.fromarray(random.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        corners.resize((16, 16), Image.Resampling.BILINEAR).save(folder / f"{i:03}.jpg", quality=95)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", 8)


@pytest.fixture
def recipe(images: Path) -> Callable[..., dict[str, Any]]:
    return lambda *overrides: recipe_of(images, *overrides)


def recipe_of(images: Path, *overrides: str) -> dict[str, Any]:
    """A run of 12 steps with FSQ and a ViT, unless overridden."""
    data = [f"data.train={images}", f"data.val={images}"]
    return override(tomllib.loads(BASE), [*data, *(overrides or [*FSQ, *VIT])])


@pytest.fixture(scope="module")
def unbroken(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of 12 steps that nothing disturbed."""
    done: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp("unbroken") / "run"
            assert fit(recipe_of(images, *KINDS[kind]), done[kind]).finished
        return done[kind]

    return run


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Asks the run to stop, as a job scheduler does, while its nth step is done."""
    original = loop.Run.train_step

    def arm(step: int) -> None:
        def train_step(run: loop.Run, images: Tensor) -> dict[str, float]:
            scalars = original(run, images)
            if run.step == step:
                signal.raise_signal(signal.SIGTERM)
            return scalars

        monkeypatch.setattr(loop.Run, "train_step", train_step)

    return arm


def lines(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def stray_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


def same_results(one: Path, other: Path) -> bool:
    """Losses, validation and weights, to the bit."""
    ours, theirs = (tv.load(folder, device="cpu").state_dict() for folder in (one, other))
    logs = [[line for kind in ("train", "val") for line in lines(folder, kind)] for folder in (one, other)]
    # Speed is the clock's, and the window that codebook use is taken over starts anew with each call.
    lost = ("images_per", "usage/", "perplexity/", "dead/", "entropy_")
    logs = [[{key: line[key] for key in line if not key.startswith(lost)} for line in log] for log in logs]
    return logs[0] == logs[1] and all(torch.equal(ours[key], theirs[key]) for key in theirs)


# It learns


@pytest.mark.parametrize(
    ("decoder", "count", "share"),
    [
        (VIT, 8, 0.2),
        ([*FLOW, "tokenizer.decoder.patch=4", "tokenizer.decoder.predict=picture"], 2, 0.3),
    ],
    ids=["vit", "flow"],
)
def test_overfits_a_few_pictures(
    decoder: list[str], count: int, share: float, recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The squared error falls below ``share`` of what each picture's own mean colour leaves."""
    folder = write_images(tmp_path / "data", count)
    settings = ["optim.steps=250", "optim.batch_size=8", "optim.warmup=10", "data.crop=[1.0, 1.0]", "data.flip=0"]
    logs = ["log.every=5", "log.save_every=1000", "data.val=''"]
    fit(recipe(*FSQ, *decoder, f"data.train={folder}", *settings, *logs), tmp_path / "run")
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert np.mean(losses[-5:]) < 0.7 * losses[0]

    tokenizer = tv.load(tmp_path / "run", device="cpu")
    pictures = torch.stack([load_image(path).float() / 255 for path in sorted(folder.iterdir())])
    error = (tokenizer.reconstruct(pictures) - pictures).square().mean()
    assert error < share * (pictures.mean(dim=(2, 3), keepdim=True) - pictures).square().mean()


def test_perceptual_loss_is_minimised_and_logged(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "net.safetensors")
    net = ["loss.net=test_resnet", f"loss.net_weights={tmp_path / 'net.safetensors'}", "optim.batch_size=8"]
    fit(recipe(*FSQ, *VIT, *net, "optim.steps=3", "loss.perceptual=0.5"), tmp_path / "both")
    for line in lines(tmp_path / "both"):
        assert line["loss"] == pytest.approx(line["reconstruction"] + 0.5 * line["perceptual"], rel=1e-5)
    assert lines(tmp_path / "both", "val")[-1]["perceptual@4"] > 0

    alone = ["loss.reconstruction=0", "loss.perceptual=1", "optim.steps=60", "log.val_every=100"]
    fit(recipe(*FSQ, *VIT, *net, *alone), tmp_path / "alone")
    losses = [line["loss"] for line in lines(tmp_path / "alone")]
    assert np.mean(losses[-10:]) < 0.8 * losses[0]


# What a run leaves behind


def test_run_folder(unbroken: Callable[[str], Path], images: Path) -> None:
    folder = unbroken("vit, EMA-VQ")
    written = build(TrainConfig, read_toml(folder / "recipe.toml"))
    assert written == build(TrainConfig, recipe_of(images, *KINDS["vit, EMA-VQ"]))

    assert [line["step"] for line in lines(folder)] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines(folder, "val")] == [6, 12]
    assert all(math.isfinite(value) for line in lines(folder) for key, value in line.items() if key != "kind")
    assert {"usage/0", "perplexity/0", "entropy_first/0", "gradient_norm", "images_per_second"} <= lines(folder)[
        -1
    ].keys()
    sheets = sorted((folder / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["0000006.png", "0000012.png"]
    # A column for each of 1, 2 and 4 tokens, and the original; a row for each of 8 pictures.
    with Image.open(sheets[0]) as sheet:
        width, height = sheet.size
    assert width > 4 * 96 and height > 8 * 96

    tokenizer = tv.load(folder, device="cpu")
    assert (tokenizer.name, tokenizer.max_tokens, tokenizer.codebook_sizes) == ("tiny", 4, (16,))
    assert tokenizer.reconstruct(sorted(images.iterdir())[0]).shape == (1, 3, 16, 16)
    assert not stray_files(folder)


def test_saved_tokenizer_is_the_average(unbroken: Callable[[str], Path]) -> None:
    folder = unbroken("vit, EMA-VQ")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    saved = tv.load(folder, device="cpu").state_dict()
    assert all(torch.equal(saved[key], value) for key, value in state["average"].items())
    trained = {key.removeprefix("model."): value for key, value in state["model"].items()}
    assert saved.keys() == trained.keys() and not all(torch.equal(saved[key], trained[key]) for key in saved)


def test_corrupt_images_are_named_and_counted(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / ("a long folder name " * 8).strip(), 4)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    table = recipe(*FSQ, *VIT, f"data.train={folder}", "optim.steps=10")
    fit(table, tmp_path / "run")
    # 10 batches of 4 are 8 epochs of 5 images.
    told = [line for line in capsys.readouterr().err.splitlines() if "corrupt" in line]
    assert len(told) == lines(tmp_path / "run")[-1]["skipped"] >= 8
    assert all("broken.jpg" in line for line in told)
    assert f"({len(told)} so far)" in told[-1]


# A stopped run goes on


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact(
    kind: str,
    workers: int,
    unbroken: Callable[[str], Path],
    stop_after: Callable[[int], None],
    recipe: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Stopped after steps 1, 5 (where a checkpoint is due) and 8, and resumed each time."""
    folder = tmp_path / "run"
    stop_after(1)
    outcome = fit(recipe(*KINDS[kind], f"data.workers={workers}"), folder)
    for step in (5, 8):
        assert (outcome.step, outcome.finished) == (lines(folder)[-1]["step"], False)
        stop_after(step)
        outcome = resume(folder)
        assert outcome.step == step
    stop_after(-1)
    assert resume(folder).finished
    assert same_results(folder, unbroken(kind))
    assert steps_on_board(folder, "train/loss") == list(range(1, STEPS + 1))
    assert steps_on_board(folder, "val/psnr@4") == [6, 12]


def steps_on_board(folder: Path, tag: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # TensorBoard sorts files by the second and then by a counter, as text: 10 would come before 9.
    files = sorted((folder / "tensorboard").iterdir(), key=lambda file: int(file.name.rpartition(".")[2]))
    for i, file in enumerate(files):
        file.rename(file.with_name(f"events.out.tfevents.{i:04}.{i}"))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


def test_stopped_before_the_first_step(
    recipe: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    unbroken: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    listen = loop.stop_on_signal

    @contextmanager
    def stopped_at_once() -> Iterator[Any]:
        with listen() as stop:
            signal.raise_signal(signal.SIGTERM)
            yield stop

    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_on_signal", stopped_at_once)
        assert fit(recipe(*KINDS["vit, EMA-VQ"]), tmp_path / "run") == loop.Outcome(tmp_path / "run", 0, False)
    assert resume(tmp_path / "run").finished
    assert same_results(tmp_path / "run", unbroken("vit, EMA-VQ"))


def test_finished_run_stays_as_it_is(unbroken: Callable[[str], Path]) -> None:
    folder = unbroken("vit, EMA-VQ")
    before = (folder / "checkpoint.pt").read_bytes()
    outcome = resume(folder)
    assert (outcome.step, outcome.finished) == (STEPS, True)
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_second_signal_interrupts_at_once(
    recipe: Callable[..., dict[str, Any]], stop_after: Any, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), loop.stop_on_signal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_killed_run_resumes(
    recipe: Callable[..., dict[str, Any]], unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    """SIGKILL in step 8, after the checkpoint of step 5: steps 6 and 7 are done, and logged, once more."""
    folder = tmp_path / "run"
    program = f"""
import json, os, signal
from tokenizers_vis.images import load_image
from tokenizers_vis.train import loop
done = loop.Run.train_step
def train_step(run, images):
    if run.step == 7:
        with open({str(folder / "metrics.jsonl")!r}, "a") as log:
            log.write('{{"step": 8, "ki')
        os.kill(os.getpid(), signal.SIGKILL)
    return done(run, images)
loop.Run.train_step = train_step
loop.fit(json.loads({json.dumps(recipe(*KINDS["vit, EMA-VQ"]))!r}), {str(folder)!r})
"""
    process = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 9  # 7 steps, a validation, a part of a line
    assert resume(folder).finished
    assert same_results(folder, unbroken("vit, EMA-VQ"))


@pytest.mark.skipif(os.name != "posix", reason="sends signals to a process group")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_stops_on_request(
    number: int, recipe: Callable[..., dict[str, Any]], images: Path, tmp_path: Path
) -> None:
    """Ctrl-C and a job scheduler signal the whole group, data workers included."""
    from tokenizers_vis.config import to_toml

    folder = tmp_path / "my run"
    (tmp_path / "r.toml").write_text(to_toml(recipe(*FSQ, *VIT, "optim.steps=1000000", "log.save_every=1000000")))
    command = [sys.executable, "-m", "tokenizers_vis.cli", "train", str(tmp_path / "r.toml"), "data.workers=2"]
    process = subprocess.Popen(
        [*command, "--data", str(images), "--out", str(folder)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: (folder / "metrics.jsonl").is_file() and len(lines_so_far(folder)) > 2, process)
        os.killpg(process.pid, number)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, told
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    assert step == lines(folder)[-1]["step"]
    assert f"stopped after step {step}; go on with: tokenizers-vis train --resume '{folder}'" in told
    assert tv.load(folder, device="cpu").name == "tiny"
    assert not stray_files(folder)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def lines_so_far(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    pytest.fail("the run did not start within two minutes")


# What goes wrong


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
# TensorBoard's own thread may meet the limit first.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("room", [2000, 100_000], ids=["nothing fits", "half of it fits"])
def test_full_disk(
    room: int,
    recipe: Callable[..., dict[str, Any]],
    unbroken: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The system refuses to write on, as it does when the disk is full; the checkpoint before stays whole."""
    import resource

    write = loop.Run.write_checkpoint

    def limited(run: loop.Run) -> None:
        if run.step == 5:
            return write(run)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            return write(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "write_checkpoint", limited)
        with pytest.raises(RunError, match="cannot write the checkpoint of step 10.*step 5 is whole.*Make room"):
            fit(recipe(*KINDS["vit, EMA-VQ"]), folder)
    assert (folder / "checkpoint.pt").stat().st_size > room
    assert not stray_files(folder)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 5
    assert tv.load(folder, device="cpu").name == "tiny"
    assert resume(folder).finished
    assert same_results(folder, unbroken("vit, EMA-VQ"))


def test_no_space_left(recipe: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first checkpoint finds no room, and the message does not promise one."""

    def refuse(state: object, path: Path) -> None:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(RunError, match="step 5.*there is none yet.*No space left"):
        fit(recipe(), tmp_path / "run")
    assert not stray_files(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_new_run_needs_a_new_folder(recipe: Callable[..., dict[str, Any]], unbroken: Callable[[str], Path]) -> None:
    folder = unbroken("vit, EMA-VQ")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="already holds a run; go on with --resume"):
        fit(recipe(), folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_new_run_spares_a_trained_tokenizer(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.safetensors").write_bytes(b"precious")
    with pytest.raises(RunError, match="already holds a run"):
        fit(recipe(), tmp_path)
    assert (tmp_path / "tokenizer.safetensors").read_bytes() == b"precious"


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no checkpoint.pt"):
        resume(tmp_path)


@pytest.fixture
def stopped(recipe: Callable[..., dict[str, Any]], stop_after: Callable[[int], None], tmp_path: Path) -> Path:
    """A run that was stopped after step 1, on images of its own."""
    stop_after(1)
    data = write_images(tmp_path / "data", 4)
    return fit(recipe(*FSQ, *VIT, f"data.train={data}"), tmp_path / "run").folder


def test_resume_on_other_data(stopped: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "000.jpg").rename(tmp_path / "data" / "other.jpg")
    with pytest.raises(RunError, match="the data are not those that this run was started on"):
        resume(stopped)


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_resume_from_a_damaged_checkpoint(damage: str, stopped: Path) -> None:
    file = stopped / "checkpoint.pt"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "text":
        file.write_text("not a checkpoint")
    else:
        torch.save({"weights": torch.zeros(3)}, file)
    with pytest.raises(RunError, match="checkpoint.pt is "):
        resume(stopped)


def test_resume_with_another_recipe(stopped: Path) -> None:
    text = (stopped / "recipe.toml").read_text()
    (stopped / "recipe.toml").write_text(text.replace("width = 32", "width = 64"))
    with pytest.raises(RunError, match="tokenizer.decoder.width was 32, is 64; tokenizer.encoder.width was 32, is 64"):
        resume(stopped)


def test_what_may_change_is_said(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The learning rate may be lowered after a run that went astray, and the number of steps be raised."""
    text = (stopped / "recipe.toml").read_text()
    (stopped / "recipe.toml").write_text(text.replace("lr = 0.003", "lr = 0.001").replace("steps = 12", "steps = 13"))
    assert resume(stopped).step == 13
    told = capsys.readouterr().err
    assert "optim.lr was 0.003, is 0.001" in told and "optim.steps was 12, is 13" in told
    assert lines(stopped)[1]["lr"] == pytest.approx(0.001)


def test_resume_may_name_its_recipe(stopped: Path, images: Path) -> None:
    with pytest.raises(RunError, match=r"optim.batch_size was 4, is 8; tokenizer.encoder.depth was 1, is 2"):
        resume(stopped, recipe_of(images, *FSQ, *VIT, "optim.batch_size=8", "tokenizer.encoder.depth=2"))


def test_newest_and_best_are_kept(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    fit(recipe(*FSQ, *VIT, "log.save_every=2", "log.keep=3", "log.val_every=4"), tmp_path / "run")
    kept = {path.name for path in (tmp_path / "run").glob("checkpoint*.pt")}
    assert kept == {"checkpoint.pt", "checkpoint-0000010.pt", "checkpoint-0000008.pt"}
    steps = [torch.load(tmp_path / "run" / name, weights_only=True)["step"] for name in sorted(kept)]
    assert steps == [8, 10, 12]
    scores = {line["step"]: line["psnr@4"] for line in lines(tmp_path / "run", "val")}
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["best"] == max(scores.values())
    best = tv.load(tmp_path / "run" / "best.safetensors", device="cpu").state_dict()
    newest = tv.load(tmp_path / "run", device="cpu").state_dict()
    assert all(torch.equal(best[key], newest[key]) for key in best) == (max(scores, key=scores.get) == STEPS)


def test_damaged_checkpoint_is_passed_over(
    recipe: Callable[..., dict[str, Any]],
    unbroken: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """A disk that lost the newest file costs the steps since the one before, and no more."""
    folder = tmp_path / "run"
    fit(recipe(*KINDS["vit, EMA-VQ"]), folder)
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:5000])
    assert resume(folder).finished
    assert "going on from checkpoint-0000010.pt, step 10" in capsys.readouterr().err
    assert same_results(folder, unbroken("vit, EMA-VQ"))


def test_run_goes_on_without_what_it_started_from(
    source: Path, recipe: Callable[..., dict[str, Any]], stop_after: Callable[[int], None], tmp_path: Path
) -> None:
    stop_after(2)
    init = [f"init.tokenizer={source}", 'init.parts=["encoder"]', "tokenizer.canvas.resize=pad"]
    table = without(recipe(*FSQ, *VIT, *init), "encoder")
    folder = fit(table, tmp_path / "run").folder
    source.unlink()
    assert resume(folder).finished


@pytest.mark.parametrize("setting", ["accumulate=2", "checkpointing=true"])
def test_same_run_in_less_memory(
    setting: str, recipe: Callable[..., dict[str, Any]], unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    """Pieces of a batch, and activations computed again, change sums by their rounding alone."""
    for name, settings in {"plain": [], "small": [setting]}.items():
        fit(recipe(*FSQ, *VIT, "optim.steps=4", *settings), tmp_path / name)
    plain, small = (np.array([line["loss"] for line in lines(tmp_path / name)]) for name in ("plain", "small"))
    assert np.abs(small / plain - 1).max() < 2e-3


@pytest.mark.gpu
def test_half_precision_trains(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """As full precision does, but for rounding; the first steps may be lost to a loss scale that is too large."""
    for precision in ("fp16", "fp32"):
        settings = ["device=cuda", f"precision={precision}", "optim.steps=30", "log.val_every=100"]
        fit(recipe(*FSQ, *VIT, *settings), tmp_path / precision)
    half, full = ([line["loss"] for line in lines(tmp_path / precision)] for precision in ("fp16", "fp32"))
    assert half != full and np.abs(np.array(half) / np.array(full) - 1).max() < 0.05
    state = torch.load(tmp_path / "fp16" / "checkpoint.pt", weights_only=True)
    assert state["scaler"]["scale"] > 1


def test_alarms_and_speed_are_told(
    recipe: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """A codebook far larger than what four tokens of eight pictures can use; a device whose best is known."""
    monkeypatch.setattr(loop, "peak_flops", lambda device, dtype: 1e9)
    vq = ["tokenizer.quantizer.kind=vq", "tokenizer.quantizer.dim=3", "tokenizer.quantizer.codebook_size=512"]
    fit(recipe(*vq, *VIT, "optim.steps=8"), tmp_path / "run")
    told = capsys.readouterr().err
    assert "usage of codebook 0 fell below 20 %" in told and "Try to revive codes" in told
    assert all(line["mfu"] > 0 for line in lines(tmp_path / "run"))
    assert "MFU" in told


@pytest.mark.slow
def test_compiled_blocks_train_alike(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for name in ("false", "true"):
        fit(recipe(*FSQ, *VIT, "optim.steps=4", f"compile={name}"), tmp_path / name)
    plain, compiled = (np.array([line["loss"] for line in lines(tmp_path / name)]) for name in ("false", "true"))
    assert np.abs(compiled / plain - 1).max() < 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["optim.lr=1e30", "optim.warmup=0", "log.save_every=1"],
            ("at step 2 .its pictures", "the checkpoint of step 1 is kept"),
        ),
        (["loss.reconstruction=1e38"], ("norm inf at step 1", "no checkpoint was written yet")),
    ],
    ids=["loss", "gradient"],
)
def test_not_a_finite_number(
    settings: list[str], message: tuple[str, str], recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=f"(?s).*{message[0]}.*{message[1]}.*lower optim.lr"):
        fit(recipe(*FSQ, *VIT, "data.val=''", *settings), tmp_path / "run")
    if "save_every" in " ".join(settings):
        state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
        assert state["step"] == 1
        assert all(value.isfinite().all() for value in state["model"].values())
    broken = torch.load(tmp_path / "run" / "broken-0.pt", weights_only=True)
    assert broken["step"] == ("save_every" in " ".join(settings)) and broken["data"].shape == (4, 3, 16, 16)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.stepz=3", "optim.stepz: .*Did you mean 'steps'"),
        ("optim.steps=many", "optim.steps is a whole number, got 'many'"),
        ("optim.steps=0", "steps and batch_size are at least 1"),
        ("optim.ema=1", "ema from 0 to below 1"),
        ("optim.clip=-1", "clip are at least 0"),
        ("log.every=0", "every, val_every, save_every and keep are at least 1"),
        ("precision=fp8", "precision is one of 'bf16', 'fp16', 'fp32'"),
        ("precision=fp16", "needs a CUDA device, this is cpu: use 'bf16' or 'fp32'"),
        ("accumulate=3", "accumulate divides optim.batch_size .4., got 3"),
        ("task=tokeniser", "there is no task 'tokeniser'. Did you mean 'tokenizer'"),
        ("tokenizer.decodr.kind=vit", "a tokenizer has no 'decodr'. Did you mean 'decoder'"),
        ("tokenizer.decoder.kind=vat", "there is no decoder 'vat'. Did you mean 'vit'"),
        ("tokenizer.decoder.heads=5", "width 32 is not a multiple of heads 5"),
        ("tokenizer.quantizer.levels=[8, 8]", "must agree on the width of a code"),
        ("data.train=''", "data.train is empty.*--data"),
        ("data.train=no/such/folder", "there is nothing at 'no/such/folder'"),
        ("device=abacus", "the device 'abacus' cannot be used here"),
        ("init.tokenizer=x", "tokenizer comes with parts or adopt"),
        ("optim", "an override reads key.sub=value"),
    ],
)
def test_wrong_recipe_starts_nothing(
    setting: str, message: str, recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(recipe(*FSQ, *VIT, setting), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_recipe() -> None:
    with pytest.raises(ConfigError, match="there is no recipe 'minni'. Did you mean 'mini'.*give a .toml file"):
        read_recipe("minni")
    with pytest.raises(ConfigError, match="there is no file no/such.toml"):
        read_recipe("no/such.toml")


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("mini")])
def test_shipped_recipe_builds(name: str) -> None:
    table = override(read_recipe(name), ["data.train=somewhere"])
    config = build(TrainConfig, table)
    tokenizer = untrained(config)
    assert tokenizer.name == config.name
    assert any(p.requires_grad for p in tokenizer.parameters())
    assert config.optim.warmup < config.optim.steps


# Parts of a trained tokenizer


@pytest.fixture
def source(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    """A saved tokenizer whose canvas pads, with an EMA codebook that training would move."""
    settings = recipe(*EMA_VQ, *VIT, "tokenizer.canvas.resize=pad", "tokenizer.quantizer.kmeans_start=false")
    tv.Tokenizer.from_config({"name": "source", **settings["tokenizer"]}).save(tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def without(table: dict[str, Any], *parts: str) -> dict[str, Any]:
    return {**table, "tokenizer": {part: value for part, value in table["tokenizer"].items() if part not in parts}}


def test_frozen_parts_stay_as_they_were(
    source: Path, recipe: Callable[..., dict[str, Any]], tmp_path: Path, stop_after: Callable[[int], None]
) -> None:
    """A flow decoder learned over a finished encoder and codebook; also over a stop."""
    init = [f"init.tokenizer={source}", 'init.parts=["encoder", "quantizer"]', "init.freeze=true"]
    table = without(recipe(*FLOW, *init, "optim.steps=4"), "canvas", "encoder")
    start = untrained(build(TrainConfig, table)).state_dict()
    stop_after(2)
    fit(table, tmp_path / "run")
    assert resume(tmp_path / "run").finished

    trained, taken = tv.load(tmp_path / "run", device="cpu"), tv.load(source, device="cpu")
    assert trained.canvas.resize == "pad" and trained.config["decoder"]["kind"] == "flow"
    for part in ("encoder", "quantizer"):
        ours, theirs = getattr(trained, part).state_dict(), getattr(taken, part).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), part
    moved = [key for key, value in trained.state_dict().items() if not torch.equal(value, start[key])]
    assert moved and all(key.startswith("decoder.") for key in moved)


def test_parts_are_a_start_when_not_frozen(source: Path, recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    init = [f"init.tokenizer={source}", 'init.parts=["encoder", "quantizer", "decoder"]', "optim.steps=2"]
    table = without(recipe("seed=5", *init), "canvas", "encoder")
    taken = tv.load(source, device="cpu").state_dict()
    start = untrained(build(TrainConfig, table))
    assert all(torch.equal(value, taken[key]) for key, value in start.state_dict().items())
    assert all(p.requires_grad for p in start.parameters())
    fit(table, tmp_path / "run")
    trained = tv.load(tmp_path / "run", device="cpu").state_dict()
    changed = {key.partition(".")[0] for key, value in trained.items() if not torch.equal(value, taken[key])}
    assert changed == {"encoder", "quantizer", "decoder"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["tokenizer.encoder.depth=2"], "tokenizer.encoder differs from that of .*leave it out"),
        (["tokenizer.canvas.size=32"], "tokenizer.canvas differs"),
        (['init.parts=["colours"]'], "init.parts.* is one of 'canvas', 'encoder', 'quantizer', 'decoder'"),
        (["init.tokenizer=minni"], "there is no preset, file or folder 'minni'"),
        (['init.parts=["encoder", "quantizer", "decoder"]', "init.freeze=true"], "leaves nothing to train"),
    ],
)
def test_parts_that_do_not_fit(
    settings: list[str], message: str, source: Path, recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    init = [f"init.tokenizer={source}", 'init.parts=["encoder"]', "tokenizer.canvas.resize=pad"]
    with pytest.raises(ValueError, match=message):
        fit(recipe(*init, *EMA_VQ, "tokenizer.quantizer.kmeans_start=false", *VIT, *settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# The optimiser


def test_learning_rate() -> None:
    config = OptimConfig(steps=110, batch_size=1, lr=2.0, warmup=10, final=0.1)
    rates = [learning_rate(config, step) for step in range(config.steps)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[60] == pytest.approx(2.0 * (1 + 0.1) / 2)
    assert rates[-1] == pytest.approx(0.2, rel=0.01)
    assert learning_rate(config, config.steps) == pytest.approx(0.2)
    assert sorted(rates[10:], reverse=True) == rates[10:]
    constant = dataclasses.replace(config, warmup=0, final=1.0)
    assert {learning_rate(constant, step) for step in range(110)} == {2.0}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_one_group(kind: str, recipe: Callable[..., dict[str, Any]]) -> None:
    tokenizer = untrained(build(TrainConfig, recipe(*KINDS[kind])))
    tokenizer.encoder.to_codes.requires_grad_(False)
    decayed, others = adamw(tokenizer, OptimConfig(steps=1, batch_size=1, weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0)
    trainable = [id(p) for p in tokenizer.parameters() if p.requires_grad]
    assert sorted(trainable) == sorted(id(p) for p in [*decayed["params"], *others["params"]])
    names = {id(p): name for name, p in tokenizer.named_parameters()}
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert "encoder.read_patches.weight" in {names[id(p)] for p in decayed["params"]}
    assert {"encoder.registers", "encoder.read_patches.bias"} <= {names[id(p)] for p in others["params"]}


def test_average_follows_its_formula() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = Average(model, decay=0.5)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    for step in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        model(torch.randn(8, 2))
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        for key, value in model.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value if value.is_floating_point() else value.clone()
    for key, value in average.model.state_dict().items():
        torch.testing.assert_close(value, expected[key])
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())


def test_average_of_nothing_new_is_the_same() -> None:
    model = nn.Linear(64, 64)
    average = Average(model, decay=0.999)
    for step in range(50):
        average.update(model, step)
    assert torch.equal(average.model.weight, model.weight)


def test_a_flow_decoder_adopts_what_fits_of_a_one_pass_decoder(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    source = tv.Tokenizer.from_config(tiny("flextok", "fsq", "vit"))
    source.save(tmp_path / "source.safetensors")
    decoder = tiny("flextok", "fsq", "flow")["decoder"]
    config = build(
        TrainConfig,
        {
            "name": "adopted",
            "tokenizer": {"decoder": decoder},
            "init": {
                "tokenizer": str(tmp_path / "source.safetensors"),
                "parts": ["encoder", "quantizer"],
                "freeze": True,
                "adopt": ["decoder"],
            },
            "optim": {"steps": 1, "batch_size": 2},
            "data": {"train": "unused"},
        },
    )
    adopted = untrained(config)
    theirs, ours = source.decoder.state_dict(), adopted.decoder.state_dict()
    shared = [key for key in theirs if key in ours and ours[key].shape == theirs[key].shape]
    assert "token_positions" in shared and any("attention.qkv" in key for key in shared)
    assert all(torch.equal(ours[key], theirs[key]) for key in shared)
    assert all(p.requires_grad for p in adopted.decoder.parameters())
    assert adopted.codes == source.name and adopted.name == "adopted"


def test_fine_tuning_from_the_command_line(
    recipe: Callable[..., dict[str, Any]], images: Path, source: Path, tmp_path: Path
) -> None:
    """``--from`` takes a whole tokenizer; ``--decoder-only`` leaves its ids as they are."""
    from tokenizers_vis import cli

    small = ["optim.steps=3", "optim.batch_size=4", "data.workers=0", "precision=fp32", "device=cpu"]
    for name, extra in {"whole": [], "decoder": ["--decoder-only"]}.items():
        arguments = ["train", "--from", str(source), *extra, "--data", str(images), "-o", str(tmp_path / name), *small]
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
    places = (source, tmp_path / "whole", tmp_path / "decoder")
    before, whole, decoder = (tv.load(path, device="cpu") for path in places)
    pictures = sorted(images.iterdir())
    assert torch.equal(decoder.encode(pictures).ids, before.encode(pictures).ids) and decoder.codes == before.codes
    assert whole.codes != before.codes
    for part, kept in {"encoder": (False, True), "decoder": (False, False)}.items():
        start = getattr(before, part).state_dict()
        for tuned, same in zip((whole, decoder), kept, strict=True):
            now = getattr(tuned, part).state_dict()
            assert all(torch.equal(start[key], now[key]) for key in start) == same
