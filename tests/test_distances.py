"""Set distances against torch-fidelity and pytorch-fid, closed forms, and what batches, order and small n do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenizers_vis.eval.distances import (
    bootstrap,
    fd_infinity,
    frechet,
    frechet_distance,
    inception_score,
    kernel_distance,
    prdc,
    small_sample,
)
from tokenizers_vis.eval.features import FeatureNet
from tokenizers_vis.eval.moments import Moments, Statistics
from tokenizers_vis.eval.protocol import Stamp, StampError
from tokenizers_vis.eval.set_distance import SetDistance, SmallSampleWarning

STAMP = Stamp("abc", 100, size="256", crop="center", features="mobilenetv2", feature_hash="123")


class Means(FeatureNet):
    """Features that can be told by eye: the mean of each channel of each half of the picture."""

    name, sha256, resize, dim = "means", "0" * 64, "none", 6

    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def fit(self, x: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, (1, 2))

    def embed(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """Features 90 6 of pictures, and of what is left of them."""
    x = torch.rand(90, 6) @ torch.rand(6, 6)
    return x, x + 0.1 * torch.randn(90, 6)


# Against the references


def test_the_numbers_are_those_of_the_references(recorded: Callable) -> None:
    tensors, _ = recorded("fid")
    x, y = tensors["x"], tensors["y"]
    fid = tensors["fid"].item()
    assert tensors["pytorch_fid"].item() == pytest.approx(fid, rel=1e-9)
    assert frechet_distance(x, y) == pytest.approx(fid, rel=1e-9)
    moments = []
    for part in (x, y):
        statistics = Statistics(part.shape[1])
        for batch in part.split(37):
            statistics.update(batch)
        moments += [statistics.moments().mu, statistics.moments().sigma]
        np.testing.assert_allclose(moments[-1], np.cov(part.double().numpy(), rowvar=False), rtol=1e-10, atol=1e-12)
    assert frechet(*moments) == pytest.approx(fid, rel=1e-9)
    m = len(y)
    assert kernel_distance(x[:m], y) == pytest.approx(tensors["kid"].item(), rel=1e-9)
    assert kernel_distance(x[:m], y, paired=True) == pytest.approx(tensors["kid_u_statistic"].item(), rel=1e-9)
    found = prdc(x, y)
    assert found.precision == pytest.approx(tensors["precision"].item(), abs=1e-6)
    assert found.recall == pytest.approx(tensors["recall"].item(), abs=1e-6)
    assert inception_score(tensors["logits"]) == pytest.approx(tuple(tensors["inception_score"].tolist()), rel=1e-6)


def test_torch_fidelity_side_by_side_also_with_fewer_pictures_than_dimensions() -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    for n, d in ((70, 20), (20, 50)):
        x, y = torch.rand(n, d).double(), torch.rand(n, d).double() ** 2
        first, second = (fid.fid_features_to_statistics(part) for part in (x, y))
        expected = fid.fid_statistics_to_metric(first, second, False)["frechet_inception_distance"]
        # Their own noise where the product of covariances is singular: roots of eigenvalues around 1e-16.
        assert frechet_distance(x, y) == pytest.approx(expected, abs=1e-6)
        assert frechet(first["mu"], first["sigma"], second["mu"], second["sigma"]) == pytest.approx(expected, abs=1e-6)
        kernel = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_coef0": 1.0}
        options = {**kernel, "kid_kernel_poly_gamma": None, "kid_subsets": 1, "kid_subset_size": n, "rng_seed": 0}
        theirs = kid.kid_features_to_metric(x, y, verbose=False, **options)["kernel_inception_distance_mean"]
        assert kernel_distance(x, y) == pytest.approx(theirs, rel=1e-6)


def test_density_and_coverage_by_their_definition() -> None:
    real, fake = torch.randn(30, 4).double(), torch.randn(25, 4).double() + 0.5
    among, across = torch.cdist(real, real), torch.cdist(real, fake)
    radius = among.sort(dim=1).values[:, 5]
    inside = across <= radius[:, None]
    found = prdc(real, fake, density_k=5)
    assert found.density == pytest.approx(inside.sum().item() / (5 * 25))
    assert found.coverage == pytest.approx(inside.any(dim=1).double().mean().item())


# Closed forms


@given(st.floats(0.1, 5), st.floats(0.1, 5), st.floats(-3, 3))
def test_frechet_of_two_normals_in_closed_form(a: float, b: float, shift: float) -> None:
    d = 3
    found = frechet(np.zeros(d), a**2 * np.eye(d), np.full(d, shift), b**2 * np.eye(d))
    assert found == pytest.approx(d * (shift**2 + (a - b) ** 2), rel=1e-9, abs=1e-9)


def test_equal_sets_have_no_distance(pair: tuple[Tensor, Tensor]) -> None:
    x, _ = pair
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert kernel_distance(x, x, paired=True) == pytest.approx(0, abs=1e-12)
    found = prdc(x, x)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert fd_infinity(x, x).value == pytest.approx(0, abs=1e-9)


def test_pairs_are_left_out_of_the_cross_term_because_they_bias_it() -> None:
    """Opposite vectors are a set of the same distribution, so the true distance is 0; but each pair is unlike."""
    draw = torch.Generator().manual_seed(0)
    sets = [torch.randn(20, 4, generator=draw) for _ in range(1000)]
    apart, counted = ([kernel_distance(x, -x, paired=paired) for x in sets] for paired in (True, False))
    error = np.std(apart) / len(sets) ** 0.5
    assert abs(np.mean(apart)) < 4 * error
    assert np.mean(counted) > 4 * error
    # How far it is off: 2 / n of what the kernel of a pair lacks, E k(x, x') - E k(x, -x), with x.x' / d + 1 cubed.
    within = np.mean([((x.square().sum(dim=1) / -4 + 1) ** 3).mean().item() for x in sets])
    assert np.mean(counted) == pytest.approx(2 / 20 * (1 + 3 / 4 - within), abs=4 * error)


def test_a_weight_is_a_repetition(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    weights = torch.randint(0, 3, (90,))
    expected = frechet_distance(x.repeat_interleave(weights, dim=0), y.repeat_interleave(weights, dim=0))
    assert frechet_distance(x, y, weights) == pytest.approx(expected, rel=1e-9)


def test_inception_score_of_sure_and_of_clueless_guesses() -> None:
    sure = 1e4 * torch.eye(7).repeat(10, 1)
    mean, deviation = inception_score(sure, splits=10, seed=None)
    assert mean == pytest.approx(7) and deviation == pytest.approx(0, abs=1e-9)
    assert inception_score(torch.ones(40, 7))[0] == pytest.approx(1)


# Small n


def test_fd_infinity_takes_the_bias_of_small_n_away() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(400, 12, generator=draw) for _ in range(2))
    line = fd_infinity(x, y, paired=False)
    assert len(line.sizes) >= 10 and line.r2 > 0.9 and line.slope > 0
    assert abs(line.value) < 0.3 * frechet_distance(x, y)
    with pytest.raises(ValueError, match="at least 50 pictures are needed here, got 49"):
        fd_infinity(x[:49], y)


def test_the_bootstrap_covers_a_mean_and_shrinks_with_n() -> None:
    draw = np.random.default_rng(0)

    def interval(n: int, **options: int) -> tuple[float, float]:
        values = draw.standard_normal(n)
        return tuple(bootstrap(lambda w: float(w @ values / w.sum()), n, samples=400, **options))

    hits = [low < 0 < high for low, high in (interval(100) for _ in range(60))]
    assert 0.85 <= np.mean(hits) <= 1
    low, high = interval(2500)
    assert high - low == pytest.approx(2 * 1.96 / 50, rel=0.2)
    low, high = interval(2500, draws=100)  # fewer draws are scaled to the same width
    assert high - low == pytest.approx(2 * 1.96 / 50, rel=0.2)
    with pytest.raises(ValueError, match="2 pictures"):
        bootstrap(lambda w: 0.0, 1)


def test_few_pictures_are_warned_of(pair: tuple[Tensor, Tensor]) -> None:
    assert small_sample(60, 6) == ""
    assert "n/d = 0.5" in small_sample(50, 100) and "rank 49 at most, of 100" in small_sample(50, 100)
    assert "rank" not in small_sample(150, 100)
    few = SetDistance(Means())
    few.update(*(part[:20] for part in pair))
    with pytest.warns(SmallSampleWarning, match="n/d = 3.3"):
        few.compute(samples=0)


# SetDistance


def test_a_set_distance_gives_all_numbers_under_the_name_of_their_net(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    distance = SetDistance(Means())
    distance.update(x, y)
    found = distance.compute(samples=30)
    kinds = ["fd", "kd", "fd_infinity", "precision", "recall", "density", "coverage"]
    assert list(found) == [f"{kind}_means" for kind in kinds]
    assert found["fd_means"].value == pytest.approx(frechet_distance(x, y), rel=1e-9)
    assert found["kd_means"].value == pytest.approx(kernel_distance(x, y, paired=True), rel=1e-9)
    for name in ("fd_means", "kd_means"):
        assert found[name].low < found[name].value < found[name].high
    assert all(number.n == 90 for number in found.values())
    fewer = SetDistance(Means())
    fewer.update(x[:5].repeat(1, 1), y[:5])
    with pytest.warns(SmallSampleWarning):
        assert list(fewer.compute(samples=0)) == ["fd_means", "kd_means"]


def test_batches_order_and_parts_do_not_matter(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    names = [f"{i}.png" for i in range(90)]
    order = torch.randperm(90)

    def gathered(*parts: Tensor) -> dict:
        whole = SetDistance(Means(), keep=60)
        for part in parts:
            other = SetDistance(Means(), keep=60)
            for batch in part.split(13):
                other.update(x[batch], y[batch], [names[i] for i in batch])
            whole.merge(other.state())
        assert whole.n == 90 and len(whole.state()["keys"]) == 60
        return whole.compute(samples=10)

    once, apart = gathered(torch.arange(90)), gathered(order[:50], order[50:])
    for name, number in once.items():
        assert apart[name].value == pytest.approx(number.value, rel=1e-6), name
    assert apart["fd_means"].low == pytest.approx(once["fd_means"].low, rel=1e-6)
    # All pictures are in FD, though the features of only 60 are kept.
    assert once["fd_means"].value == pytest.approx(frechet_distance(x, y), rel=1e-6)
    assert (once["fd_means"].n, once["kd_means"].n) == (90, 60)
    assert "60 pictures out of 90" in once["kd_means"].note


def test_wrong_features_are_refused_and_count_nothing(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    distance = SetDistance(Means())
    for bad, message in (
        ((x[:, :5], y), "features are n 6"),
        ((x[:5], y), "got 5 originals, 90 reconstructions"),
        ((x, y.where(torch.arange(90)[:, None] != 3, torch.nan)), "1 of 90 feature vectors are not finite"),
        ((x, y, ["a.png"]), "1 names"),
    ):
        with pytest.raises(ValueError, match=message):
            distance.update(*bad)
    assert distance.n == 0
    with pytest.raises(ValueError, match="2 pictures or more, got 0"):
        distance.compute()


def test_damage_ranks_in_order_along_every_ladder(shared: Path, photos: list[Path]) -> None:
    """Blur, JPEG and resize, each from worse to better: FD and KD of the shared net fall at every step."""
    from PIL import Image, ImageFilter

    from tokenizers_vis.eval.codecs import through_codec
    from tokenizers_vis.eval.features import feature_net
    from tokenizers_vis.eval.squares import fit_square, unfit_square

    file = shared / "weights" / "mobilenetv2_100_same_imagenet1001.fp16.safetensors"
    if not file.is_file():
        pytest.skip(f"needs {file}")
    net = feature_net("mobilenetv2", file)
    pictures = [
        np.array(Image.open(path).convert("RGB").crop((i, 0, i + 160, 160))) for path in photos for i in (0, 90)
    ]
    ladders: dict[str, list[Callable[[np.ndarray], np.ndarray]]] = {
        "blur": [lambda p, r=r: np.array(Image.fromarray(p).filter(ImageFilter.GaussianBlur(r))) for r in (8, 4, 2, 1)],
        "jpeg": [lambda p, q=q: through_codec(p, "jpeg", q).pixels for q in (2, 8, 25, 80)],
        "resize": [lambda p, s=s: np.array(unfit_square(*fit_square(p, s))) for s in (16, 32, 64, 128)],
    }

    def features(some: list[np.ndarray]) -> Tensor:
        return net([torch.from_numpy(picture).permute(2, 0, 1) for picture in some])

    originals = features(pictures)
    for name, steps in ladders.items():
        damaged = [features([step(picture) for picture in pictures]) for step in steps]
        for distance in (frechet_distance, lambda x, y: kernel_distance(x, y, paired=True)):
            values = [distance(originals, step) for step in damaged]
            assert values == sorted(values, reverse=True) and values[-1] > 0, (name, values)


# Statistics as files


def test_statistics_come_back_from_their_file(tmp_path: Path, pair: tuple[Tensor, Tensor]) -> None:
    statistics = Statistics(6)
    statistics.update(pair[0])
    moments = statistics.moments(STAMP)
    moments.save(tmp_path / "kept.npz")
    again = Moments.load(tmp_path / "kept.npz", STAMP)
    assert np.array_equal(again.mu, moments.mu) and np.array_equal(again.sigma, moments.sigma)
    assert (again.n, again.stamp) == (90, STAMP)
    with pytest.raises(StampError, match="was measured in another way: n: 200 against 100"):
        Moments.load(
            tmp_path / "kept.npz", Stamp("abc", 200, "256", "center", features="mobilenetv2", feature_hash="123")
        )
    with pytest.raises(ValueError, match="kept as .npz"):
        moments.save(tmp_path / "kept.npy")


def test_reference_statistics_of_other_programs_are_read(tmp_path: Path) -> None:
    adm = {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "mu": np.ones(3, np.float32), "sigma": np.eye(3)}
    np.savez(tmp_path / "VIRTUAL.npz", **adm, mu_s=np.ones(5), sigma_s=np.eye(5))
    found = Moments.load(tmp_path / "VIRTUAL.npz", STAMP)
    assert (found.n, found.stamp, found.mu.dtype) == (None, None, np.float64)
    assert frechet(found.mu, found.sigma, np.zeros(3), np.eye(3)) == pytest.approx(3)


def test_files_that_are_no_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no statistics"):
        Moments.load(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("no statistics")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(2))
    np.savez(tmp_path / "code.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    for name, message in (
        ("text", "cannot be read"),
        ("other", r"got \(3,\) and \(2, 2\)"),
        ("code", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            Moments.load(tmp_path / f"{name}.npz")


def test_moments_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="2 pictures or more, got 1"):
        one = Statistics(3)
        one.update(torch.rand(1, 3))
        one.moments()
    with pytest.raises(ValueError, match="the same d twice"):
        frechet(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="no covariance: it has the eigenvalue -1"):
        frechet(np.zeros(2), np.diag([1.0, -1.0]), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="one shape"):
        kernel_distance(torch.rand(4, 3), torch.rand(5, 3), paired=True)
    with pytest.raises(ValueError, match="at least 6 pictures are needed here, got 5"):
        prdc(torch.rand(5, 3), torch.rand(9, 3))
