"""Generators: what they draw depends on class and seed alone, with and without a cache, and nothing wrong gets in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenizers_vis as tv
from tokenizers_vis.config import ConfigError
from tokenizers_vis.generator import Generator, load_generator
from tokenizers_vis.generators.backbone import Backbone, KeyValues, causal_after
from tokenizers_vis.generators.fused import FusedBackbone
from tokenizers_vis.generators.guidance import Interval, PowerCosine
from tokenizers_vis.generators.levels import level_mask
from tokenizers_vis.generators.random_order import random_orders, random_share
from tokenizers_vis.token_shards import codes_hash
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.weights import CheckpointError

KINDS: dict[str, dict[str, Any]] = {
    "causal": {},
    "random_order": {},
    "masked": {},
    "levels": {"levels": [1, 1, 2, 4]},
}
CODES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "table": ([16], {}),
    "table of digits": ([16], {"factors": [2, 4, 2]}),
    "table, two codebooks": ([8, 5], {}),
    "factorized": ([8, 5], {"kind": "factorized"}),
    "factorized, in turn": ([8, 5], {"kind": "factorized", "depth": 1, "heads": 2}),
    "bits": ([4, 8], {"kind": "bits"}),
}
EXACT = ("causal", "random_order", "levels")
SMALL = {"width": 8, "depth": 1, "heads": 1}
LABELS = [0, 1, 2, None]


def table(kind: str = "causal", codes: str = "table", **over: Any) -> dict[str, Any]:
    sizes, how = CODES[codes]
    model = {"kind": kind, "backbone": {"width": 32, "depth": 2, "heads": 2, "dropout": 0.1}, "codes": how}
    return {
        "name": f"tiny-{kind}",
        "tokenizer": "tiny",
        "hash": "0" * 16,
        "codebook_sizes": sizes,
        "nested": True,
        "max_tokens": 8,
        "classes": 3,
        "class_names": ["cat", "dog", "owl"],
        "model": {**model, **KINDS[kind]},
        **over,
    }


def generator(kind: str = "causal", codes: str = "table", **over: Any) -> Generator:
    """Untrained, with weights so large that its guesses are far from even."""
    torch.manual_seed(0)
    gen = Generator.from_config(table(kind, codes, **over)).eval().requires_grad_(False)
    for parameter in gen.parameters():
        if parameter.ndim > 1:
            parameter.copy_(parameter * 3 if parameter.abs().max() > 0 else torch.randn_like(parameter) / 4)
    return gen


def two_tokens(kind: str, codes: str = "table") -> Generator:
    """Of images so short that all of them can be listed."""
    model = table(kind, codes)["model"]
    if kind == "levels":
        model["levels"] = [1, 1]
    return generator(kind, codes, max_tokens=2, model=model)


def count_passes(gen: Generator, call: Callable[[], object]) -> int:
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    # Positions are turned into rotations once in each pass, with the cache and without.
    handle = gen.model.backbone.llama.rotary_emb.register_forward_hook(count)
    call()
    handle.remove()
    return runs


every_codes = pytest.mark.parametrize("codes", CODES)
# Every kind and every way to read ids, and those together that meet nowhere else.
PAIRS = [("causal", codes) for codes in CODES] + [
    ("random_order", "table, two codebooks"),
    ("masked", "table of digits"),
    ("masked", "factorized, in turn"),
    ("levels", "table, two codebooks"),
    ("levels", "bits"),
]


@pytest.mark.parametrize(("kind", "codes"), PAIRS)
class TestEveryKind:
    def test_a_sample_depends_on_its_class_and_seed_alone(self, kind: str, codes: str) -> None:
        gen = generator(kind, codes)
        tokens = gen.sample(LABELS, guidance=2.0, seed=5)
        assert tokens == gen.sample(LABELS, guidance=2.0, seed=[5, 6, 7, 8], batch_size=3)
        assert tokens[2:3] == gen.sample(2, guidance=2.0, seed=7)
        assert tokens != gen.sample(LABELS, guidance=2.0, seed=6)

    def test_fewer_tokens_are_a_prefix_of_the_same_sample(self, kind: str, codes: str) -> None:
        gen = generator(kind, codes)
        guidance = PowerCosine(4.0)
        assert gen.sample(LABELS, 5, guidance=guidance) == gen.sample(LABELS, guidance=guidance)[:, :5]

    def test_a_given_prefix_stays_and_is_gone_on_from(self, kind: str, codes: str) -> None:
        gen = generator(kind, codes)
        whole = gen.sample(LABELS, guidance=2.0)
        going_on = gen.sample(LABELS, guidance=2.0, prefix=whole[:, :4])
        assert going_on[:, :4] == whole[:, :4]
        if kind in EXACT:
            assert going_on == whole

    def test_guidance_of_one_is_none(self, kind: str, codes: str) -> None:
        gen = generator(kind, codes)
        free = gen.sample(LABELS)
        assert free == gen.sample(LABELS, guidance=1.0) == gen.sample(LABELS, guidance=PowerCosine(1.0))
        assert free != gen.sample(LABELS, guidance=6.0)
        assert free[3:] == gen.sample(LABELS, guidance=6.0)[3:]  # with no class there is nothing to be guided to

    def test_passes_are_counted_exactly(self, kind: str, codes: str) -> None:
        gen = generator(kind, codes)
        for n, given, guidance in ((8, 0, 1.0), (3, 0, 1.0), (8, 4, 1.0), (8, 0, 3.0)):
            prefix = gen.sample(LABELS, given) if given else None
            said = gen.forward_passes(n, given=given, guidance=guidance)
            assert said == count_passes(
                gen, lambda n=n, g=guidance, p=prefix: gen.sample(LABELS, n, guidance=g, prefix=p)
            )

    def test_every_parameter_learns(self, kind: str, codes: str) -> None:
        gen = generator(kind, codes).train().requires_grad_(True)
        ids = gen.eval().sample(LABELS).ids
        gen.train().model.loss(ids, torch.tensor([0, 1, 2, 3]), 0.6).backward()
        assert not [name for name, p in gen.named_parameters() if p.grad is None or not p.grad.isfinite().all()]

    def test_saved_and_loaded_it_draws_the_same(self, kind: str, codes: str, tmp_path: Path) -> None:
        gen = generator(kind, codes)
        gen.save(tmp_path / "generator.safetensors")
        loaded = load_generator(tmp_path, "cpu")
        assert loaded.config == gen.config
        assert loaded.sample(LABELS) == gen.sample(LABELS)
        half = load_generator(tmp_path, "cpu", torch.bfloat16)
        assert half.dtype == torch.bfloat16
        assert half.sample(LABELS, guidance=2.0).n_tokens == 8


@pytest.mark.parametrize(("kind", "codes"), [pair for pair in PAIRS if pair[0] in EXACT])
def test_the_chances_of_all_sequences_add_up_to_one(kind: str, codes: str) -> None:
    gen = two_tokens(kind, codes)
    ids = torch.cartesian_prod(*[torch.arange(size) for size in gen.codebook_sizes * 2])
    ids = ids.reshape(len(ids), 2, -1)
    bits = gen.bits(tv.Tokens(ids, gen.codebook_sizes, "tiny"), 1).sum(dim=1)
    assert torch.exp2(-bits).sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ("causal", "random_order"))
@every_codes
def test_the_cache_changes_nothing(kind: str, codes: str) -> None:
    gen = generator(kind, codes)
    ids, labels = gen.sample(LABELS).ids, torch.tensor([0, 1, 2, 3])
    whole = gen.model.hidden(ids, labels)
    stream = gen.model.codes.to_stream(ids)
    session = gen.model.session(labels)
    steps = [session.hidden]
    for start, stop in ((0, 1), (1, 4), (4, gen.model.length - 1)):  # one by one, and several at once
        steps.append(session.advance(stream[:, start:stop]))
    assert (torch.cat(steps, dim=1) - whole).abs().max() < 1e-5
    session.rewind(2)
    assert session.filled == 2
    assert (session.advance(stream[:, 2:3]) - whole[:, 3:4]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="nothing to guess"):
        session.advance(stream)
    with pytest.raises(ValueError, match="goes back to 0 to 3"):
        session.rewind(4)


@pytest.mark.parametrize("kind", ("causal", "random_order", "levels"))
def test_samples_follow_the_law_that_bits_tells(kind: str) -> None:
    gen = two_tokens(kind)
    drawn = gen.sample([1] * 6000, batch_size=6000).ids[..., 0]
    found = torch.bincount(drawn[:, 0] * 16 + drawn[:, 1], minlength=256)
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16))[..., None]
    expected = 6000 * torch.exp2(-gen.bits(tv.Tokens(pairs, (16,), "tiny"), 1).sum(dim=1))
    large = expected > 5
    chi = ((found - expected)[large] ** 2 / expected[large]).sum().item()
    count = int(large.sum())
    assert chi < count + 4 * (2 * count) ** 0.5  # four standard deviations of chi-square


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fused_backbone_gives_the_numbers_of_the_plain_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Backbone(width=24, depth=3, heads=3, mlp_ratio=2.0, dropout=0.5).to(dtype).eval().requires_grad_(False)
    for parameter in plain.parameters():
        parameter.mul_(1.5)
    fused, caches = FusedBackbone(plain), (KeyValues(9), KeyValues(9))
    for start, stop in ((0, 3), (3, 4), (4, 9)):
        x, at = torch.randn(2, stop - start, 24, dtype=dtype), torch.arange(start, stop)
        mask = causal_after(start, stop - start, x.device)
        expected = plain(x, at, cache=caches[0], mask=mask)
        assert torch.allclose(fused(x, at, cache=caches[1], mask=mask), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="room for 9 positions, 10"):
        fused(x[:, :1], at[:1], cache=caches[1], mask=None)


def test_an_interval_of_guidance_drops_the_unconditional_rows_when_it_is_over() -> None:
    gen = generator()
    rows = []
    rotary = gen.model.backbone.llama.rotary_emb
    handle = rotary.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    gen.sample([0, 1], guidance=Interval(4.0, start=1, stop=4))
    handle.remove()
    assert rows == [4, 4, 4, 4, 2, 2, 2, 2]  # the class, and what is read after each token but the last


# Random order


def test_random_order_in_raster_order_is_what_sampling_sees() -> None:
    """At the end of training no sequence is shuffled, and the loss is that of the model that samples."""
    gen = generator("random_order")
    ids, labels = gen.sample(LABELS).ids, torch.tensor([0, 1, 2, 3])
    raster = gen.model.loss(ids, labels, 1.0)
    assert raster.item() == pytest.approx(-gen.model.log_prob(ids, labels).mean().item(), abs=1e-6)
    assert abs(gen.model.loss(ids, labels, 0.0).item() - raster.item()) > 1e-3


def test_the_share_of_random_orders_falls_from_one_to_none() -> None:
    assert [random_share(p, (0.5, 0.75)) for p in (0.0, 0.49, 0.5, 0.625, 0.75, 1.0)] == [1, 1, 1, 0.5, 0, 0]
    assert random_share(0.3, (0.3, 0.3)) == 0
    orders = random_orders(400, 6, 0.25, torch.device("cpu"))
    assert torch.equal(orders.sort(dim=1).values, torch.arange(6).expand(400, 6))
    raster = (orders == torch.arange(6)).all(dim=1).float().mean().item()
    assert raster == pytest.approx(0.75, abs=0.08)


# Levels


def test_the_mask_of_levels_is_block_causal() -> None:
    levels = (1, 1, 2, 4)
    of = [0, 1, 2, 2, 3, 3, 3, 3]
    mask = level_mask(levels)

    def sees(row: int, column: int) -> bool:
        if column == 0:
            return True
        if row == 0:
            return False
        query, mine = row > 8, of[(row - 1) % 8]
        other = of[(column - 1) % 8]
        if column > 8:
            return query and mine == other
        return other < mine if query else other <= mine

    assert mask.tolist() == [[sees(row, column) for column in range(17)] for row in range(17)]


@pytest.mark.parametrize(
    ("levels", "passes"),
    [([1, 1, 1, 1, 4, 8, 16, 32, 64], 9), ([1] * 8 + [8] * 15, 8 + (128 - 8) // 8), ([1] * 128, 128)],
    ids=["ResTok", "DetailFlow", "token by token"],
)
def test_levels_take_as_many_passes_as_their_papers_say(levels: list[int], passes: int) -> None:
    model = {"kind": "levels", "backbone": SMALL, "levels": levels}
    gen = Generator.from_config(table(max_tokens=128, model=model)).eval()
    assert gen.forward_passes() == passes == count_passes(gen, lambda: gen.sample([0]))


# Whose tokens


@pytest.fixture
def pair(tiny: Callable[..., dict[str, Any]]) -> tuple[Generator, Tokenizer]:
    """A generator, and the tokenizer that it is of."""
    torch.manual_seed(1)
    tok = Tokenizer.from_config(tiny()).eval()
    sizes = list(tok.codebook_sizes)
    return generator(
        tokenizer=tok.codes, hash=codes_hash(tok), codebook_sizes=sizes, max_tokens=6, nested=tok.nested
    ), tok


def test_samples_decode_with_the_tokenizer_that_the_generator_is_of(
    pair: tuple[Generator, Tokenizer], tmp_path: Path
) -> None:
    gen, tok = pair
    tok.save(tmp_path / "tok.safetensors")
    loaded = gen.load_tokenizer(tmp_path / "tok.safetensors", "cpu")
    assert loaded.decode(gen.sample(["cat", "owl"], 4)).shape == (2, 3, 16, 16)
    assert gen.bits(tok.encode(torch.rand(2, 3, 16, 16))).shape == (2, 6)


def test_another_tokenizer_is_refused_by_its_hash(
    pair: tuple[Generator, Tokenizer], tiny: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    gen, _ = pair
    other = Tokenizer.from_config(tiny()).eval()  # of the same name and shape, with weights of its own
    with pytest.raises(ValueError, match=f"hash {gen.hash}.*{codes_hash(other)}.*mean other things"):
        gen.check(other)
    other.save(tmp_path / "tok.safetensors")
    with pytest.raises(ValueError, match="mean other things"):
        gen.load_tokenizer(tmp_path / "tok.safetensors")


# Wrong input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.sample([0, 3]), "from 0 to 2, a class's name or None.*got 3"),
        (lambda g: g.sample(-1), "got -1"),
        (lambda g: g.sample(0.5), "got 0.5"),
        (lambda g: g.sample([True]), "got True"),
        (lambda g: g.sample("cot"), "no class 'cot'. Did you mean 'cat'"),
        (lambda g: g.sample([]), "no labels"),
        (lambda g: g.sample([0], 9), "from 1 to 8, got 9"),
        (lambda g: g.sample([0], 0), "got 0"),
        (lambda g: g.sample([0], 2.0), "got 2.0"),
        (lambda g: g.sample([0, 1], seed=[1]), "one for each of 2 labels"),
        (lambda g: g.sample([0], seed=-1), "from 0"),
        (lambda g: g.sample([0], batch_size=0), "from 1, got 0"),
        (lambda g: g.sample([0], guide=2.0), "Did you mean 'guidance'"),
        (lambda g: g.sample([0], steps=3), "no option 'steps'"),
        (lambda g: g.sample([0], temperature=-1.0), "temperature is 0 or more"),
        (lambda g: g.sample([0], top_p=0.0), "top_p is above 0"),
        (lambda g: g.sample([0], top_k=-1), "top_k is 0"),
        (lambda g: g.sample([0], guidance=float("nan")), "guidance scale is a number"),
        (lambda g: g.sample([0], guidance={"kind": "cosine", "scale": 2}), "no guidance 'cosine'"),
        (lambda g: g.sample([0], 4, prefix=g.sample([0], 4)), "leaves nothing of 4"),
        (lambda g: g.sample([0], prefix=tv.Tokens(torch.zeros(1, 9, 1).long(), (16,), "tiny")), "up to 8 tokens"),
        (lambda g: g.sample([0, 0], prefix=g.sample([0, 1, 2], 4)), "got 3 for 2 labels"),
        (lambda g: g.sample([0], prefix=tv.Tokens(torch.zeros(1, 2, 1).long(), (16,), "mini")), "tokens are of 'mini'"),
        (lambda g: g.sample([0], prefix=torch.zeros(1, 2, 1).long()), "takes Tokens, got Tensor"),
        (lambda g: g.bits(tv.Tokens(torch.full((1, 2, 1), 16), (17,), "tiny")), r"codebooks \(17,\)"),
        (lambda g: g.bits(tv.Tokens(torch.full((1, 2, 1), 16), (16,), "tiny")), "from 0 to 15"),
        (lambda g: g.bits(g.sample([0, 1, 2]), [0, 1]), "got 2 for 3 images"),
        (lambda g: g.train().sample([0]), "training mode"),
    ],
)  # fmt: skip
def test_wrong_input_is_told_what_is_allowed(call: Callable[[Generator], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(generator())


def test_what_only_some_models_can_do_is_said() -> None:
    with pytest.raises(ValueError, match="whole ones: 1, 2, 4 tokens; got 3"):
        gen = generator("levels")
        gen.sample([0], prefix=gen.sample([0], 3))
    with pytest.raises(ValueError, match="no top_k"):
        generator("causal", "bits").sample([0], top_k=3)
    with pytest.raises(ValueError, match="is not nested"):
        generator(nested=False).sample([0], 4)
    assert generator("masked").forward_passes(steps=4) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, "no 'models'. Did you mean 'model'"),
        ({"class_names": ["cat"]}, "3 classes have 1 names"),
        ({"codebook_sizes": [1]}, "codebook_sizes are 2 or more"),
        ({"sampling": {"top_q": 1}}, "no option 'top_q'"),
        ({"model": {"kind": "causal"}}, "model.backbone is a table"),
        ({"model": {"kind": "casual", "backbone": SMALL}}, "Did you mean 'causal'"),
        ({"model": {"kind": "causal", "backbone": {**SMALL, "heads": 3}}}, "heads divides width"),
        ({"model": {"kind": "causal", "backbone": SMALL, "codes": {"factors": [3]}}}, "multiply to"),
        ({"model": {"kind": "levels", "backbone": SMALL, "levels": [4]}}, "add up to max_tokens, 8"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Generator.from_config({**table(), **change})


def test_a_file_that_is_no_generator_is_refused(tmp_path: Path, tiny: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError, match="no generator 'mini-imagenett'"):
        load_generator("mini-imagenett")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_generator(tmp_path)
    Tokenizer.from_config(tiny()).save(tmp_path / "generator.safetensors")
    with pytest.raises(CheckpointError, match="is no generator"):
        load_generator(tmp_path)


def test_defaults_of_sampling_come_with_the_generator() -> None:
    gen = generator(sampling={"guidance": {"kind": "power_cosine", "scale": 8.0}, "top_k": 4})
    assert gen.sample(LABELS) == generator().sample(LABELS, guidance=PowerCosine(8.0), top_k=4)
    assert gen.sample(LABELS, guidance=1.0, top_k=0) == generator().sample(LABELS)
    assert "tiny-causal: causal, 8 tokens of tiny, 3 classes, 8 passes" in repr(gen)


def test_dropout_is_the_module_s_own_after_a_copy() -> None:
    """The averaged copy of a model in training is in eval mode, and must not drop what the model drops."""
    import copy

    backbone = Backbone(width=16, depth=1, heads=1, dropout=0.5).train()
    still = copy.deepcopy(backbone).eval()

    def run(net: Backbone) -> Tensor:
        return net(torch.ones(1, 3, 16), torch.arange(3))

    assert torch.equal(run(still), run(still)) and not torch.equal(run(backbone), run(backbone))
