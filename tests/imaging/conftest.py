from __future__ import annotations

import io
from collections.abc import Callable
from importlib import resources

import cv2
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """A photo as RGB, uint8 (224, 224, 3)."""
    return photos_of(["imagenet_00_243.jpg"])[0]


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    """Twenty different photos as RGB."""
    folder = resources.files("foolbox") / "data"
    return photos_of(sorted(file.name for file in folder.iterdir() if file.name.startswith("imagenet_"))[:20])


def photos_of(names: list[str]) -> list[np.ndarray]:
    folder = resources.files("foolbox") / "data"
    return [np.array(Image.open(io.BytesIO((folder / name).read_bytes())).convert("RGB")) for name in names]


@pytest.fixture(scope="session")
def small(photo: np.ndarray) -> np.ndarray:
    """The photo at 17 x 23 pixels: odd sizes, and small enough to try every truncation of a file."""
    return cv2.resize(photo, (23, 17), interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """Encode an array or a PIL image with Pillow: encode(image, "PNG", **options)."""

    def run(image: np.ndarray | Image.Image, format_name: str, **options: object) -> bytes:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image.squeeze())
        buffer = io.BytesIO()
        picture.save(buffer, format_name, **options)
        return buffer.getvalue()

    return run


@pytest.fixture(scope="session")
def samples(small: np.ndarray, encode: Callable[..., bytes]) -> dict[str, bytes]:
    """The same picture in every format and many of their variants."""
    picture = Image.fromarray(small)
    palette = picture.quantize(16)
    see_through = picture.copy()
    see_through.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 23).astype(np.uint8), (17, 1))))
    deep = Image.fromarray(np.array(picture.convert("L")).astype(np.uint16) * 257)
    bgr16 = small[:, :, ::-1].astype(np.uint16) * 257
    return {
        "jpeg": encode(picture, "JPEG"),
        "jpeg progressive": encode(picture, "JPEG", progressive=True),
        "jpeg grey": encode(picture.convert("L"), "JPEG"),
        "jpeg cmyk": encode(picture.convert("CMYK"), "JPEG", quality=95),
        "jpeg 4:4:4": encode(picture, "JPEG", subsampling=0),
        "jpeg 4:1:1": cv2.imencode(
            ".jpg", small[:, :, ::-1], [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411]
        )[1].tobytes(),
        "jpeg restart markers": encode(picture, "JPEG", restart_marker_blocks=1),
        "png": encode(picture, "PNG"),
        "png alpha": encode(see_through, "PNG"),
        "png grey alpha": encode(see_through.convert("LA"), "PNG"),
        "png grey": encode(picture.convert("L"), "PNG"),
        "png palette": encode(palette, "PNG"),
        "png palette transparent": encode(palette, "PNG", transparency=3),
        "png grey transparent": encode(picture.convert("L"), "PNG", transparency=int(small[3, 3].mean())),
        "png black and white": encode(picture.convert("1"), "PNG"),
        "png 16-bit grey": encode(deep, "PNG"),
        "png 16-bit": cv2.imencode(".png", bgr16)[1].tobytes(),
        "webp": encode(picture, "WEBP"),
        "webp lossless": encode(picture, "WEBP", lossless=True),
        "webp alpha": encode(see_through, "WEBP", lossless=True),
        "webp animation": encode(picture, "WEBP", save_all=True, append_images=[picture.rotate(180)], lossless=True),
        "bmp": encode(picture, "BMP"),
        "bmp palette": encode(palette, "BMP"),
        "bmp grey": encode(picture.convert("L"), "BMP"),
        "bmp black and white": encode(picture.convert("1"), "BMP"),
        "tiff": encode(picture, "TIFF"),
        "tiff lzw": encode(picture, "TIFF", compression="tiff_lzw"),
        "tiff deflate": encode(picture, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": encode(picture, "TIFF", compression="jpeg"),
        "tiff cmyk": encode(picture.convert("CMYK"), "TIFF"),
        "tiff palette": encode(palette, "TIFF"),
        "tiff grey": encode(picture.convert("L"), "TIFF"),
        "tiff 16-bit grey": encode(deep, "TIFF"),
        "tiff 16-bit": cv2.imencode(".tiff", bgr16)[1].tobytes(),
        "gif": encode(palette, "GIF"),
        "gif transparent": encode(palette, "GIF", transparency=3),
        "gif animation": encode(palette, "GIF", save_all=True, append_images=[palette.rotate(180)]),
    }
