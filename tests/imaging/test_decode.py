from __future__ import annotations

import contextlib
import io
import struct
import time
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from manyeyes.errors import ConfigError, ImageError, Reason
from manyeyes.imaging.decode import DecodeLimits, ImageInfo, decode, inspect, probe
from manyeyes.imaging.phash import hamming_distance, perceptual_hash
from manyeyes.imaging.preprocessing import Preprocessing

Encode = Callable[..., bytes]
fixtures_are_constants = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def as_pillow_sees_it(encoded: bytes, background: int = 255) -> np.ndarray:
    picture = Image.open(io.BytesIO(encoded))
    picture.seek(0)
    if picture.mode.startswith("I"):
        return np.repeat((np.array(picture) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if picture.mode in ("RGBA", "LA") or "transparency" in picture.info:
        pixels = np.array(picture.convert("RGBA")).astype(int)
        colours, opacity = pixels[:, :, :3], pixels[:, :, 3:]
        return ((colours * opacity + background * (255 - opacity) + 127) // 255).astype(np.uint8)
    return np.array(picture.convert("RGB"))


def reason_of(encoded: bytes, **options: object) -> Reason:
    with pytest.raises(ImageError) as caught:
        decode(encoded, **options)
    return caught.value.reason


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("background", [0, 255])
def test_every_format_gives_the_pixels_that_another_library_sees(samples: dict[str, bytes], background: int) -> None:
    for name, encoded in samples.items():
        image = decode(encoded, background=background)
        expected = as_pillow_sees_it(encoded, background)
        assert image.dtype == np.uint8 and image.flags.c_contiguous, name
        assert image.shape == (17, 23, 3), name
        assert np.abs(image.astype(int) - expected).max() <= 1, name


def test_grey_is_the_brightness_of_the_colours(samples: dict[str, bytes]) -> None:
    for name, encoded in samples.items():
        grey = decode(encoded, channels=1)
        assert grey.shape == (17, 23, 1) and grey.flags.c_contiguous, name
        expected = cv2.cvtColor(decode(encoded), cv2.COLOR_RGB2GRAY)
        # JPEG stores brightness itself; colours that were cut off at 0 or 255 give another.
        assert np.abs(grey[:, :, 0].astype(int) - expected).mean() < 1.5, name


def test_probe_tells_format_and_size_of_every_format(samples: dict[str, bytes]) -> None:
    for name, encoded in samples.items():
        assert probe(encoded) == ImageInfo(name.split()[0], width=23, height=17)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_held_in_any_way_gives_an_upright_image(
    small: np.ndarray, encode: Encode, format_name: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if format_name == "WEBP" else {}
    encoded = encode(small, format_name, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    np.testing.assert_array_equal(decode(encoded), np.array(upright))
    assert (probe(encoded).width, probe(encoded).height) == (23, 17)


def test_every_truncation_of_every_format_is_refused(samples: dict[str, bytes]) -> None:
    for name, encoded in samples.items():
        for length in range(len(encoded)):
            with pytest.raises(ImageError):
                decode(encoded[:length])
                pytest.fail(f"{name} cut to {length} of {len(encoded)} bytes was decoded")


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_a_photo_that_lost_its_end_is_called_truncated(photo: np.ndarray, encode: Encode, kept: float) -> None:
    for format_name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        encoded = encode(photo, format_name)
        assert reason_of(encoded[: int(len(encoded) * kept)]) == Reason.TRUNCATED, format_name


def test_a_jpeg_with_a_hole_of_zeros_is_called_corrupt(photo: np.ndarray, encode: Encode) -> None:
    encoded = encode(photo, "JPEG")
    middle = len(encoded) // 2
    damaged = encoded[:middle] + bytes(500) + encoded[middle + 500 :]
    assert cv2.imdecode(np.frombuffer(damaged, np.uint8), cv2.IMREAD_COLOR) is not None, "OpenCV would let it pass"
    assert reason_of(damaged) in (Reason.CORRUPT, Reason.TRUNCATED)


def test_a_phone_that_leaves_the_scan_header_empty_gives_its_photo(photo: np.ndarray, encode: Encode) -> None:
    encoded = encode(photo, "JPEG")
    scan = encoded.rindex(b"\xff\xda")
    last_of_header = scan + 2 + int.from_bytes(encoded[scan + 2 : scan + 4])
    phone = encoded[: last_of_header - 3] + bytes(3) + encoded[last_of_header:]
    np.testing.assert_array_equal(decode(phone), decode(encoded))
    assert reason_of(phone[:-500]) == Reason.TRUNCATED, "its damage is still found"


@given(data=st.data())
@settings(fixtures_are_constants, max_examples=1500)
def test_a_flipped_bit_is_refused_or_leaves_an_image_of_the_right_shape(
    samples: dict[str, bytes], data: st.DataObject
) -> None:
    encoded = bytearray(samples[data.draw(st.sampled_from(sorted(samples)))])
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= 1 << data.draw(st.integers(0, 7))
    limits = DecodeLimits(max_pixels=1_000_000)
    try:
        image = decode(bytes(encoded), limits=limits)
    except ImageError:
        return
    info = probe(bytes(encoded))
    assert image.dtype == np.uint8 and image.shape in ((info.height, info.width, 3), (info.width, info.height, 3))


def test_any_flipped_bit_of_a_png_is_refused(samples: dict[str, bytes]) -> None:
    encoded = samples["png"]
    for position in range(len(encoded)):
        damaged = bytearray(encoded)
        damaged[position] ^= 0x10
        with pytest.raises(ImageError):
            decode(bytes(damaged))


@given(st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_random_bytes_are_refused(encoded: bytes) -> None:
    with pytest.raises(ImageError):
        decode(encoded)
    with pytest.raises(ImageError):
        probe(encoded)


@given(
    st.sampled_from(
        [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"MM\0*", b"BM", b"RIFF\x90\0\0\0WEBPVP8 "]
    ),
    st.binary(max_size=300),
)
@settings(max_examples=1000, deadline=None)
def test_random_bytes_after_a_known_beginning_are_refused(magic: bytes, rest: bytes) -> None:
    with pytest.raises(ImageError):
        decode(magic + rest, limits=DecodeLimits(max_pixels=1_000_000))


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"hello, this is a text file", Reason.NOT_AN_IMAGE),
        (b"BM is also how a text may begin, even a rather long one", Reason.NOT_AN_IMAGE),
        (bytes(1000), Reason.NOT_AN_IMAGE),
        (b"%PDF-1.7 ...", Reason.UNSUPPORTED_FORMAT),
        (b"8BPS\0\1" + bytes(20), Reason.UNSUPPORTED_FORMAT),
        (b"\0\0\0\x20ftypavif" + bytes(20), Reason.UNSUPPORTED_FORMAT),
        (b"\0\0\0\x18ftypheic" + bytes(20), Reason.UNSUPPORTED_FORMAT),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", Reason.UNSUPPORTED_FORMAT),
        (b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg/>", Reason.UNSUPPORTED_FORMAT),
        (b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code></Error>", Reason.NOT_AN_IMAGE),
        (b"\xff\xd8\xff", Reason.TRUNCATED),
    ],
)
def test_what_is_no_image_that_we_decode_says_why(encoded: bytes, reason: Reason) -> None:
    assert reason_of(encoded) == reason
    with pytest.raises(ImageError) as caught:
        probe(encoded)
    assert caught.value.reason == reason


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_tiffs_without_plain_colours_are_called_unsupported(small: np.ndarray, encode: Encode, mode: str) -> None:
    assert reason_of(encode(Image.fromarray(small).convert(mode), "TIFF")) == Reason.UNSUPPORTED_FORMAT


def test_a_file_above_the_limit_of_bytes_is_refused(samples: dict[str, bytes]) -> None:
    encoded = samples["jpeg"]
    assert reason_of(encoded, limits=DecodeLimits(max_bytes=len(encoded) - 1)) == Reason.TOO_MANY_BYTES
    decode(encoded, limits=DecodeLimits(max_bytes=len(encoded)))


def test_the_limit_of_pixels_holds_for_every_format(samples: dict[str, bytes]) -> None:
    for encoded in samples.values():
        assert reason_of(encoded, limits=DecodeLimits(max_pixels=17 * 23 - 1)) == Reason.TOO_MANY_PIXELS
        decode(encoded, limits=DecodeLimits(max_pixels=17 * 23))


def test_a_pixel_bomb_is_refused_by_its_header(samples: dict[str, bytes]) -> None:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1_000_000)))
    jpeg = bytearray(samples["jpeg"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    gif = bytearray(samples["gif"])
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    bmp = bytearray(samples["bmp"])
    bmp[18:26] = struct.pack("<ii", 1 << 30, 1 << 30)
    webp = bytearray(samples["webp animation"])
    webp[24:30] = b"\xff\xff\0\xff\xff\0"
    for bomb in (png + png_chunk(b"IEND", b""), jpeg, gif, bmp, webp):
        assert reason_of(bytes(bomb)) == Reason.TOO_MANY_PIXELS


def test_a_header_that_promises_more_pixels_than_there_are_is_refused(samples: dict[str, bytes]) -> None:
    jpeg = bytearray(samples["jpeg"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 2000, 2000)
    short = zlib.compress(bytes(100))
    header = struct.pack(">IIBBBBB", 100, 100, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", short) + png_chunk(b"IEND", b"")
    for encoded in (bytes(jpeg), png):
        assert reason_of(encoded) in (Reason.TRUNCATED, Reason.CORRUPT)


def test_a_jpeg_that_would_take_minutes_by_thousands_of_scans_is_refused(photo: np.ndarray, encode: Encode) -> None:
    encoded = encode(photo, "JPEG", progressive=True)
    start = encoded.rindex(b"\xff\xda")
    scan = encoded[start:-2]
    assert reason_of(encoded[:-2] + scan * 600 + b"\xff\xd9") == Reason.CORRUPT


def test_damage_in_a_compressed_tiff_is_found_by_its_checksum(photo: np.ndarray, encode: Encode) -> None:
    encoded = bytearray(encode(photo, "TIFF", compression="tiff_adobe_deflate"))
    encoded[len(encoded) // 2] ^= 1
    assert reason_of(bytes(encoded)) == Reason.CORRUPT


def test_a_small_tiff_that_inflates_without_end_is_refused(small: np.ndarray, encode: Encode) -> None:
    encoded = encode(small, "TIFF", compression="tiff_adobe_deflate")
    bomb = zlib.compress(bytes(80 << 20))
    pages = bytearray(encoded + bomb)
    (first,) = struct.unpack_from("<I", encoded, 4)
    for entry in range(first + 2, first + 2 + 12 * struct.unpack_from("<H", encoded, first)[0], 12):
        tag = struct.unpack_from("<H", encoded, entry)[0]
        if tag in (273, 279):
            struct.pack_into("<HII", pages, entry + 2, 4, 1, len(encoded) if tag == 273 else len(bomb))
    with pytest.raises(ImageError, match="inflate to more than"):
        decode(bytes(pages))


def test_a_32_bit_bmp_without_transparency_is_not_blank(small: np.ndarray) -> None:
    pixels = np.dstack([small[::-1, :, ::-1], np.zeros(small.shape[:2], np.uint8)]).tobytes()
    file_header = b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54)
    picture_header = struct.pack("<IiiHHIIiiII", 40, 23, 17, 1, 32, 0, len(pixels), 0, 0, 0, 0)
    np.testing.assert_array_equal(decode(file_header + picture_header + pixels), small)


def test_bytes_after_the_end_do_no_harm(samples: dict[str, bytes]) -> None:
    for name in ("jpeg", "png", "gif", "bmp", "webp"):
        np.testing.assert_array_equal(decode(samples[name] + b"trailing"), decode(samples[name]))


def test_bad_images_leave_no_noise_on_stderr(samples: dict[str, bytes], capfd: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).bytes(5000)
    for encoded in samples.values():
        for damaged in (encoded[: len(encoded) // 2], encoded[:200] + noise[: len(encoded) - 200]):
            with contextlib.suppress(ImageError):
                decode(damaged)
    assert capfd.readouterr().err == ""


def test_preprocessing_refuses_the_pixels_of_another_decoder() -> None:
    values = Preprocessing.for_size(32, 32).to_dict()
    assert Preprocessing.from_dict(values) == Preprocessing.for_size(32, 32)
    with pytest.raises(ConfigError, match="other pixels"):
        Preprocessing.from_dict(values | {"decoder": "opencv"})


@pytest.mark.parametrize("orientation", range(1, 9))
def test_inspection_tells_size_and_looks_of_a_photo_without_all_its_pixels(
    photo: np.ndarray, encode: Encode, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(photo[:, 11:], "JPEG", exif=exif)
    whole = decode(encoded)
    image, height, width = inspect(encoded)
    assert (height, width, 3) == whole.shape
    assert 96 <= min(image.shape[:2]) < 2 * 96 + 1 <= min(whole.shape[:2])
    assert hamming_distance(perceptual_hash(image), perceptual_hash(whole)) <= 4


def test_inspection_refuses_what_decoding_refuses(samples: dict[str, bytes], photo: np.ndarray, encode: Encode) -> None:
    for encoded in samples.values():
        image, height, width = inspect(encoded)
        assert (height, width) == decode(encoded).shape[:2] and min(image.shape[:2]) >= min(96, height, width)
    encoded = encode(photo, "JPEG")
    middle = len(encoded) // 2
    for damaged in (encoded[:-2000], encoded[:middle] + bytes(500) + encoded[middle + 500 :], b"", b"GIF89a"):
        with pytest.raises(ImageError) as caught:
            inspect(damaged)
        assert caught.value.reason == reason_of(damaged)


@pytest.mark.parametrize(
    "encoded",
    [
        b"\xff\xd8" + b"\xff" * (8 << 20),
        b"\xff\xd8" + b"\xff\xe0\x00\x02" * (2 << 20),
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", bytes([0, 0, 0, 8] * 2 + [8, 0, 0, 0, 0]))
        + png_chunk(b"teXt", b"") * 500_000,
        b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1a" * (4 << 20),
        b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe\0" * (2 << 20),
        b"RIFF\x16\0\x80\0WEBPVP8X\x0a\0\0\0" + bytes(10) + b"JUNK\0\0\0\0" * (1 << 20),
    ],
    ids=["JPEG fill bytes", "JPEG segments", "PNG chunks", "GIF blocks", "GIF extensions", "WebP chunks"],
)
def test_millions_of_tiny_parts_are_refused_instead_of_walked_through(encoded: bytes) -> None:
    started = time.process_time()
    with pytest.raises(ImageError, match="more than"):
        decode(encoded)
    # Walking through them takes 2 to 5 seconds.
    assert time.process_time() - started < 1
