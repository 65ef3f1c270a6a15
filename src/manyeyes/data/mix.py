"""Mixup and CutMix on uint8 batches: neighbours in the global batch are blended, or swap a rectangle.

The order is shuffled, so a neighbour is a random partner; and as a pair is fixed by the order and its draws are keyed
by (seed, epoch, the smaller example_index), the result does not depend on how the batch is shared out between workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from manyeyes.errors import ConfigError
from manyeyes.imaging.draws import uniforms

_STREAM = 0x313C
# Pairs are blended in blocks whose 16-bit sums stay in a core's cache.
_BLOCK_BYTES = 1 << 17


@dataclass(frozen=True)
class Mix:
    """How examples are mixed in training; with both on, each pair takes one of the two with equal chance.

    Attributes:
        mixup: alpha of the Beta(alpha, alpha) distribution of the blending weight; 0 is off; 0.2 is usual.
        cutmix: alpha of the Beta distribution of the share of the area that is kept; 0 is off; 1.0 is usual.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"mix.{name}={getattr(self, name)} must be 0 (off) or above, e.g. 0.2.")

    @property
    def is_on(self) -> bool:
        """Whether anything is mixed."""
        return self.mixup > 0 or self.cutmix > 0


def mix_batch(
    images: np.ndarray, labels: np.ndarray, example_indices: np.ndarray, mix: Mix, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mix row 2i with row 2i + 1, in place; an odd last row stays as it is.

    Args:
        images: uint8 (n, height, width, channels), overwritten.
        labels: int32 (n,).
        example_indices: int64 (n,).

    Returns:
        labels_b: int32 (n,), the label of the partner.
        lam: float32 (n,), the share of the row's own label, exactly as the pixels were mixed; 1 - lam is the partner's.
    """
    num_mixed = len(images) // 2 * 2
    labels_b = labels.copy()
    lam = np.ones(len(images), np.float32)
    if not mix.is_on or num_mixed == 0:
        return labels_b, lam
    labels_b[0:num_mixed:2], labels_b[1:num_mixed:2] = labels[1:num_mixed:2], labels[0:num_mixed:2]
    keys = example_indices[:num_mixed].reshape(-1, 2).min(axis=1)
    choice, first, second, top, left = uniforms(seed, epoch, keys, 5, _STREAM).T
    blended = choice < (0.5 if mix.mixup and mix.cutmix else float(mix.mixup > 0))
    alpha = np.where(blended, mix.mixup, mix.cutmix)
    share = _symmetric_beta(alpha, first, second)

    pairs = images[:num_mixed].reshape(-1, 2, *images.shape[1:])
    kept = np.empty(len(pairs))
    (chosen,) = np.nonzero(blended)
    kept[chosen] = _blend(pairs, chosen, share[chosen])
    for pair in np.nonzero(~blended)[0]:
        kept[pair] = _swap_box(pairs[pair], share[pair], top[pair], left[pair])
    lam[:num_mixed] = np.repeat(kept, 2)
    return labels_b, lam


def _blend(pairs: np.ndarray, chosen: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Blend the chosen pairs in place with weights in 256ths, in whole numbers; returns the weights."""
    weights = np.rint(share * 256).astype(np.uint16)
    image_shape = pairs.shape[2:]
    size = max(1, _BLOCK_BYTES // (2 * math.prod(image_shape)))
    for start in range(0, len(chosen), size):
        block = chosen[start : start + size]
        own = weights[start : start + size].reshape(-1, *[1] * (len(image_shape) + 1))
        values = pairs[block].astype(np.uint16)
        # The largest sum, 255 * 256 + 128, just fits 16 bits.
        mixed = values * own
        mixed += values[:, ::-1] * (256 - own)
        mixed += np.uint16(128)
        mixed >>= np.uint16(8)
        pairs[block] = mixed
    return weights / 256


def _swap_box(pair: np.ndarray, share: float, top: float, left: float) -> float:
    """Swap a rectangle of about (1 - share) of the area between two images in place; returns the share that is kept."""
    _, height, width, _ = pair.shape
    scale = math.sqrt(1 - share)
    box_height, box_width = round(height * scale), round(width * scale)
    y, x = int(top * (height - box_height + 1)), int(left * (width - box_width + 1))
    box = pair[:, y : y + box_height, x : x + box_width]
    box[:] = box[::-1].copy()
    return 1 - box_height * box_width / (height * width)


def _symmetric_beta(alpha: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Draw Beta(alpha, alpha) from two uniforms each, exactly.

    Bailey's polar method gives Student's t with 2 alpha degrees of freedom, and (1 + t / sqrt(2 alpha + t²)) / 2 is the
    symmetric beta; written with q = u^(1/alpha) so that a small alpha does not overflow.
    """
    q = first ** (1 / alpha)
    cosine = np.cos(2 * np.pi * second)
    square = cosine**2 * (1 - q)
    return 0.5 + 0.5 * np.copysign(np.sqrt(square / (q + square)), cosine)
