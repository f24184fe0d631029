"""A picture depends on its codes and its seed, on nothing else; what is computed once changes nothing."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.decoders.base import Decoder, DecoderLoss
from tokenizers_vis.decoders.flow import FlowDecoder
from tokenizers_vis.decoders.guidance import AdaptiveProjected, ClassifierFree
from tokenizers_vis.decoders.paths import random_times
from tokenizers_vis.decoders.sampling import Sampling
from tokenizers_vis.decoders.solvers import SOLVERS
from tokenizers_vis.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"dim": 5, "max_tokens": 6, "size": 16, "patch": 8, "width": 32, "depth": 2, "heads": 2}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def decoder(kind: str = "flow", **changes) -> Decoder:
    """In eval mode. It starts with zeros in its last layers, so that these are drawn again."""
    made = build(Decoder, {"kind": kind, **SHAPE, "steps": 2, "guidance": 1, **changes}).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if any(part in name for part in ("modulation", "to_patches", "read_patches", "jump")):
                parameter.normal_(std=0.2)
    return made.requires_grad_(False)


def flow(**changes) -> FlowDecoder:
    return decoder("flow", **changes)


@pytest.fixture
def codes() -> Tensor:
    return torch.randn(4, 6, 5)


def counted(made: FlowDecoder) -> list[int]:
    """How many images each pass through the network held, from now on."""
    passes: list[int] = []
    made.norm.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    return passes


# -- options


def test_defaults_are_the_constructor_s_and_options_win(codes):
    said = {"steps": 3, "guidance": 2.0, "guidance_kind": "apg", "solver": "heun", "schedule": "shifted:2"}
    made = flow(**said)
    assert torch.equal(made(codes), made(codes, **said))
    for change in (
        {"steps": 4},
        {"guidance": 3.0},
        {"guidance_kind": "cfg"},
        {"solver": "euler"},
        {"solver": "unipc"},
        {"schedule": "uniform"},
    ):
        assert not torch.allclose(made(codes), made(codes, **change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 3}, "no option step; it takes steps, .*Did you mean 'steps'"),
        ({"steps": 0}, "steps is a whole number from 1, or one for each scale, got 0"),
        ({"steps": -1}, "steps is a whole number"),
        ({"steps": 2.0}, "steps is a whole number"),
        ({"steps": True}, "steps is a whole number"),
        ({"steps": None}, "steps is a whole number"),
        ({"guidance": "3"}, "guidance is a number"),
        ({"guidance": None}, "guidance is a number"),
        ({"guidance": math.nan}, "guidance is a number"),
        ({"guidance": lambda t: 2.0}, "guidance is a number .* or a Guidance"),
        ({"guidance": ClassifierFree(2.0), "guidance_kind": "apg"}, "leave guidance_kind out"),
        ({"guidance_kind": "cgf"}, "guidance_kind is one of 'cfg', 'apg'; got 'cgf'. Did you mean 'cfg'"),
        ({"solver": "rk4"}, "solver is one of 'euler', 'heun', 'dpm\\+\\+', 'unipc'; got 'rk4'"),
        ({"solver": "unipcc"}, "Did you mean 'unipc'"),
        ({"noise": torch.zeros(3, 3, 16, 16)}, r"noise is \(4, 3, 16, 16\).*got \(3, 3, 16, 16\)"),
        ({"noise": torch.zeros(4, 3, 16, 8)}, "noise is"),
        ({"noise": torch.zeros(3, 16, 16)}, "noise is"),
        ({"seed": -1}, "seed is a whole number from 0"),
        ({"seed": 2**63}, "seed is a whole number from 0"),
        ({"seed": 1.5}, "seed is a whole number from 0"),
        ({"seed": "4"}, "seed is a whole number from 0"),
        ({"seed": True}, "seed is a whole number from 0"),
        ({"seed": [1, 2, 3, None]}, "seed is a whole number from 0"),
        ({"seed": [1, 2, 3]}, "one for each of 4 images; got 3"),
        ({"seed": 1, "noise": torch.zeros(4, 3, 16, 16)}, "a picture has one start: give seed or noise, not both"),
        ({"seed": 1, "generator": torch.Generator()}, "give seed or generator, not both"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_wrong_options_are_refused(options, message, codes):
    with pytest.raises(ValueError, match=message):
        flow()(codes, **options)


@pytest.mark.parametrize(
    "default", [{"steps": 0}, {"guidance": math.nan}, {"steps": (2, 2)}, {"rollout": -1}, {"scales": (8, 24)}]
)
def test_defaults_that_cannot_be_are_told_before_training(default):
    with pytest.raises(ConfigError, match="|".join(default)):
        flow(**default)


# -- where pictures start


@pytest.mark.parametrize("how", ["default", "seed", "seeds", "generator", "noise"])
def test_the_same_seed_is_the_same_picture_on_every_batch_split(how, codes):
    made = flow()
    noise = torch.randn(4, 3, 16, 16)

    def sample(*splits: int) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        start, parts = 0, []
        for size in splits:
            rows = slice(start, start + size)
            starts = {"seed": 7, "seeds": [3, 1, 3, 8][rows], "generator": generator, "noise": noise[rows]}
            options = {} if how == "default" else {how.removesuffix("s") if how == "seeds" else how: starts[how]}
            parts.append(made(codes[rows], **options))
            start += size
        return torch.cat(parts)

    whole = sample(4)
    assert torch.equal(whole, sample(4))
    for splits in ((1, 1, 1, 1), (3, 1), (2, 2)):
        torch.testing.assert_close(sample(*splits), whole, **CLOSE)
    same = codes[:1].expand(2, -1, -1)
    starts_alike = torch.allclose(*made(same, **({"generator": torch.Generator()} if how == "generator" else {})))
    assert starts_alike == (how != "generator")


def test_the_noise_of_a_seed_is_the_same_bits_at_every_place():
    def start(seeds: object, b: int) -> Tensor:
        return Sampling(1, seed=seeds).start(b, (3, 8, 8))

    seeds = [3, 0, 3, 2**63 - 1]
    whole = start(seeds, 4)
    assert torch.equal(whole[0], whole[2]) and len(whole.unique(dim=0)) == 3
    assert abs(whole[1].mean()) < 0.2 and abs(whole[1].std() - 1) < 0.2
    for places in ([2, 1, 0], [3], [1, 1], [0, 3]):
        assert torch.equal(start([seeds[i] for i in places], len(places)), whole[places])
    assert torch.equal(start(3, 2), whole[[0, 2]]) and torch.equal(start(torch.tensor(seeds), 4), whole)
    assert torch.equal(start(torch.tensor(seeds).numpy()[0], 1), whole[:1])
    # Without a seed it is seed 0's; a single picture of a generator is that of its seed.
    assert torch.equal(start(None, 2), whole[[1, 1]])
    assert torch.equal(Sampling(1, generator=torch.Generator().manual_seed(3)).start(1, (3, 8, 8)), whole[:1])


def test_a_picture_of_a_seed_in_any_company(codes):
    made, seeds = flow(), [11, 5, 5, 2]
    whole = made(codes, seed=seeds, guidance=2.0)
    for places in ([3, 2, 1, 0], [2, 0], [1]):
        some = made(codes[places], seed=[seeds[i] for i in places], guidance=2.0)
        # Not to the bit: matrix products of other heights may round in another order.
        torch.testing.assert_close(some, whole[places], **CLOSE)


def test_seeds_reach_the_decoder_whatever_the_batches(tiny):
    tok = Tokenizer.from_config(tiny("flextok", "fsq", "flow")).eval()
    torch.nn.init.normal_(tok.decoder.read_patches.weight)
    torch.nn.init.normal_(tok.decoder.to_patches.weight, std=0.1)
    tokens = tok.encode(torch.rand(3, 3, 16, 16))
    seeds = [4, 9, 4]
    whole = tok.decode(tokens, seed=seeds)
    torch.testing.assert_close(tok.decode(tokens, seed=torch.tensor(seeds), batch_size=2), whole, **CLOSE)
    alone = [tok.decode(tokens[i : i + 1], seed=seed) for i, seed in enumerate(seeds)]
    torch.testing.assert_close(torch.cat(alone), whole, **CLOSE)
    torch.testing.assert_close(tok.decode(tokens, seed=9, batch_size=2)[1], whole[1], **CLOSE)
    assert not torch.allclose(tok.decode(tokens), whole)
    with pytest.raises(ValueError, match="seed is for 2 images, tokens are 3"):
        tok.decode(tokens, seed=[1, 2])


def test_sampling_leaves_the_global_random_state_alone(codes):
    made = flow()
    state = torch.get_rng_state()
    made(codes)
    made(codes, seed=[1, 2, 3, 4])
    made(codes, generator=torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())


# -- progress


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_callback_sees_every_step(solver, codes):
    made, seen = flow(), []
    end = made(codes, steps=3, solver=solver, guidance=2.0, callback=lambda *told: seen.append(told))
    assert [told[:2] for told in seen] == [(1, 3), (2, 3), (3, 3)]
    assert all(told[2].shape == (4, 3, 16, 16) for told in seen)
    assert torch.equal(end, made(codes, steps=3, solver=solver, guidance=2.0))
    # The first is what a single step gives; the last Euler step lands on its estimate.
    torch.testing.assert_close(seen[0][2], made(codes, steps=1, guidance=2.0), **CLOSE)
    if solver in ("euler", "heun"):
        torch.testing.assert_close(seen[-1][2], end, **CLOSE)


# -- exact speed-ups


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_sampling", ROOT / "benchmarks" / "sampling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("predict", ["velocity", "picture"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("lengths", [None, [6, 1, 3, 5]], ids=["all", "ragged"])
def test_what_is_computed_once_changes_nothing(predict, guidance, lengths, benchmark, codes):
    made = flow(predict=predict, steps=4)
    plain = benchmark.Plain(**SHAPE, predict=predict, steps=4).eval()
    plain.load_state_dict(made.state_dict())
    lengths = None if lengths is None else torch.tensor(lengths)
    for solver in ("euler", "heun"):
        options = {"guidance": guidance, "seed": 3, "solver": solver}
        expected = plain(codes, lengths, **options)
        torch.testing.assert_close(made(codes, lengths, **options), expected, rtol=0, atol=1e-5)
    assert (expected - made(codes, lengths, seed=3, guidance=guidance + 1)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["flow", "flextok", "patch_flow", "shortcut"])
@pytest.mark.parametrize("lengths", [None, [6, 1, 3, 5]], ids=["all", "ragged"])
@pytest.mark.parametrize("n", [1, 6])
def test_guidance_in_one_batch_is_that_of_two(kind, lengths, n, codes):
    made = decoder(kind)
    lengths = None if lengths is None else torch.tensor(lengths).clamp_max(n)
    for rule in (3.0, AdaptiveProjected(3.0)):
        two, one = (made(codes[:, :n], lengths, guidance=rule, batched=flag) for flag in (False, True))
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert (two - made(codes[:, :n], lengths)).abs().max() > 1e-3


def test_one_batch_is_one_pass(codes):
    made = flow(steps=3)
    passes = counted(made)
    made(codes, guidance=2.0, batched=True)
    assert passes == [8, 8, 8]
    passes.clear()
    made(codes, guidance=2.0)  # on a CPU
    assert passes == [4] * 6


def test_times_are_told_once_for_all_images_and_steps(codes):
    made, rows = flow(), []
    made.modulation.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    for solver in ("euler", "heun"):
        made(codes, steps=5, guidance=2.0, solver=solver)
    assert rows == [5, 5]


def test_the_benchmark(benchmark: ModuleType, capsys: pytest.CaptureFixture) -> None:
    threads = torch.get_num_threads()
    try:
        table = benchmark.main(["--width", "32", "--depth", "1", "--steps", "2", "--calls", "1", "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    assert list(table) == ["plain", "times once", "times once, guidance in one batch"]
    lines = capsys.readouterr().out.splitlines()
    differences = [float(line.split("|")[-2]) for line in lines if line.startswith(("| plain", "| times"))]
    assert len(differences) == 3 and differences[0] == 0 and max(differences) < 1e-5
    with pytest.raises(SystemExit):
        benchmark.main(["--steps", "0"])


# -- training through the sampler


def test_the_estimate_of_a_rollout_is_a_sample(codes):
    target = torch.randn(4, 3, 16, 16)
    made = flow(rollout=3, null_rate=0.5)
    done = losses(made, codes, target)
    assert done.estimate.shape == target.shape and (done.weight == 1).all()
    # The velocity's own loss is that of a decoder without.
    plain = flow(null_rate=0.5)
    plain.load_state_dict(made.state_dict())
    torch.testing.assert_close(done.loss, losses(plain, codes, target).loss)
    assert not torch.allclose(done.estimate, losses(plain, codes, target).estimate)


def losses(made: FlowDecoder, codes: Tensor, target: Tensor) -> DecoderLoss:
    torch.manual_seed(3)
    return made.loss(codes, target)


def test_the_gradient_of_a_rollout_is_that_of_plain_back_propagation(codes, monkeypatch):
    target = torch.randn(4, 3, 16, 16)
    made = flow(rollout=3).requires_grad_(True)

    def gradients() -> list[Tensor]:
        read = codes.clone().requires_grad_(True)
        made.zero_grad()
        done = losses(made, read, target)
        (done.estimate - target).square().mean().backward()
        return [read.grad, *(p.grad for name, p in made.named_parameters() if name != "null_token")]

    kept = gradients()
    passes = counted(made)
    gradients()
    assert len(passes) == 7  # the loss, three steps, and these once more on the way back
    monkeypatch.setattr("tokenizers_vis.decoders.flow.checkpoint", plainly)
    for ours, theirs in zip(kept, gradients(), strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def plainly(function: Callable[..., Tensor], *inputs: object, use_reentrant: bool) -> Tensor:
    return function(*inputs)


def test_rollout_times_are_those_of_each_image():
    times = random_times(4, 500, torch.device("cpu"))
    assert times.shape == (5, 500) and (times[0] == 1).all() and (times[-1] == 0).all()
    gaps = times[:-1] - times[1:]
    assert (gaps > 0).all() and gaps.mean(dim=1) == pytest.approx([0.25] * 4, abs=0.02)
    assert gaps.std() > 0.08
