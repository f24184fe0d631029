"""TiTok, TA-TiTok and One-D-Piece give their originals' numbers, loaded as a download from what the originals recorded.

The originals' sizes by name ("small" ...) are tables in the recorded configs, and their references ``${a.b}`` are kept.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from einops import rearrange
from safetensors.torch import save_file

import tokenizers_vis as tv
from tokenizers_vis.catalogue import list_presets, preset
from tokenizers_vis.convert import convert
from tokenizers_vis.convert.titok import Config
from tokenizers_vis.decoders.titok import TiTokDecoder
from tokenizers_vis.decoders.transformer import Transformer, prefix_mask
from tokenizers_vis.encoders.titok import TiTokEncoder
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.weights import CheckpointError, empty_weights

CLOSE = {"rtol": 0, "atol": 2e-5}
PAINTED = {"rtol": 0, "atol": 5e-5}
PRESETS = [name for name in list_presets() if preset(name).get("family") == "titok"]
MANIFESTS = json.loads(gzip.decompress((Path(__file__).parent / "fixtures/manifests/titok.json.gz").read_bytes()))
# Their names of the parameters whose gradients were recorded -> ours, where the shape is the same but for ones.
GRADIENTS = {
    "latent_tokens": "encoder.queries",
    "encoder.class_embedding": "encoder.class_token",
    "encoder.conv_out.weight": "encoder.to_codes.weight",
    "encoder.conv_out.bias": "encoder.to_codes.bias",
    "encoder.transformer.1.attn.in_proj_weight": "encoder.transformer.blocks.1.attention.qkv.weight",
    "encoder.transformer.1.mlp.c_fc.bias": "encoder.transformer.blocks.1.mlp.up.bias",
    "quantize.embedding.weight": "quantizer.codebook",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.positional_embedding": "decoder.positions",
    "decoder.latent_token_positional_embedding": "decoder.token_positions",
    "decoder.decoder_embed.weight": "decoder.read_codes.weight",
    "decoder.text_guidance_proj.weight": "decoder.read_text.weight",
    "decoder.text_guidance_positional_embedding": "decoder.text_positions",
    "decoder.transformer.0.attn.in_proj_bias": "decoder.transformer.blocks.0.attention.qkv.bias",
    "decoder.transformer.1.attn.out_proj.weight": "decoder.transformer.blocks.1.attention.out.weight",
    "decoder.conv_out.weight": "decoder.head.smooth.weight",
    "pixel_quantize.embedding.weight": "canvas.codebook",
    "pixel_decoder.conv_in.weight": "canvas.decoder.path.first.weight",
    "pixel_decoder.up.0.block.0.nin_shortcut.weight": "canvas.decoder.path.levels.1.blocks.0.shortcut.weight",
}
HEADS = {
    "pixels": {"ffn.0": "to_patches"},
    "logits": {"ffn.0": "hidden", "ffn.2": "to_logits"},
}


class Recording:
    """What an original gave, and its weights and config as a folder that a download leaves."""

    def __init__(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        self.all, self.config = tensors, json.loads(metadata["options"])
        # Stored in half precision, which holds them exactly.
        self.weights = {k.removeprefix("weights."): v.float() for k, v in tensors.items() if k.startswith("weights.")}
        self.proxy = {k.removeprefix("proxy."): v for k, v in self.weights.items() if k.startswith("proxy.")}
        self.weights = {k: v for k, v in self.weights.items() if not k.startswith("proxy.")}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.all[key]

    def write(self, folder: Path, **vq_model) -> Path:
        folder.mkdir(exist_ok=True)
        config = json.loads(json.dumps(self.config))
        config["model"]["vq_model"] |= vq_model
        (folder / "config.json").write_text(json.dumps(config))
        save_file(self.weights, folder / "model.safetensors")
        return folder

    def check_gradients(self, tok: Tokenizer, loss: torch.Tensor) -> None:
        loss.backward()
        ours = {name: parameter.grad for name, parameter in tok.named_parameters()}
        heads = HEADS[tok.config["decoder"]["head"]]
        checked = 0
        for key, expected in self.all.items():
            name = key.removeprefix("grad.")
            if name == key:
                continue
            if name == "encoder.patch_embed.weight":
                found = rearrange(
                    ours["encoder.read_patches.weight"], "w (p q c) -> w c p q", c=3, p=expected.shape[-1]
                )
            elif name.startswith("decoder.ffn."):
                _, _, layer, kind = name.split(".")
                found = ours[f"decoder.head.{heads[f'ffn.{layer}']}.{kind}"]
            else:
                found = ours[GRADIENTS[name]]
            # But for axes of one.
            torch.testing.assert_close(
                found.squeeze(), expected.squeeze(), rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
            )
            checked += 1
        assert checked >= 4


@pytest.fixture
def original(recorded):
    return lambda name: Recording(*recorded(name))


@pytest.fixture
def loaded(original, tmp_path):
    def load(name: str) -> tuple[Tokenizer, Recording]:
        was = original(name)
        return tv.load(was.write(tmp_path / name), "cpu"), was

    return load


def plane(x: torch.Tensor) -> torch.Tensor:
    """Their b c 1 k -> b k c."""
    return x[:, :, 0].mT


def check_encoding(tok: Tokenizer, was: Recording) -> None:
    n = tok.encoder.max_tokens
    with torch.no_grad():
        torch.testing.assert_close(tok.encoder(tok.canvas.read(was["images"]), n), plane(was["z"]), **CLOSE)
    tokens = tok.encode(was["images"])
    if tok.continuous:
        assert isinstance(tokens, tv.Latents)
        torch.testing.assert_close(tokens.values, plane(was["latents"]), **CLOSE)
    else:
        assert torch.equal(tokens.ids[..., 0], was["ids"][:, 0])


# -- the originals' numbers


@pytest.mark.parametrize(
    ("name", "bound"),
    [("titok_two_stage", PAINTED), ("titok_single_stage", CLOSE), ("titok_vae", CLOSE)],
)
def test_encode_and_decode(name, bound, loaded):
    tok, was = loaded(name)
    check_encoding(tok, was)
    tokens = tok.encode(was["images"])
    expected = was["decoded"]
    torch.testing.assert_close(tok.decode(tokens), expected.clamp(0, 1), **bound)
    # And what ``decode`` clamps.
    codes = tokens.values if tok.continuous else tok.quantizer.lookup(tokens.ids)
    with torch.no_grad():
        torch.testing.assert_close(tok.canvas.paint(tok.decoder(codes)), expected, **bound)
    assert tok.encoder.scrambled == (name == "titok_two_stage") and not tok.nested


def test_gradients_of_a_single_stage(loaded):
    tok, was = loaded("titok_single_stage")
    done = tok.requires_grad_(True).train().training_pass(was["images"])
    loss = done.decoded.loss + done.quantized.loss
    torch.testing.assert_close(done.quantized.loss, was["quantizer_loss"])
    torch.testing.assert_close(loss, was["loss"])
    was.check_gradients(tok, loss)


def test_gradients_of_a_vae(loaded):
    tok, was = loaded("titok_vae")
    done = tok.requires_grad_(True).training_pass(was["images"])  # in eval mode, which takes the mean
    torch.testing.assert_close(done.quantized.parts["kl"], was["kl"])
    loss = done.decoded.loss + done.quantized.loss
    torch.testing.assert_close(loss, was["loss"])
    was.check_gradients(tok, loss)


def test_gradients_of_the_second_stage(loaded):
    tok, was = loaded("titok_two_stage")
    codes = tok.quantizer.lookup(tok.encode(was["images"]).ids)
    tok.requires_grad_(True)
    loss = F.mse_loss(tok.canvas.paint(tok.decoder(codes)), was["images"])
    torch.testing.assert_close(loss, was["loss"])
    was.check_gradients(tok, loss)


def test_the_first_stage_with_its_vqgan(original, tmp_path):
    was = original("titok_first_stage")
    folder = was.write(tmp_path / "stage-1")
    torch.save(was.proxy, folder / "proxy.bin")
    tok = tv.load(folder, "cpu")
    check_encoding(tok, was)
    assert torch.equal(tok.canvas.target(was["images"]).flatten(1), was["target"])
    torch.testing.assert_close(tok.reconstruct(was["images"]), was["decoded"].clamp(0, 1), **PAINTED)
    done = tok.requires_grad_(True).train().training_pass(was["images"])
    torch.testing.assert_close(done.decoded.estimate, was["logits"], **CLOSE)
    torch.testing.assert_close(done.decoded.loss, was["cross_entropy"])
    loss = done.decoded.loss + done.quantized.loss
    torch.testing.assert_close(loss, was["loss"])
    was.check_gradients(tok, loss)


def test_the_first_stage_alone_encodes_and_says_what_it_lacks(loaded):
    tok, was = loaded("titok_first_stage")
    check_encoding(tok, was)
    with pytest.raises(ValueError, match="first stage.*put proxy.bin into its folder"):
        tok.reconstruct(was["images"])
    with pytest.raises(ValueError, match="put proxy.bin"):
        tok.training_pass(was["images"])
    # The scores themselves, and the loss against target ids, need no VQGAN.
    codes = tok.quantizer.lookup(tok.encode(was["images"]).ids)
    found = tok.decoder.loss(codes, was["target"].view(2, 8, 8))
    torch.testing.assert_close(found.estimate, was["logits"], **CLOSE)
    torch.testing.assert_close(found.loss, was["cross_entropy"])
    for target in (was["images"], was["target"]):
        with pytest.raises(ValueError, match=r"trained on ids \(2, 8, 8\)"):
            tok.decoder.loss(codes, target)


@pytest.mark.parametrize("name", ["tatitok_vq", "tatitok_vae"])
def test_a_text_beside_the_tokens(name, loaded):
    tok, was = loaded(name)
    check_encoding(tok, was)
    tokens, text = tok.encode(was["images"]), was["text"]
    torch.testing.assert_close(tok.decode(tokens, text=text), was["decoded"].clamp(0, 1), **CLOSE)
    torch.testing.assert_close(tok.decode(tokens, text=text, batch_size=1), was["decoded"].clamp(0, 1), **CLOSE)
    assert (tok.decode(tokens, text=text.flip(0)) - was["decoded"].clamp(0, 1)).abs().max() > 1e-3
    tok.requires_grad_(True)
    quantized = tok.quantizer(tok.encoder(tok.canvas.read(was["images"]), tok.max_tokens))
    done = tok.decoder.loss(quantized.codes, tok.canvas.target(was["images"]), text=text)
    torch.testing.assert_close(done.estimate, was["decoded"], **CLOSE)
    loss = done.loss + quantized.loss
    torch.testing.assert_close(loss, was["loss"])
    was.check_gradients(tok, loss)


def test_a_text_that_does_not_fit(loaded, monkeypatch):
    tok, was = loaded("tatitok_vq")
    tokens = tok.encode(was["images"])
    with pytest.raises(ValueError, match="reads a text beside the tokens: hand in text=, floats b 5 12"):
        tok.decode(tokens)
    with pytest.raises(ValueError, match="text is floats 2 5 12"):
        tok.decode(tokens, text=was["text"][:, :4])
    with pytest.raises(ValueError, match="text is for 1 images, tokens are 2"):
        tok.decode(tokens, text=was["text"][:1])
    monkeypatch.setitem(sys.modules, "open_clip", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"pip install 'tokenizers-vis\[text\]'"):
        tok.decode(tokens, text=["A photo of a cat.", "A photo of a dog."])
    with pytest.raises(ValueError, match="a list of strings"):
        tok.decode(tokens, text="no")  # as long as there are images
    plain, was = loaded("titok_single_stage")
    with pytest.raises(ValueError, match="reads no text"):
        plain.decode(plain.encode(was["images"]), text=torch.zeros(3, 5, 12))


def test_every_length_of_one_d_piece(loaded):
    tok, was = loaded("one_d_piece")
    assert tok.nested and tok.max_tokens == 9
    check_encoding(tok, was)
    for n in (1, 7, 9):
        tokens = tok.encode(was["images"], n)
        assert torch.equal(tokens.ids[..., 0], was["ids"][:, 0, :n])
        torch.testing.assert_close(tok.decode(tokens), was[f"decoded.{n}"].clamp(0, 1), **PAINTED)
    ragged = tok.decode(tok.encode(was["images"], [7, 1]))
    expected = torch.stack([was["decoded.7"][0], was["decoded.1"][1]])
    torch.testing.assert_close(ragged, expected.clamp(0, 1), **PAINTED)
    codes = tok.quantizer.lookup(tok.encode(was["images"], 7).ids)
    tok.requires_grad_(True)
    loss = F.mse_loss(tok.canvas.paint(tok.decoder(codes)), was["images"])
    torch.testing.assert_close(loss, was["loss.7"])
    was.check_gradients(tok, loss)


def test_one_d_piece_trains_with_one_length_a_batch(loaded):
    tok, _ = loaded("one_d_piece")
    drawn = torch.stack([tok.encoder.lengths.sample(4, tok.max_tokens) for _ in range(200)])
    assert (drawn == drawn[:, :1]).all() and set(drawn[:, 0].tolist()) == set(range(1, 10))


def test_a_ragged_batch_sees_its_text_and_no_dropped_token():
    made = TiTokDecoder(
        dim=5, max_tokens=6, size=16, patch=8, width=32, depth=2, heads=2, text_dim=4, text_tokens=3
    ).eval()
    codes, text = torch.randn(2, 6, 5), torch.randn(2, 3, 4)
    with torch.no_grad():
        ragged = made(codes, torch.tensor([6, 2]), text=text)
        alone = torch.cat([made(codes[:1], text=text[:1]), made(codes[1:, :2], text=text[1:])])
    torch.testing.assert_close(ragged, alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("modulated", [False, True])
def test_the_last_block_computes_the_kept_places_alone(modulated):
    made = Transformer(32, 3, 2, modulated=modulated).double()
    for block in made.blocks if modulated else ():
        torch.nn.init.normal_(block.modulation.weight, std=0.1)
    x, keep = torch.randn(2, 9, 32, dtype=torch.float64), slice(2, 6)
    condition = torch.randn(2, 32, dtype=torch.float64) if modulated else None
    sizes = []
    made.blocks[-1].mlp.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[1]))
    for mask in (None, prefix_mask(torch.tensor([3, 5]), 5, before=4)):
        whole = made(x, mask, condition)
        torch.testing.assert_close(made(x, mask, condition, keep), whole[:, keep], rtol=0, atol=1e-12)
    assert sizes == [9, 4, 9, 4]


def test_the_scramble_reads_without_a_transpose():
    made = TiTokEncoder(dim=5, max_tokens=3, size=16, patch=8, width=32, depth=1, heads=2, scrambled=True).eval()
    x = torch.randn(2, 3, 16, 16)
    kept = []
    made.norm_out.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        z = made(x, 3)
        torch.testing.assert_close(z, made.to_codes(kept[0].reshape(2, 32, 3).mT))
        assert torch.equal(made(x, 2), z[:, :2])


# -- folders and configs


def test_a_yaml_beside_a_bin(original, tmp_path):
    was = original("titok_single_stage")
    (tmp_path / "titok.yaml").write_text(yaml.safe_dump(was.config))
    torch.save(was.weights, tmp_path / "pytorch_model.bin")
    check_encoding(tv.load(tmp_path, "cpu"), was)


def test_a_preset_name_with_other_weights_is_refused(original, tmp_path):
    folder = original("titok_two_stage").write(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit its config; missing: .*of another shape: "):
        tv.load("titok-s-128", "cpu", weights=folder)


def test_keys_are_strict(original, tmp_path):
    was = original("titok_single_stage")
    del was.weights["decoder.mask_token"]
    was.weights["decoder.register"] = torch.zeros(1)
    was.weights["encoder.patch_embed.weight"] = was.weights["encoder.patch_embed.weight"].flatten(1)
    was.weights["encoder.patch_embed.bias"] = was.weights["encoder.patch_embed.bias"][:8].clone()
    with pytest.raises(CheckpointError, match="missing: decoder.mask_token; left over: decoder.register; of another"):
        tv.load(was.write(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vit_enc_model_size": "huge"}, "vit_enc_model_size is one of small, base, large, or a table"),
        ({"vit_enc_model_size": {"width": 32}}, "vit_enc_model_size is one of"),
        ({"quantize_mode": "fsq"}, "quantize_mode is one of vq, vae; got 'fsq'"),
        ({"finetune_decoder": True}, "its pixel decoder reads scores of codes"),
        ({"is_legacy": "no"}, "is_legacy is true or false, got 'no'"),
        ({"num_latent_tokens": None}, "num_latent_tokens, a whole number from 1; got None"),
        ({"codebook_size": "${model.nothing}"}, "refers to model.nothing, which is not in it"),
        ({"codebook_size": "${model.vq_model.codebook_size}"}, "in a circle: model.vq_model.codebook_size -> "),
        ({"codebook_size": "${oc.env:HOME}"}, "only references to other keys are read"),
        ({"use_l2_norm": None}, "use_l2_norm, true or false; got None"),
    ],
    ids=str,
)
def test_a_config_that_is_wrong(changes, message, original, tmp_path):
    folder = original("titok_single_stage").write(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        tv.load(folder, "cpu")


def test_references_are_followed_as_data():
    config = Config({"a": {"b": "${c.d}", "e": "x-${c.f}-${c.f}"}, "c": {"d": {"f": "${c.f}"}, "f": 3}})
    assert config.get("a.b.f") == 3 and config.get("a.e") == "x-3-3" and config.get("a.q", 5) == 5
    assert config.table("a.b") == {"f": 3}


def test_a_size_by_name(original, tmp_path):
    folder = original("titok_single_stage").write(tmp_path, vit_dec_model_size="large")
    with pytest.raises(CheckpointError, match=r"of another shape: .*instead of \(1, 1024\)"):
        tv.load(folder, "cpu")


def test_a_training_checkpoint_with_clustering(original, tmp_path):
    was = original("tatitok_vq")
    was.weights["quantize.embed_prob"] = torch.rand(40)
    tok = tv.load(was.write(tmp_path, clustering_vq=True), "cpu")
    assert tok.quantizer.revival == "nearest" and torch.equal(tok.quantizer.usage, was.weights["quantize.embed_prob"])
    check_encoding(tok, was)


# -- the releases at full size


def test_there_is_a_manifest_for_each_preset():
    assert set(MANIFESTS) == set(PRESETS) and len(PRESETS) == 18


@pytest.mark.parametrize("name", PRESETS)
def test_the_names_and_shapes_of_a_release(name):
    table = preset(name)
    state = {key: torch.empty(shape, device="meta") for key, shape in MANIFESTS[name].items()}
    converted = convert("titok", table["official"], state)
    with torch.device("meta"), empty_weights():
        tok = Tokenizer.from_config({"name": name, **converted.config})
    ours = {key: tuple(value.shape) for key, value in tok.state_dict().items()}
    assert ours == {key: tuple(value.shape) for key, value in converted.state.items()}
    assert (tok.max_tokens, tok.nested, list(tok.codebook_sizes)) == tuple(
        table[key] for key in ("max_tokens", "nested", "codebook_sizes")
    )
    assert tok.bits_per_token * tok.max_tokens == table["bits_per_image"]
    assert (tok.image_size, tok.canvas.resize) == (table["image_size"], table["resize"])
    assert tok.continuous == name.endswith("vae") and "Apache-2.0" in table["licence"]
    assert table["commercial"] != name.startswith("titok")  # of ImageNet alone: for research, say the authors
