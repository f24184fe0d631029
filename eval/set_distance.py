"""All distances between the originals and their reconstructions as sets, from features that come batch by batch."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenizers_vis.eval.distances import (
    bootstrap,
    fd_infinity,
    frechet,
    frechet_distance,
    inception_score,
    off_diagonal_mean,
    pair_kernel,
    prdc,
    small_sample,
)
from tokenizers_vis.eval.features import FeatureNet, InceptionFeatures
from tokenizers_vis.eval.moments import Moments, Statistics, finite_rows

_LINE = 50  # pictures that fd_infinity needs
_NEIGHBOURS = 6  # and prdc: one more than the neighbours it looks at
_SPLITS = 10  # of the Inception Score
_FEWEST = 2  # pictures that have a covariance


class SmallSampleWarning(UserWarning):
    """A set distance of so few pictures that it depends on how many they are."""


class Measured(NamedTuple):
    """A number, its 95 % interval where there is one, how many pictures it is of, and what is to be said of it."""

    value: float
    low: float | None
    high: float | None
    n: int
    note: str


def out_of_reach(n: int, net: FeatureNet) -> list[str]:
    """What so few pictures do not have, a line each."""
    kinds = {"set distances": _FEWEST}
    if n >= _FEWEST:
        kinds = {"precision, recall, density and coverage": _NEIGHBOURS, f"{net.metric('fd_infinity')}": _LINE}
        kinds |= {"Inception Score": _SPLITS} if isinstance(net, InceptionFeatures) else {}
    return [f"no {what}: {least} pictures are needed, and there are {n}" for what, least in kinds.items() if n < least]


class SetDistance:
    """``update(originals, reconstructions)`` as often as wanted, then ``compute()``.

    Memory does not grow with the pictures: moments are gathered of all of them (FD), and the features of ``keep``
    pictures are kept, chosen by their names, for the distances that need pairs of pictures.
    """

    def __init__(self, net: FeatureNet, *, keep: int = 5000) -> None:
        """net: whose features will come; it names the numbers."""
        if keep < 2:
            raise ValueError(f"keep is 2 pictures or more, got {keep}")
        self.net, self.keep = net, keep
        self._statistics = Statistics(net.dim), Statistics(net.dim)
        self._keys = np.zeros(0, dtype=np.uint64)
        self._features = np.zeros((0, 2, net.dim), dtype=np.float32)

    @property
    def n(self) -> int:
        """Pictures so far."""
        return self._statistics[0].n

    def update(self, originals: Tensor, reconstructions: Tensor, names: Sequence[str] | None = None) -> None:
        """Features b d each, row by row of the same pictures.

        names: of the pictures. Those that are kept when there are more than ``keep`` are then the same ones in
        whichever order, batches and parts they come; None numbers the pictures as they come.

        Raises ``ValueError`` for other shapes, and for features that are not finite; nothing is counted then.
        """
        rows = [finite_rows(part, self.net.dim) for part in (originals, reconstructions)]
        names = [str(self.n + i) for i in range(len(rows[0]))] if names is None else names
        if not len(rows[0]) == len(rows[1]) == len(names):
            raise ValueError(
                f"each original has a reconstruction and a name: got {len(rows[0])} originals, {len(rows[1])} "
                f"reconstructions and {len(names)} names"
            )
        for statistics, part in zip(self._statistics, rows, strict=True):
            statistics.update(part)
        keys = [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) for name in names]
        self._keep(np.array(keys, dtype=np.uint64), torch.stack(rows, dim=1).float().numpy())

    def state(self) -> dict[str, np.ndarray]:
        """All that was gathered, as arrays for a file or another process; ``merge`` takes them."""
        first, second = self._statistics
        return {
            "n": np.array(first.n),
            "sum": torch.stack([first.sum, second.sum]).numpy(),
            "outer": torch.stack([first.outer, second.outer]).numpy(),
            "keys": self._keys,
            "features": self._features,
        }

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        """Adds the ``state()`` of another one, of other pictures."""
        for i, statistics in enumerate(self._statistics):
            statistics.n += int(state["n"])
            statistics.sum += torch.from_numpy(state["sum"][i])
            statistics.outer += torch.from_numpy(state["outer"][i])
        self._keep(state["keys"], state["features"])

    def moments(self) -> tuple[Moments, Moments]:
        """Of the originals and of the reconstructions. Raises ``ValueError`` for fewer than 2 pictures."""
        return tuple(statistics.moments() for statistics in self._statistics)

    def compute(self, *, samples: int = 100, seed: int = 0) -> dict[str, Measured]:
        """The numbers by name; of those that need more pictures than there are none is given.

        fd (lower is better), kd (lower, unbiased for pairs), fd_infinity (lower), precision, recall, density, coverage
        (higher), inception_score (higher; of the reconstructions, from the FID's Inception alone); each ends in the
        name of the net, but for fid and kid. samples: of the bootstrap over pictures that gives fd and kd intervals; 0
        is none.

        Warns (``SmallSampleWarning``) when n is small against d. Raises ``ValueError`` for fewer than 2 pictures.
        """
        if self.n < _FEWEST:
            raise ValueError(f"a set distance needs {_FEWEST} pictures or more, got {self.n}")
        order = np.argsort(self._keys)  # whatever is drawn at random is then drawn alike in every run
        x, y = torch.from_numpy(self._features[order]).double().unbind(dim=1)
        kept, name = len(x), self.net.metric
        note = small_sample(self.n, self.net.dim)
        if note:
            warnings.warn(note, SmallSampleWarning, stacklevel=2)
        about = "" if kept == self.n else f"of {kept} pictures out of {self.n}, chosen by their names"
        found: dict[str, Measured] = {}

        fd = self.frechet()
        low, high = None, None
        if samples:
            low, high = bootstrap(
                lambda w: frechet_distance(x, y, w), kept, around=fd, population=self.n, samples=samples, seed=seed
            )
            low = max(0.0, low)
        found[name("fd")] = Measured(fd, low, high, self.n, note)

        h = pair_kernel(x, y)
        kd = off_diagonal_mean(h)
        low, high = None, None
        if samples:
            low, high = bootstrap(lambda w: off_diagonal_mean(h, w), kept, around=kd, samples=samples, seed=seed)
        found[name("kd")] = Measured(kd, low, high, kept, about)

        if kept >= _LINE:
            line = fd_infinity(x, y, seed=seed)
            fit = f"a line through {len(line.sizes)} sizes from {line.sizes[0]} to {kept}, R2 = {line.r2:.3f}"
            found[name("fd_infinity")] = Measured(line.value, None, None, kept, fit)
        if kept >= _NEIGHBOURS:
            for kind, value in prdc(x, y)._asdict().items():
                found[name(kind)] = Measured(value, None, None, kept, about)
        if isinstance(self.net, InceptionFeatures) and kept >= _SPLITS:
            mean, deviation = inception_score(self.net.logits(y.float()), splits=_SPLITS)
            said = f"mean of {_SPLITS} parts, standard deviation {deviation:.3g}"
            found["inception_score"] = Measured(mean, None, None, kept, said)
        return found

    def frechet(self) -> float:
        """The Fréchet distance of all pictures, by their features where all are kept, else by their moments."""
        if self.n == len(self._keys):
            x, y = torch.from_numpy(self._features[np.argsort(self._keys)]).double().unbind(dim=1)
            return frechet_distance(x, y)
        return frechet(*_flat(self.moments()))

    def _keep(self, keys: np.ndarray, features: np.ndarray) -> None:
        keys = np.concatenate([self._keys, keys])
        features = np.concatenate([self._features, features])
        if len(keys) > self.keep:
            chosen = np.sort(np.argsort(keys, kind="stable")[: self.keep])
            keys, features = keys[chosen], features[chosen]
        self._keys, self._features = keys, features


def _flat(moments: tuple[Moments, Moments]) -> tuple[np.ndarray, ...]:
    first, second = moments
    return first.mu, first.sigma, second.mu, second.sigma
