"""A text model with an image vocabulary: interleaved parts round trip, and a small model learns them."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer as TextModel
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tokenizers_vis.language import extend_vocabulary
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.tokens import Tokens

TEXTS = ["a cat sits on the mat", "a dog runs in the rain", "the rocket starts at night"]
UNUSED = 12  # rows that a model has beyond the ids of its text tokenizer, as released ones do


@pytest.fixture(scope="module")
def text_tokenizer():
    """Byte-level BPE, which gives back every text exactly."""
    model = TextModel(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")


@pytest.fixture
def tok(tiny):
    torch.manual_seed(0)
    return Tokenizer.from_config(tiny(quantizer="vq")).eval()


def a_model(kind, text_tokenizer, tied=True):
    v = len(text_tokenizer) + UNUSED
    torch.manual_seed(2)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=v, n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=tied,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    config = LlamaConfig(
        vocab_size=v, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("init", ["mean", "codebook"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_text_model_stays_what_it_was(text_tokenizer, tok, kind, tied, init):
    model = a_model(kind, text_tokenizer, tied).eval()
    ids = torch.tensor([text_tokenizer.encode(TEXTS[0])])
    before = model(ids).logits
    table = model.get_input_embeddings().weight.detach().clone()
    mixed = extend_vocabulary(model, text_tokenizer, tok, init=init)
    after, new = model(ids).logits, model.get_input_embeddings().weight
    rows = len(text_tokenizer) + UNUSED
    assert mixed.vocabulary.first == rows and after.shape[-1] == model.config.vocab_size == mixed.vocabulary.stop
    torch.testing.assert_close(after[..., :rows], before)
    torch.testing.assert_close(new[:rows], table)
    assert (model.get_output_embeddings().weight is new) == tied
    # New rows lie where the text's lie, and no two are alike.
    assert new[rows:].isfinite().all() and len(new[rows:].unique(dim=0)) == mixed.vocabulary.total
    spread = new[rows:-3].std() / table.std()
    assert (spread < 0.3) if init == "mean" else (0.5 < spread < 2)


def test_codes_that_are_alike_start_alike(text_tokenizer, tok):
    model = a_model("llama", text_tokenizer)
    mixed = extend_vocabulary(model, text_tokenizer, tok, init="codebook")
    codes = tok.quantizer.lookup(torch.arange(32)[None, :, None])[0]
    rows = model.get_input_embeddings().weight[mixed.vocabulary.first :][:32]
    distances = [torch.pdist(x.detach().float()) for x in (codes, rows)]
    assert torch.corrcoef(torch.stack(distances))[0, 1] > 0.8


@pytest.mark.parametrize("quantizer", ["fsq", "library"])
def test_parts_go_both_ways(text_tokenizer, tiny, quantizer):
    tok = Tokenizer.from_config(tiny(quantizer=quantizer)).eval()
    mixed = extend_vocabulary(a_model("llama", text_tokenizer), text_tokenizer, tok)
    image, tokens = torch.rand(3, 16, 16), tok.encode(torch.rand(3, 16, 16), n_tokens=2)
    parts = ["a cat: ", image, " and é☂ ", tokens, tokens, "."]
    ids = mixed.encode(parts, n_tokens=4)
    expected = ["a cat: ", tok.encode(image, n_tokens=4), " and é☂ ", tokens, tokens, "."]
    assert mixed.decode(ids) == expected
    assert mixed.decode(mixed.encode([image]))[0].n_tokens == 6
    assert mixed.decode(mixed.encode(["a ", "cat"])) == ["a cat"]
    batch = mixed.batch([parts, ["dog"]], n_tokens=4, padding_side="left")
    assert [mixed.decode(row) for row in batch["input_ids"]] == [expected, ["dog"]]
    assert batch["attention_mask"][1].tolist() == [0] * (len(ids) - len(mixed.encode(["dog"]))) + [1] * len(
        mixed.encode(["dog"])
    )
    assert mixed.decode(torch.full((3,), mixed.vocabulary.pad)) == []


def test_streams_that_are_broken_are_named(text_tokenizer, tok):
    mixed = extend_vocabulary(a_model("llama", text_tokenizer), text_tokenizer, tok)
    code, begin, end = mixed.vocabulary.first, mixed.vocabulary.begin, mixed.vocabulary.end
    assert mixed.decode(torch.tensor([begin, code]))[0].n_tokens == 1  # broken off after a whole token
    for row, message in (
        ([1, code], f"id {code} at place 1 is outside of an image"),
        ([1, end], f"id {end} at place 1 is outside"),
        ([len(text_tokenizer)], "is outside of an image"),
        ([1, begin, 5, end], "begins at place 1: id 5 is outside the vocabulary"),
        ([1, begin, end], "begins at place 1: before end .* at least one"),
        ([begin, begin, code, end], "begins at place 0: sequence 0 has id"),
    ):
        with pytest.raises(ValueError, match=message):
            mixed.decode(torch.tensor(row))
    for wrong, message in (
        ("a cat", "list of texts"),
        ([], "list of texts"),
        ([torch.rand(2, 3, 16, 16)], "one image"),
    ):
        with pytest.raises(ValueError, match=message):
            mixed.encode(wrong)
    with pytest.raises(ValueError, match="one stream"):
        mixed.decode(torch.zeros(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_not_extended_twice(text_tokenizer, tok, tiny, tmp_path, tied):
    model = a_model("llama", text_tokenizer, tied)
    mixed = extend_vocabulary(model, text_tokenizer, tok)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert extend_vocabulary(again, text_tokenizer, tok).vocabulary == mixed.vocabulary
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    other = Tokenizer.from_config(tiny(quantizer="fsq")).eval()
    with pytest.raises(ValueError, match="was extended for"):
        extend_vocabulary(again, text_tokenizer, other)


def test_what_cannot_be_extended_is_refused(text_tokenizer, tok):
    model = a_model("llama", text_tokenizer)
    with pytest.raises(ValueError, match="'mean' or 'codebook'"):
        extend_vocabulary(model, text_tokenizer, tok, init="zero")
    with pytest.raises(ValueError, match="needs one code for each id"):
        extend_vocabulary(model, text_tokenizer, tok, init="codebook", bits_per_id=1)
    model.resize_token_embeddings(20, mean_resizing=False)
    with pytest.raises(ValueError, match="the model 20 rows"):
        extend_vocabulary(model, text_tokenizer, tok)


@pytest.mark.parametrize(("kind", "init"), [("gpt2", "mean"), ("llama", "codebook")])
def test_a_small_model_learns_text_and_images(text_tokenizer, tok, kind, init):
    """It memorises three texts with an image each, and from the text generates that image, and text from the image."""
    model = a_model(kind, text_tokenizer)
    mixed = extend_vocabulary(model, text_tokenizer, tok, init=init)
    images = [Tokens(torch.randint(32, (1, n, 1)), (32,), tok.name, nested=True) for n in (6, 3, 5)]
    rows = [[text, image, " is what you see</s>"] for text, image in zip(TEXTS, images, strict=True)]
    batch = mixed.batch(rows)
    targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(**batch, labels=targets).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    model.eval()
    prompts = mixed.batch([[text] for text in TEXTS], padding_side="left")
    ids = model.generate(
        **prompts,
        max_new_tokens=30,
        do_sample=False,
        logits_processor=[mixed.legal_ids()],
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=mixed.vocabulary.pad,
    )
    assert [mixed.decode(row) for row in ids] == rows
    assert tok.decode(mixed.decode(ids[0])[1]).shape == (1, 3, 16, 16)
