"""What the files around the pixels say: format, size, EXIF orientation, and whether all their bytes are there.

OpenCV decodes many a truncated file to a half-empty image without an error; the structure of the file tells.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from manyeyes.errors import ImageError, Reason
from manyeyes.imaging.fields import need, unpack
from manyeyes.imaging.tiff import exif_orientation, tiff_size, verify_tiff

_DECODED = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
)
_NOT_DECODED = (
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\0\0\x01\0", "icon"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL \r\n", "JPEG XL"),
    (4, b"jP  \r\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"II+\0", "BigTIFF"),
    (0, b"MM\0+", "BigTIFF"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"DDS ", "DirectDraw"),
    (0, b"<svg", "SVG"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    (4, b"ftyphe", "HEIC"),
    (4, b"ftypmif1", "HEIC or AVIF"),
    (4, b"ftyp", "video"),
    (0, b"\x1aE\xdf\xa3", "video"),
)
_BMP_HEADER_BYTES = (12, 40, 52, 56, 64, 108, 124)
# Real progressive files have about ten scans; each costs a pass over the whole image.
_MAX_JPEG_SCANS = 500
# Real files have some hundreds of parts (a GIF one per 255 bytes); one of nothing but tiny parts would take seconds.
_MAX_PARTS = 20_000
_MIN_GIF_BLOCK_BYTES = 32


@dataclass(frozen=True)
class ImageInfo:
    """What the header of an encoded image says.

    Attributes:
        format: "jpeg", "png", "webp", "bmp", "tiff" or "gif".
        width, height: pixels as stored, before EXIF rotation.
    """

    format: str
    width: int
    height: int


def read_header(encoded: bytes) -> ImageInfo:
    """Format and size, from the header alone.

    Raises:
        ImageError: empty, not_an_image, unsupported_format, truncated or corrupt.
    """
    name = _format_of(encoded)
    width, height = _SIZES[name](encoded)
    if width < 1 or height < 1:
        raise ImageError(Reason.CORRUPT, f"{name} of {width} x {height} pixels")
    return ImageInfo(name, width, height)


def verify(encoded: bytes, info: ImageInfo) -> int:
    """Walk through the whole file (a JPEG: up to its pixels) and check that it is all there.

    Returns:
        The EXIF orientation, 1 to 8.

    Raises:
        ImageError: unsupported_format, truncated or corrupt.
    """
    return _VERIFIERS[info.format](encoded)


def _format_of(encoded: bytes) -> str:
    if not encoded:
        raise ImageError(Reason.EMPTY)
    for magic, name in _DECODED:
        if encoded.startswith(magic):
            return name
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        return "webp"
    if encoded.startswith(b"BM") and len(encoded) >= 18 and unpack("<I", encoded, 14)[0] in _BMP_HEADER_BYTES:
        return "bmp"
    for position, magic, name in _NOT_DECODED:
        if encoded[position:].startswith(magic):
            raise ImageError(Reason.UNSUPPORTED_FORMAT, name)
    if encoded.startswith((b"<?xml", b"<!--")) and b"<svg" in encoded[:4096]:
        raise ImageError(Reason.UNSUPPORTED_FORMAT, "SVG")
    raise ImageError(Reason.NOT_AN_IMAGE, f"starts with {encoded[:8].hex(' ')}")


# --- JPEG


def _jpeg_segments(encoded: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, first byte, end) of the payload of each segment, up to the first scan."""
    position = 2
    for _ in range(_MAX_PARTS):
        prefix, marker = unpack(">BB", encoded, position)
        if prefix != 0xFF:
            raise ImageError(Reason.CORRUPT, f"no JPEG marker at byte {position}")
        if marker == 0xFF:
            position += 1
            continue
        if marker == 0xD9:
            raise ImageError(Reason.CORRUPT, "JPEG without pixels")
        (length,) = unpack(">H", encoded, position + 2)
        if length < 2:
            raise ImageError(Reason.CORRUPT, f"JPEG segment of {length} bytes at byte {position}")
        end = position + 2 + length
        need(encoded, end, "a JPEG segment")
        yield marker, position + 4, end
        if marker == 0xDA:
            return
        position = end
    raise ImageError(Reason.CORRUPT, f"JPEG with more than {_MAX_PARTS} segments")


def _jpeg_size(encoded: bytes) -> tuple[int, int]:
    for marker, start, _ in _jpeg_segments(encoded):
        if _is_jpeg_frame(marker):
            precision, height, width = unpack(">BHH", encoded, start)
            if precision != 8:
                raise ImageError(Reason.UNSUPPORTED_FORMAT, f"JPEG with {precision} bits a sample")
            return width, height
    raise ImageError(Reason.CORRUPT, "JPEG without a frame header")


def _verify_jpeg(encoded: bytes) -> int:
    orientation, progressive, num_channels, num_scanned = 1, False, 0, 0
    for marker, start, end in _jpeg_segments(encoded):
        if marker == 0xE1 and encoded.startswith(b"Exif\0\0", start):
            orientation = exif_orientation(encoded[start + 6 : end])
        elif _is_jpeg_frame(marker):
            progressive = marker in (0xC2, 0xCA)
            (num_channels,) = unpack("B", encoded, start + 5)
        elif marker == 0xDA:
            (num_scanned,) = unpack("B", encoded, start)
    # Most files have one scan of all channels. Only the others are searched: that takes a tenth of their decoding.
    if (progressive or num_scanned < num_channels) and encoded.count(b"\xff\xda") > _MAX_JPEG_SCANS:
        raise ImageError(Reason.CORRUPT, f"JPEG with more than {_MAX_JPEG_SCANS} scans")
    return orientation


def _is_jpeg_frame(marker: int) -> bool:
    return 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)


def mend_jpeg_scan(encoded: bytes) -> bytes:
    """Write the only values that a sequential JPEG can have into its scan header; some phones leave zeros there."""
    for marker, start, end in _jpeg_segments(encoded):
        if marker == 0xDA:
            return encoded[: max(start, end - 3)] + b"\x00\x3f\x00" + encoded[end:]
    return encoded


# --- PNG


def _png_size(encoded: bytes) -> tuple[int, int]:
    length, kind = unpack(">I4s", encoded, 8)
    if kind != b"IHDR" or length != 13:
        raise ImageError(Reason.CORRUPT, "PNG that does not begin with IHDR")
    width, height = unpack(">II", encoded, 16)
    return width, height


def _verify_png(encoded: bytes) -> int:
    position, orientation, kind = 8, 1, b""
    data = memoryview(encoded)
    num_chunks = 0
    while kind != b"IEND":
        num_chunks += 1
        if num_chunks > _MAX_PARTS + len(encoded) // 1024:
            raise ImageError(Reason.CORRUPT, f"PNG with more than {num_chunks - 1} chunks")
        length, kind = unpack(">I4s", encoded, position)
        end = position + 8 + length
        need(encoded, end + 4, "a PNG chunk")
        if zlib.crc32(data[position + 4 : end]) != unpack(">I", encoded, end)[0]:
            raise ImageError(Reason.CORRUPT, f"checksum of the PNG chunk at byte {position}")
        if kind == b"eXIf":
            orientation = exif_orientation(encoded[position + 8 : end])
        position = end + 4
    return orientation


def png_transparent_grey(encoded: bytes) -> int | None:
    """The grey value that means transparent, as a sample of the file's depth; None if there is none.

    OpenCV knows the tRNS chunk of colour and palette PNGs only.
    """
    depth, colour_type = unpack("BB", encoded, 24)
    position = encoded.find(b"tRNS")
    if colour_type != 0 or not 0 <= position < encoded.find(b"IDAT"):
        return None
    (value,) = unpack(">H", encoded, position + 4)
    return value if depth >= 8 else value * 255 // (2**depth - 1)


# --- GIF


def _gif_size(encoded: bytes) -> tuple[int, int]:
    width, height = unpack("<HH", encoded, 6)
    return width, height


def _verify_gif(encoded: bytes) -> int:
    position = 13 + _gif_colour_table_bytes(unpack("<B", encoded, 10)[0])
    num_frames = num_blocks = 0
    max_blocks = _MAX_PARTS + len(encoded) // _MIN_GIF_BLOCK_BYTES
    while True:
        (block,) = unpack("<B", encoded, position)
        if block == 0x3B:
            break
        if block == 0x21:
            position += 2
        elif block == 0x2C:
            *_, flags = unpack("<4HB", encoded, position + 1)
            position += 11 + _gif_colour_table_bytes(flags)
            num_frames += 1
        else:
            raise ImageError(Reason.CORRUPT, f"GIF block of unknown kind {block} at byte {position}")
        length = -1
        while length != 0:
            (length,) = unpack("<B", encoded, position)
            position += 1 + length
            num_blocks += 1
            if num_blocks > max_blocks:
                raise ImageError(Reason.CORRUPT, f"GIF with more than {max_blocks} blocks")
    if not num_frames:
        raise ImageError(Reason.CORRUPT, "GIF without a frame")
    return 1


def _gif_colour_table_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


# --- BMP


def _bmp_size(encoded: bytes) -> tuple[int, int]:
    width, height = unpack("<HH" if encoded[14] == 12 else "<ii", encoded, 18)
    return width, abs(height)


def _verify_bmp(encoded: bytes) -> int:
    (start,) = unpack("<I", encoded, 10)
    width, height = _bmp_size(encoded)
    compression, stored_bytes = 0, 0
    if encoded[14] == 12:
        (bits,) = unpack("<H", encoded, 24)
    else:
        bits, compression, stored_bytes = unpack("<HII", encoded, 28)
    if compression in (1, 2):
        if not stored_bytes:
            raise ImageError(Reason.CORRUPT, "compressed BMP that does not tell its size")
        end = start + stored_bytes
    elif compression in (0, 3, 6):
        end = start + (width * bits + 31) // 32 * 4 * height
    else:
        raise ImageError(Reason.UNSUPPORTED_FORMAT, f"BMP with compression {compression}")
    need(encoded, end, "the pixels of a BMP")
    return 1


# --- WebP


def _webp_size(encoded: bytes) -> tuple[int, int]:
    (kind,) = unpack("<4s", encoded, 12)
    if kind == b"VP8X":
        low_width, high_width, low_height, high_height = unpack("<HBHB", encoded, 24)
        return 1 + low_width + (high_width << 16), 1 + low_height + (high_height << 16)
    if kind == b"VP8L":
        signature, bits = unpack("<BI", encoded, 20)
        if signature != 0x2F:
            raise ImageError(Reason.CORRUPT, "WebP without its lossless signature")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        start_code, width, height = unpack("<3sHH", encoded, 23)
        if start_code != b"\x9d\x01\x2a":
            raise ImageError(Reason.CORRUPT, "WebP without its start code")
        return width & 0x3FFF, height & 0x3FFF
    raise ImageError(Reason.CORRUPT, f"WebP that begins with a chunk {kind!r}")


def _verify_webp(encoded: bytes) -> int:
    end_of_file = 8 + unpack("<I", encoded, 4)[0]
    need(encoded, end_of_file, "a WebP")
    position, orientation = 12, 1
    num_chunks = 0
    while position < end_of_file:
        num_chunks += 1
        if num_chunks > _MAX_PARTS:
            raise ImageError(Reason.CORRUPT, f"WebP with more than {_MAX_PARTS} chunks")
        kind, length = unpack("<4sI", encoded, position)
        end = position + 8 + length
        if end > end_of_file:
            raise ImageError(Reason.CORRUPT, f"WebP chunk at byte {position} is longer than the file")
        if kind == b"EXIF":
            orientation = exif_orientation(encoded[position + 8 : end].removeprefix(b"Exif\0\0"))
        position = end + length % 2
    return orientation


_SIZES: dict[str, Callable[[bytes], tuple[int, int]]] = {
    "jpeg": _jpeg_size,
    "png": _png_size,
    "gif": _gif_size,
    "bmp": _bmp_size,
    "webp": _webp_size,
    "tiff": tiff_size,
}
_VERIFIERS: dict[str, Callable[[bytes], int]] = {
    "jpeg": _verify_jpeg,
    "png": _verify_png,
    "gif": _verify_gif,
    "bmp": _verify_bmp,
    "webp": _verify_webp,
    "tiff": verify_tiff,
}
