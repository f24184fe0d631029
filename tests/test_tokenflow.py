"""TokenFlow, with CLIP's and SigLIP's encoder, against what its authors' code gave; and the shapes of the releases."""

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
from tokenizers_vis.decoders.vision import resized
from tokenizers_vis.encoders.dual import VisionTower
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.weights import CheckpointError

LEFT_OUT = ("encoder.layers.26.", "post_layernorm.", "head.")  # of SigLIP
MANIFEST = Path(__file__).parent / "fixtures" / "manifests" / "tokenflow.json.gz"


def flat(grid: Tensor) -> Tensor:
    return grid.flatten(2).mT


@pytest.fixture(params=["clip", "siglip"])
def pair(request: pytest.FixtureRequest, official, folder) -> tuple[Tokenizer, dict[str, Tensor]]:
    weights, expected, options = official(f"tokenflow_{request.param}")
    return tv.load(folder(weights, options), device="cpu"), expected


class TestAgreement:
    @torch.no_grad()
    def test_z_ids_codes_and_pictures_are_its_authors(self, pair):
        tok, expected = pair
        z = tok.encoder(tok.canvas.read(expected["images"] / 255), tok.encoder.max_tokens)
        torch.testing.assert_close(z, flat(expected["z"]), rtol=0, atol=2e-5)
        tokens = tok.encode(expected["images"])
        assert torch.equal(tokens.ids[..., 0], expected["ids"])
        codes = tok.quantizer.lookup(tokens.ids)
        torch.testing.assert_close(codes, flat(expected["codes"]), rtol=0, atol=2e-5)
        painted = tok.decoder(codes)
        torch.testing.assert_close(painted, expected["picture"], rtol=0, atol=5e-5)
        assert torch.equal(tok.decode(tokens), tok.canvas.paint(painted).clamp(0, 1))

    def test_what_the_semantic_decoder_makes_of_the_codes_is_its_authors(self, pair):
        tok, expected = pair
        codes = tok.quantizer.lookup(expected["ids"][..., None])
        (features,) = tok.decoder.features(codes)
        torch.testing.assert_close(features, expected["features"], rtol=0, atol=2e-5)
        meaning, pixels = tok.quantizer.part.halves(codes)
        changed = torch.cat([meaning, torch.randn_like(pixels)], dim=-1)
        assert torch.equal(tok.decoder.features(changed)[0], features)
        assert not torch.equal(tok.decoder(changed), tok.decoder(codes))

    def test_losses_and_gradients_are_its_authors(self, pair):
        tok, expected = pair
        tok.train().requires_grad_(True)
        tok.quantizer.scale_drop = 0.0
        quantized = tok.quantizer(tok.encoder(tok.canvas.read(expected["images"] / 255), tok.encoder.max_tokens))
        torch.testing.assert_close(quantized.loss, expected["loss"], rtol=2e-5, atol=2e-5)
        total = quantized.loss
        for made in (tok.decoder(quantized.codes), *tok.decoder.features(quantized.codes)):
            total = total + (made * torch.linspace(-1, 1, made.numel()).view_as(made)).mean()
        total.backward()
        for grad, name in (
            (tok.encoder.pixels.net.path.first.weight.grad, "grad_first"),
            (tok.encoder.to_meaning[0].weight.grad, "grad_meaning"),
            (tok.quantizer.part.codebook.grad, "grad_codebook"),
        ):
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=2e-5)

    def test_siglip_is_read_by_the_names_of_older_transformers_too(self, official, folder):
        weights, expected, options = official("tokenflow_siglip")
        theirs = "encoder_vqkd."
        old = {key.replace(theirs, f"{theirs}vision_model."): value for key, value in weights.items()}
        assert old.keys() != weights.keys()
        tok = tv.load(folder(old, options), device="cpu")
        assert torch.equal(tok.encode(expected["images"]).ids[..., 0], expected["ids"])

    def test_what_is_saved_decodes_as_before(self, pair, tmp_path):
        tok, expected = pair
        tok.save(tmp_path / "ours.safetensors")
        again = tv.load(tmp_path / "ours.safetensors", device="cpu")
        ids = expected["ids"][..., None]
        assert torch.equal(again.decode(ids), tok.decode(ids))


class TestRefusals:
    def test_weights_that_are_missing_or_left_over_are_named(self, official, folder):
        weights, _, options = official("tokenflow_clip")
        weights["encoder_vqkd.more"] = weights.pop("decoder_vqkd.blocks.0.attn.v_bias")
        with pytest.raises(
            CheckpointError, match=r"missing: .*attention\.qkv\.bias.*left over: .*encoder\.semantic\.more"
        ):
            tv.load(folder(weights, options), device="cpu")

    @pytest.mark.parametrize("gone", ["quantize.embedding_vqkd.weight", "encoder_vqkd.conv1.weight"])
    def test_a_checkpoint_of_another_model_is_told(self, gone, official, folder):
        weights, _, options = official("tokenflow_clip")
        del weights[gone]
        with pytest.raises(CheckpointError, match=f"holds no {gone}, so it is of another model"):
            tv.load(folder(weights, options), device="cpu")

    def test_codebooks_of_different_lengths_are_refused(self, official):
        weights, _, options = official("tokenflow_clip")
        weights["quantize.embedding_vqkd.weight"] = weights["quantize.embedding_vqkd.weight"][1:]
        with pytest.raises(CheckpointError, match="both codebooks are of one length"):
            convert("tokenflow", options, weights)

    def test_only_released_teachers(self):
        with pytest.raises(CheckpointError, match="'clipb_224' or 'siglip_384'.*got 'vitamin_xlarge_256'"):
            convert("tokenflow", {"teacher": "vitamin_xlarge_256"}, {})

    def test_a_tensor_with_other_axes_is_told(self, official):
        weights, _, options = official("tokenflow_clip")
        weights["encoder_vqkd.conv1.weight"] = weights["encoder_vqkd.conv1.weight"].flatten(1)
        with pytest.raises(CheckpointError, match=r"conv1.weight has 4 axes, got \(36, 12\)"):
            convert("tokenflow", options, weights)

    def test_scales_that_do_not_end_in_the_grid_are_refused(self, official):
        weights, _, options = official("tokenflow_clip")
        table = convert("tokenflow", options | {"scale_rq_layers": [1, 2, 5]}, weights).config
        with pytest.raises(ConfigError, match="takes 25 vectors an image, the encoder gives 36"):
            Tokenizer.from_config({"name": "x", **table})

    def test_both_encoders_look_at_one_grid(self, official):
        weights, _, options = official("tokenflow_clip")
        table = convert("tokenflow", options, weights).config
        table["encoder"]["pixels"]["size"] += 2
        with pytest.raises(ConfigError, match="both encoders look at one grid"):
            Tokenizer.from_config({"name": "x", **table})
        with pytest.raises(ValueError, match="positions for its own grid, of side 4"):
            VisionTower(size=9, patch=2, width=8, depth=1, heads=1, hidden=8, positions=3, style="siglip")


def test_positions_of_another_grid_keep_the_class_token_and_the_corners_side():
    positions = torch.cat([torch.full((1, 2), 7.0), torch.arange(9.0)[:, None].expand(9, 2)])
    assert resized(positions, 3) is positions
    larger = resized(positions, 5)
    assert larger.shape == (26, 2) and torch.equal(larger[0], positions[0])
    assert larger[1, 0] < larger[5, 0] < larger[21, 0] < larger[25, 0]


class TestReleases:
    @pytest.mark.parametrize("name", ["tokenflow", "tokenflow-xl"])
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
        aside = ("quantize.codebook_used", *(f"encoder_vqkd.vision_model.{part}" for part in LEFT_OUT))
        kept = sum(value.numel() for key, value in weights.items() if not key.startswith(aside))
        zeros = sum(
            value.numel() for key, value in weights.items() if key.endswith(".q_bias")
        )  # a k has none of theirs
        assert sum(value.numel() for value in tok.state_dict().values()) == kept + zeros
