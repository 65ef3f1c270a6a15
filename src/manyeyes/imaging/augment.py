"""Random changes of training images, a pure function of (image, seed, epoch, example_index).

Order: one affine warp (random resized crop, zoom, rotation, shift and flips together), RandAugment, colour, erasing.
What a warp brings in from outside of the image is its mirror image (BORDER_REFLECT_101). Flips and shifts alone move
whole pixels and change no value.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import cv2
import numpy as np

from manyeyes.errors import ConfigError, UsageError
from manyeyes.imaging import geometry, randaugment
from manyeyes.imaging.decode import decode
from manyeyes.imaging.draws import uniforms
from manyeyes.imaging.preprocessing import Preprocessing

_UPPER_BOUNDS = {
    "flip_horizontal": 1,
    "flip_vertical": 1,
    "rotate_degrees": 180,
    "shift": 0.9,
    "zoom": 0.9,
    "random_resized_crop": 1,
    "brightness": 1,
    "contrast": 1,
    "saturation": 1,
    "hue": 0.5,
    "randaugment_ops": 16,
    "randaugment_magnitude": 10,
    "erase": 1,
}
_FLIP_X, _FLIP_Y, _ROTATE, _SHIFT_X, _SHIFT_Y, _ZOOM = range(6)
_CROP_AREA, _CROP_ASPECT, _CROP_Y, _CROP_X = range(6, 10)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(10, 14)
_ERASE, _ERASE_AREA, _ERASE_ASPECT, _ERASE_Y, _ERASE_X = range(14, 19)
_ERASE_COLOUR = slice(19, 22)
_NUM_DRAWS = 22
_RANDAUGMENT_STREAM = 1

_CROP_ASPECTS = (3 / 4, 4 / 3)
_ERASE_AREAS = (0.02, 1 / 3)
_ERASE_ASPECTS = (0.3, 1 / 0.3)


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied. The default of every field changes nothing.

    Attributes:
        flip_horizontal, flip_vertical: probability in [0, 1].
        rotate_degrees: largest rotation to either side, at most 180.
        shift: largest shift along each axis, as a fraction of the side.
        zoom: largest relative change of scale, e.g. 0.2 for 0.8 to 1.2.
        random_resized_crop: smallest area of the region that is cut out and resized, as a fraction of the image; 0 is
            off. Its aspect ratio is 3/4 to 4/3 times that of the result.
        brightness, contrast, saturation: largest relative change, e.g. 0.4 for 0.6 to 1.4.
        hue: largest rotation of the colour plane, as a fraction of the circle, at most 0.5.
        randaugment_ops: how many random operations follow one another; 0 is off.
        randaugment_magnitude: their strength, 0 to 10.
        erase: probability that a random rectangle is painted over with a random colour.
    """

    flip_horizontal: float = 0.0
    flip_vertical: float = 0.0
    rotate_degrees: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    random_resized_crop: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    randaugment_ops: int = 0
    randaugment_magnitude: float = 9.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        for name, upper in _UPPER_BOUNDS.items():
            value = getattr(self, name)
            if not 0 <= value <= upper:
                raise ConfigError(f"augmentation.{name}={value} is out of range. Use 0 to {upper}.")

    @property
    def is_identity(self) -> bool:
        """Whether no image is ever changed."""
        return dataclasses.replace(self, randaugment_magnitude=9.0) == Augmentation()

    @property
    def _warps(self) -> bool:
        return not self._moves_whole_pixels_only or self.flip_horizontal + self.flip_vertical + self.shift > 0

    @property
    def _moves_whole_pixels_only(self) -> bool:
        return not (self.rotate_degrees or self.zoom or self.random_resized_crop)

    @property
    def _recolours(self) -> bool:
        return self.brightness + self.contrast + self.saturation + self.hue > 0


def augment_batch(
    images: np.ndarray,
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    example_indices: np.ndarray,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Augment preprocessed images of one size.

    Args:
        images: uint8 array (n, height, width, channels), channels 1 or 3; not modified.
        example_indices: integer array (n,).
        out: where to write, of the shape of `images`, C-contiguous and apart from it; made if None.

    Returns:
        uint8 array (n, height, width, channels): `out`. Row i depends on images[i], seed, epoch and example_indices[i]
        only.
    """
    num, height, width, channels = images.shape
    if out is None:
        out = np.empty(images.shape, np.uint8)
    elif out.shape != images.shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise UsageError(
            f"out is {out.dtype} {out.shape}. Use a C-contiguous uint8 array of the shape of images, {images.shape}."
        )
    draws = uniforms(seed, epoch, example_indices, _NUM_DRAWS)
    if augmentation._warps:
        # OpenCV takes and gives (H, W) where there is one channel.
        shape = images.shape if channels > 1 else images.shape[:3]
        _warp(
            images.reshape(shape),
            out.reshape(shape),
            _affine_matrices(augmentation, draws, height, width),
            augmentation,
        )
    else:
        np.copyto(out, images)
    if augmentation.randaugment_ops:
        ops = uniforms(seed, epoch, example_indices, 2 * augmentation.randaugment_ops, _RANDAUGMENT_STREAM)
        for image, row in zip(out, ops.reshape(num, -1, 2), strict=True):
            image[:] = randaugment.apply(image, row, augmentation.randaugment_magnitude)
    if augmentation._recolours:
        _recolour(out, augmentation, draws)
    if augmentation.erase:
        _erase(out, augmentation, draws)
    return out


def training_view(
    encoded_or_image: bytes | np.ndarray,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    example_index: int,
) -> np.ndarray:
    """What training sees of one stored image in one epoch.

    Where random_resized_crop is on, the region is cut from the decoded image and resized once to the output size, in
    place of the geometric steps of `preprocessing`.

    Args:
        encoded_or_image: encoded bytes, or a decoded uint8 array (H, W, channels).

    Returns:
        uint8 array (height, width, channels).

    Raises:
        ImageError: the bytes can't be decoded.
        UsageError: random_resized_crop with a preprocessing that gives no fixed size.
    """
    if isinstance(encoded_or_image, np.ndarray):
        image = encoded_or_image
    else:
        image = decode(encoded_or_image, channels=preprocessing.channels, background=preprocessing.background)
    indices = np.array([example_index])
    if augmentation.random_resized_crop:
        shape = preprocessing.output_shape
        if shape is None:
            raise UsageError(
                "random_resized_crop needs a preprocessing with a fixed size. Use Preprocessing.for_size(...)."
            )
        draws = uniforms(seed, epoch, indices, _NUM_DRAWS)
        boxes = _crop_boxes(augmentation, draws, image.shape[0], image.shape[1], aspect=shape[1] / shape[0])
        top, left, crop_height, crop_width = (int(edge[0]) for edge in boxes)
        image = geometry.crop(image, top, left, crop_height, crop_width)
        image = geometry.resize(image, shape[0], shape[1], preprocessing.interpolation)
        augmentation = dataclasses.replace(augmentation, random_resized_crop=0.0)
    else:
        image = preprocessing.apply(image)
    return augment_batch(image[None], augmentation, seed, epoch, indices)[0]


def _warp(images: np.ndarray, out: np.ndarray, matrices: np.ndarray, augmentation: Augmentation) -> None:
    size = (images.shape[2], images.shape[1])
    interpolation = cv2.INTER_NEAREST if augmentation._moves_whole_pixels_only else cv2.INTER_LINEAR
    flags = interpolation | cv2.WARP_INVERSE_MAP
    for image, matrix, target in zip(images, matrices, out, strict=True):
        cv2.warpAffine(image, matrix, size, dst=target, flags=flags, borderMode=cv2.BORDER_REFLECT_101)


def _affine_matrices(augmentation: Augmentation, draws: np.ndarray, height: int, width: int) -> np.ndarray:
    """For each row the matrix (2, 3) from result pixels to image pixels."""
    flip_x = np.where(draws[:, _FLIP_X] < augmentation.flip_horizontal, -1.0, 1.0)
    flip_y = np.where(draws[:, _FLIP_Y] < augmentation.flip_vertical, -1.0, 1.0)
    angle = np.radians(augmentation.rotate_degrees * _signed(draws[:, _ROTATE]))
    scale_x = scale_y = 1 / (1 + augmentation.zoom * _signed(draws[:, _ZOOM]))
    shift_x = augmentation.shift * width * _signed(draws[:, _SHIFT_X])
    shift_y = augmentation.shift * height * _signed(draws[:, _SHIFT_Y])
    if augmentation._moves_whole_pixels_only:
        shift_x, shift_y = np.rint(shift_x), np.rint(shift_y)
    if augmentation.random_resized_crop:
        top, left, crop_height, crop_width = _crop_boxes(augmentation, draws, height, width, aspect=width / height)
        scale_x, scale_y = scale_x * crop_width / width, scale_y * crop_height / height
        shift_x = shift_x + left + crop_width / 2 - width / 2
        shift_y = shift_y + top + crop_height / 2 - height / 2
    cosine, sine = np.cos(angle), np.sin(angle)
    x, y = (width - 1) / 2, (height - 1) / 2
    matrices = np.empty((len(draws), 2, 3))
    matrices[:, 0, 0] = scale_x * cosine * flip_x
    matrices[:, 0, 1] = scale_x * -sine * flip_y
    matrices[:, 1, 0] = scale_y * sine * flip_x
    matrices[:, 1, 1] = scale_y * cosine * flip_y
    matrices[:, 0, 2] = x + shift_x - matrices[:, 0, 0] * x - matrices[:, 0, 1] * y
    matrices[:, 1, 2] = y + shift_y - matrices[:, 1, 0] * x - matrices[:, 1, 1] * y
    return matrices


def _crop_boxes(
    augmentation: Augmentation, draws: np.ndarray, height: int, width: int, aspect: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Top, left, height and width in whole pixels of the region for each row, inside the image."""
    smallest = augmentation.random_resized_crop
    area = (smallest + (1 - smallest) * draws[:, _CROP_AREA]) * (height * width)
    aspects = aspect * _log_uniform(draws[:, _CROP_ASPECT], *_CROP_ASPECTS)
    crop_height = np.clip(np.rint(np.sqrt(area / aspects)), 1, height)
    crop_width = np.clip(np.rint(np.sqrt(area * aspects)), 1, width)
    top = np.floor(draws[:, _CROP_Y] * (height - crop_height + 1))
    left = np.floor(draws[:, _CROP_X] * (width - crop_width + 1))
    return top, left, crop_height, crop_width


def _recolour(images: np.ndarray, augmentation: Augmentation, draws: np.ndarray) -> None:
    """Hue and saturation, then contrast about the mean, then brightness, as one affine map of the channels."""
    num, channels = images.shape[0], images.shape[3]
    brightness = 1 + augmentation.brightness * _signed(draws[:, _BRIGHTNESS])
    contrast = 1 + augmentation.contrast * _signed(draws[:, _CONTRAST])
    matrices = np.zeros((num, channels, channels + 1))
    if channels == 3:
        saturation = 1 + augmentation.saturation * _signed(draws[:, _SATURATION])
        angle = 2 * math.pi * augmentation.hue * _signed(draws[:, _HUE])
        matrices[:, :, :3] = randaugment.colour_matrices(saturation, angle)
    else:
        matrices[:, 0, 0] = 1
    matrices *= (brightness * contrast)[:, None, None]
    offsets = (brightness * (1 - contrast)).tolist()
    for image, matrix, offset in zip(images, matrices, offsets, strict=True):
        if augmentation.contrast:
            matrix[:, channels] = offset * randaugment.mean_brightness(image)
        image[:] = cv2.transform(image, matrix).reshape(image.shape)


def _erase(images: np.ndarray, augmentation: Augmentation, draws: np.ndarray) -> None:
    _, height, width, channels = images.shape
    rows = np.flatnonzero(draws[:, _ERASE] < augmentation.erase)
    drawn = draws[rows]
    smallest, largest = _ERASE_AREAS
    area = (smallest + (largest - smallest) * drawn[:, _ERASE_AREA]) * (height * width)
    aspects = _log_uniform(drawn[:, _ERASE_ASPECT], *_ERASE_ASPECTS)
    box_height = np.clip(np.rint(np.sqrt(area / aspects)), 1, height)
    box_width = np.clip(np.rint(np.sqrt(area * aspects)), 1, width)
    top = np.floor(drawn[:, _ERASE_Y] * (height - box_height + 1))
    left = np.floor(drawn[:, _ERASE_X] * (width - box_width + 1))
    boxes = np.stack([top, top + box_height, left, left + box_width], axis=1).astype(int).tolist()
    colours = (drawn[:, _ERASE_COLOUR] * 256).astype(np.uint8)[:, :channels]
    for row, (from_y, to_y, from_x, to_x), colour in zip(rows.tolist(), boxes, colours, strict=True):
        images[row, from_y:to_y, from_x:to_x] = colour


def _signed(draws: np.ndarray) -> np.ndarray:
    """From [0, 1) to [-1, 1)."""
    return 2 * draws - 1


def _log_uniform(draws: np.ndarray, low: float, high: float) -> np.ndarray:
    return low * (high / low) ** draws
