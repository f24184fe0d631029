"""What a user is promised of every tokenizer, over all families of encoders, quantizers and decoders."""

from __future__ import annotations

import gc
import itertools
import json
import math
import weakref

import numpy as np
import pytest
import torch
from einops import rearrange, repeat
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tokenizers_vis import list_presets, load
from tokenizers_vis import tokenizer as module
from tokenizers_vis.catalogue import nested_presets
from tokenizers_vis.config import ConfigError
from tokenizers_vis.decoders.canvas import Pixels
from tokenizers_vis.images import ImageError
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.tokens import Tokens
from tokenizers_vis.weights import CheckpointError

COMBINATIONS = list(itertools.product(["titok", "flextok"], ["fsq", "vq", "library"], ["vit", "flow"]))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def made(table) -> Tokenizer:
    """Untrained, in eval mode, but made to look: images change the tokens, and each token changes the picture."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_config(table).eval()
    with torch.no_grad():
        tokenizer.encoder.read_patches.weight.mul_(5)
        for name, parameter in tokenizer.decoder.named_parameters():
            if "modulation" in name or "to_patches" in name:
                parameter.normal_(std=0.2)
    for name, buffer in tokenizer.quantizer.named_buffers():
        if name.endswith(("codebook", "embed")):  # as small as they start, all codes look alike
            buffer.normal_()
    return tokenizer


@pytest.fixture(params=COMBINATIONS, ids="-".join)
def tok(request, tiny) -> Tokenizer:
    return made(tiny(*request.param))


@pytest.fixture
def flextok(tiny) -> Tokenizer:
    return made(tiny("flextok", "library"))


@pytest.fixture
def titok(tiny) -> Tokenizer:
    return made(tiny("titok"))


@pytest.fixture
def images() -> torch.Tensor:
    """Five pictures of four coloured squares each."""
    colours = torch.randint(0, 256, (5, 3, 2, 2), dtype=torch.uint8)
    return repeat(colours, "b c h w -> b c (h p) (w q)", p=8, q=8).contiguous()


# -- what it is


def test_properties(tok, tiny):
    k = {"fsq": (200,), "vq": (32,), "library": (16, 8)}[tok.config["quantizer"]["kind"]]
    assert (tok.image_size, tok.max_tokens, tok.codebook_sizes, tok.vocab_size) == (16, 6, k, sum(k))
    assert tok.bits_per_token == sum(math.ceil(math.log2(size)) for size in k)
    assert tok.nested == (tok.config["encoder"]["kind"] == "flextok")
    assert (tok.device, tok.dtype) == (torch.device("cpu"), torch.float32)
    assert tok.config == tiny(*(tok.config[part]["kind"] for part in ("encoder", "quantizer", "decoder")))


def test_it_shows_itself(tok):
    shown, page = repr(tok), tok._repr_html_()
    for word in (tok.name, "6 tokens", "16 px", "float32 on cpu", "codebook", *map(str, tok.codebook_sizes)):
        assert word in shown
    assert ("1 to 6" in shown) == tok.nested
    kinds = ", ".join(tok.config[part]["kind"] for part in ("encoder", "quantizer", "decoder"))
    for word in (tok.name, " + ".join(map(str, tok.codebook_sizes)), f"<b>{tok.bits_per_token}</b>", "16 px", kinds):
        assert word in page
    for key, value in tok.describe().items():
        assert isinstance(value, str) and key in page
    nbytes = -(-6 * tok.bits_per_token // 8)
    assert tok.describe()["bytes per image"] == f"{nbytes} at 6 tokens"
    assert tok.describe()["bits per pixel"].startswith(f"{6 * tok.bits_per_token / 256:.3f}")


def test_a_name_is_no_markup(tiny):
    page = Tokenizer.from_config({**tiny(), "name": "<script>&"})._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;&amp;" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": {"dim": 4}}, "must agree on the width of a code; got 4 from the encoder, 3 into"),
        ({"decoder": {"max_tokens": 5}}, "the encoder makes 6 tokens, the decoder takes 5"),
        ({"decoder": {"kind": "vti"}}, "decoder.kind: there is no decoder 'vti'. Did you mean 'vit'"),
        ({"encoder": {"widht": 3}}, "encoder.widht: .*Did you mean 'width'"),
        ({"canvas": {"size": "16"}}, "canvas.size is a whole number"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(change, message, tiny):
    table = tiny()
    for part, values in change.items():
        table[part].update(values)
    with pytest.raises(ConfigError, match=message):
        Tokenizer.from_config(table)


def test_a_config_without_a_part(tiny):
    table = tiny()
    del table["name"], table["decoder"]
    with pytest.raises(ConfigError, match="needs name, decoder"):
        Tokenizer.from_config(table)


# -- what may be handed in


def test_every_form_of_an_image_gives_the_same_ids(tok, images, tmp_path):
    arrays = list(rearrange(images, "b c h w -> b h w c").contiguous().numpy())
    pils = [Image.fromarray(array) for array in arrays]
    for i, pil in enumerate(pils):
        pil.save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.glob("*.png"))
    expected = tok.encode(images)
    assert expected.ids.shape == (5, 6, len(tok.codebook_sizes)) and expected.ids.dtype == torch.int64
    assert expected.lengths is None and expected.tokenizer == tok.name and expected.nested == tok.nested
    if "fsq" in tok.name:  # an untrained codebook may well have one code that is nearest to everything
        assert len(expected.ids.unique(dim=0)) > 1
    many = [images.float() / 255, list(images), tuple(images), arrays, pils, paths, [str(path) for path in paths]]
    mixed = [images[0], arrays[1], pils[2], paths[3], images[4].float() / 255]
    for form in [*many, np.stack(arrays), mixed, [images[:2], images[2], np.stack(arrays[3:])]]:
        assert tok.encode(form) == expected
    for one in (images[1], images[1:2], arrays[1], pils[1], paths[1], str(paths[1]), images[1].double() / 255):
        assert tok.encode(one) == expected[1]


def test_images_of_any_size_and_aspect(titok):
    shapes = [(16, 16), (8, 40), (40, 8), (1, 30), (100, 101)]
    pictures = [torch.rand(3, *shape) for shape in shapes]
    for resize in (None, "crop", "pad", "exact"):
        tokens = titok.encode(pictures, resize=resize)
        fitted = torch.stack([titok.canvas.fit(picture, resize) for picture in pictures])
        assert tokens == titok.encode(fitted)
    assert titok.encode(pictures, resize="pad") != titok.encode(pictures)
    assert torch.equal(titok.reconstruct(pictures, resize="pad"), titok.decode(titok.encode(pictures, resize="pad")))


def test_wrong_images_are_refused(titok, tmp_path):
    for nothing in ([], (), torch.zeros(0, 3, 16, 16)):
        with pytest.raises(ValueError, match="no image"):
            titok.encode(nothing)
    with pytest.raises(ImageError, match="there is no file"):
        titok.encode(tmp_path / "cat.png")
    with pytest.raises(ImageError, match="NoneType"):
        titok.encode([torch.zeros(3, 16, 16), None])
    with pytest.raises(ImageError, match="float images run from 0 to 1"):
        titok.encode(torch.full((3, 16, 16), 255.0))
    with pytest.raises(ValueError, match="resize is one of"):
        titok.encode(torch.zeros(3, 16, 16), resize="squeeze")


# -- how many tokens


def test_a_short_encoding_is_a_prefix(flextok, images):
    whole = flextok.encode(images)
    for n in range(1, 7):
        short = flextok.encode(images, n)
        assert torch.equal(short.ids, whole.ids[:, :n])
        assert short == whole[:, :n] and short.lengths is None
        assert torch.equal(flextok.decode(short), flextok.decode(whole[:, :n]))
        assert torch.equal(flextok.reconstruct(images, n), flextok.decode(short))


@pytest.mark.parametrize("decoder", ["vit", "flow"])
@pytest.mark.parametrize("quantizer", ["fsq", "vq", "library"])
def test_a_ragged_batch(tiny, images, quantizer, decoder):
    tok = made(tiny("flextok", quantizer, decoder))
    lengths = [3, 6, 1, 3, 5]
    tokens = tok.encode(images, lengths)
    whole = tok.encode(images)
    assert tokens.lengths.tolist() == lengths
    for i, n in enumerate(lengths):
        assert torch.equal(tokens.ids[i, :n], whole.ids[i, :n])
        assert (tokens.ids[i, n:] == -1).all()
    alone = torch.cat([tok.decode(one) for one in tokens])
    torch.testing.assert_close(tok.decode(tokens), alone, **CLOSE)
    torch.testing.assert_close(tok.decode(tokens, batch_size=2), alone, **CLOSE)
    torch.testing.assert_close(tok.decode(tokens[1:4]), alone[1:4], **CLOSE)
    torch.testing.assert_close(tok.reconstruct(images, lengths), alone, **CLOSE)


def test_every_form_of_a_number_of_tokens(flextok, images):
    expected = flextok.encode(images, 3)
    for n in (np.int64(3), np.array(3), torch.tensor(3), [3] * 5, (3,) * 5, torch.full((5,), 3), np.full(5, 3)):
        assert flextok.encode(images, n) == expected
    assert flextok.encode(images, [torch.tensor(3), np.int64(3), 3, 3, 3]) == expected
    assert flextok.encode(images, [2] * 5).ids.shape[1] == 2  # no longer than needed


@pytest.mark.parametrize(
    ("n", "message"),
    [
        *[(n, "n_tokens is a whole number from 1 to 6") for n in (0, -1, 7, True, 1.5, 3.0, "3", math.nan)],
        *[([3, 3, 3, 3, bad], "n_tokens is a whole number") for bad in (0, 7, True, 1.5, "3", None, [3])],
        (torch.tensor(2.0), "n_tokens is a whole number"),
        (torch.full((5, 1), 2), "n_tokens is a whole number"),
        ([3, 3], "one per image: got 2 for 5 images"),
        ([], "got 0 for 5 images"),
        ([3] * 6, "got 6 for 5 images"),
    ],
    ids=str,
)
def test_a_wrong_number_of_tokens(n, message, flextok, images):
    with pytest.raises(ValueError, match=message):
        flextok.encode(images, n)


def test_a_tokenizer_that_is_not_nested_makes_all_its_tokens(titok, images):
    assert titok.encode(images, 6) == titok.encode(images, [6] * 5) == titok.encode(images)
    assert nested_presets()
    for n in (3, [6, 6, 6, 6, 5]):
        with pytest.raises(ValueError, match=f"always makes 6 tokens.*{nested_presets()[0]}"):
            titok.encode(images, n)
    tokens = titok.encode(images)
    ids = tokens.ids.clone()
    ids[0, 5:] = -1
    ragged = Tokens(ids, titok.codebook_sizes, titok.name, torch.tensor([5, 6, 6, 6, 6]))
    for short in (tokens.ids[:, :5], ragged):
        with pytest.raises(ValueError, match="is not nested: it decodes 6 tokens"):
            titok.decode(short)


# -- decoding


def test_tokens_and_tensors_decode_alike(tok, images):
    tokens = tok.encode(images)
    pictures = tok.decode(tokens)
    assert pictures.shape == (5, 3, 16, 16) and pictures.dtype == torch.float32
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert not pictures.requires_grad
    assert torch.equal(tok.decode(tokens.ids), pictures)
    assert torch.equal(tok.decode(tokens.ids.int()), pictures)
    if len(tok.codebook_sizes) == 1:
        assert torch.equal(tok.decode(tokens.ids[..., 0]), pictures)
    other = tokens.ids.clone()
    other[:, 0] = (other[:, 0] + 1) % torch.tensor(tok.codebook_sizes)
    assert not torch.equal(tok.decode(other), pictures)


def test_a_sequence_and_back(tok, images):
    tokens = tok.encode(images)
    k = len(tok.codebook_sizes)
    sequence = tokens.to_sequence()
    assert sequence.shape == (5, 6 * k) and sequence.max() < tok.vocab_size
    back = tok.tokens_from_sequence(sequence)
    assert back == tokens and back.nested == tok.nested
    assert torch.equal(tok.decode(back), tok.decode(tokens))
    assert tok.tokens_from_sequence(sequence[2]) == tokens[2]
    with pytest.raises(ValueError, match="sequence 0 has id"):
        tok.tokens_from_sequence(torch.full((1, 6 * k), tok.vocab_size))
    if tok.nested:
        ragged = tok.encode(images, [1, 6, 2, 3, 6])
        pad = tok.vocab_size
        assert tok.tokens_from_sequence(ragged.to_sequence(pad), pad) == ragged


def test_a_token_file_and_back(flextok, images, tmp_path):
    tokens = flextok.encode(images, [1, 6, 2, 3, 6])
    tokens.save(tmp_path / "a.tok")
    assert torch.equal(flextok.decode(Tokens.load(tmp_path / "a.tok")), flextok.decode(tokens))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (lambda t: Tokens(t.ids, t.codebook_sizes, "other"), "these tokens are of 'other'.*this tokenizer is 'tiny"),
        (lambda t: Tokens(t.ids, (16, 16), t.tokenizer), r"with codebooks \(16, 16\).*\(16, 8\)"),
        (lambda t: Tokens(t.ids[..., :1], (16,), t.tokenizer), r"with codebooks \(16,\)"),
        (lambda t: torch.full_like(t.ids, 8), "ids of codebook 1 run from 0 to 7"),
        (lambda t: -torch.ones_like(t.ids), "ids of codebook 0 run from 0 to 15"),
        (lambda t: t.ids.float(), "ids are integers"),
        (lambda t: t.ids > 0, "ids are integers"),
        (lambda t: t.ids[..., 0], r"ids are b n 2"),
        (lambda t: t.ids[..., :1], r"ids are b n 2"),
        (lambda t: t.ids[0, 0], r"ids are b n 2"),
        (lambda t: t.ids[:0], "at least one image"),
        (lambda t: t.ids[:, :0], "at least one image"),
        (lambda t: t.ids.repeat(1, 2, 1), "has at most 6 tokens an image, got 12"),
        (lambda t: t.ids.tolist(), "decode takes Tokens or a tensor of ids b n k, got list"),
        (lambda t: None, "decode takes Tokens"),
    ],
)
def test_tokens_that_are_not_its_own_are_refused(tokens, message, flextok, images):
    with pytest.raises(ValueError, match=message):
        flextok.decode(tokens(flextok.encode(images)))


def test_tokens_go_to_every_tokenizer_that_shares_the_codes(tiny, images, tmp_path):
    vit = made(tiny("flextok", "fsq", "vit"))
    flow = made({**tiny("flextok", "fsq", "flow"), "codes": vit.name})
    assert (vit.codes, flow.codes) == (vit.name, vit.name) and flow.name != vit.name
    tokens = vit.encode(images)
    assert flow.decode(tokens).shape == flow.decode(tokens.ids).shape == (5, 3, 16, 16)
    assert flow.encode(images).tokenizer == vit.name
    assert flow.tokens_from_sequence(tokens.to_sequence()) == tokens
    flow.save(tmp_path / "tokenizer.safetensors")
    again = load(tmp_path, "cpu")
    assert (again.name, again.codes) == (flow.name, vit.name)
    assert torch.equal(again.decode(tokens), flow.decode(tokens))
    stranger = made(tiny("flextok", "fsq", "flow"))
    with pytest.raises(ValueError, match=f"these tokens are of '{vit.name}'"):
        stranger.decode(tokens)


def test_sampling_options_reach_the_decoder(tiny, images):
    flow, vit = made(tiny("flextok", "fsq", "flow")), made(tiny("flextok", "fsq", "vit"))
    tokens = flow.encode(images)
    assert not torch.equal(flow.decode(tokens, steps=3), flow.decode(tokens))
    assert torch.equal(flow.reconstruct(images, 4, steps=3), flow.decode(tokens[:, :4], steps=3))
    for options, message in [
        ({"stebs": 3}, "no option stebs"),
        ({"steps": 0}, "steps is a whole number"),
        ({"noise": torch.zeros(4, 3, 16, 16)}, "noise is for 4 images, tokens are 5"),
        ({"noise": torch.zeros(5, 3, 8, 8)}, "noise is"),
    ]:
        with pytest.raises(ValueError, match=message):
            flow.decode(tokens, **options)
    for option in ("steps", "guidance", "noise"):
        with pytest.raises(ValueError, match=f"takes no sampling options, got {option}"):
            vit.decode(vit.encode(images), **{option: torch.zeros(5)})


# -- the same whatever the batch


def test_batch_size_changes_nothing(tok, images):
    tokens, pictures = tok.encode(images), tok.reconstruct(images)
    for size in (1, 2, 5, 9):
        assert tok.encode(images, batch_size=size) == tokens
        torch.testing.assert_close(tok.decode(tokens, batch_size=size), pictures, **CLOSE)
    if not tok.decoder.one_pass:
        noise = torch.randn(5, 3, 16, 16)
        for options in ({"noise": noise}, {"generator": 3}):

            def sample(size, options=options):
                seeded = {k: torch.Generator().manual_seed(v) if k == "generator" else v for k, v in options.items()}
                return tok.decode(tokens, batch_size=size, **seeded)

            torch.testing.assert_close(sample(2), sample(5), **CLOSE)
            assert not torch.allclose(sample(5), pictures)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None, "2"])
def test_a_wrong_batch_size(size, titok, images):
    with pytest.raises(ValueError, match="batch_size is a whole number from 1"):
        titok.encode(images, batch_size=size)
    with pytest.raises(ValueError, match="batch_size is a whole number from 1"):
        titok.decode(titok.encode(images), batch_size=size)


@pytest.mark.parametrize("training", [False, True])
def test_encode_and_decode_leave_no_trace(tok, images, training):
    """Also in training mode, where running averages and codebooks would learn, and draw random numbers."""
    tok.train(training)
    tok.decoder.eval()  # a part that is frozen
    weights = {key: value.clone() for key, value in tok.state_dict().items()}
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    tokens = [tok.encode(images) for _ in range(4)]
    pictures = [tok.decode(one) for one in tokens]
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()
    assert all(torch.equal(value, weights[key]) for key, value in tok.state_dict().items())
    assert all(part.training == training for part in (*tok.encoder.modules(), *tok.quantizer.modules()))
    assert not any(part.training for part in tok.decoder.modules())
    assert tokens[0] == tokens[3] and torch.equal(pictures[0], pictures[3])


def test_a_long_list_of_paths_is_never_in_memory_as_a_whole(titok, tmp_path, monkeypatch):
    for i in range(8):
        Image.new("RGB", (20, 20), (i * 30, 0, 255)).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i % 8}.png" for i in range(200)]
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0
    original = module.load_image

    def counted(item):
        nonlocal most
        image = original(item)
        alive.add(image)
        most = max(most, len(alive))
        return image

    monkeypatch.setattr(module, "load_image", counted)
    gc.disable()  # nothing may hang on a cycle
    try:
        tokens = titok.encode(paths, batch_size=8)
    finally:
        gc.enable()
    assert len(tokens) == 200 and torch.equal(tokens.ids[:8], tokens.ids[192:])
    assert 1 <= most <= 8


def test_the_encoder_sees_one_batch_at_a_time(titok):
    seen = []
    titok.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    titok.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    tokens = titok.encode(torch.rand(10, 3, 16, 16), batch_size=4)
    titok.decode(tokens, batch_size=3)
    assert seen == [4, 4, 2, 3, 3, 3, 1]


# -- training


def test_a_training_pass(tok):
    tok.train()
    images = torch.rand(4, 3, 16, 16)
    done = tok.training_pass(images)
    assert (done.lengths is None) == (not tok.nested)
    n = 6 if done.lengths is None else int(done.lengths.max())
    assert done.quantized.codes.shape[:2] == (4, n) and done.decoded.estimate.shape == images.shape
    (done.decoded.loss + done.quantized.loss).backward()
    for part in (tok.encoder, tok.decoder):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


# -- files


def test_save_and_load_give_the_same_tokenizer(tok, images, tmp_path):
    path = tmp_path / "a.safetensors"
    tok.save(path)
    again = Tokenizer.from_file(path)
    assert again.config == tok.config and again.dtype == torch.float32
    assert again.state_dict().keys() == tok.state_dict().keys()
    for key, value in tok.state_dict().items():
        assert torch.equal(again.state_dict()[key], value) and again.state_dict()[key].dtype == value.dtype
    tokens = tok.encode(images)
    assert again.encode(images) == tokens
    assert torch.equal(again.decode(tokens), tok.decode(tokens))


def test_a_file_in_half_precision_is_half_as_large_and_close(tok, images, tmp_path):
    full, half = tmp_path / "full.safetensors", tmp_path / "half.safetensors"
    tok.save(full)
    tok.save(half, dtype=torch.float16)
    assert {p.dtype for p in tok.parameters()} == {torch.float32}  # the tokenizer itself is left as it was
    sizes = [sum(v.numel() * v.element_size() for v in load_file(path).values()) for path in (full, half)]
    assert sizes[1] < 0.52 * sizes[0]
    again = Tokenizer.from_file(half)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert {v.dtype for v in load_file(half).values() if v.is_floating_point()} == {torch.float16}
    tokens = tok.encode(images)
    torch.testing.assert_close(again.decode(tokens), tok.decode(tokens), rtol=0, atol=0.02)
    assert (again.encode(images).ids == tokens.ids).float().mean() > 0.9


def test_a_file_is_safetensors_with_the_config_in_its_header(flextok, tmp_path):
    path = tmp_path / "a.safetensors"
    flextok.save(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert (header["format"], header["version"]) == ("tokenizers_vis", "1")
    assert json.loads(header["config"]) == flextok.config
    assert load_file(path).keys() == flextok.state_dict().keys()
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_loading_never_unpickles(flextok, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    torch.save(flextok.state_dict(), path)

    def never(*_, **__):
        raise AssertionError("a checkpoint was unpickled")

    monkeypatch.setattr("pickle.load", never)
    monkeypatch.setattr("pickle.loads", never)
    monkeypatch.setattr(torch, "load", never)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        Tokenizer.from_file(path)
    flextok.save(path)
    assert Tokenizer.from_file(path).name == flextok.name


def test_codebooks_that_share_memory_are_saved(tiny, images, tmp_path):
    table = tiny("flextok", "library")
    table["quantizer"]["options"] = {"codebook_size": 16, "num_quantizers": 2, "shared_codebook": True}
    tok = made(table)
    tok.save(tmp_path / "a.safetensors")
    assert Tokenizer.from_file(tmp_path / "a.safetensors").encode(images) == tok.encode(images)


def edited(tokenizer, path, *, drop=(), add=None, **header) -> None:
    """What ``save`` would write, with tensors or header changed."""
    state = {key: value.clone() for key, value in tokenizer.state_dict().items() if key not in drop} | (add or {})
    metadata = {"format": "tokenizers_vis", "version": "1", "config": json.dumps(tokenizer.config)} | header
    save_file(state, path, metadata={key: value for key, value in metadata.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": ["encoder.registers"]}, r"does not fit its config; missing: encoder\.registers"),
        ({"add": {"encoder.extra": torch.zeros(2)}}, r"left over: encoder\.extra"),
        ({"add": {"encoder.registers": torch.zeros(7, 32)}}, r"encoder\.registers \(7, 32\) instead of \(6, 32\)"),
        (
            {"drop": ["encoder.registers"], "add": {"x": torch.zeros(1)}},
            r"missing: encoder\.registers; left over: x",
        ),
        ({"add": {f"x{i}": torch.zeros(1) for i in range(9)}}, r"left over: x0, .*x5 \.\.\."),
        ({"format": None}, "no tokenizers_vis checkpoint"),
        ({"format": "pt"}, "no tokenizers_vis checkpoint"),
        ({"version": "2"}, "version 2, this library reads version 1"),
        ({"version": None}, "version None"),
        ({"config": None}, "has no config in its header"),
        ({"config": "{"}, "config that cannot be built"),
        ({"config": "3"}, "config that cannot be built"),
        ({"config": "{}"}, "needs name, canvas"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_checkpoint_that_does_not_fit_is_named(changes, message, flextok, tmp_path):
    path = tmp_path / "a.safetensors"
    edited(flextok, path)
    assert Tokenizer.from_file(path).name == flextok.name
    edited(flextok, path, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_file(path)
    assert "a.safetensors" in str(caught.value)


def test_a_checkpoint_of_another_shape_or_kind(flextok, tmp_path):
    for part, change in [("encoder", {"kind": "grid3d"}), ("decoder", {"depth": 2}), ("encoder", {"new_option": 1})]:
        config = json.loads(json.dumps(flextok.config))
        config[part].update(change)
        edited(flextok, tmp_path / "a.safetensors", config=json.dumps(config))
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            Tokenizer.from_file(tmp_path / "a.safetensors")


def test_files_that_are_damaged_or_something_else(flextok, tmp_path):
    path = tmp_path / "a.safetensors"
    flextok.save(path)
    content = path.read_bytes()
    cut = len(content)
    for wrong in (b"", b"no", b"text" * 100, content[:7], content[:200], content[: cut // 2], content[:-1]):
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be read as safetensors"):
            Tokenizer.from_file(path)
    for wrong in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(CheckpointError, match=wrong.name):
            Tokenizer.from_file(wrong)


# -- load


def test_load_from_a_file_or_a_folder(tok, images, tmp_path):
    tok.save(tmp_path / "tokenizer.safetensors")
    (tmp_path / "plain").write_bytes((tmp_path / "tokenizer.safetensors").read_bytes())
    expected = tok.encode(images)
    for name in (tmp_path, str(tmp_path), tmp_path / "tokenizer.safetensors", tmp_path / "plain"):
        loaded = load(name, "cpu")
        assert not any(part.training for part in loaded.modules())
        assert not any(p.requires_grad for p in loaded.parameters())
        assert loaded.encode(images) == expected
    assert load(tmp_path).name == tok.name  # on the best device at hand


def test_load_in_bfloat16_keeps_the_quantizer_exact(tok, images, tmp_path):
    tok.save(tmp_path / "tokenizer.safetensors")
    rough = load(tmp_path, "cpu", torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    assert {p.dtype for part in (rough.encoder, rough.decoder) for p in part.parameters()} == {torch.bfloat16}
    for key, value in tok.quantizer.state_dict().items():
        assert torch.equal(rough.quantizer.state_dict()[key], value)
    tokens = rough.encode(images)
    pictures = rough.decode(tokens)
    assert pictures.dtype == torch.float32 and pictures.shape == (5, 3, 16, 16) and pictures.isfinite().all()
    assert (pictures - tok.decode(tokens)).abs().mean() < 0.05
    assert "bfloat16" in repr(rough)
    # A cast of the whole does the same.
    whole = load(tmp_path, "cpu").to(torch.bfloat16)
    assert whole.encode(images) == tokens


def test_load_says_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"there is no preset, file or folder 'minni'. Did you mean 'mini'\?.*mini"):
        load("minni")
    with pytest.raises(ValueError, match=f"Presets: {', '.join(list_presets())}"):
        load("qqqqqqqq")
    with pytest.raises(ValueError, match="there is no preset"):
        load(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"should hold tokenizer\.safetensors, .* it holds none"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        load(tmp_path / "none.safetensors")


def test_parts_of_one_s_own(tiny, images):
    """A tokenizer is its four parts, whatever their classes: here an encoder that is no transformer."""
    parts = Tokenizer.from_config(tiny("titok")).eval()
    plain = nn.Module()
    plain.dim, plain.max_tokens, plain.nested = 3, 6, False
    plain.weight = nn.Parameter(torch.randn(3))
    plain.forward = lambda x, n: x.flatten(1)[:, : 3 * n].reshape(len(x), n, 3) * plain.weight
    tok = Tokenizer(
        canvas=Pixels(size=16), encoder=plain, quantizer=parts.quantizer, decoder=parts.decoder, config=parts.config
    )
    assert tok.reconstruct(images).shape == (5, 3, 16, 16)
