"""Grids of ids from coarse to fine, and two codebooks under one index, against what their authors' code gave."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tokenizers_vis.quantizers.base import Quantized, Quantizer
from tokenizers_vis.quantizers.compose import Product
from tokenizers_vis.quantizers.fsq import FSQ
from tokenizers_vis.quantizers.multi_scale import MultiScale
from tokenizers_vis.quantizers.shared_index import SharedIndex
from tokenizers_vis.quantizers.vq import VQ

Recorded = Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def setting(recorded: Recorded, name: str, key: str) -> tuple[dict[str, Tensor], dict]:
    tensors, metadata = recorded(name)
    tensors = {at.removeprefix(f"{key}."): tensor for at, tensor in tensors.items() if at.startswith(f"{key}.")}
    return tensors, json.loads(metadata["options"])[key]


def gradients_agree(quantizer: Quantizer, out: Quantized, z: Tensor, expected: dict[str, Tensor]) -> None:
    ((out.codes * expected["w"]).sum() + out.loss).backward()
    torch.testing.assert_close(z.grad, expected["grad_z"], **CLOSE)
    codebook = next(parameter for name, parameter in quantizer.named_parameters() if name.endswith("codebook"))
    torch.testing.assert_close(codebook.grad, expected["grad_codebook"], **CLOSE)
    for i, phi in enumerate(getattr(quantizer, "phis", [])):
        torch.testing.assert_close(phi.weight.grad, expected[f"grad_phi_{i}.weight"], **CLOSE)
        torch.testing.assert_close(phi.bias.grad, expected[f"grad_phi_{i}.bias"], **CLOSE)


def var(options: dict, expected: dict[str, Tensor], **more) -> MultiScale:
    part = VQ(dim=options["Cvae"], codebook_size=options["vocab_size"])
    quantizer = MultiScale(
        part=part,
        scales=options["v_patch_nums"],
        share=options["share_quant_resi"],
        ratio=options["quant_resi"],
        commitment=options["beta"],
        **more,
    )
    part.codebook.data.copy_(expected["codebook"])
    for i, phi in enumerate(quantizer.phis):
        phi.load_state_dict({name: expected[f"phi_{i}.{name}"] for name in ("weight", "bias")})
    return quantizer


def tokenflow(options: dict, codebook: Tensor) -> SharedIndex:
    quantizer = SharedIndex(
        dims=options["split"],
        codebook_size=options["n_e"],
        commitment=options["beta"],
        entropy=options["entropy_loss_ratio"],
    )
    quantizer.codebook.data.copy_(codebook)
    return quantizer


def tokenflow_losses_agree(out: Quantized, options: dict, expected: dict[str, Tensor]) -> None:
    shares = torch.tensor(options["split"]) / sum(options["split"])
    for name, theirs, weight in (("codebook", "vq_loss", 1.0), ("commitment", "commit_loss", options["beta"])):
        halves = torch.stack([out.parts[f"{name}_0"], out.parts[f"{name}_1"]])
        torch.testing.assert_close(weight * (shares * halves).sum(), expected[theirs], **CLOSE)
    if options["entropy_loss_ratio"]:
        entropy = out.parts["sample_entropy"] - out.parts["batch_entropy"]
        torch.testing.assert_close(options["entropy_loss_ratio"] * entropy, expected["entropy_loss"], **CLOSE)
    torch.testing.assert_close(out.loss, expected["loss"], **CLOSE)


class TestVAR:
    @pytest.mark.parametrize("key", ["published", "one_phi", "own_phis", "no_phi"])
    def test_agrees_with_its_authors(self, recorded: Recorded, key: str):
        expected, options = setting(recorded, "var", key)
        quantizer, z = var(options, expected), expected["z"].requires_grad_()
        out = quantizer(z)
        assert torch.equal(out.ids[..., 0], expected["ids"])
        torch.testing.assert_close(out.codes, expected["codes"], **CLOSE)
        torch.testing.assert_close(out.loss, expected["loss"], **CLOSE)
        assert out.loss.item() == pytest.approx(
            (options["beta"] * out.parts["commitment"] + out.parts["codebook"]).item()
        )
        gradients_agree(quantizer, out, z, expected)

    @pytest.mark.parametrize("key", ["published", "one_phi", "no_phi"])
    def test_a_prefix_of_scales_is_the_coarse_picture_its_authors_decode(self, recorded: Recorded, key: str):
        expected, options = setting(recorded, "var", key)
        quantizer = var(options, expected)
        names = [name for name in expected if name.startswith("prefix_")]
        assert len(names) >= 2
        for name in names:
            ids = expected["ids"][:, : sum(p * p for p in options["v_patch_nums"][: int(name[7:])]), None]
            torch.testing.assert_close(quantizer.lookup(ids), expected[name], **CLOSE)

    def test_images_that_keep_their_first_scales_agree_with_imagefolder(self, recorded: Recorded):
        expected, metadata = recorded("imagefolder")
        options = json.loads(metadata["options"])
        quantizer, z = var(options, expected, dropout=0.5).train(), expected["z"].requires_grad_()
        for seed in range(1000):  # until the first image keeps two scales, and the others all
            torch.manual_seed(seed)
            out = quantizer(z)
            there = torch.stack([ids[:, 0, 0] >= 0 for ids in out.ids.split([1, 1, 4, 9, 16], dim=1)], dim=1)
            if there.sum(dim=1).tolist() == [2, 5, 5]:
                break
        else:
            pytest.fail("in 1000 steps no image kept two scales")
        torch.testing.assert_close(out.codes, expected["codes"], **CLOSE)
        torch.testing.assert_close(out.parts["codebook"], expected["vq_loss"], **CLOSE)
        # Their mean over scales leaves the commitment a sum.
        torch.testing.assert_close(options["beta"] * out.parts["commitment"], expected["commit_loss"] / 5, **CLOSE)
        gradients_agree(quantizer, out, z, expected)
        torch.testing.assert_close(quantizer.eval().lookup(out.ids), out.codes, **CLOSE)


class TestTokenFlow:
    @pytest.mark.parametrize("key", ["published", "entropy"])
    def test_one_scale_agrees_with_its_authors(self, recorded: Recorded, key: str):
        expected, options = setting(recorded, "tokenflow", key)
        quantizer, z = tokenflow(options, expected["codebook"]).train(), expected["z"].requires_grad_()
        out = quantizer(z)
        assert torch.equal(out.ids[..., 0], expected["ids"])
        torch.testing.assert_close(out.codes, expected["codes"], **CLOSE)
        tokenflow_losses_agree(out, options, expected)
        gradients_agree(quantizer, out, z, expected)

    @pytest.mark.parametrize("key", ["scales", "scales_entropy", "scale_drop"])
    def test_many_scales_agree_with_its_authors(self, recorded: Recorded, key: str):
        expected, options = setting(recorded, "tokenflow", key)
        scales = options["scale_rq_layers"]
        quantizer = MultiScale(
            part=tokenflow(options, expected["codebook"]),
            scales=scales,
            ratio=0.0,
            loss="scales",
            scale_drop=options["random_scale_drop_ratio"],
        ).train()
        z, wanted = expected["z"].requires_grad_(), options.get("layers", scales)
        for seed in range(100):  # until the scale that theirs left out is left out
            torch.manual_seed(seed)
            out = quantizer(z)
            pieces = out.ids.split([p * p for p in scales], dim=1)
            if [p for p, ids in zip(scales, pieces, strict=True) if (ids >= 0).all()] == wanted:
                break
        else:
            pytest.fail(f"in 100 steps the scales were never {wanted}")
        assert torch.equal(out.ids[out.ids[..., 0] >= 0].view(2, -1), expected["ids"])
        torch.testing.assert_close(out.codes, expected["codes"], **CLOSE)
        tokenflow_losses_agree(out, options, expected)
        gradients_agree(quantizer, out, z, expected)
        for name in [name for name in expected if name.startswith("decoded_")]:
            ids = expected["ids"][:, : sum(p * p for p in scales[: int(name[8:])]), None]
            torch.testing.assert_close(quantizer.lookup(ids), expected[name], **CLOSE)

    def test_the_index_is_that_of_the_least_weighted_sum_of_distances(self):
        quantizer = SharedIndex(dims=(3, 5), codebook_size=40, weights=(1.0, 0.2), distance="euclidean").eval()
        quantizer.codebook.data.normal_()
        z = torch.randn(2, 30, 8)
        (near_0, near_1), (code_0, code_1) = quantizer.halves(z), quantizer.halves(quantizer.codebook)
        distances = torch.cdist(near_0, code_0).square() + 0.2 * torch.cdist(near_1, code_1).square()
        ids = quantizer(z).ids[..., 0]
        assert torch.equal(ids, distances.argmin(dim=-1))
        assert not torch.equal(ids, torch.cdist(z, quantizer.codebook).argmin(dim=-1))

    def test_each_half_lies_on_its_own_sphere(self):
        quantizer = SharedIndex(dims=(3, 5), codebook_size=16)
        codes = quantizer(torch.randn(2, 6, 8)).codes
        for half, width in zip(quantizer.halves(codes), (3, 5), strict=True):
            torch.testing.assert_close(half.norm(dim=-1), torch.ones(2, 6))
            assert half.shape == (2, 6, width)

    @pytest.mark.parametrize("options", [{"dims": (8,)}, {"weights": (1.0,)}, {"weights": (1.0, 0.0)}])
    def test_wrong_options_are_refused(self, options: dict):
        with pytest.raises(ValueError, match="dims are|weights are"):
            SharedIndex(**{"dims": (4, 4), "codebook_size": 8} | options)


def small(**options) -> MultiScale:
    return MultiScale(**{"part": VQ(dim=4, codebook_size=16), "scales": (1, 2, 3), "share": 1} | options)


class TestMultiScale:
    def test_ids_of_all_scales_stand_behind_each_other(self):
        quantizer = small()
        assert quantizer.fixed_n == 9 and quantizer.id_count(9) == 14 and quantizer.size == 3
        assert quantizer(torch.randn(2, 9, 4)).ids.shape == (2, 14, 1)

    def test_each_further_scale_comes_closer_to_z(self):
        quantizer = small(ratio=0.0)
        quantizer.part.codebook.data.normal_().div_(3)
        z = torch.nn.functional.interpolate(torch.randn(4, 4, 2, 2), size=(3, 3), mode="bicubic").flatten(2).mT
        quantizer.eval()
        ids = quantizer(z).ids
        errors = [(quantizer.lookup(ids[:, :m]) - z).square().mean() for m in (1, 5, 14)]
        assert errors[0] > errors[1] > errors[2]

    def test_a_scale_marked_as_absent_adds_nothing_not_even_the_bias_of_phi(self):
        quantizer = small().eval()
        ids = quantizer(torch.randn(2, 9, 4)).ids
        absent = ids.clone()
        absent[0, 5:] = -1
        codes = quantizer.lookup(absent)
        torch.testing.assert_close(codes[:1], quantizer.lookup(ids[:1, :5]))
        torch.testing.assert_close(codes[1:], quantizer.lookup(ids[1:]))

    def test_ids_that_are_no_whole_scales_are_refused(self):
        ids = torch.zeros(2, 14, 1, dtype=torch.int64)
        for m in (0, 2, 13):
            with pytest.raises(ValueError, match="m is 1, 5, 14"):
                small().lookup(ids[:, :m])

    def test_the_first_scale_is_always_there(self):
        ids = torch.zeros(2, 14, 1, dtype=torch.int64)
        ids[0, 0] = -1
        with pytest.raises(ValueError, match="run from 0 to 15"):
            small().lookup(ids)

    def test_another_grid_is_refused(self):
        with pytest.raises(ValueError, match="3 x 3"):
            small()(torch.randn(2, 8, 4))

    def test_a_dropped_scale_is_any_but_the_first(self):
        quantizer, z = small(scale_drop=0.5).train(), torch.randn(2, 9, 4)
        seen = set()
        for _ in range(60):
            ids = quantizer(z).ids
            seen.add(tuple(bool((piece >= 0).all()) for piece in ids.split([1, 4, 9], dim=1)))
        assert seen == {(True, True, True), (True, False, True), (True, True, False)}
        assert (quantizer.eval()(z).ids >= 0).all()

    def test_every_image_keeps_its_first_scales_under_dropout(self):
        quantizer, z = small(dropout=1.0, keep=2).train(), torch.randn(64, 9, 4)
        ids = quantizer(z).ids[..., 0]
        assert (ids[:, :5] >= 0).all() and 0.3 < (ids[:, 5] < 0).float().mean() < 0.7
        assert torch.equal((ids[:, 5:] < 0).all(dim=1), (ids[:, 5:] < 0).any(dim=1))

    def test_moving_averages_learn_once_a_step_from_all_scales(self):
        part = VQ(dim=4, codebook_size=16, update="ema", decay=0.5)
        before = part.counts.clone()
        quantizer = small(part=part).train()
        ids = quantizer(torch.randn(2, 9, 4)).ids
        chosen = torch.bincount(ids.flatten(), minlength=16).float()
        torch.testing.assert_close(part.counts, before.lerp(chosen, 0.5))

    def test_a_codebook_may_be_revived_between_forward_and_backward(self):
        part = VQ(dim=4, codebook_size=64, distance="cosine", revive_after=1)
        before = part.codebook.detach().clone()
        out = small(part=part).train()(torch.randn(2, 9, 4))
        out.loss.backward()
        moved = (part.codebook != before).any(dim=1)
        assert moved.sum() == 64 - len(out.ids.unique()) and not moved[out.ids].any()
        assert (part.codebook.grad[out.ids.unique()] != 0).any(dim=1).all()

    def test_scalar_quantizers_and_products_are_parts_too(self):
        part = Product(parts=(FSQ(levels=(5, 5)), VQ(dim=2, codebook_size=8)))
        quantizer = small(part=part).eval()
        out = quantizer(torch.randn(2, 9, 4))
        assert out.ids.shape == (2, 14, 2) and torch.equal(quantizer.lookup(out.ids), out.codes)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scales": ()}, "scales are"),
            ({"scales": (2, 1)}, "none smaller"),
            ({"scales": (0, 1)}, "scales are"),
            ({"share": 4}, "number of phis"),
            ({"keep": 4}, "keep is"),
            ({"ratio": 1.5}, "ratio is"),
            ({"scales": (3,), "scale_drop": 0.1}, "two scales or more"),
            ({"part": MultiScale(part=VQ(dim=4, codebook_size=8), scales=(1, 2), share=1)}, "MultiScale does not"),
        ],
    )
    def test_wrong_options_are_refused(self, options: dict, message: str):
        with pytest.raises(ValueError, match=message):
            small(**options)
