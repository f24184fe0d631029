"""Vector quantization with a learned codebook."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.quantizers.base import Quantized, Quantizer
from tokenizers_vis.quantizers.codebook import anchors, kmeans, pull
from tokenizers_vis.quantizers.vq import VQ

Recorded = Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def vq(**options: object) -> VQ:
    return build(Quantizer, {"kind": "vq", "dim": 3, "codebook_size": 8} | options)


def setting(recorded: Recorded, name: str, key: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors of one setting of a recording, and the options that the original was built with."""
    tensors, metadata = recorded(name)
    tensors = {at.removeprefix(f"{key}."): tensor for at, tensor in tensors.items() if at.startswith(f"{key}.")}
    return tensors, json.loads(metadata["options"])[key]


def agree(quantizer: VQ, expected: dict[str, Tensor]) -> Quantized:
    """Runs the quantizer as the original was run; ids, codes, loss and every gradient are those recorded."""
    quantizer.codebook.data.copy_(expected["codebook"])
    z = expected["z"].requires_grad_()
    out = quantizer(z)
    assert torch.equal(out.ids, expected["ids"])
    torch.testing.assert_close(out.codes, expected["codes"], **CLOSE)
    torch.testing.assert_close(out.loss, expected["loss"], **CLOSE)
    ((out.codes * expected["w"]).sum() + out.loss).backward()
    torch.testing.assert_close(z.grad, expected["grad_z"], **CLOSE)
    torch.testing.assert_close(quantizer.codebook.grad, expected["grad_codebook"], **CLOSE)
    return out


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
            {"gradient": "none"},
            {"entropy": -0.1},
            {"entropy_temperature": 0.0},
            {"entropy_eps": -1e-5},
            {"revival": "none"},
            {"revival": "nearest", "update": "ema"},
            {"revival": "random", "revive_after": 2},
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
ema = VQ(dim=2, codebook_size=6, update="ema", decay=0.5, kmeans_start=True, revive_after=2)
nearest = VQ(dim=2, codebook_size=6, revival="nearest")
torch.manual_seed(rank)
for _ in range(30):
    z = torch.randn(1, 50 + rank, 2) + (8 * rank)
    ema(z), nearest(z)
torch.save({"ema": ema.state_dict(), "nearest": nearest.state_dict()}, f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""
        ranks = [subprocess.Popen([sys.executable, "-c", script, str(rank), str(tmp_path)]) for rank in range(2)]
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
        first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
        for kind in ("ema", "nearest"):
            assert all(torch.equal(first[kind][name], second[kind][name]) for name in first[kind])
        codes = first["ema"]["codebook"][:, 0]
        assert (codes > 5).any() and (codes < 3).any()
        # Codes start near 0, where all nearest vectors are rank 0's; a mean of two anchors would lie far from both.
        assert first["nearest"]["codebook"].norm(dim=-1).max() < 3


class TestLosses:
    def test_each_side_of_the_loss_has_a_gradient_of_its_own(self):
        """The two look alike, so a stop-gradient that is left out would not show in their values."""
        z = torch.randn(2, 5, 3, requires_grad=True)
        for options, moved in (
            ({"commitment": 1.0, "codebook_weight": 0.0}, "z"),
            ({"commitment": 0.0, "codebook_weight": 1.0}, "codebook"),
        ):
            quantizer = vq(**options)
            grads = torch.autograd.grad(quantizer(z).loss, (z, quantizer.codebook))
            assert [bool((grad != 0).any()) for grad in grads] == [moved == "z", moved == "codebook"]

    def test_entropy_is_the_formula_and_for_training(self):
        quantizer = vq(entropy=0.3, entropy_temperature=0.5, entropy_eps=0.0)
        nn.init.normal_(quantizer.codebook)
        z = torch.randn(2, 9, 3)
        out = quantizer(z)
        p = (-torch.cdist(z.view(1, 18, 3), quantizer.codebook[None])[0].square() / 0.5).softmax(dim=-1)
        sample, batch = -(p * p.log()).sum(dim=-1).mean(), -(p.mean(dim=0) * p.mean(dim=0).log()).sum()
        torch.testing.assert_close(out.parts["sample_entropy"], sample.detach())
        torch.testing.assert_close(out.parts["batch_entropy"], batch.detach())
        rest = 0.25 * out.parts["commitment"] + out.parts["codebook"]
        torch.testing.assert_close(out.loss - rest, 0.3 * (sample - batch))
        assert set(quantizer.eval()(z).parts) == set(vq()(z).parts) == {"commitment", "codebook"}

    @pytest.mark.parametrize("update", ["gradient", "ema"])
    @pytest.mark.parametrize("distance", ["euclidean", "cosine"])
    def test_learning_within_the_step_leaves_its_gradients_alone(self, distance: str, update: str):
        """Codes move before backward, which must still see them where they were."""
        z, grads = torch.randn(2, 20, 3), []
        for options in ({}, {"revive_after": 1}, {"revival": "nearest"}):
            if update == "ema" and "revival" in options:
                continue
            torch.manual_seed(0)
            quantizer = vq(update=update, distance=distance, entropy=0.5, entropy_temperature=1.0, **options)
            quantizer.codebook.data *= 3
            quantizer.codebook.data[5:] = 9.0  # equal ones, of which the first alone can be chosen
            inputs = [z.clone().requires_grad_(), *quantizer.parameters()]
            before = quantizer.codebook.clone()
            loss = quantizer(inputs[0]).loss
            assert torch.equal(quantizer.codebook, before) == (update == "gradient" and not options)
            grads.append(torch.autograd.grad(loss, inputs))
        for other in grads[1:]:
            for a, b in zip(grads[0], other, strict=True):
                assert torch.equal(a, b)


class TestClustering:
    def test_unused_codes_go_to_their_nearest_vector_and_used_ones_stay(self):
        quantizer = vq(dim=1, codebook_size=2, revival="nearest", decay=0.5)
        quantizer.codebook.data = torch.tensor([[0.0], [50.0]])
        quantizer(torch.tensor([[[1.0], [2.0]]]))
        assert quantizer.usage.tolist() == [0.5, 0.0]
        share = torch.exp(torch.tensor(-1e-3))  # of 2, the nearest to 50; the other keeps exp(-20.001) of 1
        torch.testing.assert_close(quantizer.codebook[:, 0], torch.stack([torch.tensor(0.0), 50 + share * (2 - 50)]))

    def test_pull_is_the_equation(self):
        usage = torch.tensor([0.0, 0.001, 1.0])
        expected = [(-(u * 3 * 10) / (1 - 0.9) - 1e-3) for u in usage.tolist()]
        torch.testing.assert_close(pull(usage, 0.9), torch.tensor(expected).exp())

    def test_anchors_are_the_nearest_by_distance_or_by_angle(self):
        codes, rows = torch.tensor([[1.0, 1.0], [0.0, -1.0]]), torch.tensor([[9.0, 9.0], [1.0, 0.0], [-1.0, -1.0]])
        assert anchors(codes, rows, "nearest", "euclidean").tolist() == [[1, 0], [-1, -1]]
        assert anchors(codes, rows, "nearest", "cosine").tolist() == [[9, 9], [-1, -1]]
        found = anchors(codes, rows, "random", "euclidean")
        assert len(found.unique(dim=0)) == 2 and all(row in rows.tolist() for row in found.tolist())

    @pytest.mark.parametrize("revival", ["nearest", "random"])
    @pytest.mark.parametrize("distance", ["euclidean", "cosine"])
    def test_it_brings_codes_into_use(self, distance: str, revival: str):
        used, z = {}, torch.randn(20, 2, 100, 3)
        for kind in ("restart", revival):  # restart after 0 steps is none
            torch.manual_seed(1)
            quantizer = vq(codebook_size=16, distance=distance, revival=kind)
            quantizer.codebook.data[2:] = 100 * (1 + torch.rand(14, 1)) * torch.tensor([1.0, 0.0, 0.0])
            for batch in z:
                quantizer(batch)
            used[kind] = len(quantizer.eval()(z[0]).ids.unique())
        assert used["restart"] <= 6 and used[revival] >= 2 * used["restart"]


class TestOriginals:
    @pytest.mark.parametrize("key", ["published", "entropy", "euclidean", "euclidean_entropy"])
    def test_llamagen(self, recorded: Recorded, key: str):
        expected, options = setting(recorded, "llamagen_vq", key)
        quantizer = VQ(
            dim=options["e_dim"],
            codebook_size=options["n_e"],
            distance="cosine" if options["l2_norm"] else "euclidean",
            commitment=options["beta"],
            entropy=options["entropy_loss_ratio"],
        )
        parts = agree(quantizer, expected).parts
        torch.testing.assert_close(parts["codebook"], expected["vq_loss"], **CLOSE)
        torch.testing.assert_close(options["beta"] * parts["commitment"], expected["commit_loss"], **CLOSE)
        assert ("sample_entropy" in parts) == (options["entropy_loss_ratio"] > 0)
        if "sample_entropy" in parts:
            entropy = options["entropy_loss_ratio"] * (parts["sample_entropy"] - parts["batch_entropy"])
            torch.testing.assert_close(entropy, expected["entropy_loss"], **CLOSE)

    @pytest.mark.parametrize("key", ["plain", "l2", "clustering", "l2_clustering"])
    def test_titok(self, recorded: Recorded, key: str):
        expected, options = setting(recorded, "titok_vq", key)
        clustering = options["clustering_vq"]
        quantizer = VQ(
            dim=options["token_size"],
            codebook_size=options["codebook_size"],
            distance="cosine" if options["use_l2_norm"] else "euclidean",
            commitment=options["commitment_cost"],
            revival="nearest" if clustering else "restart",
        )
        parts = agree(quantizer, expected).parts
        torch.testing.assert_close(parts["codebook"], expected["codebook_loss"], **CLOSE)
        torch.testing.assert_close(0.25 * parts["commitment"], expected["commitment_loss"], **CLOSE)
        for step in (1, 2, 3) if clustering else ():
            if step > 1:
                assert torch.equal(quantizer(expected[f"z_{step}"]).ids, expected[f"ids_{step}"])
            torch.testing.assert_close(quantizer.codebook.data, expected[f"codebook_{step}"], **CLOSE)
            torch.testing.assert_close(quantizer.usage, expected[f"embed_prob_{step}"], **CLOSE)

    @pytest.mark.parametrize("key, weights", [("legacy", (1.0, 0.25)), ("fixed", (0.25, 1.0))])
    def test_taming(self, recorded: Recorded, key: str, weights: tuple[float, float]):
        expected, options = setting(recorded, "taming_vq", key)
        assert options["legacy"] == (key == "legacy")
        agree(VQ(dim=8, codebook_size=32, commitment=weights[0], codebook_weight=weights[1]), expected)

    @pytest.mark.parametrize("distance", ["euclidean", "cosine"])
    def test_moving_averages_are_those_of_vector_quantize_pytorch(self, distance: str):
        library = pytest.importorskip("vector_quantize_pytorch")
        theirs = library.VectorQuantize(
            dim=6,
            codebook_size=24,
            decay=0.8,
            commitment_weight=0.25,
            rotation_trick=False,
            use_cosine_sim=distance == "cosine",
        )
        ours = vq(dim=6, codebook_size=24, decay=0.8, update="ema", distance=distance)
        book = theirs._codebook
        for name, ours_name in (("embed", "codebook"), ("embed_avg", "sums"), ("cluster_size", "counts")):
            getattr(ours, ours_name).copy_(getattr(book, name)[0])
        for _ in range(6):
            z = torch.randn(2, 40, 6)
            codes, ids, loss = theirs(z)
            out = ours(z)
            assert torch.equal(out.ids[..., 0], ids)  # a token that differs would move another code
            torch.testing.assert_close(out.loss, loss.squeeze())
            torch.testing.assert_close(ours.counts, book.cluster_size[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(ours.sums, book.embed_avg[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(ours.table(), book.embed[0], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("distance", ["euclidean", "cosine"])
    def test_the_rotation_trick_is_that_of_vector_quantize_pytorch(self, distance: str):
        library = pytest.importorskip("vector_quantize_pytorch")
        theirs = library.VectorQuantize(
            dim=6, codebook_size=24, commitment_weight=0.25, use_cosine_sim=distance == "cosine", rotation_trick=True
        )
        ours = vq(dim=6, codebook_size=24, update="ema", distance=distance, gradient="rotation")
        nn.init.normal_(theirs._codebook.embed)
        if distance == "cosine":
            theirs._codebook.embed.copy_(F.normalize(theirs._codebook.embed, dim=-1))
        ours.codebook.copy_(theirs._codebook.embed[0])
        z, w, grads = torch.randn(2, 40, 6), torch.randn(2, 40, 6), []
        for quantizer in (theirs.train(), ours):
            x = z.clone().requires_grad_()
            codes, ids, loss = quantizer(x)[:3]
            grads.append(torch.autograd.grad((codes * w).sum() + loss.sum(), x)[0])
        torch.testing.assert_close(grads[1], grads[0], **CLOSE)

    def test_rotated_codes_are_still_the_codes_bit_for_bit(self):
        quantizer = vq(gradient="rotation")
        out = quantizer(torch.randn(2, 5, 3, requires_grad=True))
        assert torch.equal(out.codes, quantizer.lookup(out.ids))
