"""The ops in plain torch: slow or fast, these are the numbers that every other implementation must give."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores held at a time: 2^24 float32 are 64 MB.
MAX_SCORES = 2**24


@torch.no_grad()
def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code nearest to each row, by Euclidean distance.

    z: n d. codebook: k d, same dtype and device.
    Returns n, int64. Of codes equally near, the lowest index wins.

    Finds argmax of z.c - |c|^2 / 2. The full |z|^2 - 2 z.c + |c|^2 loses the small differences between codes to the
    size of |z|^2, and costs more. Rows are taken in chunks, so that the scores never exceed 64 MB.
    Scores are as exact as the matmul: outside autocast, and with TF32 off, which is torch's default.
    """
    if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1] or len(codebook) == 0:
        raise ValueError(f"z is n d and codebook k d with k > 0, got {tuple(z.shape)} and {tuple(codebook.shape)}")
    half_norm = codebook.square().sum(dim=1) / 2
    ids = torch.empty(len(z), dtype=torch.int64, device=z.device)
    rows = max(1, MAX_SCORES // len(codebook))
    for start in range(0, len(z), rows):
        scores = torch.addmm(half_norm, z[start : start + rows], codebook.T, beta=-1)
        ids[start : start + rows] = scores.argmax(dim=1)
    return ids
