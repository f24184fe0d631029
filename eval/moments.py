"""Mean and covariance of a set of feature vectors: gathered in one pass, merged, kept as npz.

Letters: n pictures, d width of a feature vector.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenizers_vis.eval.protocol import Stamp, StampError
from tokenizers_vis.files import write_atomically


@dataclass(frozen=True, eq=False)
class Moments:
    """mu: d, float64. sigma: d d, float64, with n - 1 below the fraction. n: None where a file does not say.

    stamp: how they were measured; None in the files of other programs.
    """

    mu: np.ndarray
    sigma: np.ndarray
    n: int | None = None
    stamp: Stamp | None = None

    def save(self, path: str | Path) -> None:
        """Writes an npz that pytorch-fid and torch-fidelity read too (mu, sigma). It appears whole or not at all."""
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"statistics are kept as .npz, got {path}")
        stamp = json.dumps(self.stamp.to_dict() if self.stamp else None)
        arrays = {"mu": self.mu, "sigma": self.sigma, "n": np.array(-1 if self.n is None else self.n)}
        write_atomically(path, lambda aside: np.savez(aside, **arrays, stamp=np.array(stamp)))

    @classmethod
    def load(cls, path: str | Path, stamp: Stamp | None = None) -> Moments:
        """Reads what ``save`` wrote, pytorch-fid's statistics, or the reference files of guided diffusion (ADM).

        stamp: what the file's must be, where it has one. Raises ``StampError`` that names the difference, and
        ``ValueError`` for a file that is missing or holds something else.
        """
        if not Path(path).is_file():
            raise ValueError(f"there are no statistics {path}; an .npz with mu and sigma is wanted")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in ("mu", "sigma", "n", "stamp") if key in file.files}
                found = json.loads(str(arrays["stamp"])) if "stamp" in arrays else None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read as .npz: {error}") from error
        mu, sigma = (np.asarray(arrays.get(key, np.zeros(0)), dtype=np.float64) for key in ("mu", "sigma"))
        if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"{path} holds no statistics: mu is d and sigma d d, got {mu.shape} and {sigma.shape}")
        kept = Stamp.from_dict(found) if found else None
        if stamp and kept and (difference := stamp.difference(kept)):
            raise StampError(f"{path} was measured in another way: {difference}. Delete it, or measure as it was")
        n = int(arrays.get("n", -1))
        return cls(mu, sigma, None if n < 0 else n, kept)


class Statistics:
    """Gathers moments batch by batch, in float64: n, sum (d) and outer (d d), which add up over parts and machines."""

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """features: b d. Raises ``ValueError`` for another width or a number that is not finite."""
        rows = finite_rows(features, len(self.sum))
        self.n += len(rows)
        self.sum += rows.sum(dim=0)
        self.outer += rows.T @ rows

    def merge(self, other: Statistics) -> None:
        """Adds what another one has seen."""
        self.n += other.n
        self.sum += other.sum
        self.outer += other.outer

    def moments(self, stamp: Stamp | None = None) -> Moments:
        """Raises ``ValueError`` for fewer than 2 pictures, which have no covariance."""
        if self.n < 2:
            raise ValueError(f"a covariance needs 2 pictures or more, got {self.n}")
        mu = self.sum / self.n
        sigma = (self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)
        return Moments(mu.numpy(), sigma.numpy(), self.n, stamp)


def finite_rows(features: Tensor | np.ndarray, dim: int | None = None) -> Tensor:
    """Feature vectors n d as float64 on the CPU. Raises ``ValueError`` for another shape, or what is not finite."""
    rows = torch.as_tensor(features).detach().cpu().double()
    if rows.ndim != 2 or (dim is not None and rows.shape[1] != dim):
        raise ValueError(f"features are n {dim or 'd'}, got {tuple(rows.shape)}")
    if not rows.isfinite().all():
        raise ValueError(f"{int((~rows.isfinite()).any(dim=1).sum())} of {len(rows)} feature vectors are not finite")
    return rows
