"""Latent perturbation around other quantizers."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.quantizers.perturb import Perturb
from tokenizers_vis.quantizers.vq import VQ

Recorded = Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]
INNER = {
    "vq": {"kind": "vq", "dim": 4, "codebook_size": 32},
    "cosine": {"kind": "vq", "dim": 4, "codebook_size": 32, "distance": "cosine"},
    "sim_vq": {"kind": "sim_vq", "dim": 4, "codebook_size": 32},
    "vqgan_lc": {"kind": "vqgan_lc", "dim": 4, "codebook_size": 32, "table_dim": 6},
}


def perturb(inner: str = "vq", **options: object) -> Perturb:
    return build(Quantizer, {"kind": "perturb", "quantizer": INNER[inner], "neighbours": 5} | options)


def changed(quantizer: Perturb, z: Tensor) -> Tensor:
    """Where the codes are not those of the inner quantizer: b n."""
    return (quantizer(z).codes != quantizer.quantizer(z).codes).any(dim=-1)


@pytest.mark.parametrize("key", ["cosine", "euclidean", "half"])
def test_agrees_with_its_authors(recorded: Recorded, key: str):
    """The same draws give the same codes, where both draw for all images."""
    tensors, metadata = recorded("robusttok_perturb")
    options = json.loads(metadata["options"])[key]
    expected = {at.removeprefix(f"{key}."): tensor for at, tensor in tensors.items() if at.startswith(f"{key}.")}
    inner = VQ(dim=8, codebook_size=32, distance="cosine" if options["codebook_norm"] else "euclidean")
    inner.codebook.data.copy_(expected["codebook"])
    quantizer = Perturb(
        quantizer=inner, rate=options["alpha"], share=options["beta"], neighbours=options["delta"]
    ).train()
    z = expected["z"].requires_grad_()
    torch.manual_seed(options["seed"])
    out = quantizer(z)
    assert torch.equal(out.ids, expected["ids"])
    if key == "half":  # the first image is perturbed, among as many neighbours; the second is not
        torch.testing.assert_close(out.codes[1], expected["codes"][1])
        near = torch.cdist(z.detach().div(z.detach().norm(dim=-1, keepdim=True)), inner.table().detach())
        for codes in (out.codes[0], expected["codes"][0]):
            ids = torch.cdist(codes.detach(), inner.table().detach()).argmin(dim=-1)
            assert (ids[:, None] == near[0].argsort(dim=-1)[:, :4]).any(dim=-1).all()
    else:
        torch.testing.assert_close(out.codes, expected["codes"], rtol=2e-5, atol=2e-5)
    (out.codes * expected["w"]).sum().backward()
    torch.testing.assert_close(z.grad, expected["grad_z"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("inner", INNER)
class TestEachInner:
    def test_eval_is_the_inner_quantizer(self, inner: str):
        quantizer = perturb(inner, share=1.0).eval()
        z = torch.randn(4, 9, 4)
        for a, b in zip(quantizer(z)[:3], quantizer.quantizer(z)[:3], strict=True):
            assert torch.equal(a, b)

    def test_codes_are_swapped_for_near_ones_and_nothing_else_changes(self, inner: str):
        quantizer = perturb(inner, share=1.0, neighbours=3)
        z = torch.randn(8, 50, 4)
        out, plain = quantizer(z), quantizer.quantizer(z)
        assert torch.equal(out.ids, plain.ids) and torch.equal(out.loss, plain.loss) and out.parts == plain.parts
        table = quantizer.quantizer.table().detach()
        rows = torch.nn.functional.normalize(z, dim=-1) if inner == "cosine" else z
        near = torch.cdist(rows, table).argsort(dim=-1)[..., :3]
        place = (out.codes[..., None, :] == table[near]).all(dim=-1)  # bit for bit a code
        assert (place.sum(dim=-1) == 1).all()
        torch.testing.assert_close(place.float().mean(dim=(0, 1)), torch.full((3,), 1 / 3), rtol=0, atol=0.1)

    def test_the_gradient_is_that_of_the_inner_quantizer(self, inner: str):
        quantizer = perturb(inner, share=1.0)
        z, w = torch.randn(4, 9, 4, requires_grad=True), torch.randn(4, 9, 4)
        grads = [torch.autograd.grad((part(z).codes * w).sum(), z)[0] for part in (quantizer, quantizer.quantizer)]
        torch.testing.assert_close(*grads)


class TestAmounts:
    def test_no_rate_no_share_or_one_neighbour_is_the_identity(self):
        z = torch.randn(4, 9, 4)
        for options in ({"rate": 0.0, "share": 1.0}, {"share": 0.0}, {"share": 1.0, "neighbours": 1}):
            assert not changed(perturb(**options), z).any()

    def test_share_is_of_the_images(self):
        quantizer = perturb(share=0.3, neighbours=32)
        touched = changed(quantizer, torch.randn(10, 50, 4)).any(dim=1)
        assert touched.tolist() == [True] * 3 + [False] * 7

    def test_small_batches_have_their_share_in_the_long_run(self):
        quantizer, z = perturb(share=0.4, neighbours=32), torch.randn(4, 20, 4)
        counts = [int(changed(quantizer, z).any(dim=1).sum()) for _ in range(200)]
        assert set(counts) == {1, 2}
        assert abs(sum(counts) / 200 - 1.6) < 0.1

    def test_rate_is_of_the_vectors_and_may_be_changed(self):
        quantizer, z = perturb(share=1.0, neighbours=32), torch.randn(10, 100, 4)
        for rate in (1.0, 0.25):
            quantizer.rate = rate
            assert abs(changed(quantizer, z).float().mean() - rate * 31 / 32) < 0.05

    def test_only_perturbed_images_are_searched(self, monkeypatch: pytest.MonkeyPatch):
        from tokenizers_vis.quantizers import perturb as module

        rows, search = [], module.nearest_codes
        monkeypatch.setattr(
            module, "nearest_codes", lambda z, *args, **kw: rows.append(len(z)) or search(z, *args, **kw)
        )
        perturb(share=0.2)(torch.randn(10, 7, 4))
        assert rows == [14]

    @pytest.mark.parametrize(
        "wrong", [{"rate": 1.5}, {"rate": -0.1}, {"share": 2.0}, {"neighbours": 0}, {"neighbours": 33}]
    )
    def test_options_out_of_range_are_refused(self, wrong: dict[str, object]):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            perturb(**wrong)

    def test_a_quantizer_without_a_table_is_refused(self):
        with pytest.raises(ConfigError, match="FSQ has none"):
            build(Quantizer, {"kind": "perturb", "quantizer": {"kind": "fsq", "levels": [5, 5]}})
