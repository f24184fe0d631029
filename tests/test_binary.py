"""Codes of bits: the entropy against a table of all codes, the quantizers against what their authors' code gave."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenizers_vis.cuda import binary
from tokenizers_vis.cuda.binary import batch_entropy, sample_entropy
from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.quantizers.bernoulli import Bernoulli
from tokenizers_vis.quantizers.bsq import BSQ
from tokenizers_vis.quantizers.lfq import GFQ, LFQ

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def by_table(logits: Tensor, weights: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sample and batch entropy of n d log-odds, with all 2^d codes written out."""
    codes = torch.tensor(list(itertools.product((-0.5, 0.5), repeat=logits.shape[1])), dtype=logits.dtype)
    scores = logits @ codes.T
    weights = weights / weights.sum()
    average = weights @ scores.softmax(dim=1)
    sample = -(scores.softmax(dim=1) * scores.log_softmax(dim=1)).sum(dim=1) @ weights
    return sample, -(average * (average + eps).log()).sum()


def gradient(value: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(value, of, retain_graph=True)[0]


class TestEntropy:
    @pytest.mark.parametrize("d", [1, 2, 5, 8, 12])
    @pytest.mark.parametrize("spread", [0.01, 1.0, 20.0])
    def test_is_that_of_all_codes(self, d: int, spread: float):
        logits = (spread * torch.randn(19, d, dtype=torch.float64)).requires_grad_()
        weights = torch.rand(19, dtype=torch.float64)
        for eps in (0.0, 1e-5):
            for ours, theirs in zip(
                (sample_entropy(logits, weights), batch_entropy(logits, weights, eps)),
                by_table(logits, weights, eps),
                strict=True,
            ):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
                torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits), rtol=0, atol=1e-15)

    def test_float32_is_near_float64(self):
        for spread in (0.01, 1.0, 20.0):
            exact = (spread * torch.randn(19, 10, dtype=torch.float64)).requires_grad_()
            single = exact.detach().float().requires_grad_()
            for entropy in (sample_entropy, batch_entropy):
                torch.testing.assert_close(entropy(single).double(), entropy(exact), rtol=1e-6, atol=1e-6)
                true = gradient(entropy(exact), exact)
                error = (gradient(entropy(single), single) - true).abs().max() / true.abs().max()
                assert error < 5e-5

    def test_groups_are_apart_and_weights_count_rows(self):
        logits = torch.randn(3, 7, 4, dtype=torch.float64)
        weights = torch.tensor([1, 0, 2, 1, 0, 0, 1])
        repeated = logits.repeat_interleave(weights, dim=1)
        for entropy in (sample_entropy, batch_entropy):
            one_by_one = torch.stack([entropy(group) for group in repeated])
            torch.testing.assert_close(entropy(logits, weights), one_by_one)
            torch.testing.assert_close(entropy(repeated), one_by_one)

    def test_blocks_of_rows_change_nothing(self, monkeypatch: pytest.MonkeyPatch):
        logits = torch.randn(2, 29, 7, dtype=torch.float64, requires_grad=True)
        whole = batch_entropy(logits, eps=1e-5)
        monkeypatch.setattr(binary, "BLOCK", 100)
        parts = batch_entropy(logits, eps=1e-5)
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(gradient(parts.sum(), logits), gradient(whole.sum(), logits))

    def test_no_table_of_rows_and_codes(self):
        class Largest(TorchDispatchMode):
            numbers = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, Tensor):
                    self.numbers = max(self.numbers, out.numel())
                return out

        logits = torch.randn(300, 16, requires_grad=True)
        with Largest() as seen:
            (batch_entropy(logits) + sample_entropy(logits)).backward()
        assert seen.numbers == max(2**16, 300 * 2**8)

    @pytest.mark.parametrize("size", [0.01, 1.0, 60.0])
    def test_the_gradient_is_alive_at_18_bits(self, size: float):
        """Rows that are all alike have a product for an average, so that both entropies are known by hand.

        The clamped log of other libraries has no gradient here near uniform, and a sigmoid's own none at 60.
        """
        logits = (size * torch.tensor([1.0, -1.0]).repeat(4, 9)).requires_grad_()
        exact = logits.detach().double()
        slope = -exact * exact.sigmoid() * (-exact).sigmoid() / len(logits)
        for entropy in (sample_entropy, batch_entropy):
            ours = gradient(entropy(logits), logits).double()
            assert (ours / slope - 1).abs().max() < 1e-4
        assert batch_entropy(torch.zeros(2, 18)) == pytest.approx(18 * math.log(2))

    def test_low_precision_and_autocast_change_nothing(self):
        logits = torch.randn(9, 6).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            inside = batch_entropy(logits), sample_entropy(logits)
        assert inside == (batch_entropy(logits.float()), sample_entropy(logits.float()))

    def test_wrong_input_is_refused(self):
        for shape in ((4,), (0, 3), (3, 0), (1, 2, 3, 4)):
            with pytest.raises(ValueError, match="n d or g n d"):
                batch_entropy(torch.zeros(shape))
        with pytest.raises(ValueError, match="one for each of the 3 rows"):
            sample_entropy(torch.zeros(3, 2), torch.ones(2))
        with pytest.raises(ValueError, match="up to 28"):
            batch_entropy(torch.zeros(2, 29))


def check(quantizer: Quantizer, seen: dict[str, Tensor], name: str) -> None:
    """One training step gives what was recorded under ``name``."""
    z = seen["z"].clone().requires_grad_()
    out = quantizer.train()(z)
    assert torch.equal(out.ids, seen[f"{name}.ids"])
    torch.testing.assert_close(out.codes, seen[f"{name}.codes"], **CLOSE)
    assert set(out.parts) == {"sample_entropy", "batch_entropy", "commitment"}
    for part, value in out.parts.items():
        torch.testing.assert_close(value, seen[f"{name}.{part}"], **CLOSE)
    torch.testing.assert_close(out.loss, seen[f"{name}.loss"], **CLOSE)
    torch.testing.assert_close(gradient((out.codes * seen["w"]).sum() + out.loss, z), seen[f"{name}.gradient"], **CLOSE)


class TestLFQ:
    def test_is_open_magvit2s(self, recorded):
        seen, _ = recorded("open_magvit2_lfq")
        check(LFQ(bits=8, eps=1e-5), seen, "default")
        check(LFQ(bits=8, codebooks=(3, 5), eps=1e-5), seen, "factorized")
        # Its weights .5 of the sample and 1.5 of the batch entropy, within the .1 of both.
        check(LFQ(bits=8, entropy=0.05, gamma=3.0, eps=1e-5), seen, "weighted")

    def test_the_published_sub_tokens(self, recorded):
        seen, _ = recorded("open_magvit2_lfq")
        quantizer = LFQ(bits=18, codebooks=(6, 12)).eval()
        out = quantizer(seen["published.z"])
        assert quantizer.codebook_sizes == (64, 4096)
        assert torch.equal(out.ids, seen["published.ids"]) and torch.equal(out.codes, seen["published.codes"])
        entries = torch.cat([seen["published.entry0"], seen["published.entry1"]], dim=-1)
        assert torch.equal(quantizer.lookup(out.ids), entries)
        # Both together are the id of the whole code.
        assert torch.equal(quantizer.id_format.join(out.ids), LFQ(bits=18).eval()(seen["published.z"]).ids[..., 0])

    @pytest.mark.parametrize("options", [{}, {"spherical": True}, {"codebook_scale": 0.5}])
    def test_is_vector_quantize_pytorchs(self, options: dict):
        library = pytest.importorskip("vector_quantize_pytorch")
        theirs = library.LFQ(codebook_size=16, dim=4, diversity_gamma=1.5, commitment_loss_weight=0.25, **options)
        names = {"codebook_scale": "scale"}
        ours = LFQ(
            bits=4, bit_order="msb", gamma=1.5, temperature=0.5, **{names.get(k, k): v for k, v in options.items()}
        )
        # Hardly any decision, so that the probabilities stay above the 1e-5 at which its log is clamped.
        self.agree(theirs, ours, 0.1 * torch.randn(2, 12, 4), torch.randn(2, 12, 4))

    def test_groups_apart_are_vector_quantize_pytorchs_codebooks(self):
        library = pytest.importorskip("vector_quantize_pytorch")
        theirs = library.LFQ(codebook_size=16, num_codebooks=3, commitment_loss_weight=0.25)
        ours = GFQ(groups=3, bits=4, batch_entropy="grouped", bit_order="msb", temperature=0.5)
        self.agree(theirs, ours, 0.1 * torch.randn(2, 12, 12), torch.randn(2, 12, 12))

    @staticmethod
    def agree(theirs: torch.nn.Module, ours: Quantizer, z: Tensor, w: Tensor) -> None:
        z = z.requires_grad_()
        (codes, ids, loss), parts = theirs.train()(z, inv_temperature=2.0, return_loss_breakdown=True)
        out = ours.train()(z)
        assert torch.equal(out.ids, ids.reshape(out.ids.shape).long())
        torch.testing.assert_close(out.codes, codes, **CLOSE)
        for name, value in zip(("sample_entropy", "batch_entropy", "commitment"), parts, strict=True):
            torch.testing.assert_close(out.parts[name], value, **CLOSE)
        torch.testing.assert_close(out.loss, loss, **CLOSE)
        expected = gradient((codes * w).sum() + loss, z)
        torch.testing.assert_close(gradient((out.codes * w).sum() + out.loss, z), expected, **CLOSE)

    def test_what_weighs_nothing_is_not_computed(self):
        z = torch.randn(2, 3, 62)
        out = LFQ(bits=62, entropy=0.0).train()(z)  # a distribution over 2^62 codes could not be
        assert set(out.parts) == {"commitment"}
        assert set(LFQ(bits=62, gamma=0.0, commitment=0.0).train()(z).parts) == {"sample_entropy"}
        assert set(BSQ(bits=4, group=4, gamma0=0.0, commitment=0.0).train()(z[..., :4]).parts) == {"batch_entropy"}
        out = GFQ(groups=31, bits=2, entropy=0.0, commitment=0.0).train()(z)
        assert out.loss == 0 and out.parts == {}

    def test_in_eval_there_is_no_entropy(self):
        z = torch.randn(2, 3, 24)
        for quantizer in (LFQ(bits=24), GFQ(groups=3), BSQ(bits=24, group=8)):
            assert set(quantizer.eval()(z).parts) == {"commitment"}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"bits": 0}, "bits is 1 or more"),
            ({"bits": 8, "codebooks": (4, 5)}, "sum to bits, 8"),
            ({"bits": 63, "entropy": 0.0}, "1 to 62 bits"),
            ({"bits": 8, "codebooks": (8, 0)}, "1 to 62 bits"),
            ({"bits": 29}, "up to 28 bits, got 29"),
            ({"bits": 8, "bit_order": "little"}, "'msb' or 'lsb'"),
            ({"bits": 8, "temperature": 0.0}, "temperature is above 0"),
            ({"bits": 8, "entropy": -1.0}, "entropy is a weight"),
            ({"bits": 8, "gamma": -1.0}, "gamma is a weight"),
            ({"bits": 8, "commitment": -1.0}, "commitment is a weight"),
            ({"bits": 8, "scale": 0.0}, "scale is above 0"),
            ({"bits": 8, "eps": -1.0}, "eps is 0 or more"),
        ],
    )
    def test_options_out_of_range(self, options: dict, message: str):
        with pytest.raises(ValueError, match=message):
            LFQ(**options)


class TestGFQ:
    def test_is_wetoks(self, recorded):
        seen, _ = recorded("wetok_gfq")
        check(GFQ(groups=4, eps=1e-5), seen, "default")
        check(GFQ(groups=4, entropy=0.05, gamma=3.0, eps=1e-5), seen, "weighted")
        # Its sub-tokens fail in training: the commitment loss takes their bit mask for the mask of rows.
        assert torch.equal(seen["factorized.ids"], seen["default.ids"])

    def test_one_group_is_lfq(self):
        z = 0.1 * torch.randn(2, 6, 5)
        for kind in ("pooled", "grouped"):
            ours, lfq = GFQ(groups=1, bits=5, batch_entropy=kind).train()(z), LFQ(bits=5).train()(z)
            assert torch.equal(ours.ids, lfq.ids) and torch.equal(ours.loss, lfq.loss)

    def test_pooled_and_grouped_differ(self):
        """Two groups that each use half of the codes, not the same: together they use them all."""
        z = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, 1.0]])[None]
        parts = {kind: GFQ(groups=2, bits=2, batch_entropy=kind).train()(z).parts for kind in ("pooled", "grouped")}
        assert parts["pooled"]["batch_entropy"] == pytest.approx(2 * math.log(2))
        assert parts["grouped"]["batch_entropy"] == pytest.approx(math.log(2))

    def test_256_bits(self):
        quantizer = GFQ(groups=32).train()
        z = torch.randn(2, 5, 256)
        out = quantizer(z)
        words = quantizer.id_format.pack(out.ids)
        assert quantizer.id_format.total == 2**256 and words.shape == (2, 5, 4)
        assert torch.equal(quantizer.lookup(quantizer.id_format.unpack(words)), z.sign())

    def test_options_out_of_range(self):
        for options, message in (
            ({"groups": 0}, "groups is 1 or more"),
            ({"groups": 2, "bits": 0}, "bits is 1 or more"),
            ({"groups": 2, "batch_entropy": "both"}, "'pooled' or 'grouped'"),
            ({"groups": 2, "bits": 32}, "up to 28 bits, got 32"),
        ):
            with pytest.raises(ValueError, match=message):
                GFQ(**options)


class TestBSQ:
    def test_is_the_authors(self, recorded):
        seen, _ = recorded("bsq_vit")
        check(BSQ(bits=18), seen, "group")
        check(BSQ(bits=18, batch_entropy="bitwise"), seen, "analytical")
        weights = {"entropy": 0.2, "gamma0": 0.5, "gamma": 1.5, "temperature": 0.25}
        check(BSQ(bits=18, group=6, **weights), seen, "weighted")
        check(BSQ(bits=18, group=3, commitment=0.5, batch_entropy="bitwise", **weights), seen, "weighted_analytical")

    def test_36_bits_are_exact(self, recorded):
        seen, _ = recorded("bsq_vit")
        quantizer = BSQ(bits=36).eval()
        out = quantizer(seen["wide.z"])
        assert quantizer.codebook_sizes == (512,) * 4 and torch.equal(out.ids, seen["wide.ids"])
        torch.testing.assert_close(quantizer.lookup(out.ids), seen["wide.codes"])
        # As one number: the authors sum it in float32, where no number past 2^24 is sure.
        whole = sum((z > 0).long() << (35 - i) for i, z in enumerate(seen["wide.z"].unbind(dim=-1)))
        assert torch.equal(quantizer.id_format.join(out.ids), whole)
        assert torch.equal(BSQ(bits=18).id_format.join(seen["group.ids"]), seen["group.index"])

    def test_one_group_of_all_bits_is_spherical_lfq(self):
        z = torch.randn(2, 6, 10)
        ours = BSQ(bits=10, group=10, temperature=0.1).train()(z)
        lfq = LFQ(bits=10, spherical=True, temperature=0.1).train()(z)
        assert torch.equal(ours.codes, lfq.codes)
        for name in ("sample_entropy", "batch_entropy"):
            torch.testing.assert_close(ours.parts[name], lfq.parts[name])

    def test_options_out_of_range(self):
        for options, message in (
            ({"bits": 0}, "bits is 1 or more"),
            ({"bits": 20}, "group divides bits, 20, got 9"),
            ({"bits": 8, "group": 0}, "group divides bits"),
            ({"bits": 9, "gamma0": -1.0}, "gamma0 is a weight"),
            ({"bits": 9, "batch_entropy": "pooled"}, "'grouped' or 'bitwise'"),
            ({"bits": 36, "group": 36}, "up to 28 bits, got 36"),
        ):
            with pytest.raises(ValueError, match=message):
                BSQ(**options)
        assert BSQ(bits=36, group=36, batch_entropy="bitwise").codebook_sizes == (2**36,)


class TestBernoulli:
    def test_is_instellas(self, recorded):
        seen, metadata = recorded("instella_binary")
        # Recorded at a temperature at which the draw is certain.
        quantizer = Bernoulli(dim=12, bits=16, temperature=json.loads(metadata["options"])["train_temp"])
        names = {"project.weight": "proj.0.weight", "project.bias": "proj.0.bias", "embeddings": "embed"}
        quantizer.load_state_dict({ours: seen[theirs] for ours, theirs in names.items()})
        for mode in ("train", "eval"):
            z = seen["z"].clone().requires_grad_()
            out = quantizer.train(mode == "train")(z)
            assert torch.equal(out.ids, seen[f"{mode}.bits"])
            torch.testing.assert_close(out.codes, seen[f"{mode}.codes"], **CLOSE)
            torch.testing.assert_close(out.loss, seen[f"{mode}.loss"], **CLOSE)
            loss = (out.codes * seen["w"]).sum() + out.loss
            for ours, theirs in {"z": "z", **names}.items():
                of = z if ours == "z" else quantizer.get_parameter(ours)
                torch.testing.assert_close(gradient(loss, of), seen[f"{mode}.gradient.{theirs}"], **CLOSE)

    def test_bits_are_drawn_in_training_and_decided_in_eval(self):
        quantizer = Bernoulli(dim=3, bits=5, temperature=0.5)
        z = torch.randn(1, 1, 3)
        p = (quantizer.project(z) / 0.5).sigmoid()
        drawn = quantizer.train()(z.expand(1, 20000, 3)).ids.float().mean(dim=1)
        torch.testing.assert_close(drawn, p[0], rtol=0, atol=0.02)
        assert torch.equal(quantizer.eval()(z).ids, (p > 0.5).long())

    def test_codes_start_as_large_as_what_they_are_added_to(self):
        for bits in (16, 128):
            codes = Bernoulli(dim=64, bits=bits)(torch.randn(8, 256, 64)).codes
            assert 0.7 < codes.var(dim=(0, 1)).mean() < 1.3

    def test_words_are_the_same_bits(self):
        one, words = Bernoulli(dim=3, bits=128), Bernoulli(dim=3, bits=128, bits_per_id=32)
        words.load_state_dict(one.state_dict())
        z = torch.randn(2, 4, 3)
        a, b = one.eval()(z), words.eval()(z)
        assert words.codebook_sizes == (2**32,) * 4 and torch.equal(a.codes, b.codes)
        assert torch.equal(one.id_format.to_bits(a.ids), words.id_format.to_bits(b.ids))
        assert torch.equal(one.id_format.pack(a.ids), words.id_format.pack(b.ids))

    def test_options_out_of_range(self):
        for options, message in (
            ({"dim": 0}, "dim is 1 or more"),
            ({"dim": 4, "bits": 0}, "bits is 1 or more"),
            ({"dim": 4, "bits_per_id": 3}, "bits_per_id divides bits, 64, got 3"),
            ({"dim": 4, "bits": 128, "bits_per_id": 64}, "1 to 62 bits"),
            ({"dim": 4, "temperature": 0.0}, "temperature is above 0"),
            ({"dim": 4, "variance": -1.0}, "variance is a weight"),
        ):
            with pytest.raises(ValueError, match=message):
                Bernoulli(**options)


@pytest.mark.parametrize("order", ["msb", "lsb"])
@pytest.mark.parametrize("options", [{"bits": 62, "entropy": 0.0}, {"bits": 9, "codebooks": (2, 4, 3)}, {"groups": 5}])
def test_bits_come_in_the_order_of_the_dimensions(order: str, options: dict):
    quantizer = (GFQ if "groups" in options else LFQ)(bit_order=order, **options).eval()
    z = torch.randn(3, 4, quantizer.dim)
    out = quantizer(z)
    assert torch.equal(quantizer.id_format.to_bits(out.ids), (z > 0).to(torch.uint8))
    assert torch.equal(quantizer.lookup(out.ids), z.sign()) and torch.equal(out.codes, z.sign())
    assert F.mse_loss(z, z.sign()) == pytest.approx(out.parts["commitment"].item())
    ones = quantizer(F.one_hot(torch.tensor([[0]]), quantizer.dim).float()).ids[0, 0, 0]
    width = quantizer.id_format.widths[0]
    assert ones == (1 if order == "lsb" else 2 ** (width - 1))
