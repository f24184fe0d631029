"""The vocabulary bridge: tokens as one stream with specials, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers_vis.quantizers.integers import IdFormat
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.tokens import Tokens
from tokenizers_vis.vocabulary import Vocabulary


def some(lengths, sizes=(4, 3), name="t", nested=True):
    """Random tokens, an image for each length."""
    n = max(lengths)
    ids = torch.stack([torch.randint(size, (len(lengths), n)) for size in sizes], dim=-1)
    ids[torch.arange(n) >= torch.tensor(lengths)[:, None]] = -1
    return Tokens(ids, sizes, name, torch.tensor(lengths), nested)


def a_vocabulary(sizes=(4, 3), max_tokens=8, nested=True, **options):
    return Vocabulary(sizes, "t", max_tokens, nested, **options)


@st.composite
def cases(draw):
    """A vocabulary, tokens of it, and labels."""
    binary = draw(st.booleans())
    if binary:
        sizes = tuple(2**width for width in draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
        bits = IdFormat(sizes).bits
        bits_per_id = draw(st.sampled_from([g for g in range(1, 13) if bits % g == 0]))
    else:
        sizes, bits_per_id = tuple(draw(st.lists(st.integers(2, 70), min_size=1, max_size=3))), None
    classes = draw(st.sampled_from([0, 5]))
    vocabulary = a_vocabulary(
        sizes,
        classes=classes,
        masked=draw(st.booleans()),
        first=draw(st.sampled_from([0, 300])),
        bits_per_id=bits_per_id,
    )
    lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    labels = draw(st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths))) if classes else None
    return vocabulary, some(lengths, sizes), labels


@settings(max_examples=80)
@given(cases(), st.booleans())
def test_what_is_encoded_is_decoded(case, begin):
    vocabulary, tokens, labels = case
    ids = vocabulary.encode(tokens, labels, begin=begin)
    assert vocabulary.decode(ids, begin=begin) == tokens
    assert ids.dtype == torch.int64 and ids.shape[1] <= vocabulary.max_length
    assert vocabulary.first <= ids.min() and ids.max() < vocabulary.stop
    for row, part in zip(ids, tokens, strict=True):  # one by one, without padding
        row = row[vocabulary.attention_mask(row).bool()]
        assert row[-1] == vocabulary.end and vocabulary.decode(row, begin=begin) == part
        assert vocabulary.decode(row[:-1], begin=begin) == part  # an end that was never written
        codes = row[len(row) - 1 - part.n_tokens * len(vocabulary.codes) : -1]
        places = [vocabulary.codes[i % len(vocabulary.codes)] for i in range(len(codes))]
        assert all(id_ in place for id_, place in zip(codes.tolist(), places, strict=True))


@given(cases())
def test_the_ids_are_all_different_and_none_is_left_out(case):
    vocabulary, _, _ = case
    every = [id_ for codes in vocabulary.codes for id_ in codes] + list(vocabulary.specials.values())
    every += vocabulary.labels
    assert every == list(range(vocabulary.first, vocabulary.stop)) and len(every) == vocabulary.total


def test_where_everything_is():
    vocabulary = a_vocabulary(classes=2, masked=True)
    assert vocabulary.codes == (range(0, 4), range(4, 7))
    assert vocabulary.specials == {"begin": 7, "end": 8, "pad": 9, "mask": 10}
    assert vocabulary.labels == range(11, 13) and vocabulary.total == 13
    tokens = Tokens(torch.tensor([[[1, 2], [3, 0]]]), (4, 3), "t", nested=True)
    ragged = Tokens.stack([tokens, tokens[:, :1]])
    assert vocabulary.encode(ragged, [1, 0]).tolist() == [[7, 12, 1, 6, 3, 4, 8], [7, 11, 1, 6, 8, 9, 9]]
    assert vocabulary.prompt([1, 0]).tolist() == [[7, 12], [7, 11]]
    assert a_vocabulary().prompt(b=3).tolist() == [[7]] * 3 and a_vocabulary().mask is None
    assert repr(vocabulary) == (
        "Vocabulary(13 ids of t: codes 0 to 3, 4 to 6; begin 7, end 8, pad 9, mask 10, labels 11 to 12)"
    )


def test_to_sequence_and_from_sequence_take_specials():
    tokens = some([2, 1])
    ids = tokens.to_sequence(9, begin=7, end=8, label=[11, 12])
    assert ids[:, :2].tolist() == [[7, 11], [7, 12]] and ids[1].tolist()[4:] == [8, 9, 9]
    assert Tokens.from_sequence(ids, (4, 3), "t", 9, begin=7, end=8, labels=range(11, 13)) == tokens
    assert torch.equal(tokens.to_sequence(9), ids[:, 2:-1].masked_fill(ids[:, 2:-1] == 8, 9))
    for wrong, message in (
        ({"begin": 6}, "begin 6 is the id of a token"),
        ({"end": 9}, "no two alike"),
        ({"label": 9}, "no two alike"),
        ({"label": 3}, "label 3 is the id of a token"),
        ({"label": [11]}, "each of 2"),
        ({"label": 11.0}, "the id of one class"),
    ):
        with pytest.raises(ValueError, match=message):
            tokens.to_sequence(9, **wrong)


def test_sixty_four_bits_a_token():
    """A token of 64 codebooks of one bit, in eight ids of eight bits: the highest bit first."""
    bits = torch.zeros(1, 3, 64, dtype=torch.int64)
    bits[0, 0, 0] = bits[0, 1, 63] = bits[0, 2, 8:16] = 1
    tokens = Tokens(bits, (2,) * 64, "instella")
    vocabulary = Vocabulary((2,) * 64, "instella", 3, False, bits_per_id=8)
    assert vocabulary.sizes == (256,) * 8 and vocabulary.begin == 2048
    local = vocabulary.encode(tokens, begin=False, end=False).reshape(3, 8) - 256 * torch.arange(8)
    assert local.tolist() == [[128, *[0] * 7], [*[0] * 7, 1], [0, 255, *[0] * 6]]
    assert a_vocabulary((2**18,), bits_per_id=9).codes == (range(0, 512), range(512, 1024))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([7, 11, 1, 4, 8, 13], "id 13 is outside the vocabulary of t, which has 0 to 12"),
        ([7, 11, -1, 4], "id -1 is outside"),
        ([1, 4, 8], "id 1 at place 0, where a row starts with 7"),
        ([7, 1, 4, 8], "id 1 at place 1, where a label is 11 to 12"),
        ([7], "a row has a label, 11 to 12, at place 1"),
        ([7, 11, 8], "at least one"),
        ([7, 11, 1, 8], "whole tokens of 2 ids"),
        ([7, 11, 1], "whole tokens of 2 ids"),
        ([7, 11, 4, 1], "id 4 at place 2, where codebook 0 takes 0 to 3"),
        ([7, 11, 1, 10], "id 10 at place 3, where codebook 1 takes 4 to 6"),
        ([7, 11, 1, 4, 8, 1], "id 1 at place 5, where 9 follows"),
        ([7, 11, 1, 4, 9, 8], "id 8 at place 5, where 9 follows"),
        ([7, 11, *[1, 4] * 9], "1 to 8 tokens, got 9"),
        ([7.0, 11.0, 1.0, 4.0], "integers"),
    ],
)
def test_what_is_no_image_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        a_vocabulary(classes=2, masked=True).decode(torch.tensor(row))


def test_errors_name_the_ids_as_they_were_given():
    with pytest.raises(ValueError, match="id 101 at place 1, where codebook 0 takes 100 to 100|starts with 107"):
        a_vocabulary(first=100).decode(torch.tensor([101, 104]))
    with pytest.raises(ValueError, match="id 104 at place 1, where codebook 0 takes 100 to 103"):
        a_vocabulary(first=100).decode(torch.tensor([107, 104, 104]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": some([2], sizes=(4, 4))}, "vocabulary of t"),
        ({"tokens": some([2], name="other")}, "vocabulary of t"),
        ({"tokens": some([9])}, "1 to 8 tokens, got 9"),
        ({"tokens": torch.zeros(1, 2, 2)}, "encodes Tokens"),
        ({"labels": None}, "every image needs a label"),
        ({"labels": 2}, "classes run from 0 to 1, got 2"),
        ({"labels": [0, -1]}, "classes run from 0 to 1, got -1"),
        ({"labels": [0, 0, 1]}, "each of 2 images, got 3"),
        ({"labels": [0.0, 1.0]}, "whole numbers"),
    ],
)
def test_what_cannot_be_encoded_is_refused(change, message):
    arguments = {"tokens": some([2, 1]), "labels": [0, 1]} | change
    with pytest.raises(ValueError, match=message):
        a_vocabulary(classes=2).encode(**arguments)
    with pytest.raises(ValueError, match="has no classes"):
        a_vocabulary().encode(some([1]), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (2**62, 2**62)}, "past int64.*bits_per_id"),
        ({"bits_per_id": 2}, "powers of two"),
        ({"sizes": (16,), "bits_per_id": 3}, "divisor of a token's 4 bits"),
        ({"classes": -1}, "classes"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"first": -1}, "first"),
    ],
)
def test_impossible_vocabularies_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        a_vocabulary(**options)


@pytest.mark.parametrize("quantizer", ["fsq", "vq", "library"])
def test_of_a_tokenizer(tiny, quantizer):
    tok = Tokenizer.from_config(tiny(quantizer=quantizer)).eval()
    vocabulary = tok.vocabulary
    assert vocabulary.total == tok.vocab_size + 3 and vocabulary.nested and vocabulary.max_tokens == tok.max_tokens
    tokens = tok.encode(torch.rand(3, 3, 16, 16), n_tokens=[1, 6, 3])
    assert vocabulary.decode(vocabulary.encode(tokens)) == tokens
    assert Vocabulary.of(tok, classes=3).encode(tokens, 2)[:, 1].tolist() == [vocabulary.pad + 3] * 3


def test_a_tokenizer_without_prefixes_has_one_length(tiny):
    tok = Tokenizer.from_config(tiny(encoder="titok")).eval()
    short = Tokens(torch.zeros(1, 2, 1, dtype=torch.int64), tok.codebook_sizes, tok.name)
    assert not tok.nested and tok.vocabulary.lengths == range(6, 7)
    with pytest.raises(ValueError, match="has 6 tokens, got 2"):
        tok.vocabulary.encode(short)
