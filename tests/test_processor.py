"""Images for transformers models: the processor, and generation kept to legal ids."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BatchFeature, LlamaConfig, LlamaForCausalLM

from tokenizers_vis.processor import LegalIds, TokenizerProcessor
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.vocabulary import Vocabulary


def a_llama(vocabulary, v=None):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=v or vocabulary.stop,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=vocabulary.pad,
        bos_token_id=vocabulary.begin,
        eos_token_id=vocabulary.end,
    )
    return LlamaForCausalLM(config).eval()


def every_sequence(legal, v, prompt, stop):
    """All that a model may generate: depth first through the allowed ids."""
    found, open_ = [], [prompt]
    while open_:
        row = open_.pop()
        scores = legal(torch.tensor([row]), torch.zeros(1, v))[0]
        for id_ in scores.isfinite().nonzero().flatten().tolist():
            (found if id_ == stop else open_).append([*row, id_])
    return found


class TestLegalIds:
    @pytest.mark.parametrize("n_tokens", [None, 1, 2])
    @pytest.mark.parametrize("classes", [0, 2])
    def test_exactly_the_images_can_be_generated(self, n_tokens, classes):
        """Every path through the allowed ids is an image, and there are as many as there are images."""
        vocabulary = Vocabulary((3, 2), "t", 2, nested=True, classes=classes, masked=True, first=2)
        legal, v = LegalIds(vocabulary, n_tokens), vocabulary.stop + 3
        rows = every_sequence(legal, v, [vocabulary.begin], vocabulary.end)
        lengths = [1, 2] if n_tokens is None else [n_tokens]
        assert len(rows) == len(set(map(tuple, rows))) == (classes or 1) * sum(6**n for n in lengths)
        assert {vocabulary.decode(torch.tensor(row)).n_tokens for row in rows} == set(lengths)

    def test_a_tokenizer_without_prefixes_ends_after_all(self):
        vocabulary = Vocabulary((3,), "t", 2, nested=False)
        rows = every_sequence(LegalIds(vocabulary), vocabulary.stop, [vocabulary.begin], vocabulary.end)
        assert len(rows) == 9
        with pytest.raises(ValueError, match="n_tokens is 2 for t"):
            LegalIds(vocabulary, 1)

    def test_before_and_after_an_image(self):
        vocabulary = Vocabulary((3,), "t", 2, nested=True)
        legal = LegalIds(vocabulary)
        after = legal(torch.tensor([[3, 0, 4], [5, 5, 5]]), torch.zeros(2, 6)).isfinite()
        assert after[0].nonzero().flatten().tolist() == [vocabulary.pad]
        assert after[1].nonzero().flatten().tolist() == [vocabulary.begin]

    def test_outside_of_images_there_is_text(self):
        vocabulary = Vocabulary((3,), "t", 2, nested=True, first=10)
        legal = LegalIds(vocabulary, text=range(8))
        rows = torch.tensor([[1, 13, 10, 14], [15, 1, 2, 3], [1, 13, 10, 11]])
        allowed = [row.nonzero().flatten().tolist() for row in legal(rows, torch.zeros(3, 20)).isfinite()]
        assert allowed == [[*range(8), 13], [*range(8), 13], [14]]
        with pytest.raises(ValueError, match="overlap"):
            LegalIds(vocabulary, text=range(11))

    def test_rows_do_not_touch_each_other(self):
        vocabulary = Vocabulary((5, 4), "t", 6, nested=True, classes=3)
        legal, v = LegalIds(vocabulary), vocabulary.stop
        rows = []
        for _ in range(200):  # prefixes of random images, padded on the left
            row, scores = [vocabulary.begin], torch.rand(1, v)
            for _ in range(torch.randint(13, ()).item()):
                row.append(legal(torch.tensor([row]), torch.rand(1, v)).argmax().item())
            rows.append([vocabulary.pad] * (14 - len(row)) + row)
        scores = torch.rand(len(rows), v)
        together = legal(torch.tensor(rows), scores)
        alone = torch.cat([legal(torch.tensor([row]), scores[i : i + 1]) for i, row in enumerate(rows)])
        assert torch.equal(together, alone)
        kept = together.isfinite()
        assert torch.equal(together[kept], scores[kept]) and kept.any(dim=1).all()

    def test_a_model_that_is_too_small_is_named(self):
        vocabulary = Vocabulary((3,), "t", 2, nested=True)
        with pytest.raises(ValueError, match="the model has 5 ids, .* vocab_size=6"):
            LegalIds(vocabulary)(torch.tensor([[3]]), torch.zeros(1, 5))
        for wrong in (0, 3):
            with pytest.raises(ValueError, match="n_tokens is 1 to 2"):
                LegalIds(vocabulary, wrong)


class TestGenerate:
    @pytest.mark.parametrize(
        ("sizes", "n_tokens", "bits_per_id"), [((30,), None, None), ((8, 4), 5, None), ((2,) * 8, None, 4)]
    )
    def test_every_sequence_of_an_untrained_model_decodes(self, sizes, n_tokens, bits_per_id):
        vocabulary = Vocabulary(sizes, "t", 6, True, classes=4, bits_per_id=bits_per_id)
        labels = torch.arange(4).repeat(50)
        prompt = vocabulary.prompt(labels)
        options = {
            "max_new_tokens": vocabulary.max_length,
            "do_sample": True,
            "attention_mask": torch.ones_like(prompt),
        }
        llama = a_llama(vocabulary, vocabulary.stop + 7)
        ids = llama.generate(prompt, logits_processor=[LegalIds(vocabulary, n_tokens)], **options)
        tokens = vocabulary.decode(ids)
        lengths = torch.full((200,), tokens.n_tokens) if tokens.lengths is None else tokens.lengths
        assert len(tokens) == 200 and torch.equal(ids[:, 1], vocabulary.label(labels))
        assert set(lengths.tolist()) == ({1, 2, 3, 4, 5, 6} if n_tokens is None else {n_tokens})
        with pytest.raises(ValueError):  # without it hardly a row is an image
            vocabulary.decode(llama.generate(prompt, **options))

    def test_from_labels_to_pictures(self, tiny):
        processor = TokenizerProcessor(Tokenizer.from_config(tiny()).eval(), classes=4)
        prompt = processor.prompt([0, 3])
        ids = a_llama(processor.vocabulary).generate(
            **prompt, do_sample=True, max_new_tokens=20, logits_processor=[LegalIds(processor.vocabulary, 3)]
        )
        images = processor.batch_decode(ids)
        assert images.shape == (2, 3, 16, 16) and torch.equal(processor.decode(ids[1]), images[1])


class TestProcessor:
    @pytest.mark.parametrize("quantizer", ["fsq", "library"])
    def test_a_ragged_batch(self, tiny, quantizer):
        tok = Tokenizer.from_config(tiny(quantizer=quantizer)).eval()
        processor, images = TokenizerProcessor(tok, classes=3), torch.rand(2, 3, 16, 16)
        inputs = processor(images, labels=[2, 0], n_tokens=[6, 2])
        assert isinstance(inputs, BatchFeature) and set(inputs) == set(processor.model_input_names)
        k = len(tok.codebook_sizes)
        assert inputs["input_ids"].shape == (2, 3 + 6 * k)
        assert inputs["attention_mask"].sum(dim=1).tolist() == [3 + 6 * k, 3 + 2 * k]
        a_llama(processor.vocabulary)(**inputs)  # its ids fit a model of that size
        expected = tok.reconstruct(images, n_tokens=[6, 2])
        torch.testing.assert_close(processor.decode(inputs["input_ids"]), expected)
        assert processor(images, labels=1, return_tensors="np")["input_ids"].dtype == "int64"

    def test_saved_and_loaded(self, tiny, tmp_path):
        processor = TokenizerProcessor(Tokenizer.from_config(tiny()).eval(), classes=3)
        written = processor.save_pretrained(tmp_path / "p")
        assert sorted(written) == sorted(str(path) for path in (tmp_path / "p").iterdir())
        again = TokenizerProcessor.from_pretrained(tmp_path / "p", device="cpu")
        images = torch.rand(2, 3, 16, 16)
        assert again.vocabulary == processor.vocabulary and repr(again) == repr(processor)
        assert torch.equal(again(images, [0, 1])["input_ids"], processor(images, [0, 1])["input_ids"])
        with pytest.raises(ValueError, match="is no preset"):
            processor.save_pretrained(tmp_path / "q", by_name=True)

    def test_saved_by_name(self, tmp_path):
        processor = TokenizerProcessor.from_pretrained(self.named(tmp_path, "mini"), device="cpu")
        written = processor.save_pretrained(tmp_path / "again", by_name=True)
        assert [path.name for path in (tmp_path / "again").iterdir()] == ["processor_config.json"] and len(written) == 1
        assert json.loads((tmp_path / "again" / "processor_config.json").read_text())["tokenizer"] == "mini"

    def named(self, folder, name):
        (folder / "processor_config.json").write_text(
            json.dumps({"tokenizer": name, "classes": 0, "bits_per_id": None})
        )
        return folder

    def test_wrong_folders_are_named(self, tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            TokenizerProcessor.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="there is no preset"):
            TokenizerProcessor.from_pretrained(self.named(tmp_path, "minni"))
        (tmp_path / "processor_config.json").write_text("{}")
        with pytest.raises(ValueError, match="is no config of a TokenizerProcessor"):
            TokenizerProcessor.from_pretrained(tmp_path)

    def test_wrong_input_is_refused(self, tiny):
        processor = TokenizerProcessor(Tokenizer.from_config(tiny()).eval(), classes=3)
        image = torch.rand(3, 16, 16)
        for call, message in (
            (lambda: processor(image), "every image needs a label"),
            (lambda: processor(image, 3), "classes run from 0 to 2"),
            (lambda: processor(image, 0, 7), "n_tokens is a whole number from 1 to 6"),
            (lambda: processor(image, 0, return_tensors="tf"), "'pt' or 'np'"),
            (lambda: processor.batch_decode(torch.tensor([1, 2])), "sequences b l"),
            (lambda: processor.decode(torch.tensor([10**6])), "outside the vocabulary"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
