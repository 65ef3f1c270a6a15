"""The one way from encoded bytes to the pixels that a model sees; training, batch, stream and HTTP all call it.

A `Preprocessing` is a value: it is stored in dataset manifests and bundles, and its fingerprint says whether two of
them make the same pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from manyeyes import config, storage
from manyeyes.errors import ConfigError
from manyeyes.imaging import geometry
from manyeyes.imaging.decode import DECODER, DecodeLimits, decode

Fit = Literal["crop", "pad", "stretch"]
Interpolation = Literal["auto", "area", "linear", "cubic", "nearest"]


@dataclass(frozen=True)
class Step:
    """One geometric step.

    op:
        "resize": to exactly height x width, ignoring the aspect ratio.
        "resize_short": the shorter side to `height` pixels, keeping the aspect ratio.
        "cover": the smallest size that covers height x width, keeping the aspect ratio.
        "crop": the central height x width; a smaller image is padded first.
        "pad": into height x width whole, keeping the aspect ratio, centred on the background.
    """

    op: Literal["resize", "resize_short", "cover", "crop", "pad"]
    height: int
    width: int


@dataclass(frozen=True)
class Preprocessing:
    """How encoded bytes become pixels.

    Attributes:
        channels: 3 (RGB) or 1 (grey).
        background: grey value in [0, 255] that transparency is laid on and padding is filled with.
        interpolation: "auto" is area for shrinking and linear for enlarging.
        steps: applied in order; none keeps the size of the image.
        decoder: the library that decodes; part of the fingerprint because decoders differ in pixels.
    """

    channels: int = 3
    background: int = 255
    interpolation: Interpolation = "auto"
    steps: tuple[Step, ...] = field(default=())
    decoder: str = DECODER

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ConfigError(f"channels={self.channels} is not possible. Use 3 (RGB) or 1 (grey).")
        if self.decoder != DECODER:
            raise ConfigError(
                f"it was made with the decoder {self.decoder!r}, and {DECODER!r}, which this Manyeyes has, gives other "
                "pixels. Use the version of Manyeyes that made it, or make it again."
            )
        for step in self.steps:
            if step.height < 1 or step.width < 1:
                raise ConfigError(
                    f"{step.op} to {step.height} x {step.width} pixels is not possible. Use sizes of at least 1."
                )

    @classmethod
    def for_size(
        cls, height: int, width: int, fit: Fit = "crop", channels: int = 3, resize_short: int | None = None
    ) -> Preprocessing:
        """The usual ways to a fixed size.

        Args:
            height, width: pixels.
            fit: "crop" fills the size and cuts the rest, "pad" shows all on a background, "stretch" ignores the aspect.
            channels: 3 or 1.
            resize_short: with "crop": the shorter side before the cut (often 256 for 224); default: just enough.

        Raises:
            ConfigError: an unknown fit, or a resize_short that leaves less than is cut out.
        """
        if fit == "crop" and resize_short is not None and resize_short < max(height, width):
            raise ConfigError(
                f"resize_short={resize_short} leaves less than the {height} x {width} pixels that are cut out. "
                f"Use at least {max(height, width)}."
            )
        if fit == "stretch":
            steps: tuple[Step, ...] = (Step("resize", height, width),)
        elif fit == "pad":
            steps = (Step("pad", height, width),)
        elif fit == "crop":
            scale = Step("resize_short", resize_short, resize_short) if resize_short else Step("cover", height, width)
            steps = (scale, Step("crop", height, width))
        else:
            raise ConfigError(f"fit={fit!r} is not one of crop, pad, stretch.")
        return cls(channels=channels, steps=steps)

    def then(self, other: Preprocessing) -> Preprocessing:
        """The steps of this one, then those of `other`; channels are those of `other`."""
        return Preprocessing(
            other.channels, self.background, other.interpolation, self.steps + other.steps, self.decoder
        )

    @property
    def output_shape(self) -> tuple[int, int, int] | None:
        """(height, width, channels) of every result in pixels, or None if it depends on the image."""
        if not self.steps or self.steps[-1].op in ("resize_short", "cover"):
            return None
        return self.steps[-1].height, self.steps[-1].width, self.channels

    @property
    def fingerprint(self) -> str:
        """16 hex digits that are equal exactly when the fields are."""
        return hashlib.sha256(storage.canonical_json(self.to_dict())).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return config.to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`."""
        return config.from_dict(cls, values, "preprocessing")

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Run the geometric steps on a uint8 array (H, W, channels); returns (H', W', channels)."""
        for step in self.steps:
            image = _STEPS[step.op](image, step.height, step.width, self.interpolation, self.background)
        return image

    def __call__(self, encoded: bytes, limits: DecodeLimits | None = None) -> np.ndarray:
        """Decode and preprocess.

        Returns:
            uint8 array (height, width, channels), RGB order.

        Raises:
            ImageError: the bytes can't be decoded, or exceed the limits.
        """
        image = decode(encoded, channels=self.channels, background=self.background, limits=limits)
        return self.apply(image)


_STEPS = {
    "resize": lambda image, height, width, how, fill: geometry.resize(image, height, width, how),
    "resize_short": lambda image, height, width, how, fill: geometry.resize_short(image, height, how),
    "cover": lambda image, height, width, how, fill: geometry.cover(image, height, width, how),
    "crop": lambda image, height, width, how, fill: geometry.center_crop(image, height, width, fill),
    "pad": lambda image, height, width, how, fill: geometry.fit_into(image, height, width, how, fill),
}
