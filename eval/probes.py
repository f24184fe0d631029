"""What tokens say of an image's class: a linear probe and nearest neighbours, beside chance and beside plain pixels.

Letters: b images, n tokens, d width of a code, f features of an image, c classes. Every accuracy is top-1, 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from tokenizers_vis.latents import Latents
from tokenizers_vis.quantizers.base import check_option
from tokenizers_vis.tokenizer import Tokenizer
from tokenizers_vis.tokens import Tokens

PENALTIES = tuple(10.0**power for power in range(-3, 8))  # of the ridge; features are standardised
NEIGHBOURS = 20
TEMPERATURE = 0.07  # of a neighbour's vote, as DINO has it (https://arxiv.org/abs/2104.14294)
PIXELS = 32  # side of the pictures of the pixel baseline
_ROWS = 1024  # test images compared at a time

_Fit = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, float]]


class Split(NamedTuple):
    """Numbers of the images that a probe learns from, and of those that it is tried on; each rising."""

    train: Tensor
    test: Tensor


class ProbeResult(NamedTuple):
    """What a probe found.

    probe: "linear" or "knn". accuracy: on the test images.
    chance: accuracy of naming every test image after the most frequent class of the training images.
    pixels: accuracy of the same probe on pixels, ``pixel_features`` of as many dimensions as said by ``pixel_dim``.
    dim: features of an image. train, test: how many images. classes: how many classes.
    setting: the penalty that the linear probe chose, or the neighbours that vote.
    """

    probe: str
    accuracy: float
    chance: float
    pixels: float
    dim: int
    pixel_dim: int
    train: int
    test: int
    classes: int
    setting: float


def fixed_split(labels: Tensor | Sequence[int], *, test: float = 0.25, seed: int = 0) -> Split:
    """The same split for the same labels and seed, in every class alike.

    labels: b, integers. test: share of each class that is for the test, rounded, but at least one image; and at least
    one is left for training. Raises ``ValueError`` for a class of one image, or fewer than two classes.
    """
    labels = _labels(labels)
    check_option(0 < test < 1, "test is a share between 0 and 1", test)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().squeeze(-1)
        if len(members) < 2:
            raise ValueError(f"class {label} has one image; a class has one for training and one for the test, or more")
        count = min(max(1, round(test * len(members))), len(members) - 1)
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return Split((~chosen).nonzero().squeeze(-1), chosen.nonzero().squeeze(-1))


@torch.no_grad()
def token_features(
    tok: Tokenizer, tokens: Tokens | Latents, pool: Literal["concat", "mean"] = "concat", *, batch_size: int = 256
) -> Tensor:
    """Features of each image from its tokens: b f, float32, on the CPU.

    The codes that the decoder gets. pool: "concat" is all of them, f = n d, where place matters; "mean" their mean,
    f = d. Codes after the last token of a shorter image are 0 in the one, and not counted in the other.
    """
    check_option(pool in ("concat", "mean"), "pool is 'concat' or 'mean'", pool)
    if (tokens.tokenizer, isinstance(tokens, Latents)) != (tok.codes, tok.continuous):
        raise ValueError(f"{tok.name} looks its own tokens up, those of {tok.codes!r}; got {tokens!r}")
    features = []
    for start in range(0, len(tokens), batch_size):
        part = tokens[start : start + batch_size].to(tok.device)
        if isinstance(part, Latents):
            codes, lengths = part.values.float(), None
        else:
            codes, lengths = tok.quantizer.lookup(part.ids.clamp_min(0)).float(), part.lengths
        if lengths is not None:
            past = torch.arange(codes.shape[1], device=codes.device) >= lengths[:, None]
            codes = codes.masked_fill(past[..., None], 0.0)
        if pool == "concat":
            features.append(rearrange(codes, "b n d -> b (n d)").cpu())
        else:
            count = codes.shape[1] if lengths is None else lengths[:, None]
            features.append((reduce(codes, "b n d -> b d", "sum") / count).cpu())
    return torch.cat(features)


def linear_probe(features: Tensor, labels: Tensor | Sequence[int], images: Tensor, split: Split) -> ProbeResult:
    """Ridge regression from features to classes, in closed form: the largest output is the class.

    features: b f, floats, standardised by the training images. labels: b, integers. images: b 3 h w in [0, 1], the same
    ones, for the baseline. split: ``fixed_split(labels)``.

    The penalty is the one of ``PENALTIES`` with the smallest squared error on training images, each left out in turn,
    which is exact and needs one decomposition: what is tried on the test images is chosen without them.
    Raises ``ValueError`` for other shapes, numbers that are not finite, or a split that does not fit.
    """
    return _probe("linear", features, labels, images, split, _linear)


def knn_probe(
    features: Tensor, labels: Tensor | Sequence[int], images: Tensor, split: Split, k: int = NEIGHBOURS
) -> ProbeResult:
    """The class that the k nearest training images vote for, each with exp(cosine / 0.07) as in DINO.

    Arguments and errors as for ``linear_probe``; k is at most the number of training images. Features are standardised
    by the training images before the cosine is taken; of equal votes the lower label wins.
    """
    check_option(1 <= k <= len(split.train), f"k is from 1 to the {len(split.train)} training images", k)
    return _probe("knn", features, labels, images, split, lambda x, y, test: (_neighbours(x, y, test, k), float(k)))


def pixel_features(images: Tensor, split: Split, dim: int) -> Tensor:
    """The baseline: pictures at 32 x 32, by their first ``dim`` principal components.

    images: b 3 h w in [0, 1] -> b f, float64, on the CPU. The components are those of the training images; f is less
    than ``dim`` where there are not so many.
    """
    small = F.interpolate(images.float(), size=(PIXELS, PIXELS), mode="bilinear", antialias=True, align_corners=False)
    pixels = rearrange(small, "b c h w -> b (c h w)").double().cpu()
    pixels = pixels - pixels[split.train].mean(dim=0)
    _, sizes, directions = torch.linalg.svd(pixels[split.train], full_matrices=False)
    rank = int((sizes > 1e-9 * sizes[0].clamp_min(1e-300)).sum())
    return pixels @ directions[: max(1, min(dim, rank))].T


def _probe(
    name: str, features: Tensor, labels: Tensor | Sequence[int], images: Tensor, split: Split, fit: _Fit
) -> ProbeResult:
    """fit: of training features, their classes (b c, one-hot) and test features -> outputs t c, and its setting."""
    labels = _labels(labels)
    _check(features, labels, images, split)
    classes, targets = labels.unique(return_inverse=True)
    missing = sorted(set(targets[split.test].tolist()) - set(targets[split.train].tolist()))
    if missing:
        raise ValueError(f"class {classes[missing[0]]} is in the test and not in the training images; split by class")
    targets = F.one_hot(targets).double()
    truth = targets[split.test].argmax(dim=1)

    def accuracy(x: Tensor) -> tuple[float, float]:
        train, test = _standardised(x, split)
        outputs, setting = fit(train, targets[split.train], test)
        return (outputs.argmax(dim=1) == truth).double().mean().item(), setting

    pixels = pixel_features(images, split, features.shape[1])
    (found, setting), (baseline, _) = accuracy(features), accuracy(pixels)
    chance = (truth == targets[split.train].sum(dim=0).argmax()).double().mean().item()
    sizes = features.shape[1], pixels.shape[1], len(split.train), len(split.test), len(classes)
    return ProbeResult(name, found, chance, baseline, *sizes, setting)


def _standardised(x: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """Training and test rows, float64, with mean 0 and deviation 1 over the training rows; constant columns are 0."""
    x = x.double().cpu()
    train = x[split.train]
    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0)
    varies = deviation > 1e-12 * (1 + mean.abs())
    scale = torch.where(varies, 1 / deviation, 0.0)
    return (train - mean) * scale, (x[split.test] - mean) * scale


def _linear(x: Tensor, y: Tensor, test: Tensor) -> tuple[Tensor, float]:
    """x: b f, of mean 0. y: b c. test: t f. Outputs t c, and the penalty.

    With x = U S V' a ridge of penalty p gives the fits H y, H = 1/b + U S^2/(S^2 + p) U', and the residual of an image
    that was left out is (y - H y) / (1 - H_ii) (Hastie et al., The Elements of Statistical Learning, 7.64).
    """
    mean = y.mean(dim=0)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    projected = u.T @ (y - mean)
    best = float("inf"), 0.0
    for penalty in reversed(PENALTIES):  # of equal ones the largest
        shrink = s.square() / (s.square() + penalty)
        residual = y - mean - u @ (shrink[:, None] * projected)
        leverage = 1 / len(x) + (u.square() @ shrink)
        error = (residual / (1 - leverage).clamp_min(1e-12)[:, None]).square().mean().item()
        best = min(best, (error, penalty), key=lambda pair: pair[0])
    weights = v.T @ ((s / (s.square() + best[1]))[:, None] * projected)
    return test @ weights + mean, best[1]


def _neighbours(x: Tensor, y: Tensor, test: Tensor, k: int) -> Tensor:
    """The votes for each class: t c."""
    x = F.normalize(x, dim=1)
    votes = []
    for rows in F.normalize(test, dim=1).split(_ROWS):
        near, at = (rows @ x.T).topk(k, dim=1)
        votes.append(((near / TEMPERATURE).exp()[..., None] * y[at]).sum(dim=1))
    return torch.cat(votes)


def _labels(labels: Tensor | Sequence[int]) -> Tensor:
    labels = torch.as_tensor(labels).cpu()
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are integers, one for each image; got {labels.dtype} {tuple(labels.shape)}")
    if len(labels.unique()) < 2:
        raise ValueError(f"a probe tells classes apart: labels name two or more, got {labels.unique().tolist()}")
    return labels.long()


def _check(features: Tensor, labels: Tensor, images: Tensor, split: Split) -> None:
    b = len(labels)
    if features.ndim != 2 or len(features) != b or not features.is_floating_point():
        raise ValueError(f"features are {b} f, floats, as there are {b} labels; got {features.dtype} {features.shape}")
    if not bool(features.isfinite().all()):
        row = int((~features.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(f"features are finite numbers; those of image {row} are not")
    if images.ndim != 4 or images.shape[:2] != (b, 3) or not images.is_floating_point():
        raise ValueError(f"images are {b} 3 h w, floats in [0, 1]; got {images.dtype} {tuple(images.shape)}")
    both = torch.cat([split.train, split.test])
    if (
        not len(split.train)
        or not len(split.test)
        or both.min() < 0
        or both.max() >= b
        or len(both.unique()) < len(both)
    ):
        raise ValueError(f"a split names some of {b} images for training and others for the test; got {split}")
