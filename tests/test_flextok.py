"""FlexTok: released checkpoints give the original's numbers; the short sequences are exactly the long ones."""

from __future__ import annotations

import copy
import gzip
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tokenizers_vis as tv
from tokenizers_vis.catalogue import preset
from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.convert import convert
from tokenizers_vis.decoders.base import Decoder
from tokenizers_vis.decoders.canvas import Canvas
from tokenizers_vis.decoders.flextok import FlexTokDecoder, flextok_time
from tokenizers_vis.decoders.paths import mode_sampled, stratified_logit_normal
from tokenizers_vis.encoders.base import LengthPolicy
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.weights import CheckpointError

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ["flextok-d12-d12", "flextok-d18-d18", "flextok-d18-d28", "flextok-d18-d28.dfn"]
RECORDED = ["flextok", "flextok_header"]
CLOSE = {"rtol": 0, "atol": 2e-5}


class Original(NamedTuple):
    """tensors: what the original gave. config: its six sections. vae: its VAE's config.json. steps: of the sampler."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    vae: dict[str, Any]
    steps: int

    def __getattr__(self, name: str) -> Any:
        return self.tensors[name]

    def state(self) -> dict[str, Tensor]:
        return {
            key.removeprefix("weights."): value.float()
            for key, value in self.tensors.items()
            if key.startswith("weights.")
        }


def download(folder: Path, original: Original, *, header: bool = False, **changes: Any) -> Path:
    """A folder as a download leaves it: the config in config.json, or in the header of the weights."""
    config = original.config | changes
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "config.json").write_text(json.dumps(original.vae))
    if header:
        literals = {key: value if isinstance(value, str) else str(value) for key, value in config.items()}
        save_file(original.state(), folder / "model.safetensors", {"_target_": WRAPPER, **literals})
    else:
        save_file(original.state(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"config": config}))
    return folder


WRAPPER = "flextok.flextok_wrapper.FlexTok"


@pytest.fixture(scope="session")
def originals(recorded: Callable[[str], Any]) -> dict[str, Original]:
    found = {}
    for name in RECORDED:
        tensors, metadata = recorded(name)
        options = json.loads(metadata["options"])
        found[name] = Original(tensors, options["config"], options["vae"], options["steps"])
    return found


@pytest.fixture(scope="session", params=RECORDED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def original(name: str, originals: dict[str, Original]) -> Original:
    return originals[name]


@pytest.fixture(scope="session")
def tok(name: str, original: Original, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = download(tmp_path_factory.mktemp("downloads") / "made", original, header=name == "flextok_header")
    return tv.load(folder, "cpu")


@pytest.fixture(scope="session")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_flextok", ROOT / "benchmarks" / "flextok.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The original's numbers


@torch.no_grad()
def test_encoding(tok: Tokenizer, original: Original) -> None:
    assert tok.nested and tok.max_tokens == original.ids.shape[1]
    latents = tok.canvas.read(original.images.float() / 255)
    torch.testing.assert_close(latents, original.latents, **CLOSE)
    torch.testing.assert_close(tok.encoder(original.latents, tok.max_tokens), original.encoded, **CLOSE)
    for n in (tok.max_tokens, 3):
        assert torch.equal(tok.encode(original.images, n).ids[..., 0], original.ids[:, :n])


@pytest.mark.parametrize("case", ["all", "ragged", "null"])
@torch.no_grad()
def test_one_evaluation(case: str, tok: Tokenizer, original: Original) -> None:
    codes = tok.quantizer.lookup(original.ids[..., None])
    lengths = None if case == "all" else original.lengths
    dropped = torch.ones(len(codes), dtype=torch.bool) if case == "null" else None
    with tok.decoder.features() as kept:
        velocity = tok.decoder.velocity(original.noise, original.times, codes, lengths, dropped)
    torch.testing.assert_close(velocity, original.tensors[f"velocity.{case}"], **CLOSE)
    if case == "ragged":
        torch.testing.assert_close(kept[0], original.features, **CLOSE)


@pytest.mark.parametrize(("case", "guidance"), [("none", 1.0), ("cfg", 7.5), ("apg", 7.5)])
@torch.no_grad()
def test_drawing(case: str, guidance: float, tok: Tokenizer, original: Original) -> None:
    kind = "apg" if case == "none" else case
    sampling = dict(steps=original.steps, guidance=guidance, guidance_kind=kind, noise=original.noise)
    codes = tok.quantizer.lookup(original.ids[..., None])
    drawn = tok.decoder(codes, original.lengths, **sampling)
    torch.testing.assert_close(drawn, original.tensors[f"drawn.{case}"], **CLOSE)
    if case != "none":
        tokens = tok.encode(original.images, original.lengths.tolist())
        pictures = (original.tensors[f"pictures.{case}"] + 1) / 2
        torch.testing.assert_close(tok.decode(tokens, **sampling), pictures.clamp(0, 1), rtol=0, atol=5e-5)


def test_the_training_loss_and_its_gradients(tok: Tokenizer, original: Original, name: str) -> None:
    """The last image of the recording has its registers dropped."""
    model = copy.deepcopy(tok).requires_grad_(True)
    model.canvas.requires_grad_(False)
    noise, t = original.tensors["loss.noise"], original.tensors["loss.times"]
    x, target = model.canvas.views(original.images.float() / 255)
    codes = model.quantizer(model.encoder(x, model.max_tokens)).codes
    noisy = (1 - t.view(-1, 1, 1, 1)) * target + t.view(-1, 1, 1, 1) * noise
    dropped = torch.arange(len(x)) == len(x) - 1
    velocity = model.decoder.velocity(noisy, t, codes, original.lengths, dropped)
    loss = (velocity - (noise - target)).square().mean()
    torch.testing.assert_close(loss, original.loss, **CLOSE)
    loss.backward()
    theirs = {k.removeprefix("gradient."): v for k, v in original.tensors.items() if k.startswith("gradient.")}
    ours = dict(model.named_parameters())
    named = convert("flextok", official(original), theirs).state
    assert len(named) > 20
    for key, gradient in named.items():
        # Of queries, keys and values, which are one layer here, the keys are recorded.
        found = ours[key.replace("attn.wk", "attention.qkv")].grad
        found = found.chunk(3)[1] if "attn.wk" in key else found
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=2e-5)
    assert all(parameter.grad is None for parameter in model.canvas.parameters())


def official(original: Original) -> dict[str, Any]:
    """As a folder gives it, but the VAE of the wrapper: its shape plays no part."""
    return {"config": original.config | {"vae": original.config["vae"] | {"hf_hub_path": None, "scaling_factor": 1.0}}}


# Short sequences


@pytest.fixture
def plain(benchmark: ModuleType, tok: Tokenizer) -> FlexTokDecoder:
    """The decoder of the recording with every register spelled out."""
    table = {key: value for key, value in tok.config["decoder"].items() if key != "kind"}
    made = benchmark.Plain(**table).eval()
    made.load_state_dict(tok.decoder.state_dict())
    return made


@pytest.mark.parametrize("kept", [1, 2, 7, 11, 12])
@torch.no_grad()
def test_registers_that_are_alike_are_exactly_one(kept: int, tok: Tokenizer, plain: FlexTokDecoder) -> None:
    n = tok.max_tokens
    codes, x = torch.randn(3, kept, tok.decoder.dim), torch.randn(3, *tok.decoder.shape)
    t = torch.tensor([1.0, 0.5, 0.05])
    spelled_out = plain.velocity(x, t, codes)
    torch.testing.assert_close(tok.decoder.velocity(x, t, codes), spelled_out, rtol=0, atol=5e-6)
    # The same length said by ``lengths``: what lies behind it does not count.
    longer = torch.cat([codes, torch.randn(3, n - kept, tok.decoder.dim)], dim=1)
    lengths = torch.full((3,), kept)
    torch.testing.assert_close(tok.decoder.velocity(x, t, longer, lengths), spelled_out, rtol=0, atol=5e-6)
    nothing = plain._velocity(x, plain._modulations(t), plain._nothing())
    dropped = torch.ones(3, dtype=torch.bool)
    torch.testing.assert_close(tok.decoder.velocity(x, t, longer, lengths, dropped), nothing, rtol=0, atol=5e-6)
    sampling = {"steps": 2, "guidance": 3.0, "guidance_kind": "cfg", "noise": x}
    torch.testing.assert_close(tok.decoder(codes, **sampling), plain(codes, **sampling), rtol=0, atol=2e-5)


def test_they_are_one_for_gradients_too(tok: Tokenizer, plain: FlexTokDecoder) -> None:
    x, t, weight = torch.randn(2, 2, *tok.decoder.shape), torch.rand(2), torch.randn(2, *tok.decoder.shape)
    gradients = []
    for decoder in (copy.deepcopy(tok.decoder).double(), plain.double()):
        decoder.requires_grad_(True)
        codes = torch.linspace(-1, 1, 2 * 4 * decoder.dim, dtype=torch.float64).view(2, 4, -1).requires_grad_(True)
        (decoder.velocity(x[0].double(), t, codes).double() * weight).sum().backward()
        gradients.append({"codes": codes.grad} | {k: p.grad for k, p in decoder.named_parameters()})
    for key, gradient in gradients[0].items():
        if key != "null_token":
            torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-6, atol=1e-6)


def test_a_short_code_is_a_short_sequence(tok: Tokenizer) -> None:
    seen = []
    handle = tok.decoder.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    p, n = tok.decoder.grid**2, tok.max_tokens
    for kept in (1, 5, n):
        tok.decode(tok.encode(torch.rand(1, 3, tok.image_size, tok.image_size), kept), steps=1)
    handle.remove()
    assert seen == [p + 2, p + 1, p + 6, p + 1, p + n, p + 1]


@torch.no_grad()
def test_a_ragged_batch_is_its_images_one_by_one(tok: Tokenizer) -> None:
    lengths, images = [tok.max_tokens, 1, 4], torch.rand(3, 3, tok.image_size, tok.image_size)
    sampling = {"steps": 2, "guidance": 2.0}
    together = tok.decode(tok.encode(images, lengths), **sampling)
    alone = [tok.decode(tok.encode(images[i : i + 1], n), **sampling) for i, n in enumerate(lengths)]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    tokens = tok.encode(images, lengths)
    whole = tok.decode(tokens, generator=seeds[0], **sampling)
    torch.testing.assert_close(tok.decode(tokens, generator=seeds[1], batch_size=1, **sampling), whole, **CLOSE)
    assert (whole - together).abs().max() > 1e-3


@torch.no_grad()
def test_defaults_are_those_of_the_release(tok: Tokenizer) -> None:
    tokens = tok.encode(torch.rand(1, 3, tok.image_size, tok.image_size), 2)
    said = tok.decode(tokens, steps=25, guidance=7.5, guidance_kind="apg", solver="euler")
    assert torch.equal(tok.decode(tokens), said)
    with pytest.raises(ValueError, match="no option temperature"):
        tok.decode(tokens, temperature=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision(dtype: torch.dtype, tok: Tokenizer) -> None:
    codes = tok.quantizer.lookup(torch.randint(0, tok.vocab_size, (2, 5, 1)))
    exact = tok.decoder(codes, steps=2, guidance=1.0)
    rough = copy.deepcopy(tok.decoder).to(dtype)(codes, steps=2, guidance=1.0)
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.05 * exact.norm()


# Training


def test_a_training_step(originals: dict[str, Original], tok: Tokenizer) -> None:
    model = Tokenizer.from_config(tok.config).train()
    assert not model.canvas.vae.training
    encoded = []
    handle = model.canvas.vae.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(1))
    done = model.training_pass(torch.rand(4, 3, tok.image_size, tok.image_size))
    handle.remove()
    assert len(encoded) == 1  # one encoding is what the encoder reads and what the decoder aims at
    (done.decoded.loss + model.canvas.paint(done.decoded.estimate).square().mean()).backward()
    assert all(parameter.grad is None for parameter in model.canvas.parameters())
    assert model.decoder.to_patches.weight.grad.abs().sum() > 0
    assert all(parameter.requires_grad for parameter in model.encoder.parameters())


@pytest.mark.parametrize("times", ["mode", "logit_normal", "stratified"])
def test_the_loss_is_the_mean_square_of_the_velocity(
    times: str, tok: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {**tok.config["decoder"], "times": times, "null_rate": 0.5}
    decoder = build(Decoder, table)
    decoder.to_patches.weight.data.normal_()
    seen: dict[str, Tensor] = {}
    original = decoder.velocity

    def listen(x: Tensor, t: Tensor, codes: Tensor, lengths: Tensor, dropped: Tensor) -> Tensor:
        seen.update(x=x, t=t, dropped=dropped, v=original(x, t, codes, lengths, dropped))
        return seen["v"]

    monkeypatch.setattr(decoder, "velocity", listen)
    target = torch.randn(16, *decoder.shape)
    done = decoder.loss(torch.randn(16, 3, decoder.dim), target, torch.randint(1, 4, (16,)))
    t = seen["t"].view(-1, 1, 1, 1)
    noise = (seen["x"] - (1 - t) * target) / t
    torch.testing.assert_close(done.loss, (seen["v"] - (noise - target)).square().mean(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(done.estimate, seen["x"] - t * seen["v"])
    torch.testing.assert_close(done.weight, (1 - seen["t"]) * ~seen["dropped"])
    assert 0 < seen["dropped"].sum() < 16 and 0 < seen["t"].min() and seen["t"].max() <= 1


def test_training_times() -> None:
    device = torch.device("cpu")
    state = torch.get_rng_state()
    u = torch.rand(1000)
    torch.set_rng_state(state)
    drawn = mode_sampled(1000, 0.25, device)
    torch.testing.assert_close(drawn, 1 - u - 0.25 * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u))
    assert 0 <= drawn.min() and drawn.max() <= 1
    strata = torch.special.ndtr(stratified_logit_normal(50, device).logit()) * 50
    assert torch.equal(strata.floor().long(), torch.arange(50))


def test_lengths_rounded_up_to_powers_of_two() -> None:
    lengths = LengthPolicy("uniform_pow2").sample(20000, 12)
    shares = torch.bincount(lengths, minlength=13) / 20000
    assert lengths.unique().tolist() == [1, 2, 4, 8, 12]
    torch.testing.assert_close(shares[[1, 2, 4, 8, 12]] * 12, torch.tensor([1.0, 1, 2, 4, 4]), rtol=0, atol=0.2)


def test_time_features() -> None:
    features = flextok_time(torch.tensor([0.0, 0.5]), 8, 1.0)
    rates = torch.tensor([256.0]) ** -(torch.arange(4) / 4) * 1000
    assert features[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    torch.testing.assert_close(features[1], torch.cat([(0.5 * rates).cos(), (0.5 * rates).sin()]), rtol=0, atol=1e-3)


# The canvas


SMALL = {
    "kind": "vae",
    "size": 8,
    "scaling_factor": 0.5,
    "latent_channels": 2,
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}


def test_a_canvas_of_latents() -> None:
    canvas = build(Canvas, SMALL)
    images = torch.rand(2, 3, 8, 8)
    x = canvas.read(images)
    posterior = canvas.vae.encode(images * 2 - 1).latent_dist
    assert x.shape == (2, 2, 4, 4) and torch.equal(x, posterior.mean * 0.5) and torch.equal(x, canvas.target(images))
    assert not x.requires_grad and not any(parameter.requires_grad for parameter in canvas.parameters())
    torch.testing.assert_close(canvas.paint(x), (canvas.vae.decode(x / 0.5).sample + 1) / 2)
    x.requires_grad_(True)
    canvas.paint(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_canvas_of_latents_in_half_precision() -> None:
    canvas, images = build(Canvas, SMALL), torch.rand(2, 3, 8, 8)
    exact = canvas.read(images), canvas.paint(canvas.read(images))
    canvas.to(torch.bfloat16)
    rough = canvas.read(images), canvas.paint(exact[0])
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.float32
        assert 0 < (a - b).norm() < 0.05 * a.norm()


def test_a_draw_from_the_posterior() -> None:
    canvas = build(Canvas, {**SMALL, "sample_posterior": True})
    images = torch.rand(2, 3, 8, 8)
    torch.manual_seed(4)
    drawn = canvas.read(images)
    torch.manual_seed(4)
    assert torch.equal(drawn, canvas.vae.encode(images * 2 - 1).latent_dist.sample() * 0.5)
    assert not torch.equal(canvas.read(images), drawn)
    x, y = canvas.views(images)
    assert torch.equal(x, y)


def test_what_a_canvas_of_latents_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="size is a multiple of 2, by which the VAE shrinks images; got 9"):
        build(Canvas, {**SMALL, "size": 9}, "canvas")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'tokenizers-vis\[latents\]'"):
        build(Canvas, SMALL, "canvas")


# Checkpoints


def test_a_loaded_one_is_saved_and_loaded_without_the_folders(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path / "mine.safetensors")
    again = tv.load(tmp_path / "mine.safetensors", "cpu")
    images = torch.rand(1, 3, tok.image_size, tok.image_size)
    tokens = tok.encode(images)
    assert torch.equal(again.encode(images).ids, tokens.ids)
    assert torch.equal(again.decode(tokens, steps=1), tok.decode(tokens, steps=1))


def test_what_the_config_says(originals: dict[str, Original], tmp_path: Path) -> None:
    original = originals["flextok"]
    noise = original.config["flow_matching_noise_module"] | {"ln": True, "stratisfied": True}
    vae = original.config["vae"] | {"sample_posterior": True, "scaling_factor": 0.25, "hf_hub_path": "someone/vae"}
    made = tv.load(download(tmp_path / "a", original, vae=vae, flow_matching_noise_module=noise), "cpu")
    # The folder of the VAE is found by the last part of its name too.
    assert made.canvas.sample_posterior and made.canvas.scaling_factor == 0.25
    assert made.decoder.times == "stratified" and made.encoder.lengths == LengthPolicy("uniform_pow2")
    assert made.quantizer.bypass == 0.1 and made.decoder.null_rate == 0.1
    plain = {key: value for key, value in original.config["vae"].items() if key != "sample_posterior"}
    assert not tv.load(download(tmp_path / "b", original, vae=plain), "cpu").canvas.sample_posterior


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    *parents, last = path.split(".")
    node = config
    for key in parents:
        node = node[key]
    node[last] = value
    return config


ENCODER, DECODER = "encoder.module_dict", "decoder.module_dict"


@pytest.mark.parametrize("header", [False, True], ids=["config.json", "header"])
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("regularizer._target_", "os.system", r"regularizer asks for 'os.system'.*refused"),
        (f"{ENCODER}.enc_to_latents.norm_layer", {"_target_": "subprocess.run"}, "asks for 'subprocess.run'"),
        (f"{DECODER}.extra", [{"_target_": "builtins.eval"}], "asks for 'builtins.eval'"),
        ("pipeline._target_", ["os", "system"], "asks for"),
        ("vae._target_", "flextok.regularizers.quantize_fsq.FSQ", "vae of a released FlexTok is a StableDiffusionVAE"),
        (f"{ENCODER}.enc_to_latents.use_mup_readout", True, "use_mup_readout .* is False, this one's is True"),
        (f"{ENCODER}.enc_transformer.qkv_bias", True, "qkv_bias .* is False"),
        (f"{ENCODER}.enc_seq_packer.mask_mode", "full", "mask 'causal_last'"),
        (f"{DECODER}.dec_seq_packer.input_list_read_keys", ["dec_registers", "dec_patches"], "patches, registers"),
        (f"{DECODER}.dec_latent_dropout.replace_with_single_token", True, "replace_with_single_token"),
        (f"{DECODER}.dec_patches_posemb_module.max_sizes", [1, 2, 3], "one PositionalEmbeddingAdder 2, this one has 0"),
        (f"{ENCODER}.enc_posemb_module.max_sizes", [4, 8], "two equal whole numbers"),
        (f"{ENCODER}.enc_register_module.n_eval", 8, "n_eval of a released FlexTok is n_max, 16; got 8"),
        (f"{ENCODER}.enc_transformer.depth", 1, "left over: encoder.transformer.blocks.1"),
        (f"{DECODER}.dec_transformer.depth", 3, "missing: decoder.blocks.2"),
        (f"{ENCODER}.enc_transformer.mlp_ratio", 2.0, "of another shape: encoder.transformer.blocks.0.mlp"),
        ("regularizer.levels", [8, 8], "of another shape"),
        ("vae.hf_hub_path", None, "no scaling_factor"),
    ],
)
def test_another_network_is_refused(
    path: str, value: Any, message: str, header: bool, originals: dict[str, Original], tmp_path: Path
) -> None:
    original = originals["flextok"]
    folder = download(tmp_path / "made", original, header=header, **changed(original.config, path, value))
    with pytest.raises(CheckpointError, match=message):
        tv.load(folder, "cpu")


def test_the_nested_dropout_comes_after_the_positions(originals: dict[str, Original], tmp_path: Path) -> None:
    """Else dropped registers would differ, and not be one."""
    original = originals["flextok"]
    modules = original.config["decoder"]["module_dict"]
    first = {key: modules[key] for key in ("dec_from_latents", "dec_nested_dropout")}
    decoder = {**original.config["decoder"], "module_dict": first | modules}
    with pytest.raises(CheckpointError, match="MaskedNestedDropout comes after PositionalEmbeddingAdder 1"):
        tv.load(download(tmp_path / "made", original, decoder=decoder), "cpu")


@pytest.mark.parametrize("text", ["__import__('os').getcwd()", "{'_target_': print}", "[" * 5000, "3"])
def test_the_header_is_read_and_never_run(text: str, originals: dict[str, Original], tmp_path: Path) -> None:
    folder = download(tmp_path / "made", originals["flextok"], header=True, encoder=text)
    with pytest.raises(CheckpointError, match="encoder in the checkpoint's"):
        tv.load(folder, "cpu")


def test_a_tensor_is_missing_or_left_over(originals: dict[str, Original], tmp_path: Path) -> None:
    original = originals["flextok"]
    key = "decoder.module_dict.dec_transformer.blocks.0.attn.wq.weight"
    for name, state in {
        "missing": {k: v for k, v in original.tensors.items() if k != f"weights.{key}"},
        "left over": {**original.tensors, "weights.decoder.module_dict.extra.weight": torch.zeros(2)},
    }.items():
        folder = download(tmp_path / name, original._replace(tensors=state))
        with pytest.raises(CheckpointError, match=f"{name}: decoder"):
            tv.load(folder, "cpu")


def test_without_the_shape_of_the_vae(
    originals: dict[str, Original], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = download(tmp_path / "made", originals["flextok"])
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"shape of the VAE is in the config.json of vae.*Put that file there"):
        tv.load(folder, "cpu")


# Releases


@pytest.mark.parametrize("name", PRESETS)
def test_a_release_fits_to_the_last_tensor(name: str, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    table = preset(name)
    assert table["codebook_sizes"] == [64000] and not table["commercial"]
    with gzip.open(ROOT / "tests" / "fixtures" / "manifests" / "flextok.json.gz") as file:
        shapes = json.load(file)[name.partition(".")[0]]
    sizes = [int(part[1:]) for part in name.partition(".")[0].split("-")[1:]]
    config = benchmark.official(*sizes)
    # As in the release: its VAE has a name, its shape is the preset's.
    config["vae"] |= {"hf_hub_path": "EPFL-VILAB/flextok_vae_c16"}
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    config_table, named = convert("flextok", {**table["official"], "config": config}, state)
    tok = Tokenizer.from_state({"name": name, **config_table}, named, name)
    assert (tok.max_tokens, tok.image_size, tok.codebook_sizes, tok.nested) == (256, 256, (64000,), True)
    assert tok.bits_per_token * 256 == table["bits_per_image"]
    assert tok.canvas.vae.config.latent_channels == 16 and tok.decoder.shape == (16, 32, 32)
    count = sum(tensor.numel() for tensor in named.values())
    assert count == sum(tensor.numel() for tensor in state.values())
    parts = {"d12-d12": (85.4, 172.4), "d18-d18": (287.3, 578.6), "d18-d28": (287.3, 2169.7)}
    for part, millions in zip((tok.encoder, tok.decoder), parts[name.partition(".")[0][8:]], strict=True):
        numbers = sum(p.numel() for p in part.parameters()) + part.positions.numel()
        assert numbers / 1e6 == pytest.approx(millions, abs=0.06)


def test_the_checkpoint_of_another_release_is_refused(
    originals: dict[str, Original], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = download(tmp_path / "made", originals["flextok"], header=True)
    with pytest.raises(CheckpointError, match="checkpoint of another FlexTok: its encoder has"):
        tv.load("flextok-d12-d12", "cpu", weights=folder / "model.safetensors")
    # A preset without a config in the header takes the config.json beside it.
    folder = download(tmp_path / "beside", originals["flextok"])
    with pytest.raises(CheckpointError, match="checkpoint of another FlexTok: its encoder has"):
        tv.load("flextok-d12-d12", "cpu", weights=folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json of EPFL-VILAB/flextok_d12_d12_in1k cannot be had"):
        tv.load("flextok-d12-d12", "cpu", weights=folder)


def test_the_benchmark(benchmark: ModuleType, capsys: pytest.CaptureFixture) -> None:
    threads = torch.get_num_threads()
    try:
        medians = benchmark.main(["--depth", "1", "--steps", "1", "--calls", "1", "--threads", "1", "--kept", "9"])
    finally:
        torch.set_num_threads(threads)
    assert list(medians) == ["ours, spelled out, float32", "ours, float32", "ours, bfloat16"]
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ours")]
    differences = [float(row[-1]) for row in rows]
    assert differences[0] == 0 and differences[1] < 2e-5 and differences[2] < 1
