"""Quantizers made of quantizers: against what FQGAN, UniTok, DualToken and a public library give, and on their own."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.quantizers.base import Quantized, Quantizer
from tokenizers_vis.quantizers.compose import Product, Residual, learn_once
from tokenizers_vis.quantizers.fsq import FSQ
from tokenizers_vis.quantizers.lfq import LFQ
from tokenizers_vis.quantizers.multi_scale import MultiScale
from tokenizers_vis.quantizers.soft_vq import SoftVQ
from tokenizers_vis.quantizers.vq import VQ

Recorded = Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def setting(recorded: Recorded, name: str, key: str) -> tuple[dict[str, Tensor], dict]:
    tensors, metadata = recorded(name)
    tensors = {at.removeprefix(f"{key}."): tensor for at, tensor in tensors.items() if at.startswith(f"{key}.")}
    return tensors, json.loads(metadata["options"])[key]


def agree(product: Product, expected: dict[str, Tensor]) -> Quantized:
    """Runs a product of VQs; ids, codes, loss and every gradient are those recorded."""
    for j, part in enumerate(product.parts):
        part.codebook.data.copy_(expected[f"codebook_{j}"])
    z = expected["z"].requires_grad_()
    out = product.train()(z)
    torch.testing.assert_close(out.codes, expected["codes"], **CLOSE)
    torch.testing.assert_close(out.loss, expected["loss"], **CLOSE)
    ((out.codes * expected["w"]).sum() + out.loss).backward()
    torch.testing.assert_close(z.grad, expected["grad_z"], **CLOSE)
    for j, part in enumerate(product.parts):
        torch.testing.assert_close(part.codebook.grad, expected[f"grad_codebook_{j}"], **CLOSE)
    return out


class TestProduct:
    @pytest.mark.parametrize("key", ["dual", "triple", "euclidean"])
    def test_agrees_with_fqgan(self, recorded: Recorded, key: str):
        expected, options = setting(recorded, "fqgan", key)
        product = Product(
            part=VQ(
                dim=options["e_dim"],
                codebook_size=options["n_e"],
                distance="cosine" if options["l2_norm"] else "euclidean",
                commitment=options["beta"],
                entropy=options["entropy_loss_ratio"],
            ),
            count=3 if key == "triple" else 2,
            reduction="sum",
            disentangle=options["disentanglement_ratio"],
        )
        out = agree(product, expected)
        assert torch.equal(out.ids, expected["ids"])
        weighted = options["disentanglement_ratio"] * out.parts["disentangle"]
        torch.testing.assert_close(weighted, expected["disentangle"], **CLOSE)
        for j in range(len(product.parts)):
            entropy = out.parts[f"sample_entropy_{j}"] - out.parts[f"batch_entropy_{j}"]
            for ours, theirs in (
                (out.parts[f"codebook_{j}"], "vq_loss"),
                (options["beta"] * out.parts[f"commitment_{j}"], "commit_loss"),
                (options["entropy_loss_ratio"] * entropy, "entropy_loss"),
            ):
                torch.testing.assert_close(ours, expected[f"{theirs}_{j}"], **CLOSE)

    @pytest.mark.parametrize("key", ["plain", "entropy"])
    def test_agrees_with_unitok(self, recorded: Recorded, key: str):
        expected, options = setting(recorded, "unitok", key)
        count = options["num_codebooks"]
        product = Product(
            part=VQ(
                dim=options["vocab_width"] // count,
                codebook_size=options["vocab_size"] // count,
                distance="cosine",
                commitment=options["beta"],
                entropy=options["entropy_weight"] if options["use_entropy_loss"] else 0.0,
                entropy_temperature=options["entropy_temp"],
                entropy_eps=1e-7,
            ),
            count=count,
        )
        out = agree(product, expected)
        assert torch.equal(out.ids, expected["ids"].mT)  # theirs are b k n
        loss = sum(options["beta"] * out.parts[f"commitment_{j}"] + out.parts[f"codebook_{j}"] for j in range(count))
        torch.testing.assert_close(loss / count, expected["vq_loss"], **CLOSE)
        if key == "entropy":
            entropy = sum(out.parts[f"sample_entropy_{j}"] - out.parts[f"batch_entropy_{j}"] for j in range(count))
            torch.testing.assert_close(entropy / count, expected["entropy_loss"], **CLOSE)

    def test_pieces_follow_the_widths_of_the_parts(self):
        product = Product(parts=(FSQ(levels=(5, 5)), Residual(part=FSQ(levels=(3, 3, 3)), depth=2)))
        z = torch.randn(2, 6, 5)
        out = product(z)
        assert product.dim == product.in_dim == 5 and product.codebook_sizes == (25, 27, 27)
        assert torch.equal(out.codes[..., :2], product.parts[0](z[..., :2]).codes)
        assert torch.equal(out.ids[..., 1:], product.parts[1](z[..., 2:]).ids)

    def test_disentangle_is_0_for_codes_at_right_angles_and_1_for_equal_ones(self):
        part = VQ(dim=2, codebook_size=2)
        part.codebook.data.copy_(torch.eye(2))
        product = Product(part=part, count=2, disentangle=1.0)
        across = torch.tensor([[[3.0, 0.0, 0.0, 2.0]]])
        along = torch.tensor([[[3.0, 0.0, 2.0, 0.0]]])
        assert product(across).parts["disentangle"] == 0 and product(along).parts["disentangle"] == 1

    def test_what_the_parts_say_is_what_it_says(self):
        grid = MultiScale(part=VQ(dim=2, codebook_size=8), scales=(1, 2), share=1)
        product = Product(part=grid, count=2)
        assert product.fixed_n == 4 and product.id_count(4) == 5 and product.discrete
        assert product(torch.randn(3, 4, 4)).ids.shape == (3, 5, 2)
        assert not Product(parts=(FSQ(levels=(5,)), SoftVQ(dim=2, codebook_size=8))).discrete
        assert Product(part=LFQ(bits=2, bit_order="lsb"), count=2).order == "lsb"
        assert Residual(parts=(LFQ(bits=2, bit_order="lsb"), LFQ(bits=2, bit_order="msb"))).order == "msb"

    def test_parts_that_do_not_go_together_are_refused(self):
        grid = MultiScale(part=VQ(dim=2, codebook_size=8), scales=(1, 2), share=1)
        other = MultiScale(part=VQ(dim=2, codebook_size=8), scales=(1, 3), share=1)
        with pytest.raises(ValueError, match="different numbers of vectors"):
            Product(parts=(grid, other))
        with pytest.raises(ValueError, match="different numbers of ids"):
            Product(parts=(grid, FSQ(levels=(5,))))
        with pytest.raises(ValueError, match="one dim"):
            Product(parts=(FSQ(levels=(5,)), FSQ(levels=(5, 5))), disentangle=0.1)
        with pytest.raises(ValueError, match="two parts or more"):
            Product(part=FSQ(levels=(5,)), count=1, disentangle=0.1)
        for options in ({}, {"part": FSQ(levels=(5,))}, {"parts": (FSQ(levels=(5,)),), "count": 2}):
            with pytest.raises(ValueError, match="give parts"):
                Product(**options)

    def test_a_config_may_nest_them(self):
        table = {
            "kind": "product",
            "parts": [
                {"kind": "residual", "part": {"kind": "vq", "dim": 4, "codebook_size": 16}, "depth": 2, "shared": True},
                {"kind": "fsq", "levels": [5, 5]},
            ],
        }
        assert build(Quantizer, table).codebook_sizes == (16, 16, 25)
        table["parts"][0]["part"]["codebook_sizes"] = 8
        with pytest.raises(ConfigError, match=r"parts\[0\].part.codebook_sizes: VQ has no option"):
            build(Quantizer, table)


def rvq(tables: list[Tensor], **options) -> Residual:
    k, d = tables[0].shape
    residual = Residual(parts=tuple(VQ(dim=d, codebook_size=k) for _ in tables), **options)
    for level, table in zip(residual.levels, tables, strict=True):
        level.codebook.data.copy_(table)
    return residual


class TestDualToken:
    """Two residual quantizers, of features from two depths of one encoder, are one product."""

    def test_agrees_with_its_authors(self, recorded: Recorded):
        expected, options = setting(recorded, "dualtoken", "dual")
        residuals = []
        for name in ("pix", "sem"):
            d, depth = options[name]["latent_shape"][2], options[name]["code_shape"][2]
            part = VQ(dim=d, codebook_size=16, update="ema", decay=options[name]["decay"])
            residual = Residual(part=part, depth=depth)
            for j, level in enumerate(residual.levels):
                table = expected[f"{name}_codebook_{j}"]
                level.codebook.copy_(table)
                level.counts.fill_(3)
                level.sums.copy_(3 * table)
            residuals.append(residual)
        product = Product(parts=tuple(residuals), reduction="sum").train()
        z = torch.cat([expected["pix_z"], expected["sem_z"]], dim=-1).requires_grad_()
        out = product(z)
        assert torch.equal(out.ids, torch.cat([expected["pix_ids"], expected["sem_ids"]], dim=-1))
        torch.testing.assert_close(out.codes, torch.cat([expected["pix_codes"], expected["sem_codes"]], -1), **CLOSE)
        for i, (name, residual) in enumerate(zip(("pix", "sem"), residuals, strict=True)):
            commitment = torch.stack([out.parts[f"commitment_{j}_{i}"] for j in range(residual.depth)]).mean()
            torch.testing.assert_close(commitment, expected[f"{name}_commitment"], **CLOSE)
            for j, level in enumerate(residual.levels):
                torch.testing.assert_close(level.codebook, expected[f"{name}_moved_{j}"], **CLOSE)
        w = torch.cat([expected["pix_w"], expected["sem_w"]], dim=-1)
        ((out.codes * w).sum() + out.loss).backward()
        gradient = torch.cat([expected["pix_grad_z"], expected["sem_grad_z"]], dim=-1)
        torch.testing.assert_close(z.grad, gradient, **CLOSE)

    def test_one_codebook_for_all_levels_agrees_too(self, recorded: Recorded):
        expected, _ = setting(recorded, "dualtoken", "shared")
        residual = Residual(part=VQ(dim=6, codebook_size=16), depth=3, shared=True).eval()
        residual.parts[0].codebook.data.copy_(expected["pix_codebook_0"])
        out = residual(expected["pix_z"])
        assert torch.equal(out.ids, expected["pix_ids"])
        torch.testing.assert_close(out.codes, expected["pix_codes"], **CLOSE)


class TestResidual:
    @pytest.mark.parametrize("training", [False, True])
    def test_agrees_with_vector_quantize_pytorch(self, training: bool):
        vqp = pytest.importorskip("vector_quantize_pytorch")
        theirs = vqp.ResidualVQ(
            dim=6, num_quantizers=3, codebook_size=16, rotation_trick=False, commitment_weight=0.25
        ).train(training)
        for j, layer in enumerate(theirs.layers):
            layer._codebook.embed.data.copy_(torch.randn(1, 16, 6) / (j + 1))
        tables = [layer._codebook.embed[0].clone() for layer in theirs.layers]
        ours = rvq(tables, reduction="sum", gradient="levels").train(training)
        for level in ours.levels:
            level.codebook_weight = 0.0
        z = torch.randn(2, 20, 6)
        z_theirs, z_ours = z.clone().requires_grad_(), z.clone().requires_grad_()
        codes, ids, losses = theirs(z_theirs)
        out = ours(z_ours)
        assert torch.equal(out.ids, ids)
        torch.testing.assert_close(out.codes, codes, **CLOSE)
        if training:
            torch.testing.assert_close(out.loss, losses.sum(), **CLOSE)
            w = torch.randn_like(codes)
            ((codes * w).sum() + losses.sum()).backward()
            ((out.codes * w).sum() + out.loss).backward()
            torch.testing.assert_close(z_ours.grad, z_theirs.grad, **CLOSE)
        else:
            absent = ids.clone()
            absent[0, :, 1:] = -1
            decoder = vqp.ResidualVQ(dim=6, num_quantizers=3, codebook_size=16, quantize_dropout=True)
            decoder.load_state_dict(theirs.state_dict())
            torch.testing.assert_close(ours.lookup(absent), decoder.get_output_from_indices(absent), **CLOSE)
            torch.testing.assert_close(
                ours.lookup(ids[..., :2]), decoder.get_output_from_indices(ids[..., :2]), **CLOSE
            )

    def test_the_gradient_of_the_whole_is_that_of_one_level(self):
        z = torch.randn(2, 5, 4).requires_grad_()
        tables = [torch.randn(8, 4) for _ in range(3)]
        for gradient, times in (("whole", 1), ("levels", 3)):
            (slope,) = torch.autograd.grad(rvq(tables, gradient=gradient)(z).codes.sum(), z)
            assert (slope == times).all()

    def test_per_level_commitment_is_the_cumulative_one(self):
        z, residual = torch.randn(2, 5, 4), rvq([torch.randn(8, 4) for _ in range(3)])
        out = residual(z)
        for j in range(3):
            left = z - residual.lookup(out.ids[..., : j + 1])
            torch.testing.assert_close(out.parts[f"commitment_{j}"], left.square().mean(), **CLOSE)

    def test_fewer_columns_are_a_coarser_code(self):
        residual = rvq([torch.randn(64, 4) / 4**j for j in range(3)])
        z = torch.randn(2, 30, 4)
        ids = residual(z).ids
        errors = [(residual.lookup(ids[..., :j]) - z).square().mean() for j in (1, 2, 3)]
        assert errors[0] > errors[1] > errors[2]
        assert torch.equal(residual.lookup(ids[..., :1]), residual.levels[0].lookup(ids[..., :1]))

    def test_levels_marked_as_absent_add_nothing(self):
        residual = rvq([torch.randn(8, 4) for _ in range(3)])
        ids = residual(torch.randn(2, 5, 4)).ids
        absent = ids.clone()
        absent[0, :, 1:] = -1
        expected = torch.cat([residual.lookup(ids[:1, :, :1]), residual.lookup(ids[1:])])
        assert torch.equal(residual.lookup(absent), expected)

    def test_the_first_level_is_always_there(self):
        residual = rvq([torch.randn(8, 4) for _ in range(3)])
        ids = torch.zeros(1, 2, 3, dtype=torch.int64)
        for column, value in ((0, -1), (1, -2), (2, 8)):
            wrong = ids.clone()
            wrong[0, 1, column] = value
            with pytest.raises(ValueError, match="run from 0 to 7"):
                residual.lookup(wrong)
        with pytest.raises(ValueError, match="k is 1, 2, 3 for 1 to 3 levels"):
            residual.lookup(torch.cat([ids, ids], dim=-1))

    def test_levels_of_several_codebooks_are_taken_whole(self):
        level = Product(part=FSQ(levels=(5, 5)), count=2)
        residual = Residual(part=level, depth=2, scale=0.25).eval()
        out = residual(torch.randn(2, 5, 4))
        assert residual.codebook_sizes == (25,) * 4 and torch.equal(residual.lookup(out.ids), out.codes)
        assert residual.lookup(out.ids[..., :2]).shape == (2, 5, 4)
        with pytest.raises(ValueError, match="k is 2, 4 for"):
            residual.lookup(out.ids[..., :3])

    @pytest.mark.parametrize("part", [FSQ(levels=(5, 5, 5)), LFQ(bits=3)])
    def test_a_scale_lets_scalar_levels_follow_the_rest(self, part: Quantizer):
        z = 0.9 * (2 * torch.rand(2, 200, 3) - 1)
        scale = 0.25 if isinstance(part, FSQ) else 0.5
        errors = [(Residual(part=part, depth=j, scale=scale).eval()(z).codes - z).square().mean() for j in (1, 2, 3, 4)]
        assert all(after < 0.5 * before for before, after in zip(errors, errors[1:], strict=False))

    def test_dropout_marks_the_levels_it_leaves_out(self):
        residual = rvq([torch.randn(8, 4) for _ in range(4)], dropout=0.5, keep=2).train()
        z = torch.randn(400, 3, 4)
        out = residual(z)
        levels = (out.ids >= 0).all(dim=1).sum(dim=1)
        assert torch.equal((out.ids >= 0).sum(dim=(1, 2)), 3 * levels)  # whole levels, the first ones
        shares = torch.bincount(levels, minlength=5) / 400
        torch.testing.assert_close(shares, torch.tensor([0, 0, 1 / 6, 1 / 6, 2 / 3]), rtol=0, atol=0.07)
        assert torch.equal(residual.lookup(out.ids), out.codes)
        assert torch.equal(residual.eval()(z).ids >= 0, torch.ones_like(out.ids, dtype=torch.bool))

    def test_a_shared_codebook_learns_once_a_step_from_all_levels(self):
        part = VQ(dim=4, codebook_size=8, update="ema", decay=0.5)
        part.codebook.normal_()
        part.sums.copy_(part.codebook)
        table, counts, sums = part.codebook.clone(), part.counts.clone(), part.sums.clone()
        residual = Residual(part=part, depth=3, shared=True).train()
        z = torch.randn(2, 6, 4)
        ids = residual(z).ids
        assert torch.equal(ids, rvq([table] * 3)(z).ids)  # no level saw a codebook that another had moved
        rest, chosen = z, torch.zeros_like(sums)
        for j in range(3):
            chosen.index_add_(0, ids[..., j].flatten(), rest.flatten(0, 1))
            rest = rest - table[ids[..., j]]
        torch.testing.assert_close(part.counts, counts.lerp(torch.bincount(ids.flatten(), minlength=8).float(), 0.5))
        torch.testing.assert_close(part.sums, sums.lerp(chosen, 0.5))
        assert len(residual.state_dict()) == len(part.state_dict())  # it is saved once

    def test_learning_once_leaves_nothing_behind_when_it_fails(self):
        part = VQ(dim=4, codebook_size=8, update="ema")
        before = part.codebook.clone()
        with pytest.raises(ValueError, match="width"), learn_once(part, True):
            part.train()(torch.randn(1, 5, 4))
            part(torch.randn(1, 5, 3))
        assert part.waiting is None and torch.equal(part.codebook, before)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"parts": (FSQ(levels=(5,)), FSQ(levels=(5, 5)))}, "widths are equal"),
            ({"parts": (FSQ(levels=(5,)),), "shared": True}, "give part and depth"),
            ({"part": FSQ(levels=(5,)), "depth": 0}, "give parts"),
            ({"part": FSQ(levels=(5,)), "depth": 0, "shared": True}, "give parts"),
            ({"part": FSQ(levels=(5,)), "depth": 2, "keep": 3}, "keep is"),
            ({"part": FSQ(levels=(5,)), "depth": 2, "dropout": 1.5}, "dropout is"),
            ({"part": FSQ(levels=(5,)), "depth": 2, "scale": 0.0}, "scale is"),
            ({"part": MultiScale(part=VQ(dim=4, codebook_size=8), scales=(1, 2), share=1), "depth": 2}, "the reverse"),
        ],
    )
    def test_wrong_options_are_refused(self, options: dict, message: str):
        with pytest.raises(ValueError, match=message):
            Residual(**options)
