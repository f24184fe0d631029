"""How far one set of pictures is from another, as features see them: functions of features n d, computed in float64.

``set_distance.SetDistance`` gathers the features of a run and gives all of these numbers, each named after its net.
Letters: n m pictures, d width of a feature vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenizers_vis.eval.moments import finite_rows

Features = Tensor | np.ndarray
_BLOCK = 1024  # rows of a distance matrix at a time
_FEWEST = 50  # pictures that a line through FD against 1/n needs


class PRDC(NamedTuple):
    """Shares of pictures, each from 0 to 1 but for density, higher is better. See ``prdc``."""

    precision: float
    recall: float
    density: float
    coverage: float


class FDInfinity(NamedTuple):
    """value: where the line FD = value + slope / n ends. r2: of the fit. sizes, values: what it was fitted to."""

    value: float
    slope: float
    r2: float
    sizes: tuple[int, ...]
    values: tuple[float, ...]


class Interval(NamedTuple):
    """From low to high."""

    low: float
    high: float


def frechet(mu1: Features, sigma1: Features, mu2: Features, sigma2: Features) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2), lower is closer: https://arxiv.org/abs/1706.08500.

    mu: d. sigma: d d, symmetric. Raises ``ValueError`` for other shapes, or a sigma that is no covariance.
    """
    mu1, mu2, sigma1, sigma2 = (torch.as_tensor(part).cpu().double() for part in (mu1, mu2, sigma1, sigma2))
    d = len(mu1)
    if mu1.shape != (d,) or mu2.shape != (d,) or sigma1.shape != (d, d) or sigma2.shape != (d, d):
        shapes = ", ".join(str(tuple(part.shape)) for part in (mu1, sigma1, mu2, sigma2))
        raise ValueError(f"mu is d and sigma d d, the same d twice; got {shapes}")
    return _frechet(mu1, _root(sigma1), mu2, _root(sigma2))


def frechet_distance(x: Features, y: Features, weights: Features | None = None) -> float:
    """``frechet`` of the moments of features x: n d and y: m d; fast and exact also for fewer pictures than d.

    weights: n whole numbers, how often each picture counts, in both (then m is n).
    """
    return _frechet(*_factor(_rows(x, 2), weights), *_factor(_rows(y, 2), weights))


def kernel_distance(x: Features, y: Features, *, paired: bool = False) -> float:
    """Squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, unbiased: KID's, https://arxiv.org/abs/1801.01401.

    x: n d, y: m d. Lower is closer; around 0, also below it, for sets of one kind.
    paired: picture i of y was made from picture i of x (m is n). Then the pairs are left out of the cross term too:
        they are alike, the formula for independent sets would come out too low, by more the smaller n is.
    """
    x, y = _rows(x, 2), _rows(y, 2)
    if paired:
        return off_diagonal_mean(pair_kernel(x, y))
    n, m = len(x), len(y)
    xx, yy, xy = (_kernel_sums(a, b) for a, b in ((x, x), (y, y), (x, y)))
    return (xx[0] - xx[1]) / (n * (n - 1)) + (yy[0] - yy[1]) / (m * (m - 1)) - 2 * xy[0] / (n * m)


def pair_kernel(x: Features, y: Features) -> Tensor:
    """k(xi, xj) + k(yi, yj) - k(xi, yj) - k(yi, xj): n n; the mean off its diagonal is the paired kernel distance."""
    x, y = _rows(x, 2), _rows(y, 2)
    if x.shape != y.shape:
        raise ValueError(f"pairs have features of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    cross = _kernel(x, y)
    return _kernel(x, x).add_(_kernel(y, y)).sub_(cross).sub_(cross.T)


def off_diagonal_mean(h: Tensor, weights: Features | None = None) -> float:
    """Of h: n n, over pairs of different pictures, each counted by its weight."""
    w = torch.ones(len(h), dtype=torch.float64) if weights is None else torch.as_tensor(weights).double()
    return float((w @ h @ w - w.square() @ h.diagonal()) / (w.sum() ** 2 - w.square().sum()))


def fd_infinity(x: Features, y: Features, *, paired: bool = True, points: int = 15, seed: int = 0) -> FDInfinity:
    """FD at infinitely many pictures, by a line through FD against 1/n: https://arxiv.org/abs/1911.07023.

    FD of n pictures is off by about a constant over n: too high for independent sets, by less and either way for pairs.
    x, y: n d; random subsets of ``points`` sizes from n / 10 to n, of the same pictures in both where they are
    ``paired``. How good the line is says r2. Raises ``ValueError`` for fewer than 50 pictures.
    """
    x, y = _rows(x, _FEWEST), _rows(y, _FEWEST)
    n = min(len(x), len(y))
    draw = np.random.default_rng(seed)
    sizes = np.unique(np.linspace(n // 10, n, points).round().astype(int))
    values = []
    for size in sizes:
        first = draw.permutation(len(x))[:size]
        second = first if paired else draw.permutation(len(y))[:size]
        values.append(frechet_distance(x[first], y[second]))
    slope, value = np.polyfit(1 / sizes, values, 1)
    left = np.array(values) - (value + slope / sizes)
    spread = np.var(values)
    r2 = 1 - np.mean(left**2) / spread if spread > 0 else 1.0
    return FDInfinity(float(value), float(slope), float(r2), tuple(sizes.tolist()), tuple(values))


def prdc(real: Features, fake: Features, *, k: int = 3, density_k: int = 5) -> PRDC:
    """Precision and recall (https://arxiv.org/abs/1904.06991), density and coverage (https://arxiv.org/abs/2002.09797).

    real: n d. fake: m d, reconstructions or generated pictures. A picture's ball reaches to its k-th neighbour in its
    own set (density_k-th for the last two). precision: fakes inside a real's ball. recall: reals inside a fake's ball.
    density: reals' balls that a fake is inside of, over density_k. coverage: reals with a fake inside their ball.

    Raises ``ValueError`` when there are not more pictures than neighbours.
    """
    if min(k, density_k) < 1:
        raise ValueError(f"k and density_k are 1 or more, got {k} and {density_k}")
    real, fake = _rows(real, max(k, density_k) + 1), _rows(fake, max(k, density_k) + 1)
    real_k, real_density = _radii(real, (k, density_k))
    (fake_k,) = _radii(fake, (k,))
    n, m = len(real), len(fake)
    recalled = covered = inside = 0
    precise = torch.zeros(m, dtype=torch.bool)
    for start in range(0, n, _BLOCK):
        rows = slice(start, start + _BLOCK)
        square = _squares(real[rows], fake)
        precise |= (square <= real_k[rows, None]).any(dim=0)
        recalled += int((square <= fake_k).any(dim=1).sum())
        within = square <= real_density[rows, None]
        covered += int(within.any(dim=1).sum())
        inside += int(within.sum())
    return PRDC(float(precise.double().mean()), recalled / n, inside / (density_k * m), covered / n)


def inception_score(logits: Features, *, splits: int = 10, seed: int | None = 2020) -> tuple[float, float]:
    """exp of the mean KL(p(class | picture) || p(class)), higher is better: https://arxiv.org/abs/1606.03498.

    logits: n classes, of the FID's Inception without bias. The mean and the standard deviation over ``splits`` parts of
    the shuffled pictures; seed None leaves them in order. Raises ``ValueError`` for fewer pictures than splits.
    """
    logits = _rows(logits, splits)
    n = len(logits)
    if seed is not None:  # as torch-fidelity shuffles
        logits = logits[np.random.RandomState(seed).permutation(n)]
    logs = logits.log_softmax(dim=1)
    scores = []
    for i in range(splits):
        part = logs[i * n // splits : (i + 1) * n // splits]
        share = part.exp()
        scores.append((share * (part - share.mean(dim=0).log())).nan_to_num(0).sum(dim=1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    n: int,
    *,
    around: float | None = None,
    population: int | None = None,
    samples: int = 100,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Where a statistic of n pictures would lie, had other pictures of the same kind been taken.

    statistic: weights (n, how often each picture was drawn) -> the number.
    around: the number the interval is put around; None is the statistic of all n.
    population: how many pictures that number is of; None is n.
    draws: of more pictures than this, so many are drawn, and the spread is scaled by (draws / population)^1/2.

    The bootstrap's own mean is taken out of the spread: drawing with repetition makes set distances larger, and the
    percentiles would lie above the number. How far the number itself is off at small n is ``fd_infinity``'s to say.
    """
    if n < 2 or samples < 2 or not 0 < level < 1:
        raise ValueError(f"a bootstrap needs 2 pictures, 2 samples and a level in (0, 1); got {n}, {samples}, {level}")
    draw = np.random.default_rng(seed)
    many = min(n, draws)
    values = np.array([statistic(draw.multinomial(many, np.full(n, 1 / n))) for _ in range(samples)])
    around = statistic(np.ones(n, dtype=np.int64)) if around is None else around
    spread = (values - values.mean()) * np.sqrt(many / (population or n))
    low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(around + low), float(around + high))


def small_sample(n: int, d: int) -> str:
    """What is to be said of a Frechet distance of n pictures in d dimensions; "" from n = 10 d on."""
    if n >= 10 * d:
        return ""
    rank = f" The covariances have rank {n - 1} at most, of {d}." if n <= d else ""
    return (
        f"a Frechet distance of {n} pictures in {d} dimensions (n/d = {n / d:.2g}) depends on how many they are: "
        f"compare it at the same n and the same pictures only, or read the kernel distance.{rank}"
    )


# Parts


def _rows(features: Features, least: int) -> Tensor:
    rows = finite_rows(features)
    if len(rows) < least:
        raise ValueError(f"at least {least} pictures are needed here, got {len(rows)}")
    return rows


def _factor(x: Tensor, weights: Features | None) -> tuple[Tensor, Tensor]:
    """mu: d, and a: r d with a^T a the covariance, r at most n and d."""
    count = torch.ones(len(x), dtype=torch.float64) if weights is None else torch.as_tensor(weights).double()
    if len(count) != len(x) or count.sum() < 2:
        raise ValueError(f"weights are one for each of {len(x)} pictures, 2 together at least; got {len(count)}")
    x, count = x[count > 0], count[count > 0]
    mu = count @ x / count.sum()
    a = (x - mu) * (count / (count.sum() - 1)).sqrt()[:, None]
    return mu, torch.linalg.qr(a, mode="r").R if a.shape[0] > a.shape[1] else a


def _root(sigma: Tensor) -> Tensor:
    """a: d d with a^T a = sigma."""
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    noise = len(values) * torch.finfo(torch.float64).eps * values.abs().max()
    if values.min() < -1e4 * noise - 1e-300:
        raise ValueError(f"sigma is no covariance: it has the eigenvalue {values.min():.3g}, none may be below 0")
    # What is below the noise is 0: a root would raise 1e-16 to 1e-8, in each of the many directions without pictures.
    return (values * (values > noise)).sqrt()[:, None] * vectors.T


def _frechet(mu1: Tensor, a1: Tensor, mu2: Tensor, a2: Tensor) -> float:
    # The eigenvalues of sigma1 sigma2 are the squared singular values of a1 a2^T: no root of a product is needed.
    both = torch.linalg.svdvals(a1 @ a2.T).sum()
    return max(0.0, float((mu1 - mu2).square().sum() + a1.square().sum() + a2.square().sum() - 2 * both))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


def _kernel_sums(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The sum of the kernel over all pairs, and over the pairs of equal number."""
    total = own = 0.0
    for start in range(0, len(x), _BLOCK):
        block = _kernel(x[start : start + _BLOCK], y)
        total += block.sum().item()
        own += block.diagonal(start).sum().item() if start < len(y) else 0.0
    return total, own


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances n m."""
    return (x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T).clamp_(min=0)


def _radii(x: Tensor, ks: tuple[int, ...]) -> tuple[Tensor, ...]:
    """For each k the squared distance of every picture to its k-th neighbour, not counting itself: n."""
    most = max(ks)
    nearest = []
    for start in range(0, len(x), _BLOCK):
        square = _squares(x[start : start + _BLOCK], x)
        square.diagonal(start).fill_(-1)
        nearest.append(square.topk(most + 1, largest=False).values)
    return tuple(torch.cat(nearest)[:, k] for k in ks)
