"""What tokens hold: every map is what decoding by hand gives, and mixtures hold the ids that they should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenizers_vis.anatomy import arrivals, influences, interpolate, morph, prefixes, swap
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.tokens import Tokens


def tokenizer(table) -> Tokenizer:
    torch.manual_seed(0)
    tok = Tokenizer.from_config(table).eval()
    with torch.no_grad():
        for parameter in tok.decoder.parameters():  # what starts at zero would hide what tokens change
            parameter.add_(0.2 * torch.randn_like(parameter))
    return tok


@pytest.fixture(params=[("fsq", "vit"), ("library", "vit"), ("fsq", "flow")], ids="-".join)
def tok(request, tiny) -> Tokenizer:
    quantizer, decoder = request.param
    return tokenizer(tiny(quantizer=quantizer, decoder=decoder))


def random_tokens(tok: Tokenizer, b: int, seed: int = 0, n: int = 6) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(size, (b, n), generator=generator) for size in tok.codebook_sizes], dim=-1)
    return Tokens(ids, tok.codebook_sizes, tok.codes, nested=tok.nested)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-5)


def test_a_prefix_is_what_decode_makes_of_it(tok) -> None:
    tokens = random_tokens(tok, 2)
    pictures = prefixes(tok, tokens, [1, 4, 6])
    assert pictures.shape == (2, 3, 3, 16, 16)
    for column, n in enumerate((1, 4, 6)):
        assert close(pictures[:, column], tok.decode(tokens[:, :n]))
    assert pictures[:, 0].sub(pictures[:, 2]).abs().max() > 0.01


def test_arrivals_add_up_to_the_picture_and_end_with_the_tokens(tok) -> None:
    whole, short = random_tokens(tok, 1), random_tokens(tok, 1, seed=1, n=3)
    changes = arrivals(tok, Tokens.stack([whole, short]))
    assert changes.shape == (2, 6, 3, 16, 16)
    assert close(0.5 + changes[:1].sum(dim=1), tok.decode(whole))
    assert close(0.5 + changes[1:].sum(dim=1), tok.decode(short))
    assert changes[1, :3].abs().amax(dim=(1, 2, 3)).min() > 1e-3 and changes[1, 3:].abs().max() < 2e-5


def test_an_influence_is_the_change_by_hand(tok) -> None:
    tokens, donors = random_tokens(tok, 2), random_tokens(tok, 3, seed=1)
    maps = influences(tok, tokens, donors, [4, 1], batch_size=4)
    assert maps.shape == (2, 2, 16, 16)
    for row in range(2):
        for column, place in enumerate((4, 1)):
            ids = tokens.ids[[row, row, row]].clone()
            ids[:, place] = donors.ids[:, place]
            error = (tok.decode(ids) - tok.decode(tokens[row])).square().mean(dim=(0, 1)).sqrt()
            assert close(maps[row, column], error) and error.max() > 1e-3
    assert influences(tok, tokens[0], tokens[0]).abs().max() < 2e-5  # its own tokens change nothing


def test_influences_need_no_nested_tokenizer(tiny) -> None:
    tok = tokenizer(tiny(encoder="titok"))
    tokens = tok.encode(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert not tok.nested and influences(tok, tokens, random_tokens(tok, 2)).shape == (2, 6, 16, 16)
    with pytest.raises(ValueError, match="not nested"):
        prefixes(tok, tokens)


def test_mixtures_hold_the_ids_of_both(tok) -> None:
    a, b, c = (random_tokens(tok, 1, seed) for seed in range(3))
    mixed = swap(Tokens.stack([a, b]), c, [0, 5])
    assert torch.equal(mixed.ids[:, [0, 5]], c.ids[:, [0, 5]].expand(2, -1, -1))
    assert torch.equal(mixed.ids[:, 1:5], torch.cat([a.ids, b.ids])[:, 1:5])
    steps = morph(a, b)
    assert len(steps) == 7 and steps[0] == a and steps[6] == b and steps.nested is True
    assert torch.equal(steps.ids[2], torch.cat([b.ids[0, :2], a.ids[0, 2:]]))
    assert morph(a, b, [6, 0]) == Tokens.stack([b, a])


def test_codes_go_straight_from_one_image_to_the_other(tok) -> None:
    a, b = random_tokens(tok, 1), random_tokens(tok, 1, seed=1)
    way = interpolate(tok, a, b, [0.0, 0.5, 1.0], batch_size=2)
    assert way.shape == (3, 3, 16, 16)
    assert close(way[0], tok.decode(a)[0]) and close(way[2], tok.decode(b)[0])
    assert min((way[1] - way[0]).abs().max(), (way[1] - way[2]).abs().max()) > 1e-3
    assert close(interpolate(tok, b, a, [0.5])[0], way[1])


def test_sampling_options_reach_the_decoder(tiny) -> None:
    tok = tokenizer(tiny(decoder="flow"))
    tokens = random_tokens(tok, 1)
    first, second = (prefixes(tok, tokens, [6], seed=seed)[0, 0] for seed in (0, 1))
    assert close(second, tok.decode(tokens, seed=1)[0]) and not close(first, second)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tok, a, b: prefixes(tok, a, [0]), "from 1 to 6"),
        (lambda tok, a, b: prefixes(tok, a, []), "at least one"),
        (lambda tok, a, b: prefixes(tok, a.ids), "no tokens of tiny"),
        (lambda tok, a, b: influences(tok, a, b, [6]), "from 0 to 5"),
        (lambda tok, a, b: influences(tok, a, Tokens.stack([b, b[:, :2]])), "unlike numbers"),
        (lambda tok, a, b: influences(tok, a, Tokens(b.ids, (256,), "other")), "no tokens of tiny"),
        (lambda tok, a, b: swap(a, b[:, :2], [2]), "from 0 to 1"),
        (lambda tok, a, b: swap(a, Tokens.stack([b, b]), [0]), "got 2 for 1"),
        (lambda tok, a, b: swap(a, Tokens(b.ids, (256,), "other"), [0]), "one tokenizer"),
        (lambda tok, a, b: morph(a, b[:, :2]), "as many tokens"),
        (lambda tok, a, b: morph(a, b, [7]), "from 0 to 5"),
        (lambda tok, a, b: interpolate(tok, a, b, []), "at least one"),
        (lambda tok, a, b: interpolate(tok, a, Tokens.stack([b, b]), [0.5]), "an image each"),
    ],
)
def test_what_cannot_be_is_refused(tiny, call, message) -> None:
    tok = tokenizer(tiny())
    with pytest.raises(ValueError, match=message):
        call(tok, random_tokens(tok, 1), random_tokens(tok, 1, seed=1))
