"""FQGAN, dual and triple, against what its authors' code gave; and the shapes of the released files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tokenizers_vis as tv
from tokenizers_vis.catalogue import preset
from tokenizers_vis.config import ConfigError
from tokenizers_vis.convert import convert
from tokenizers_vis.decoders.conv import GridDecoder
from tokenizers_vis.decoders.dual import DualDecoder, FeatureHead
from tokenizers_vis.encoders.fqgan import FactorizedEncoder
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.weights import CheckpointError

KINDS = ["dual", "triple"]
PRESETS = ["fqgan-dual-16", "fqgan-triple-16", "fqgan-dual-8", "fqgan-triple-8"]
MANIFEST = Path(__file__).parent / "fixtures" / "manifests" / "fqgan.json.gz"


def flat(grid: Tensor) -> Tensor:
    return grid.flatten(2).mT


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, official, folder) -> tuple[Tokenizer, dict[str, Tensor]]:
    weights, expected, options = official(f"fqgan_{request.param}")
    return tv.load(folder(weights, options), device="cpu"), expected


class TestAgreement:
    @torch.no_grad()
    def test_z_ids_codes_and_pictures_are_its_authors(self, pair):
        tok, expected = pair
        z = tok.encoder(tok.canvas.read(expected["images"] / 255), tok.max_tokens)
        torch.testing.assert_close(z, flat(expected["z"]), rtol=0, atol=2e-5)
        tokens = tok.encode(expected["images"])
        assert torch.equal(tokens.ids, expected["ids"])
        assert len(tok.codebook_sizes) == expected["ids"].shape[-1]
        torch.testing.assert_close(tok.quantizer.lookup(tokens.ids), flat(expected["codes"]), rtol=0, atol=1e-6)
        painted = tok.decoder(tok.quantizer.lookup(tokens.ids))
        torch.testing.assert_close(painted, expected["picture"], rtol=0, atol=5e-5)
        assert torch.equal(tok.decode(tokens), tok.canvas.paint(painted).clamp(0, 1))

    def test_the_features_that_codes_foretell_are_its_authors(self, pair):
        tok, expected = pair
        found = tok.decoder.features(tok.quantizer.lookup(expected["ids"]))
        names = sorted(key for key in expected if key.startswith("features_"))
        assert len(found) == len(names) == len(tok.codebook_sizes) - 1
        for features, name in zip(found, names, strict=True):
            torch.testing.assert_close(features, expected[name], rtol=0, atol=2e-5)

    def test_losses_and_gradients_are_its_authors(self, pair):
        tok, expected = pair
        tok.train().requires_grad_(True)
        quantized = tok.quantizer(tok.encoder(tok.canvas.read(expected["images"] / 255), tok.max_tokens))
        torch.testing.assert_close(quantized.loss, expected["loss"], rtol=2e-5, atol=2e-5)
        painted = tok.decoder(quantized.codes)
        (quantized.loss + (painted * torch.linspace(-1, 1, painted.numel()).view_as(painted)).mean()).backward()
        for grad, name in (
            (tok.encoder.path.first.weight.grad, "grad_first"),
            (tok.quantizer.parts[0].codebook.grad, "grad_codebook"),
        ):
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=2e-5)

    def test_a_checkpoint_of_training_is_read_with_its_averaged_weights(self, tmp_path, official):
        weights, _, options = official("fqgan_dual")
        torch.save({"model": {key: value * 0 for key, value in weights.items()}, "ema": weights}, tmp_path / "a.pt")
        (tmp_path / "config.json").write_text(json.dumps(options))
        tok = tv.load(tmp_path, device="cpu")
        assert torch.equal(tok.decoder.pixels.from_codes.weight, weights["post_quant_conv.weight"])

    def test_without_heads_it_loads_and_foretells_nothing(self, official, folder):
        weights, expected, options = official("fqgan_dual")
        weights = {key: value for key, value in weights.items() if not key.startswith("feat_pred_head.")}
        tok = tv.load(folder(weights, options), device="cpu")
        assert tok.decoder.features(tok.quantizer.lookup(expected["ids"])) == ()
        assert torch.equal(tok.encode(expected["images"]).ids, expected["ids"])

    def test_what_is_saved_decodes_as_before(self, pair, tmp_path):
        tok, expected = pair
        tok.save(tmp_path / "ours.safetensors")
        again = tv.load(tmp_path / "ours.safetensors", device="cpu")
        assert torch.equal(again.decode(expected["ids"]), tok.decode(expected["ids"]))


class TestRefusals:
    def test_weights_that_are_missing_or_left_over_are_named(self, official, folder):
        weights, _, options = official("fqgan_dual")
        weights["encoder.more.weight"] = weights.pop("quant_conv_sem.bias")
        with pytest.raises(CheckpointError, match="missing: encoder.branches.1.to_codes.bias.*left over: encoder.more"):
            tv.load(folder(weights, options), device="cpu")

    def test_the_triple_is_no_dual(self, official, folder):
        weights, _, options = official("fqgan_triple")
        with pytest.raises(CheckpointError, match="missing.*left over"):
            tv.load(folder(weights, options | {"codebooks": 2}), device="cpu")

    def test_a_checkpoint_of_another_family_is_told(self, tmp_path):
        torch.save({"model": {"quantize.embedding.weight": torch.zeros(4, 2)}}, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match="of another model; it has quantize"):
            tv.load("fqgan-dual-16", weights=tmp_path / "other.pt")

    def test_parts_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match="multiple of branches"):
            FactorizedEncoder(dim=8, size=16, branches=3)
        pixels = GridDecoder(dim=8, size=4, ch=32, channel_mult=(1,), num_res_blocks=1, z_channels=8)
        head = {"dim": 4, "grid": 4, "width": 16, "heads": 2, "out": 16}
        with pytest.raises(ValueError, match="as wide as its transformer"):
            FeatureHead(**head | {"out": 8})
        with pytest.raises(ValueError, match="a code has dim 8"):
            DualDecoder(dim=8, size=4, pixels=pixels, heads=(FeatureHead(**head, start=6),))
        with pytest.raises(ValueError, match="grid of the pixels"):
            DualDecoder(dim=8, size=4, pixels=pixels, heads=(FeatureHead(**head | {"grid": 2}),))
        decoder = DualDecoder(dim=8, size=4, pixels=pixels)
        with pytest.raises(ValueError, match="a whole grid, of 16 codes"):
            decoder.features(torch.zeros(1, 3, 8))


class TestReleases:
    @pytest.mark.parametrize("name", PRESETS)
    def test_the_preset_takes_exactly_the_tensors_of_the_released_file(self, name):
        shapes = json.loads(gzip.decompress(MANIFEST.read_bytes()))[name]
        table = preset(name)
        with torch.device("meta"):
            weights = {key: torch.empty(shape) for key, shape in shapes.items()}
            converted = convert(table["family"], table["official"], weights)
            tok = Tokenizer.from_state({"name": name, **converted.config}, converted.state, name)
        assert tok.max_tokens == table["max_tokens"] and tok.image_size == table["image_size"]
        assert list(tok.codebook_sizes) == table["codebook_sizes"] and tok.nested == table["nested"]
        assert tok.bits_per_token * tok.max_tokens == table["bits_per_image"]
        kept = [key for key in shapes if not key.endswith("codebook_used")]
        assert sum(p.numel() for p in tok.parameters()) == sum(weights[key].numel() for key in kept)

    def test_a_mistake_in_the_config_is_told(self, official):
        weights, _, options = official("fqgan_dual")
        converted = convert("fqgan", options | {"num_heads": 5}, weights)
        with pytest.raises(ConfigError, match="not a multiple of heads 5"):
            Tokenizer.from_config({"name": "x", **converted.config})
