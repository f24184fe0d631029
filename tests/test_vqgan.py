"""The VQGAN lineage, LlamaGen and MaskGIT, against what the authors' code gave; and the shapes of released files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import tokenizers_vis as tv
from tokenizers_vis.catalogue import preset
from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.convert import convert
from tokenizers_vis.convert.vqgan import vqgan_codes, vqgan_codes_names
from tokenizers_vis.decoders import channels_last
from tokenizers_vis.decoders.base import Decoder
from tokenizers_vis.decoders.canvas import Canvas, Pixels
from tokenizers_vis.decoders.conv import Double, Head
from tokenizers_vis.encoders.base import Encoder
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.weights import CheckpointError, load_strictly

Recorded = Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]
NAMES = ["llamagen_cosine", "llamagen_euclidean", "maskgit_vqgan"]
MANIFEST = Path(__file__).parent / "fixtures" / "manifests" / "vqgan.json.gz"
MANIFESTS = json.loads(gzip.decompress(MANIFEST.read_bytes()))
CLOSE, PAINTED = {"rtol": 0, "atol": 2e-5}, {"rtol": 0, "atol": 5e-5}


class Original(NamedTuple):
    weights: dict[str, Tensor]
    given: dict[str, Tensor]
    options: dict

    def write(self, folder: Path, **options) -> Path:
        """As a download lies on disk."""
        folder.mkdir(exist_ok=True)
        save_file(self.weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.options | options))
        return folder


def original(recorded: Recorded, name: str) -> Original:
    tensors, metadata = recorded(name)
    # Stored in 8 bits, which hold them exactly.
    weights = {key[8:]: value.float() for key, value in tensors.items() if key.startswith("weights.")}
    if name.startswith("llamagen"):
        weights["quantize.codebook_used"] = torch.arange(65536.0)
    given = {key: value for key, value in tensors.items() if not key.startswith("weights.")}
    return Original(weights, given, json.loads(metadata["options"]))


def flat(grid: Tensor) -> Tensor:
    return grid.flatten(2).mT


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest, recorded: Recorded, tmp_path: Path) -> tuple[Tokenizer, Original]:
    theirs = original(recorded, request.param)
    return tv.load(theirs.write(tmp_path / request.param), device="cpu"), theirs


@pytest.fixture
def maskgit(recorded: Recorded) -> Original:
    return original(recorded, "maskgit_vqgan")


@pytest.fixture
def llamagen(recorded: Recorded) -> Original:
    return original(recorded, "llamagen_cosine")


def canvas_of(theirs: Original, *, encoder: bool) -> Canvas:
    """A canvas with the weights of a recorded MaskGIT-VQGAN."""
    shape = {key: value for key, value in theirs.options.items() if key not in ("num_embeddings", "embedding_dim")}
    codes = {"num_embeddings": theirs.options["num_embeddings"], "embedding_dim": theirs.options["embedding_dim"]}
    canvas = build(Canvas, vqgan_codes(shape, codes, size=theirs.options["resolution"], encoder=encoder))
    weights = {k: v for k, v in theirs.weights.items() if encoder or not k.startswith("encoder.")}
    named = vqgan_codes_names(weights, len(theirs.options["channel_mult"]), prefix="")
    load_strictly(canvas, {key.removeprefix("canvas."): value for key, value in named.items()}, "the recording")
    return canvas


class TestAgreement:
    @torch.no_grad()
    def test_z_ids_codes_and_pictures_are_its_authors(self, pair):
        tok, (_, given, _) = pair
        z = tok.encoder(tok.canvas.read(given["images"] / 255), tok.max_tokens)
        torch.testing.assert_close(z, flat(given["z"]), **CLOSE)
        tokens = tok.encode(given["images"])
        assert torch.equal(tokens.ids[..., 0], given["ids"])
        codes = tok.quantizer.lookup(tokens.ids)
        torch.testing.assert_close(codes, flat(given["codes"]), **CLOSE)
        torch.testing.assert_close(tok.canvas.paint(tok.decoder(codes)), given["picture"], **PAINTED)
        torch.testing.assert_close(tok.decode(tokens), given["picture"].clamp(0, 1), **PAINTED)

    def test_the_quantizers_loss_is_its_authors(self, pair):
        tok, (_, given, _) = pair
        tok.train()
        torch.testing.assert_close(tok.quantizer(flat(given["z"])).loss, given["loss"], rtol=1e-5, atol=0)

    def test_a_training_step_reaches_every_weight(self, pair):
        tok, (_, given, _) = pair
        tok.train().requires_grad_(True)
        quantized, decoded, lengths = tok.training_pass(given["images"] / 255)
        (quantized.loss + decoded.loss).backward()
        assert lengths is None and all(p.grad is not None for p in tok.parameters())
        with torch.no_grad():  # where the layers work in place
            torch.testing.assert_close(tok.decoder(quantized.codes), decoded.estimate, **CLOSE)

    def test_one_image_at_a_time_gives_the_same(self, pair):
        tok, (_, given, _) = pair
        together = tok.encode(given["images"])
        for i, image in enumerate(given["images"]):
            assert torch.equal(tok.encode(image).ids[0], together.ids[i])
            alone = tok.decode(together[i : i + 1])[0]
            torch.testing.assert_close(alone, tok.decode(together)[i], **CLOSE)
        laid_out_otherwise = given["images"].contiguous(memory_format=torch.channels_last)
        assert torch.equal(tok.encode(laid_out_otherwise).ids, together.ids)

    def test_what_is_saved_decodes_as_before(self, pair, tmp_path):
        tok, (_, given, _) = pair
        tok.save(tmp_path / "ours.safetensors")
        again = tv.load(tmp_path / "ours.safetensors", device="cpu")
        assert torch.equal(again.decode(given["ids"]), tok.decode(given["ids"]))

    def test_half_precision_gives_nearly_the_same_picture(self, pair, tmp_path):
        tok, (_, given, _) = pair
        tok.save(tmp_path / "ours.safetensors")
        half = tv.load(tmp_path / "ours.safetensors", device="cpu", dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16
        assert (half.decode(given["ids"]) - tok.decode(given["ids"])).abs().mean() < 0.02


class TestCheckpoints:
    @pytest.mark.parametrize("nest", [{}, {"model": 0}, {"model": 1, "ema": 0}, {"state_dict": 0}])
    def test_a_pickle_may_nest_its_tensors(self, llamagen, tmp_path, nest):
        """Averaged weights go before the last ones."""
        content = {key: {k: v + off for k, v in llamagen.weights.items()} for key, off in nest.items()}
        torch.save(content or llamagen.weights, tmp_path / "vq.pt")
        (tmp_path / "config.json").write_text(json.dumps(llamagen.options))
        tok = tv.load(tmp_path, device="cpu")
        assert torch.equal(tok.quantizer.codebook, llamagen.weights["quantize.embedding.weight"])

    def test_what_its_config_does_not_say_the_weights_do(self, llamagen):
        said = {key: value for key, value in llamagen.options.items() if key not in ("ch", "num_res_blocks")}
        assert convert("llamagen", said, llamagen.weights).config == (
            convert("llamagen", llamagen.options, llamagen.weights).config
        )

    def test_open_muses_name_of_the_codes_width_is_known(self, maskgit, tmp_path):
        maskgit.options["quantized_embed_dim"] = maskgit.options.pop("embedding_dim")
        del maskgit.options["num_resolutions"]
        tok = tv.load(maskgit.write(tmp_path), device="cpu")
        assert torch.equal(tok.encode(maskgit.given["images"]).ids[..., 0], maskgit.given["ids"])

    def test_another_size_of_picture_is_a_longer_sequence(self, maskgit, tmp_path):
        tok = tv.load(maskgit.write(tmp_path, resolution=40), device="cpu")
        assert (tok.image_size, tok.max_tokens) == (40, 100)
        assert tok.decode(tok.encode(torch.rand(3, 40, 56))).shape == (1, 3, 40, 40)

    @pytest.mark.parametrize(("change", "says"), [(None, "missing: "), ("more", "left over: encoder.net.more")])
    def test_weights_that_do_not_fit_are_named(self, llamagen, tmp_path, change, says):
        taken = llamagen.weights.pop("encoder.mid.1.q.bias")
        if change:
            llamagen.weights.update({"encoder.mid.1.q.bias": taken, f"encoder.{change}": taken.clone()})
        with pytest.raises(CheckpointError, match=says):
            tv.load(llamagen.write(tmp_path), device="cpu")

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"num_resolutions": 2}, "num_resolutions is the length of channel_mult, got 2"),
            ({"embedding_dim": 8}, "codes are z_channels = 16 wide, got an embedding of 8"),
            ({"channel_mult": "1, 2"}, "channel_mult is a list of whole numbers, got '1, 2'"),
            ({"num_embeddings": 41}, r"quantizer.codebook \(40, 16\) instead of \(41, 16\)"),
        ],
    )
    def test_configs_that_do_not_fit_are_refused(self, maskgit, tmp_path, options, says):
        with pytest.raises(CheckpointError, match=says):
            tv.load(maskgit.write(tmp_path, **options), device="cpu")

    @pytest.mark.parametrize("content", [[1, 2], {"optimizer": 3}, {"model": 4}])
    def test_a_file_of_something_else_is_refused(self, llamagen, content):
        with pytest.raises(CheckpointError, match="a table of tensors"):
            convert("llamagen", llamagen.options, content)


class TestReleases:
    @pytest.mark.parametrize("name", MANIFESTS)
    def test_the_released_file_fits_its_preset_exactly(self, name):
        table = preset(name)
        with torch.device("meta"):
            state = {key: torch.empty(shape) for key, shape in MANIFESTS[name].items()}
            config, state = convert(table["family"], table["official"], state)
            tok = Tokenizer.from_config({"name": name, **config})
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in tok.state_dict().items()}
        assert tok.max_tokens == table["max_tokens"] and tok.image_size == table["image_size"]
        assert list(tok.codebook_sizes) == table["codebook_sizes"] and tok.nested == table["nested"]
        assert tok.bits_per_token * tok.max_tokens == table["bits_per_image"]
        assert tok.canvas.resize == table["resize"]

    @pytest.mark.parametrize(
        ("name", "other"), [("llamagen-vq-16", "llamagen-vq-8"), ("llamagen-vq-8", "llamagen-vq-16")]
    )
    def test_the_file_of_another_preset_is_refused(self, name, other):
        table = preset(name)
        state = {key: torch.empty(shape, device="meta") for key, shape in MANIFESTS[other].items()}
        config, state = convert(table["family"], table["official"], state)
        with pytest.raises(CheckpointError, match="w.pt does not fit its config; "):
            Tokenizer.from_state({"name": name, **config}, state, "w.pt")


class TestCanvas:
    @torch.no_grad()
    def test_it_paints_what_its_authors_paint(self, maskgit):
        canvas = canvas_of(maskgit, encoder=False)
        torch.testing.assert_close(canvas.paint(maskgit.given["logits"]), maskgit.given["painted"], **PAINTED)

    def test_its_targets_are_its_authors_codes(self, maskgit):
        canvas = canvas_of(maskgit, encoder=True)
        images = canvas.read(maskgit.given["images"] / 255)
        with torch.autocast("cpu", torch.bfloat16):
            target = canvas.target(images)
        assert target.dtype == torch.int64 and torch.equal(target.flatten(1), maskgit.given["ids"])

    def test_scores_that_are_sure_of_the_targets_paint_the_vqgans_picture(self, maskgit):
        canvas = canvas_of(maskgit, encoder=True)
        target = canvas.target(maskgit.given["images"] / 255)
        sure = 100.0 * F.one_hot(target, len(canvas.codebook)).movedim(-1, 1)
        torch.testing.assert_close(canvas.paint(sure), maskgit.given["picture"], **PAINTED)

    def test_with_an_encoder_targets_do_not_learn(self, maskgit):
        canvas = canvas_of(maskgit, encoder=True)
        assert not any(parameter.requires_grad for parameter in canvas.parameters())
        assert all(parameter.requires_grad for parameter in canvas_of(maskgit, encoder=False).parameters())

    def test_a_picture_loss_reaches_scores_and_codebook(self, maskgit):
        canvas, y = canvas_of(maskgit, encoder=False), maskgit.given["logits"].requires_grad_()
        canvas.paint(y).square().mean().backward()
        assert y.grad.abs().sum() > 0 and canvas.codebook.grad.abs().sum() > 0

    def test_without_an_encoder_there_are_no_targets(self, maskgit):
        with pytest.raises(ValueError, match="build it with encoder = true .* or train on pictures"):
            canvas_of(maskgit, encoder=False).target(torch.rand(1, 3, 24, 24))

    def test_scores_of_another_codebook_are_refused(self, maskgit):
        with pytest.raises(ValueError, match=r"takes scores b 40 h w, got \(2, 41, 6, 6\)"):
            canvas_of(maskgit, encoder=False).paint(torch.zeros(2, 41, 6, 6))

    @pytest.mark.parametrize(("span", "low"), [("signed", -1.0), ("unit", 0.0)])
    def test_pixels_have_the_range_they_are_told(self, span, low):
        canvas, images = Pixels(size=4, span=span), torch.tensor([0.0, 0.25, 1.0])
        assert torch.equal(canvas.read(images), low + images * (1 - low))
        assert torch.equal(canvas.paint(canvas.target(images)), images)


class TestParts:
    SHAPE = {"dim": 16, "size": 8, "ch": 32, "channel_mult": [1, 1], "num_res_blocks": 1, "z_channels": 16}

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"size": 9}, "size 9 is not a multiple"),
            ({"ch": 48}, r"multiple of norm_groups .*got \[48, 48\]"),
            ({"channel_mult": [1, 0]}, r"multiple of norm_groups .*got \[32, 0\]"),
            ({"norm_groups": 12}, r"multiple of norm_groups \(12\), got \[32, 32\]"),
            ({"norm_groups": 0}, "norm_groups is 1 or more"),
            ({"attention": [2]}, r"levels from 0 to 1, got \[2\]"),
            ({"dim": 8, "style": "maskgit"}, "dim is z_channels"),
            ({"style": "taminng"}, "style is one of 'taming', 'maskgit'"),
        ],
    )
    def test_shapes_that_cannot_be_are_refused(self, change, says):
        for part, kind in ((Encoder, "grid"), (Decoder, "conv")):
            with pytest.raises(ConfigError, match=says):
                build(part, {"kind": kind, **self.SHAPE, **change})

    def test_fewer_groups_of_a_narrow_net_keep_colour(self):
        """A channel that is a group of its own loses its mean: flat pictures of any colour come out alike."""
        flat = torch.randn(3, 32, 1, 1).expand(3, 32, 4, 4)
        alike = Head(32, 3, norm_groups=32)(flat)
        torch.testing.assert_close(alike, alike[:1].expand(3, -1, -1, -1), rtol=0, atol=1e-3)
        told_apart = Head(32, 3, norm_groups=8)(flat)
        assert (told_apart[1:] - told_apart[:1]).abs().amax(dim=(1, 2, 3)).min() > 0.1
        for part, kind in ((Encoder, "grid"), (Decoder, "conv")):
            net = build(part, {"kind": kind, **self.SHAPE, "norm_groups": 8, "attention": [1]})
            groups = [norm.num_groups for norm in net.modules() if isinstance(norm, channels_last.GroupNorm)]
            assert len(groups) > 8 and set(groups) == {8}

    def test_a_grid_is_decoded_whole_and_takes_no_options(self):
        decoder = build(Decoder, {"kind": "conv", **self.SHAPE})
        for wrong in (
            {"codes": torch.zeros(1, 3, 16)},
            {"codes": torch.zeros(1, 16, 16), "lengths": torch.tensor([3])},
        ):
            with pytest.raises(ValueError, match="decoded whole, from 16 codes; got"):
                decoder(**wrong)
        with pytest.raises(ValueError, match="takes no sampling options, got steps"):
            decoder(torch.zeros(1, 16, 16), steps=2)

    def test_tokens_are_in_raster_order(self):
        """Far from a place nothing changes: without attention, norms and padding a conv sees its surroundings alone."""
        encoder = build(Encoder, {"kind": "grid", **self.SHAPE, "size": 64}).eval()
        decoder = build(Decoder, {"kind": "conv", **self.SHAPE, "size": 64}).eval()
        x = torch.zeros(1, 3, 64, 64)
        x[..., 8:10, 40:42] = 5.0
        with torch.no_grad():
            moved = (encoder(x, 1024) - encoder(x * 0, 1024)).square().sum(-1)[0]
            assert divmod(int(moved.argmax()), 32) in [(row, column) for row in (3, 4, 5) for column in (19, 20, 21)]
            codes = torch.zeros(1, 1024, 16)
            codes[0, 4 * 32 + 20] = 5.0
            moved = (decoder(codes) - decoder(codes * 0)).square().sum(1)[0]
        row, column = divmod(int(moved.flatten().argmax()), 64)
        assert 5 <= row <= 12 and 37 <= column <= 44


class TestLargeMaps:
    """Above a size, decoders go another way in memory and arithmetic: to the same picture."""

    @torch.no_grad()
    def test_large_maps_give_the_same_picture(self, pair, monkeypatch):
        tok, (_, given, _) = pair
        codes = tok.quantizer.lookup(given["ids"][..., None])
        plain = tok.decoder(codes)
        monkeypatch.setattr(channels_last, "LARGE", 1)
        large = tok.decoder(codes)
        torch.testing.assert_close(large, plain, **CLOSE)
        assert not torch.equal(large, plain)  # it did go the other way
        for i in range(len(codes)):
            torch.testing.assert_close(tok.decoder(codes[i : i + 1])[0], large[i], **CLOSE)

    @pytest.mark.parametrize("size", [(2, 2), (5, 7)])
    @torch.no_grad()
    def test_doubling_is_exact_when_large(self, monkeypatch, size):
        double, x = Double(32).double(), torch.randn(2, 32, *size, dtype=torch.float64)
        plain = double(x)
        monkeypatch.setattr(channels_last, "LARGE", 1)
        torch.testing.assert_close(double.float()(x.float()), plain.float(), rtol=0, atol=1e-5)

    def test_training_keeps_to_the_plain_way(self, pair, monkeypatch):
        tok, (_, given, _) = pair
        codes = tok.quantizer.lookup(given["ids"][..., None]).requires_grad_()
        plain = tok.decoder(codes)
        monkeypatch.setattr(channels_last, "LARGE", 1)
        again = tok.decoder(codes)
        assert torch.equal(again, plain)
        norm, x = channels_last.GroupNorm(32, 32), torch.randn(1, 32, 8, 8)
        norm(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
        assert norm.weight.grad is not None

    @pytest.mark.parametrize(("h", "w"), [(96, 96), (7, 200), (1, 3)])
    @torch.no_grad()
    def test_the_norm_is_exact_with_channels_last(self, h, w):
        norm = channels_last.GroupNorm(64, 32)
        norm.weight.normal_()
        norm.bias.normal_()
        x = torch.randn(2, 64, h, w) + torch.randn(2, 64, 1, 1) + torch.linspace(0, 2, h)[:, None]
        exact = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), 1e-6)
        found = norm(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(found, exact.float(), rtol=0, atol=8e-6)  # torch's own is off by 2e-5 and more
        if h > 1:
            assert found.is_contiguous(memory_format=torch.channels_last)
