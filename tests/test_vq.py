"""Vector quantization with a learned codebook."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.quantizers.vq import VQ, kmeans


def vq(**options: object) -> VQ:
    return build(Quantizer, {"kind": "vq", "dim": 3, "codebook_size": 8} | options)


class TestVQ:
    @pytest.mark.parametrize("offset, scale", [(0, 1), (0, 1e-4), (1000, 1)])
    def test_euclidean_codes_are_the_nearest(self, offset: float, scale: float):
        quantizer = vq(codebook_size=64, dim=8).eval()
        nn.init.normal_(quantizer.codebook, mean=offset, std=scale)
        z = torch.randn(1, 500, 8) + offset
        expected = torch.cdist(z.double(), quantizer.codebook.detach().double()[None]).argmin(dim=-1)
        assert torch.equal(quantizer(z).ids[..., 0], expected)

    def test_cosine_codes_have_length_one_and_the_smallest_angle(self):
        quantizer = vq(distance="cosine").eval()
        z = 7 * torch.randn(2, 50, 3)
        out = quantizer(z)
        torch.testing.assert_close(out.codes.norm(dim=-1), torch.ones(2, 50))
        expected = F.cosine_similarity(z[:, :, None].double(), quantizer.codebook.detach().double(), dim=-1).argmax(-1)
        assert torch.equal(out.ids[..., 0], expected)

    def test_the_loss_is_the_formula(self):
        quantizer = vq(dim=1, codebook_size=2, commitment=0.5, codebook_weight=2.0)
        quantizer.codebook.data = torch.tensor([[0.0], [10.0]])
        z = torch.tensor([[[1.0], [7.0]]], requires_grad=True)
        out = quantizer(z)
        assert out.parts["commitment"] == out.parts["codebook"] == 5.0  # (1 + 9) / 2
        assert out.loss == 12.5
        out.loss.backward()
        assert z.grad.flatten().tolist() == [0.5, -1.5]  # commitment * (z - c), as 2 / 2 of the mean of two
        assert quantizer.codebook.grad.flatten().tolist() == [-2.0, 6.0]  # codebook_weight * (c - z)

    def test_the_straight_through_gradient_is_the_identity(self):
        z = torch.randn(2, 5, 3, requires_grad=True)
        weight = torch.randn(2, 5, 3)
        (grad,) = torch.autograd.grad((vq()(z).codes * weight).sum(), z)
        assert torch.equal(grad, weight)

    def test_ema_of_a_constant_reaches_it_even_after_a_cast(self):
        quantizer = vq(dim=1, update="ema", decay=0.9).bfloat16()
        z = torch.full((2, 32, 1), 256.0)
        for _ in range(300):
            ids = quantizer(z).ids
        torch.testing.assert_close(quantizer.lookup(ids), z, rtol=1e-5, atol=0)
        assert all(b.dtype == torch.float32 for b in quantizer.buffers())

    def test_ema_codes_converge_to_cluster_means(self):
        centres = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0]])
        z = (centres[:, None] + 0.3 * torch.randn(3, 40, 2)).reshape(1, 120, 2)
        quantizer = vq(dim=2, codebook_size=3, update="ema", decay=0.5, kmeans_start=True)
        for _ in range(40):
            quantizer(z)
        found = quantizer.codebook[quantizer(z).ids.view(3, 40)[:, 0]]
        torch.testing.assert_close(found, z.view(3, 40, 2).mean(dim=1), rtol=1e-4, atol=1e-4)

    def test_gradient_descent_lowers_the_loss(self):
        quantizer, z = vq(), torch.randn(2, 64, 3)
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=5.0)
        losses = []
        for _ in range(20):
            loss = quantizer(z).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0]

    @pytest.mark.parametrize("update", ["gradient", "ema"])
    def test_kmeans_start_uses_the_first_training_batch_once(self, update: str):
        z = 3 + torch.randn(2, 64, 3)
        quantizer = vq(update=update, kmeans_start=True, codebook_weight=0.0)
        quantizer.eval()(z)
        assert not quantizer.started
        quantizer.train()(z)
        assert quantizer.started and len(quantizer.eval()(z).ids.unique()) == 8
        other = vq(update=update, kmeans_start=True)
        other.load_state_dict(quantizer.state_dict())
        before = other.codebook.clone()
        other.train()(-z)
        moved = (other.codebook - before).norm() / before.norm()
        assert moved < 0.1  # a second start would have put every code to the other side

    def test_kmeans_finds_well_separated_clusters(self):
        centres = 20 * torch.eye(4)
        rows = centres.repeat(10, 1) + 0.01 * torch.randn(40, 4)
        found = kmeans(rows, 12)  # more than clusters, so that random starts cannot miss one
        assert (torch.cdist(centres, found).amin(dim=1) < 0.5).all()

    def test_kmeans_with_fewer_vectors_than_codes_uses_each_vector(self):
        rows = torch.randn(5, 3)
        found = kmeans(rows, 16)
        assert len(found.unique(dim=0)) == 16
        assert (torch.cdist(rows, found).amin(dim=1) < 1e-6).all()
        assert (torch.cdist(found, rows).amin(dim=1) < 0.2).all()

    @pytest.mark.parametrize("update", ["gradient", "ema"])
    @pytest.mark.parametrize("distance", ["euclidean", "cosine"])
    def test_dead_codes_revive(self, update: str, distance: str):
        z = torch.randn(2, 100, 3)
        used = {}
        for revive_after in (0, 3):
            torch.manual_seed(1)
            quantizer = vq(codebook_size=16, update=update, distance=distance, revive_after=revive_after)
            with torch.no_grad():  # all but two stand behind one another, where only the first can be chosen
                quantizer.codebook[2:] = torch.tensor([100.0, 0.0, 0.0])
                if update == "ema":
                    quantizer.sums.copy_(quantizer.codebook)
            for _ in range(20):
                quantizer(z).loss.backward() if update == "gradient" else quantizer(z)
            used[revive_after] = len(quantizer.eval()(z).ids.unique())
        assert used[0] < 6 < 12 < used[3]

    def test_a_code_revives_after_exactly_so_many_steps(self):
        quantizer = vq(dim=1, codebook_size=2, revive_after=3)
        quantizer.codebook.data = torch.tensor([[0.0], [50.0]])
        z = torch.tensor([[[1.0], [2.0]]])
        for step in range(1, 4):
            assert quantizer.codebook[1] == 50
            assert quantizer(z).ids.flatten().tolist() == [0, 0]
            assert quantizer.idle.tolist() == [0, step % 3]
        assert quantizer.codebook[1] in z

    @pytest.mark.parametrize(
        "wrong",
        [
            {"dim": 0},
            {"codebook_size": 1},
            {"distance": "manhattan"},
            {"update": "none"},
            {"commitment": -1.0},
            {"decay": 1.0},
            {"revive_after": -1},
        ],
    )
    def test_options_out_of_range_are_refused(self, wrong: dict[str, object]):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            vq(**wrong)

    @pytest.mark.slow
    def test_ranks_learn_the_same_codebook(self, tmp_path):
        """Two processes with different data end with one codebook, which has seen both halves."""
        script = """
import sys, torch
from torch import distributed
from tokenizers_vis.quantizers.vq import VQ
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
quantizer = VQ(dim=2, codebook_size=6, update="ema", decay=0.5, kmeans_start=True, revive_after=2)
torch.manual_seed(rank)
for _ in range(30):
    quantizer(torch.randn(1, 50, 2) + (8 * rank))
torch.save(quantizer.state_dict(), f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""
        ranks = [subprocess.Popen([sys.executable, "-c", script, str(rank), str(tmp_path)]) for rank in range(2)]
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
        first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert (first["codebook"][:, 0] > 5).any() and (first["codebook"][:, 0] < 3).any()
