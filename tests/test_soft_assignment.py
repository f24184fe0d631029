"""Quantizers that choose softly: IBQ, OptVQ and SoftVQ, against what their authors' code gave and on their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenizers_vis.quantizers.base import Quantized, Quantizer
from tokenizers_vis.quantizers.ibq import IBQ
from tokenizers_vis.quantizers.opt_vq import OptVQ, sinkhorn
from tokenizers_vis.quantizers.soft_vq import SoftVQ

Recorded = Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def setting(recorded: Recorded, name: str, key: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors of one setting of a recording, and the options that the original was built with."""
    tensors, metadata = recorded(name)
    tensors = {at.removeprefix(f"{key}."): tensor for at, tensor in tensors.items() if at.startswith(f"{key}.")}
    return tensors, json.loads(metadata["options"])[key]


def agree(quantizer: Quantizer, expected: dict[str, Tensor]) -> Quantized:
    """Runs the quantizer as the original was run; ids, codes, loss and every gradient are those recorded."""
    quantizer.load_state_dict({name: expected[name] for name, _ in quantizer.named_parameters()})
    z = expected["z"].requires_grad_()
    out = quantizer(z)
    assert torch.equal(out.ids, expected["ids"])
    torch.testing.assert_close(out.codes, expected["codes"], **CLOSE)
    torch.testing.assert_close(out.loss, expected["loss"], **CLOSE)
    ((out.codes * expected["w"]).sum() + out.loss).backward()
    torch.testing.assert_close(z.grad, expected["grad_z"], **CLOSE)
    for name, parameter in quantizer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[f"grad_{name}"], **CLOSE)
    return out


class TestIBQ:
    @pytest.mark.parametrize("key", ["published", "warm", "plain"])
    def test_agrees_with_its_authors(self, recorded: Recorded, key: str):
        expected, options = setting(recorded, "seed_voken_ibq", key)
        quantizer = IBQ(
            dim=options["e_dim"],
            codebook_size=options["n_e"],
            codebook_weight=options["beta"],
            entropy=options.get("entropy_loss_weight", 0.0),
            entropy_temperature=options.get("entropy_temperature", 0.01),
            gamma=options.get("batch_maximization_weight", 1.0),
        )
        parts = agree(quantizer, expected).parts
        quant = parts["quantization"] + parts["commitment"] + options["beta"] * parts["codebook"]
        torch.testing.assert_close(quant, expected["quant_loss"], **CLOSE)
        for name in ("sample_entropy", "batch_entropy"):
            assert (name in parts) == options["use_entropy_loss"]
            if name in parts:
                torch.testing.assert_close(parts[name], expected[name], **CLOSE)

    def test_the_defaults_are_the_published_setting(self, recorded: Recorded):
        agree(IBQ(dim=8, codebook_size=32), setting(recorded, "seed_voken_ibq", "published")[0])

    def test_every_code_has_a_gradient_from_the_codes_alone(self):
        quantizer = IBQ(dim=4, codebook_size=32)
        out = quantizer(torch.randn(1, 2, 4))
        (out.codes * torch.randn(1, 2, 4)).sum().backward()
        assert (quantizer.codebook.grad != 0).any(dim=-1).all()

    def test_ids_are_the_largest_inner_product_and_the_lowest_of_equals(self):
        quantizer = IBQ(dim=2, codebook_size=4).eval()
        quantizer.codebook.data = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 1.0], [9.0, 1.0]])
        assert quantizer(torch.tensor([[[1.0, 0.0], [-1.0, 0.1]]])).ids.flatten().tolist() == [1, 2]

    def test_codes_are_those_of_the_codebook_bit_for_bit_in_training(self):
        quantizer = IBQ(dim=4, codebook_size=32)
        out = quantizer(torch.randn(2, 9, 4))
        assert torch.equal(out.codes, quantizer.lookup(out.ids))

    def test_entropy_is_for_training(self):
        quantizer = IBQ(dim=4, codebook_size=8).eval()
        assert set(quantizer(torch.randn(1, 3, 4)).parts) == {"quantization", "commitment", "codebook"}

    def test_losses_of_weight_zero_are_left_out(self):
        quantizer = IBQ(dim=4, codebook_size=8, quantization=0, commitment=0, codebook_weight=0, entropy=0)
        out = quantizer(torch.randn(1, 3, 4))
        assert not out.parts and out.loss == 0
        assert "batch_entropy" not in IBQ(dim=4, codebook_size=8, gamma=0)(torch.randn(1, 3, 4)).parts


class TestSoftVQ:
    @pytest.mark.parametrize("key", ["published", "single", "pair"])
    def test_agrees_with_its_authors(self, recorded: Recorded, key: str):
        expected, options = setting(recorded, "softvq", key)
        quantizer = SoftVQ(
            dim=options["e_dim"],
            codebook_size=options["n_e"],
            codebooks=options["num_codebooks"],
            l2_norm=options["l2_norm"],
            tau=options["tau"],
            entropy=options["entropy_loss_ratio"],
        )
        parts = agree(quantizer, expected).parts
        torch.testing.assert_close(parts["sample_entropy"] - parts["batch_entropy"], expected["entropy"], **CLOSE)

    def test_the_defaults_are_the_published_setting(self, recorded: Recorded):
        agree(SoftVQ(dim=8, codebook_size=32, codebooks=4), setting(recorded, "softvq", "published")[0])

    def test_a_cold_mixture_is_the_code_that_lookup_gives(self):
        quantizer = SoftVQ(dim=4, codebook_size=16, codebooks=3, tau=1e-5).eval()
        out = quantizer(torch.randn(2, 6, 4))
        torch.testing.assert_close(out.codes, quantizer.lookup(out.ids), rtol=0, atol=1e-5)

    def test_each_run_of_vectors_has_its_own_codebook(self):
        quantizer = SoftVQ(dim=2, codebook_size=2, codebooks=2).eval()
        quantizer.codebook.data = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[-1.0, 0.0], [0.0, -1.0]]])
        codes = quantizer.lookup(torch.tensor([[[0], [1], [0], [1]]]))
        assert codes[0].tolist() == [[1, 0], [0, 1], [-1, 0], [0, -1]]

    def test_an_image_does_not_depend_on_its_batch(self):
        quantizer = SoftVQ(dim=4, codebook_size=16, codebooks=3).eval()
        z = torch.randn(4, 6, 4)
        out, alone = quantizer(z), [quantizer(image[None]) for image in z]
        assert torch.equal(out.ids, torch.cat([one.ids for one in alone]))
        torch.testing.assert_close(out.codes, torch.cat([one.codes for one in alone]))

    def test_an_n_that_the_codebooks_do_not_divide_is_refused(self):
        quantizer = SoftVQ(dim=4, codebook_size=16, codebooks=3)
        for call in (lambda: quantizer(torch.randn(1, 7, 4)), lambda: quantizer.lookup(torch.zeros(1, 7, 1).long())):
            with pytest.raises(ValueError, match="evenly, got 7"):
                call()


@pytest.mark.parametrize("dim", [3, 8])
@pytest.mark.parametrize("kind", [IBQ, SoftVQ])
def test_the_shares_of_all_codes_are_never_held(kind: type[Quantizer], dim: int):
    """The fused attention kernel takes these shapes, both ways: torch's plain one, which holds n K, is barred."""
    quantizer, z = kind(dim=dim, codebook_size=16, entropy=0.0), torch.randn(2, 5, dim, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        quantizer(z).codes.square().sum().backward()
    assert (z.grad != 0).any()


def dense(z: Tensor, codes: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The transport plan itself, n k, in float64."""
    cost = torch.cdist(z.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    plan = (-epsilon * (cost - cost.min()) / cost.std()).exp()
    plan = plan / plan.sum()
    for _ in range(iterations):
        plan = plan / plan.sum(dim=0) / len(codes)
        plan = plan / plan.sum(dim=1, keepdim=True) / len(z)
    return plan


class TestOptVQ:
    @pytest.mark.parametrize("key", ["published", "plain", "skewed", "nearest"])
    @pytest.mark.parametrize("block", [2**22, 100])
    def test_agrees_with_its_authors(self, recorded: Recorded, monkeypatch: pytest.MonkeyPatch, key: str, block: int):
        monkeypatch.setattr("tokenizers_vis.quantizers.opt_vq.BLOCK", block)
        expected, options = setting(recorded, "optvq", key)
        quantizer = OptVQ(
            dim=options["e_dim"],
            codebook_size=options["n_e"],
            heads=options["num_head"],
            projection=options["use_proj"],
            codebook_weight=options["beta"],
            epsilon=options.get("epsilon", 10.0),
            iterations=options.get("n_iters", 5),
            eval_assignment="sinkhorn" if key == "plain" else "nearest",
        )
        # The nearest code is what eval gives by default; Sinkhorn is training, and, on request, eval.
        agree(quantizer.train(key in ("published", "skewed")), expected)

    def test_the_defaults_are_the_published_setting(self, recorded: Recorded):
        agree(OptVQ(dim=16, codebook_size=32, heads=4), setting(recorded, "optvq", "published")[0])

    def test_the_plan_is_that_of_the_formula(self):
        z, codes = torch.randn(200, 4), torch.randn(16, 4)
        ids = sinkhorn(z, codes, epsilon=2.0, iterations=4)
        assert torch.equal(ids, dense(z, codes, 2.0, 4).argmax(dim=1))

    def test_vectors_spread_over_the_codes_in_training_and_take_the_nearest_in_eval(self):
        quantizer = OptVQ(dim=4, codebook_size=16, projection=False)
        z = torch.randn(4, 64, 4) * 0.1 + quantizer.codebook[3].detach()
        assert len(quantizer(z).ids.unique()) == 16
        assert quantizer.eval()(z).ids.unique().tolist() == [3]

    def test_vectors_far_from_all_others_still_have_their_nearest_code(self):
        # Here every entry of the plan but a few underflows: as plain numbers, rows of zeros.
        codes = torch.randn(64, 64)
        z = torch.cat([codes[:32] + 1e-4, 300 * codes[32:]])
        ids = sinkhorn(z, codes, epsilon=1000.0, iterations=5)
        assert (ids == torch.arange(64)).all()

    def test_a_common_offset_changes_nothing(self):
        z, codes = torch.randn(64, 4), torch.randn(16, 4)
        z, codes = (x.mul(1024).round().div(1024) for x in (z, codes))  # numbers that the offset does not round
        ids = sinkhorn(z, codes, epsilon=10.0, iterations=5)
        assert torch.equal(sinkhorn(z + 4096, codes + 4096, epsilon=10.0, iterations=5), ids)

    def test_ranks_share_one_plan(self, tmp_path):
        """Two ranks with parts of a batch give the ids of the whole batch."""
        z, codes = torch.randn(30, 4), torch.randn(16, 4)
        torch.save((z, codes), tmp_path / "in.pt")
        program = """
import sys, torch
from torch import distributed
from tokenizers_vis.quantizers.opt_vq import sinkhorn
folder, rank = sys.argv[1], int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
z, codes = torch.load(f"{folder}/in.pt")
part = z[:11] if rank == 0 else z[11:]
torch.save(sinkhorn(part, codes, epsilon=10.0, iterations=5, all_ranks=True), f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""
        runs = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(rank)]) for rank in range(2)]
        assert [run.wait(timeout=120) for run in runs] == [0, 0]
        ids = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)])
        assert torch.equal(ids, sinkhorn(z, codes, epsilon=10.0, iterations=5))
        assert not torch.equal(ids[:11], sinkhorn(z[:11], codes, epsilon=10.0, iterations=5))

    def test_one_vector_alone_is_an_assignment_too(self):
        assert OptVQ(dim=4, codebook_size=8)(torch.randn(1, 1, 4)).loss.isfinite()


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (IBQ, {"codebook_size": 1}, "codebook_size is 2 or more, got 1"),
        (IBQ, {"entropy": -1.0}, "entropy is a weight, 0 or more, got -1.0"),
        (IBQ, {"entropy_temperature": 0.0}, "entropy_temperature is above 0, got 0.0"),
        (OptVQ, {"heads": 3}, r"dim is a multiple of heads \(3\), got 4"),
        (OptVQ, {"epsilon": 0.0}, "epsilon is above 0"),
        (OptVQ, {"iterations": 0}, "iterations is 1 or more"),
        (OptVQ, {"eval_assignment": "argmin"}, "'nearest' or 'sinkhorn', got 'argmin'"),
        (SoftVQ, {"tau": 0.0}, "tau is above 0"),
        (SoftVQ, {"codebooks": 0}, "codebooks is 1 or more"),
    ],
)
def test_wrong_options_are_refused(kind: type[Quantizer], options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        kind(**({"dim": 4, "codebook_size": 8} | options))
