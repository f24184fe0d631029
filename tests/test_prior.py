"""Files coded with a generator's probabilities: the same tokens back, from every batch, in as few bytes as promised."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tokenizers_vis as tv
from tokenizers_vis.cli import main
from tokenizers_vis.generator import Generator
from tokenizers_vis.generators import exact
from tokenizers_vis.generators import prior as prior_module
from tokenizers_vis.generators.exact import Exact, exact_copy
from tokenizers_vis.generators.prior import Prior, integer_weights, read_header
from tokenizers_vis.token_file import TokenFileError
from tokenizers_vis.token_shards import codes_hash
from tokenizers_vis.tokens import Tokens

CODES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "table": ([64], {}),
    "table of digits": ([64], {"factors": [4, 4, 4]}),
    "table, two codebooks": ([32, 5], {}),
    "factorized": ([32, 5], {"kind": "factorized"}),
    "factorized, in turn": ([32, 5], {"kind": "factorized", "depth": 1, "heads": 2}),
    "bits": ([4, 16], {"kind": "bits"}),
}
N = 10
BACKBONE = {"width": 16, "depth": 2, "heads": 2}


def generator(codes: str = "table", kind: str = "causal", seed: int = 0, **over: Any) -> Generator:
    """Untrained, and so sure of its guesses that there is something to win."""
    torch.manual_seed(seed)
    sizes, how = CODES[codes]
    model = {"kind": kind, "backbone": BACKBONE, "codes": how}
    table = {"name": "tiny", "tokenizer": "t", "hash": "0" * 16, "codebook_sizes": sizes, "nested": True,
             "max_tokens": N, "classes": 3, "class_names": ["cat", "dog", "owl"], "model": model}  # fmt: skip
    gen = Generator.from_config({**table, **over}).eval().requires_grad_(False)
    for name, parameter in gen.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(parameter * 3 if parameter.abs().max() > 0 else 2 * torch.randn_like(parameter))
        if name.startswith("model.codes.table"):
            parameter.mul_(20)
    return gen


def images(gen: Generator, b: int, seed: int = 0) -> tuple[Tokens, list[int | None]]:
    """Samples of random lengths, and their labels."""
    random = np.random.default_rng(seed)
    labels = [None if label == 3 else int(label) for label in random.integers(4, size=b)]
    lengths = torch.from_numpy(random.integers(1, N + 1, size=b))
    lengths[0] = N
    ids = gen.sample(labels, seed=seed).ids
    ids = ids.masked_fill(torch.arange(N)[:, None] >= lengths[:, None, None], -1)
    return Tokens(ids, gen.codebook_sizes, gen.tokenizer, lengths, True), labels


@pytest.fixture(scope="module")
def gen() -> Generator:
    return generator()


@pytest.fixture(scope="module")
def coded(gen: Generator) -> bytes:
    tokens, labels = images(gen, 12)
    data = tokens.to_bytes(gen, labels)
    assert data[4] == 2
    return data


@pytest.mark.parametrize(("codes", "kind"), [(codes, "causal") for codes in CODES] + [("table", "random_order")])
def test_tokens_come_back(codes: str, kind: str) -> None:
    gen = generator(codes, kind)
    prior = Prior(gen)
    tokens, labels = images(gen, 40)
    data = prior.to_bytes(tokens, labels)
    assert data[4] == 2 and len(data) < len(tokens.to_bytes())
    assert Tokens.from_bytes(data, prior) == tokens
    # What the images take is what theory says, but for whole bytes.
    theory = sum(gen.bits(one, label).sum().item() / 8 for one, label in zip(tokens, labels, strict=True))
    assert theory < sum(map(len, read_header(data).images)) < theory * 1.01 + len(tokens)


@pytest.mark.parametrize("codes", ["table", "factorized", "bits", "large"])
def test_tokens_that_the_generator_does_not_know_follow_plainly(codes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordered tokenizer may have more tokens than its generator: those cost what packed ids cost."""
    large = {"codebook_sizes": [2**18], "model": {"kind": "causal", "backbone": BACKBONE, "codes": {"kind": "bits"}}}
    gen = generator("bits", **large) if codes == "large" else generator(codes)
    _, labels = images(gen, 6)
    more = torch.stack([torch.randint(size, (6, 7)) for size in gen.codebook_sizes], dim=2)
    ids = torch.cat([gen.sample(labels).ids, more], dim=1)
    ids[1, N:] = 0  # of which the range coder leaves out what it can
    lengths = torch.tensor([N + 7, N + 7, N + 3, N, 4, 1])
    ids = ids.masked_fill(torch.arange(N + 7)[:, None] >= lengths[:, None, None], -1)
    tokens = Tokens(ids, gen.codebook_sizes, gen.tokenizer, lengths, True)
    data = tokens.to_bytes(gen, labels)
    assert data[4] == 2 and Tokens.from_bytes(data, gen) == tokens
    known = Tokens(ids[:, :N], gen.codebook_sizes, gen.tokenizer, lengths.clamp(max=N), True)
    short = known.to_bytes(gen, labels)
    extra = len(read_header(data).images[0]) - len(read_header(short).images[0])
    bits = sum(math.log2(size) for size in gen.codebook_sizes)
    assert abs(extra - 7 * bits / 8) <= 1
    # A header that promises more tokens than its bytes can hold is not believed.
    monkeypatch.setattr(prior_module, "read_header", lambda data: read_header(data)._replace(lengths=[10_000] * 6))
    with pytest.raises(TokenFileError, match="the header is wrong"):
        Prior(gen).from_bytes(short)
    whole = Tokens(ids[:1], gen.codebook_sizes, gen.tokenizer, None, True)
    told = gen.bits(whole, labels[0])
    torch.testing.assert_close(told[:, :N], gen.bits(whole[:, :N], labels[0]))
    torch.testing.assert_close(told[:, N:], torch.full((1, 7), bits))
    with pytest.raises(ValueError, match="unlike numbers of tokens"):
        gen.bits(Tokens(ids[:3], gen.codebook_sizes, gen.tokenizer, lengths[:3], True))  # all longer than it knows
    with pytest.raises(ValueError, match=rf"knows their prefix, tokens\[:, :{N}\]"):
        gen.sample(labels[0], prefix=whole)


def test_more_tokens_than_an_image_has_are_refused() -> None:
    gen = generator(nested=False)
    with pytest.raises(ValueError, match=f"goes up to {N} tokens an image, got {N + 1}"):
        Tokens(torch.zeros(1, N + 1, 1, dtype=torch.int64), [64], "t").to_bytes(gen)


@pytest.mark.parametrize("codes", CODES)
def test_exact_probabilities_are_the_generator_s(codes: str) -> None:
    gen = generator(codes)
    tokens = gen.sample([0, 1, 2])
    model, labels = exact_copy(gen.model), torch.arange(3)
    with Exact(), torch.no_grad():
        stream = model.codes.to_stream(tokens.ids)
        session = model.session(labels)
        hidden = torch.cat([session.hidden, session.advance(stream[:, :-1])], dim=1)
    assert torch.allclose(hidden.float(), gen.model.hidden(tokens.ids, labels), atol=2e-3)


def everything(model: Any, stream: Tensor, labels: Tensor) -> Tensor:
    """All logits of a batch, in one pass."""
    with Exact(), torch.no_grad():
        session = model.session(labels)
        hidden = torch.cat([session.hidden, session.advance(stream[:, :-1])], dim=1)
        return model.codes.choice_logits(hidden, stream, torch.arange(N), 0)


@pytest.mark.parametrize("codes", ["table of digits", "factorized, in turn"])
def test_batch_steps_threads_and_kernels_change_no_bit(codes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gen = generator(codes)
    model, labels = exact_copy(gen.model), torch.tensor([0, 1, 2, 3] * 4)
    stream = model.codes.to_stream(gen.sample([0, 1, 2, None] * 4).ids)
    whole = everything(model, stream, labels)
    assert torch.equal(whole[3:4], everything(model, stream[3:4], labels[3:4]))
    with Exact(), torch.no_grad():
        session = model.session(labels)
        steps = [session.hidden] + [session.advance(stream[:, i, None]) for i in range(N - 1)]
        stepped = model.codes.choice_logits(torch.cat(steps, dim=1), stream, torch.arange(N), 0)
    assert torch.equal(whole, stepped)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 2)
        assert torch.equal(whole, everything(model, stream, labels))
    finally:
        torch.set_num_threads(threads)
    # Products that are summed in another order, as other hardware does.
    linear = torch.nn.functional.linear
    halves = SimpleNamespace(linear=lambda x, w: linear(x[..., ::2], w[:, ::2]) + linear(x[..., 1::2], w[:, 1::2]))
    monkeypatch.setattr(exact, "F", halves)
    assert torch.equal(whole, everything(model, stream, labels))


def test_sums_are_exact_in_any_order() -> None:
    """Against the same sum in Python's fractions, which floats in this order and that do not agree with."""
    x, weight = 1000 * torch.randn(5, 700).double(), exact.on_grid(torch.randn(3, 700).double(), exact.WEIGHT_BITS)
    order = torch.randperm(700)
    assert torch.equal(exact.linear(x, weight), exact.linear(x[:, order], weight[:, order]))
    assert not torch.equal(x @ weight.T, x[:, order] @ weight[:, order].T)
    rounded, scale = exact.row_on_grid(x)
    for i in range(5):
        true = math.fsum((rounded[i] * weight[0]).tolist()) * scale[i].item()
        assert exact.linear(x, weight)[i, 0].item() == true
    assert torch.allclose(exact.linear(x, weight), x @ weight.T, rtol=1e-3)


def test_functions_made_of_single_operations_are_those_of_the_library() -> None:
    x = torch.linspace(-59, 59, 100_001, dtype=torch.float64)
    assert torch.allclose(exact.exp(x), x.exp(), rtol=1e-14)
    for ours, theirs in zip(exact.cos_sin(100 * x), ((100 * x).cos(), (100 * x).sin()), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    assert torch.allclose(exact.silu(x), torch.nn.functional.silu(x))
    assert torch.allclose(exact.gelu(x), torch.nn.functional.gelu(x), atol=5e-4)
    q, k, v = torch.randn(3, 2, 4, 7, 8).double()
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(exact.attention(q, k, v, mask), expected, atol=1e-4)


def test_what_may_differ_between_machines_is_not_run() -> None:
    x = torch.randn(3, 3)
    for inexact in (lambda: x @ x, lambda: x.mean(), lambda: x.softmax(0), lambda: x.exp(), lambda: x.cumsum(0)):
        with pytest.raises(ValueError, match="not known to be the same"), Exact():
            inexact()
    gen = generator()
    gen.model.codes.table.weight.mul_(1e6)
    with pytest.raises(ValueError, match="too large"):
        exact_copy(gen.model)


def test_weights_are_integers_that_nothing_but_the_logits_decides() -> None:
    logits = np.array([[0.0, -math.log(2), -2 * math.log(2), -100.0, 0.02]])
    found = integer_weights(logits)
    assert found.tolist() == [[2**30, 2**29, 2**28, 0, 2**30]]  # 0.02 nats are less than half a step
    fractions = np.array([2 ** (30 - step / 16) % 1 for step in range(1, 16)])
    assert np.abs(fractions - 0.5).min() > 1e-3  # no library's pow rounds these another way


def test_files_and_labels(gen: Generator, tmp_path: Path) -> None:
    tokens, labels = images(gen, 20)
    tokens.save(tmp_path / "a.tok", prior=gen, labels=labels)
    assert Tokens.load(tmp_path / "a.tok", prior=gen) == tokens
    names = [None if label is None else gen.class_names[label] for label in labels]
    assert tokens.to_bytes(gen, names) == (tmp_path / "a.tok").read_bytes()
    without = tokens.to_bytes(gen)
    assert Tokens.from_bytes(without, gen) == tokens
    assert sum(map(len, read_header(without).images)) > sum(map(len, read_header(tokens.to_bytes(gen, labels)).images))
    one = tokens[0]
    assert Tokens.from_bytes(one.to_bytes(gen, labels[0]), gen) == one


def test_a_file_is_never_longer_for_a_prior(gen: Generator) -> None:
    random = Tokens(torch.randint(0, 64, (6, N, 1)), (64,), "t", nested=True)
    assert random.to_bytes(gen) == random.to_bytes()
    assert Tokens.from_bytes(random.to_bytes(), gen) == random


def test_what_cannot_be_read_back_is_not_written(gen: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a machine's sums are not the same from pass to pass."""
    tokens, labels = images(gen, 12)
    honest = Prior._weights
    calls = iter(range(10**9))

    def wrong(self: Prior, *args: Any) -> np.ndarray:
        table = honest(self, *args)
        return np.roll(table, 1, axis=1) if next(calls) == N + 3 else table

    monkeypatch.setattr(Prior, "_weights", wrong)
    assert tokens.to_bytes(gen, labels) == tokens.to_bytes()


def test_other_probabilities_are_noticed(gen: Generator, coded: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Prior._weights
    monkeypatch.setattr(Prior, "_weights", lambda self, *args: honest(self, *args) + 2.0**24)
    with pytest.raises(TokenFileError, match="computes other probabilities"):
        Tokens.from_bytes(coded, gen)


def test_another_generator_is_refused(gen: Generator, coded: bytes) -> None:
    other = generator(seed=1)
    with pytest.raises(TokenFileError, match=f"hash {Prior(gen).hash}.*{Prior(other).hash}"):
        Tokens.from_bytes(coded, other)
    renamed = generator(name="other", class_names=["a", "b", "c"])
    assert Tokens.from_bytes(coded, renamed) == Tokens.from_bytes(coded, gen)  # names decide nothing
    with pytest.raises(TokenFileError, match="'tiny'.*does not come with the library"):
        Tokens.from_bytes(coded)


def test_every_cut_and_every_wrong_byte_is_noticed(gen: Generator, coded: bytes) -> None:
    for end in range(len(coded)):
        with pytest.raises(TokenFileError):
            Tokens.from_bytes(coded[:end], gen)
    with pytest.raises(TokenFileError, match="cut short: .* bytes of its images arrived"):
        Tokens.from_bytes(coded[:-1], gen)
    for place in range(len(coded)):
        wrong = bytearray(coded)
        wrong[place] ^= 32
        with pytest.raises(TokenFileError):
            Tokens.from_bytes(bytes(wrong), gen)
    with pytest.raises(TokenFileError, match="follow"):
        Tokens.from_bytes(coded + b"\0", gen)


def test_what_does_not_go_together_is_refused(gen: Generator) -> None:
    tokens, labels = images(gen, 3)
    with pytest.raises(ValueError, match="masked generator"):
        tokens.to_bytes(generator(kind="masked"))
    with pytest.raises(ValueError, match="these tokens are of 'other'"):
        Tokens(tokens.ids.clamp_min(0), (64,), "other").to_bytes(gen)
    with pytest.raises(ValueError, match="labels are one for all"):
        tokens.to_bytes(gen, [0, 1])
    with pytest.raises(ValueError, match="from 0 to 2"):
        tokens.to_bytes(gen, 3)
    with pytest.raises(ValueError, match="labels are for a prior"):
        tokens.to_bytes(labels=labels)
    with pytest.raises(ValueError, match="prior is a generator"):
        tokens.to_bytes("tiny")


def test_what_stands_alone_may_be_large_in_sum() -> None:
    """A bias is added number by number: that of a large codebook is no row of a matrix."""
    gen = generator()
    gen.model.codes.bias.fill_(2000)
    exact_copy(gen.model)
    gen.model.codes.bias[0] = 2.0**16
    with pytest.raises(ValueError, match="codes.bias has weights too large"):
        exact_copy(gen.model)


def test_without_constriction_it_says_what_to_install(gen: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ValueError, match="needs constriction: pip install"):
        Prior(gen)


def test_two_thousand_sequences_come_back(gen: Generator) -> None:
    tokens, labels = images(gen, 2000)
    data = tokens.to_bytes(gen, labels)
    assert data[4] == 2 and Tokens.from_bytes(data, gen) == tokens
    assert read_header(data).labels == [0 if label is None else label + 1 for label in labels]


@pytest.mark.slow
@pytest.mark.parametrize("codes", CODES)
def test_thousands_of_sequences_come_back(codes: str) -> None:
    gen = generator(codes)
    prior = Prior(gen)
    for seed in range(5):
        tokens, labels = images(gen, 1000, seed)
        data = prior.to_bytes(tokens, labels)
        assert data[4] == 2 and Tokens.from_bytes(data, prior) == tokens


@pytest.mark.slow
def test_images_alone_and_together_are_the_same_bytes(gen: Generator) -> None:
    prior = Prior(gen)
    tokens, labels = images(gen, 300)
    together = read_header(prior.to_bytes(tokens, labels)).images
    alone = [prior._encode(one.ids, gen.label_rows(label), [one.n_tokens])[0]
             for one, label in zip(tokens, labels, strict=True)]  # fmt: skip
    assert together == alone


def test_the_command_line(tmp_path: Path, tiny: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture) -> None:
    tok = tv.Tokenizer.from_config(tiny("flextok", "fsq")).eval()
    tok.save(tmp_path / "tok.safetensors")
    sizes = list(tok.codebook_sizes)
    own = generator(tokenizer=tok.name, codebook_sizes=sizes, max_tokens=6, hash=codes_hash(tok))
    own.model.codes.bias.copy_(torch.where(torch.isin(torch.arange(200), seen(tok)), 20.0, 0.0))
    own.save(tmp_path / "gen.safetensors")
    Image.new("RGB", (16, 16), (200, 90, 30)).resize((64, 64)).save(tmp_path / "a.png")

    def run(*words: object) -> int:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        return ended.value.code or 0

    args = ("--tokenizer", tmp_path / "tok.safetensors")
    many = [tmp_path / "a.png"]
    assert run("encode", *many, "-o", tmp_path / "plain.tok", *args) == 0
    assert run("encode", *many, "-o", tmp_path / "a.tok", *args, "--prior", tmp_path / "gen.safetensors") == 0
    found = Tokens.load(tmp_path / "a.tok", prior=tv.load_generator(tmp_path / "gen.safetensors", "cpu"))
    assert found == Tokens.load(tmp_path / "plain.tok")
    assert run("decode", tmp_path / "a.tok", "-o", tmp_path / "b.png", *args,
               "--prior", tmp_path / "gen.safetensors") == 0  # fmt: skip
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.size == (16, 16)
    assert (tmp_path / "a.tok").read_bytes()[4] == 2
    assert run("info", tmp_path / "a.tok", "--prior", tmp_path / "gen.safetensors") == 0
    assert "image 0: 6 tokens" in capsys.readouterr().out
    assert run("info", tmp_path / "a.tok") == run("decode", tmp_path / "a.tok", "-o", tmp_path / "c.png", *args) == 1
    assert capsys.readouterr().err.count("give it as prior=tv.load_generator(...), or --prior") == 2
    assert run("info", tmp_path / "tok.safetensors", "--prior", tmp_path / "gen.safetensors") == 1
    # Ids of the same codebook that mean other things: refused before the first file.
    generator(tokenizer=tok.name, codebook_sizes=sizes, max_tokens=6).save(tmp_path / "other.safetensors")
    assert run("encode", *many, "-o", tmp_path / "d.tok", *args, "--prior", tmp_path / "other.safetensors") == 1
    assert f"hash {'0' * 16}" in capsys.readouterr().err and not (tmp_path / "d.tok").exists()


def seen(tok: tv.Tokenizer) -> Tensor:
    """The ids of a picture of one colour."""
    return tok.encode(torch.tensor([200, 90, 30], dtype=torch.uint8).expand(16, 16, 3).numpy()).ids.unique()
