"""softmax_entropy: the entropies and gradients of dense float64, and the numbers of the code it stands for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_vis.cuda import entropy
from tokenizers_vis.cuda.entropy import SoftmaxEntropy, softmax_entropy

PARTS = ("loss", "grad_z", "grad_codebook")


def dense(z: Tensor, codebook: Tensor, temperature: float, metric: str, eps: float) -> SoftmaxEntropy:
    """By definition, with the matrix."""
    logits = z @ codebook.T if metric == "dot" else -(z[:, None] - codebook).square().sum(dim=-1)
    log_p = F.log_softmax(logits / temperature, dim=1)
    p = log_p.exp()
    mean = p.mean(dim=0)
    # A code of probability 0 has no gradient; xlogy would give it 0 * infinity.
    batch = -(mean * (mean + eps).clamp_min(1e-300).log()).sum()
    return SoftmaxEntropy(-(p * log_p).sum(dim=1).mean(), batch)


def with_gradients(function, z: Tensor, codebook: Tensor, *options) -> list[Tensor]:
    """sample, batch, and the gradients of an uneven sum of both."""
    z, codebook = z.detach().clone().requires_grad_(), codebook.detach().clone().requires_grad_()
    result = function(z, codebook, *options)
    (0.7 * result.sample - 1.3 * result.batch).sum().backward()
    return [result.sample.detach(), result.batch.detach(), z.grad, codebook.grad]


def assert_near(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Within the tolerance of each tensor's largest number."""
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * max(1e-2, theirs.abs().max().item())


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("metric", ["euclidean", "dot"])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 3), (1, 7, 1), (33, 17, 5), (70, 129, 8), (9, 2, 64)])
def test_dense_float64_gives_the_same(n: int, k: int, d: int, metric: str, eps: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(entropy, "MAX_SCORES", 7 * k)  # several chunks, the last one not full
    z, codebook = torch.randn(n, d), torch.randn(k, d)
    for temperature, tolerance in ((1.0, 1e-5), (0.01, 1e-4)):
        expected = with_gradients(dense, z.double(), codebook.double(), temperature, metric, eps)
        assert_near(with_gradients(softmax_entropy, z, codebook, temperature, metric, eps), expected, tolerance)
        exact = with_gradients(softmax_entropy, z.double(), codebook.double(), temperature, metric, eps)
        assert exact[2].dtype == torch.float64
        assert_near(exact, expected, 1e-9)


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
def test_gradients_are_finite_differences(metric: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(entropy, "MAX_SCORES", 12)
    z = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    for eps in (0.0, 1e-3):

        def entropies(z: Tensor, codebook: Tensor, eps: float = eps) -> tuple[Tensor, ...]:
            return tuple(softmax_entropy(z, codebook, 0.5, metric, eps))

        assert torch.autograd.gradcheck(entropies, (z, codebook))


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
@pytest.mark.parametrize("size", [3.0, 30.0])
def test_logits_of_thousands_neither_overflow_nor_turn_negative(metric: str, size: float):
    z, codebook = size * torch.randn(65, 16), size * torch.randn(50, 16)
    sample, batch, *gradients = with_gradients(softmax_entropy, z, codebook, 0.01, metric, 0.0)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert 0 <= sample < 0.1 and 0 < batch <= torch.tensor(50.0).log()


def test_codes_far_from_zero_are_told_apart():
    """-|z - c|^2 written as 2 z.c - |c|^2 would lose all digits here."""
    z, codebook = 1000 + 0.1 * torch.randn(40, 8), 1000 + 0.1 * torch.randn(30, 8)
    expected = with_gradients(dense, z.double(), codebook.double(), 0.01, "euclidean", 0.0)
    assert_near(with_gradients(softmax_entropy, z, codebook, 0.01, "euclidean", 0.0), expected, 1e-4)


def test_known_values():
    z = torch.zeros(5, 2)
    same = torch.ones(4, 2)
    sample, batch = softmax_entropy(z, same)
    assert sample.item() == batch.item() == pytest.approx(torch.tensor(4.0).log().item())
    corners = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    sample, batch = softmax_entropy(corners, corners)  # sure rows, all codes alike
    assert sample.item() == 0 and batch.item() == pytest.approx(torch.tensor(4.0).log().item())


def test_groups_are_computed_one_by_one():
    z, codebook = torch.randn(3, 11, 4), torch.randn(3, 6, 4)
    got = with_gradients(softmax_entropy, z, codebook, 0.1)
    alone = [with_gradients(softmax_entropy, *pair, 0.1) for pair in zip(z, codebook, strict=True)]
    assert got[0].shape == got[1].shape == (3,)
    for together, apart in zip(got, zip(*alone, strict=True), strict=True):
        assert torch.equal(together, torch.stack(apart))


def test_autocast_and_half_precision_are_computed_in_float32():
    z, codebook = torch.randn(21, 8), torch.randn(13, 8)
    expected = with_gradients(softmax_entropy, z, codebook, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for ours, plain in zip(with_gradients(softmax_entropy, z, codebook, 0.05), expected, strict=True):
            assert torch.equal(ours, plain)
    half = with_gradients(softmax_entropy, z.bfloat16(), codebook.bfloat16(), 0.05)
    assert [part.dtype for part in half] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert torch.equal(half[0], softmax_entropy(z.bfloat16().float(), codebook.bfloat16().float(), 0.05).sample)


def test_inputs_stay_and_one_gradient_is_enough():
    z, codebook = torch.randn(9, 4), torch.randn(5, 4, requires_grad=True)
    copies = z.clone(), codebook.detach().clone()
    sample, _ = softmax_entropy(z, codebook)
    sample.backward()
    assert torch.equal(z, copies[0]) and torch.equal(codebook, copies[1]) and z.grad is None
    # The gradient of one of the two alone.
    other = codebook.detach().clone().requires_grad_()
    dense(z, other, 0.01, "euclidean", 0.0).sample.backward()
    assert torch.allclose(codebook.grad, other.grad, atol=1e-4 * other.grad.abs().max().item())


def test_no_matrix_of_rows_and_codes_is_kept():
    z, codebook = torch.randn(4096, 2, requires_grad=True), torch.randn(1024, 2, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        softmax_entropy(z, codebook)
    assert sum(saved) <= 2 * (z.numel() + codebook.numel())


@pytest.mark.parametrize(("original", "metric"), [("llamagen", "euclidean"), ("fqgan", "euclidean"), ("ibq", "dot")])
def test_the_originals_give_the_same(original: str, metric: str, recorded: Callable):
    """Their entropy loss is sample - batch with 1e-5 in the batch's logarithm. The 1e-5 they add to every logit of the
    sample's log-softmax changes nothing.
    """
    tensors, _ = recorded("softmax_entropy")
    z, codebook = tensors["z"].requires_grad_(), tensors["codebook"].requires_grad_()
    sample, batch = softmax_entropy(z, codebook, 0.01, metric, 1e-5)
    (sample - batch).backward()
    assert_near([sample - batch, z.grad, codebook.grad], [tensors[f"{original}.{x}"] for x in PARTS], 2e-5)
    if original == "ibq":
        assert_near([sample, batch], [tensors["ibq.sample"], tensors["ibq.batch"]], 2e-5)


@pytest.mark.parametrize(
    ("z", "codebook", "options", "message"),
    [
        ((4, 2), (3, 3), {}, "the same d"),
        ((4,), (3, 4), {}, "n d"),
        ((2, 4, 3), (4, 3), {}, "g n d"),
        ((2, 4, 3), (3, 4, 3), {}, "g n d"),
        ((0, 2), (3, 2), {}, "1 or more"),
        ((4, 2), (0, 2), {}, "1 or more"),
        ((4, 2), (3, 2), {"temperature": 0.0}, "temperature is above 0"),
        ((4, 2), (3, 2), {"temperature": float("nan")}, "temperature is above 0"),
        ((4, 2), (3, 2), {"eps": -1e-5}, "eps is 0 or more"),
        ((4, 2), (3, 2), {"metric": "cosine"}, "'euclidean' or 'dot'"),
    ],
)
def test_wrong_input_is_refused(z: tuple, codebook: tuple, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        softmax_entropy(torch.zeros(z), torch.zeros(codebook), **options)
    with pytest.raises(ValueError, match="float dtype"):
        softmax_entropy(torch.zeros(4, 2, dtype=torch.int64), torch.zeros(3, 2))
