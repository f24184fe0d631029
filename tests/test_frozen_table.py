"""SimVQ and VQGAN-LC: codes that are a learned linear map of a frozen table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenizers_vis.config import ConfigError, build
from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.quantizers.frozen_table import VQGANLC, FrozenTable, SimVQ

Recorded = Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def agree(quantizer: FrozenTable, recorded: Recorded, name: str, key: str) -> dict:
    """Ids, codes, loss and every gradient are those that the original gave; returns the options it was built with."""
    tensors, metadata = recorded(name)
    expected = {at.removeprefix(f"{key}."): tensor for at, tensor in tensors.items() if at.startswith(f"{key}.")}
    quantizer.load_state_dict({at: expected[at] for at in ("frozen", "projection.weight", "projection.bias")})
    z = expected["z"].requires_grad_()
    out = quantizer(z)
    assert torch.equal(out.ids, expected["ids"])
    torch.testing.assert_close(out.codes, expected["codes"], **CLOSE)
    torch.testing.assert_close(out.loss, expected["loss"], **CLOSE)
    ((out.codes * expected["w"]).sum() + out.loss).backward()
    torch.testing.assert_close(z.grad, expected["grad_z"], **CLOSE)
    for at, parameter in quantizer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[f"grad_{at}"], **CLOSE)
    return json.loads(metadata["options"])[key]


class TestSimVQ:
    def test_the_defaults_are_the_published_setting(self, recorded: Recorded):
        assert agree(SimVQ(dim=8, codebook_size=32), recorded, "simvq", "published")["legacy"] is False

    def test_legacy_is_the_weights_the_other_way_round(self, recorded: Recorded):
        quantizer = SimVQ(dim=8, codebook_size=32, commitment=1.0, codebook_weight=0.25)
        assert agree(quantizer, recorded, "simvq", "legacy")["legacy"] is True

    @pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
    def test_without_bias_it_is_that_of_vector_quantize_pytorch(self, gradient: str):
        library = pytest.importorskip("vector_quantize_pytorch")
        theirs = library.SimVQ(dim=6, codebook_size=24, rotation_trick=gradient == "rotation")
        ours = SimVQ(dim=6, codebook_size=24, bias=False, gradient=gradient)
        ours.frozen.copy_(theirs.frozen_codebook)
        ours.projection.load_state_dict(theirs.code_transform.state_dict())
        z, w, results = torch.randn(2, 20, 6), torch.randn(2, 20, 6), []
        for quantizer, weight in ((theirs, theirs.code_transform.weight), (ours, ours.projection.weight)):
            x = z.clone().requires_grad_()
            out = quantizer(x)
            codes, ids, loss = out[:3]
            grads = torch.autograd.grad((codes * w).sum() + loss, (x, weight))
            results.append((codes, ids.view(2, 20), loss, *grads))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)

    def test_codes_are_the_mapped_table_and_only_the_map_learns(self):
        quantizer = SimVQ(dim=3, codebook_size=8)
        ids = torch.arange(8).view(1, 8, 1)
        expected = quantizer.frozen @ quantizer.projection.weight.T + quantizer.projection.bias
        torch.testing.assert_close(quantizer.lookup(ids)[0], expected)
        assert {name for name, _ in quantizer.named_parameters()} == {"projection.weight", "projection.bias"}
        assert "frozen" in quantizer.state_dict()

    def test_losses_of_weight_zero_are_left_out(self):
        out = SimVQ(dim=3, codebook_size=8, commitment=0.0, codebook_weight=0.0)(torch.randn(1, 4, 3))
        assert not out.parts and out.loss == 0

    @pytest.mark.parametrize(
        "wrong", [{"dim": 0}, {"codebook_size": 1}, {"gradient": "none"}, {"commitment": -1}, {"codebook_weight": -1}]
    )
    def test_options_out_of_range_are_refused(self, wrong: dict[str, object]):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build(Quantizer, {"kind": "sim_vq", "dim": 3, "codebook_size": 8} | wrong)


class TestVQGANLC:
    def test_the_defaults_are_the_published_setting(self, recorded: Recorded):
        agree(VQGANLC(dim=8, codebook_size=32, table_dim=12), recorded, "vqgan_lc", "published")

    @pytest.mark.parametrize("name", ["table.npy", "table.safetensors", "table.pth", "one.pt"])
    def test_a_table_is_read_from_a_file(self, tmp_path: Path, name: str):
        table, path = torch.randn(16, 6), tmp_path / name
        if path.suffix == ".npy":
            np.save(path, table.numpy())
        elif path.suffix == ".safetensors":
            save_file({"centres": table}, path)
        else:
            torch.save({"centres": table} if name == "one.pt" else table, path)
        options = {"kind": "vqgan_lc", "dim": 3, "codebook_size": 16, "table_dim": 6}
        quantizer = build(Quantizer, options | {"table": str(path)})
        assert torch.equal(quantizer.frozen, table)
        path.unlink()
        other = build(Quantizer, options)
        other.load_state_dict(quantizer.state_dict())
        assert torch.equal(other.table(), quantizer.table())

    def test_a_table_that_does_not_fit_is_refused(self, tmp_path: Path):
        options = {"kind": "vqgan_lc", "dim": 3, "codebook_size": 16, "table_dim": 6}
        np.save(tmp_path / "wide.npy", np.zeros((16, 7), np.float32))
        np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
        np.save(tmp_path / "nan.npy", np.full((16, 6), np.nan, np.float32))
        torch.save({"a": torch.zeros(16, 6), "b": torch.zeros(16, 6)}, tmp_path / "two.pt")
        torch.save(Path, tmp_path / "code.pth")
        (tmp_path / "broken.safetensors").write_bytes(b"table")
        (tmp_path / "table.csv").write_text("0")
        for name, message in (
            ("wide.npy", r"\(16, 7\), not 16 by 6"),
            ("objects.npy", "cannot be read"),
            ("nan.npy", "not finite"),
            ("two.pt", "not one tensor"),
            ("code.pth", "cannot be read"),
            ("broken.safetensors", "cannot be read"),
            ("table.csv", "ends in .npy"),
            ("missing.npy", "there is no table"),
        ):
            with pytest.raises(ConfigError, match=message):
                build(Quantizer, options | {"table": str(tmp_path / name)})

    @pytest.mark.parametrize("wrong", [{"dim": 0}, {"codebook_size": 1}, {"table_dim": 0}])
    def test_options_out_of_range_are_refused(self, wrong: dict[str, object]):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build(Quantizer, {"kind": "vqgan_lc", "dim": 3, "codebook_size": 8, "table_dim": 4} | wrong)
