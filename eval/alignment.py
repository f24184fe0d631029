"""Where a face's eyes, nose and mouth are, and the crop that turns them upright: five points, two schemes.

"dlib-5" is what dlib's 5-point predictor finds: the corners of the eye on the right of the picture (outer, inner),
those of the one on the left, and the base of the nose. "arcface-5", of insightface and of TokBench's annotations: the
centres of the eye on the left of the picture and the one on the right, the tip of the nose, the corners of the mouth.
Only the eyes are in both; points of one scheme become those of the other by the similarity that fits the eyes.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

DLIB, ARCFACE = "dlib-5", "arcface-5"

# Where the points of an upright face lie. dlib's, as shares of the face without its margin, are in its
# image_transforms/interpolation.h; ArcFace's, in a crop of 112 pixels, in insightface's face_align.py.
TEMPLATES = {
    DLIB: np.array(
        [
            [0.8595674595992, 0.2134981538014],
            [0.6460604764104, 0.2289674387677],
            [0.1205750620789, 0.2137274526848],
            [0.3340850613712, 0.2290642403242],
            [0.4901123135679, 0.6277975316475],
        ]
    ),
    ARCFACE: np.array(
        [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
    ),
}


def eyes(points: np.ndarray, scheme: str) -> np.ndarray:
    """5 2 -> 2 2: the centres of the eye on the left of the picture and of the one on the right."""
    if scheme == ARCFACE:
        return points[:2]
    return np.stack([points[2:4].mean(axis=0), points[0:2].mean(axis=0)])


def converted(points: np.ndarray, scheme: str, to: str) -> np.ndarray:
    """Points of a scheme as those of another, 5 2 each: exact for the eyes, the rest where an upright face has it."""
    if scheme == to:
        return points
    matrix = similarity_transform(eyes(TEMPLATES[to], to), eyes(points, scheme))
    return TEMPLATES[to] @ matrix[:, :2].T + matrix[:, 2]


def similarity_transform(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift that takes points n 2 nearest to others, n 2, in least squares: 2 3, float64.

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns" (1991).
    """
    centre, middle = source.mean(axis=0), target.mean(axis=0)
    a, b = source - centre, target - middle
    u, values, vt = np.linalg.svd(b.T @ a)
    flip = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = (u * flip) @ vt
    linear = rotation * (values @ flip) / (a**2).sum()
    return np.column_stack([linear, middle - linear @ centre])


def warp(picture: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """uint8 h w 3 -> uint8 size size 3, bilinear, black outside. matrix: 2 3, from the picture's pixels to the crop's.

    What cv2.warpAffine gives, which insightface uses, but for its coordinates of 1/32 pixel.
    """
    linear = np.linalg.inv(matrix[:, :2])
    at = np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=-1)  # x y of each pixel of the crop
    where = (at - matrix[:, 2]) @ linear.T
    height, width = picture.shape[:2]
    grid = (2 * where + 1) / [width, height] - 1  # centres of pixels: -1 and 1 are the edges
    x = rearrange(torch.tensor(picture, dtype=torch.float64), "h w c -> 1 c h w")
    crop = F.grid_sample(x, torch.from_numpy(grid)[None], mode="bilinear", padding_mode="zeros", align_corners=False)
    return rearrange(crop[0].round().to(torch.uint8), "c h w -> h w c").numpy()
