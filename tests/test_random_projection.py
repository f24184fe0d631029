"""The random projection quantizer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tokenizers_vis.quantizers.random_projection import RandomProjection


class TestRandomProjection:
    @pytest.mark.parametrize("norm", [True, False])
    def test_ids_are_those_of_the_library(self, norm: bool):
        library = pytest.importorskip("vector_quantize_pytorch").RandomProjectionQuantizer
        theirs = library(dim=12, codebook_size=32, codebook_dim=5, norm=norm)
        ours = RandomProjection(dim=12, codebook_size=32, codebook_dim=5, norm=norm).eval()
        ours.load_state_dict({"projection": theirs.rand_projs, "codebook": theirs.vq._codebook.embed})
        z = 3 * torch.randn(2, 200, 12) + 1
        assert torch.equal(ours(z).ids[..., 0], theirs(z))

    @pytest.mark.parametrize("norm", [True, False])
    def test_each_codebook_is_a_quantizer_of_its_own(self, norm: bool):
        options = {"dim": 12, "codebook_size": 32, "codebook_dim": 3, "norm": norm}
        together, z = RandomProjection(codebooks=3, **options).eval(), torch.randn(2, 50, 12)
        out, codes = together(z), []
        for j in range(3):
            alone = RandomProjection(**options).eval()
            alone.load_state_dict({name: value[j : j + 1] for name, value in together.state_dict().items()})
            assert torch.equal(alone(z).ids[..., 0], out.ids[..., j])
            codes.append(alone(z).codes)
        torch.testing.assert_close(out.codes, sum(codes) / 3)

    def test_size_and_shift_do_not_matter(self):
        quantizer, z = RandomProjection(dim=8, codebook_size=64, codebook_dim=4).eval(), torch.randn(2, 50, 8)
        assert torch.equal(quantizer(z).ids, quantizer(20 * z - 3).ids)
        plain = RandomProjection(dim=8, codebook_size=64, codebook_dim=4, norm=False).eval()
        assert torch.equal(plain(z).ids, plain(20 * z).ids) and not torch.equal(plain(z).ids, plain(20 * z - 3).ids)

    @pytest.mark.parametrize("norm", [True, False])
    def test_codes_are_the_shortest_vectors_that_project_to_the_chosen_ones(self, norm: bool):
        quantizer = RandomProjection(dim=10, codebook_size=16, codebook_dim=3, norm=norm).eval()
        out = quantizer(torch.randn(2, 30, 10))
        chosen = F.normalize(quantizer.codebook[0], dim=-1)[out.ids[..., 0]]
        torch.testing.assert_close(out.codes @ quantizer.projection[0], chosen, rtol=1e-4, atol=1e-5)
        # Shortest: nothing of it lies outside of what the projection sees; with norm it has mean 0, as z has.
        seen = quantizer.projection[0].T
        seen = seen - seen.mean(dim=1, keepdim=True) if norm else seen
        torch.testing.assert_close(out.codes @ torch.linalg.pinv(seen) @ seen, out.codes, rtol=1e-4, atol=1e-5)
        assert bool(out.codes.mean(dim=-1).abs().max() < 1e-5) == norm
        assert torch.equal(quantizer(out.codes).ids, out.ids)

    @pytest.mark.parametrize("codebook_dim", [2, 4, 20])
    def test_codes_are_nearer_to_z_the_more_codebooks_there_are(self, codebook_dim: int):
        options = {"dim": 12, "codebook_size": 64, "codebook_dim": codebook_dim, "norm": False}
        z, similar = torch.randn(2, 200, 12), []
        for codebooks in (1, 3, 6, 12):
            codes = RandomProjection(codebooks=codebooks, **options).eval()(z).codes
            similar.append(F.cosine_similarity(codes, z, dim=-1).mean().item())
        assert similar == sorted(similar) and similar[0] > 0.2

    def test_loading_brings_the_codes_too(self):
        first, other = (RandomProjection(dim=8, codebook_size=16, codebook_dim=4).eval() for _ in range(2))
        ids = torch.arange(16)[None, :, None]
        assert not torch.equal(first.lookup(ids), other.lookup(ids))
        other.load_state_dict(first.state_dict())
        assert torch.equal(first.lookup(ids), other.lookup(ids)) and set(first.state_dict()) == {
            "projection",
            "codebook",
        }

    def test_nothing_is_learned_and_the_gradient_passes_straight_through(self):
        quantizer = RandomProjection(dim=6, codebook_size=16, codebook_dim=3).train()
        before = {name: value.clone() for name, value in quantizer.state_dict().items()}
        z, weights = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 6)
        out = quantizer(z)
        (out.codes * weights).sum().backward()
        assert torch.equal(z.grad, weights) and out.loss == 0 and not out.parts
        assert not list(quantizer.parameters())
        assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())

    @pytest.mark.parametrize("name, value", [("dim", 0), ("codebook_size", 1), ("codebook_dim", 0), ("codebooks", 0)])
    def test_impossible_options_are_refused(self, name: str, value: int):
        with pytest.raises(ValueError, match=f"{name} is"):
            RandomProjection(**{"dim": 4} | {name: value})
