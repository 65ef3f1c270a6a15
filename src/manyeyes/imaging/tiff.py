"""TIFF files, and the small TIFF that EXIF data is."""

from __future__ import annotations

import zlib

from manyeyes.errors import ImageError, Reason
from manyeyes.imaging.fields import need, unpack

_MAX_PAGES = 10_000
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_DEFLATE = (8, 32946)
_INFLATE_BYTES = 1 << 20
_MAX_PIXEL_BYTES = 8
_MAX_PADDING_BYTES = 64 << 20
_INTEGERS = {1: "B", 3: "H", 4: "I"}

Tags = dict[int, tuple[int, int, int]]
"""Tag to (type, count, position of the values)."""


def exif_orientation(tiff: bytes) -> int:
    """The orientation in an EXIF block; 1, upright, where it is missing or damaged."""
    try:
        order = _byte_order(tiff)
        tags, _ = _page(tiff, order, unpack(order + "I", tiff, 4)[0], check_values=False)
        return _orientation(tiff, order, tags)
    except ImageError:
        return 1


def _orientation(encoded: bytes, order: str, tags: Tags) -> int:
    orientation = _values(encoded, order, tags, 274, (1,))[0]
    return orientation if 1 <= orientation <= 8 else 1


def tiff_size(encoded: bytes) -> tuple[int, int]:
    """Width and height of the first page."""
    order = _byte_order(encoded)
    tags, _ = _page(encoded, order, unpack(order + "I", encoded, 4)[0], check_values=False)
    return _values(encoded, order, tags, 256, (0,))[0], _values(encoded, order, tags, 257, (0,))[0]


def verify_tiff(encoded: bytes) -> int:
    """Check that all pages are there, and that the first is one that OpenCV reads right; its orientation."""
    order = _byte_order(encoded)
    first = position = unpack(order + "I", encoded, 4)[0]
    seen: set[int] = set()
    orientation = 1
    while position:
        if position in seen or len(seen) >= _MAX_PAGES:
            raise ImageError(Reason.CORRUPT, "TIFF whose pages do not end")
        seen.add(position)
        tags, following = _page(encoded, order, position, check_values=True)
        strips = _strips(encoded, order, tags)
        if position == first:
            orientation = _orientation(encoded, order, tags)
            _refuse_rare(encoded, order, tags)
            if _values(encoded, order, tags, 259, (1,))[0] in _DEFLATE:
                width, height = tiff_size(encoded)
                _verify_deflate(encoded, strips, width * height * _MAX_PIXEL_BYTES + _MAX_PADDING_BYTES)
        position = following
    return orientation


def _refuse_rare(encoded: bytes, order: str, tags: Tags) -> None:
    """Refuse what OpenCV decodes to something else than it means, or not at all."""
    bits = max(_values(encoded, order, tags, 258, (1,)))
    sample_format = max(_values(encoded, order, tags, 339, (1,)))
    colour_space = _values(encoded, order, tags, 262, (1,))[0]
    num_samples = _values(encoded, order, tags, 277, (1,))[0]
    planes = _values(encoded, order, tags, 284, (1,))[0]
    transparency = _values(encoded, order, tags, 338, (0,))[0]
    if bits not in (1, 8, 16) or sample_format > 1:
        raise ImageError(Reason.UNSUPPORTED_FORMAT, f"TIFF with {bits} bits a sample in format {sample_format}")
    if num_samples not in (1, 3, 4) or colour_space not in ((1, 2) if bits > 8 else range(7)):
        raise ImageError(
            Reason.UNSUPPORTED_FORMAT, f"TIFF with {num_samples} samples of {bits} bits in colour space {colour_space}"
        )
    if bits > 8 and planes != 1:
        raise ImageError(Reason.UNSUPPORTED_FORMAT, f"TIFF with {bits} bits a sample in separate planes")
    if colour_space == 2 and num_samples == 4 and transparency not in ((2,) if bits > 8 else (1, 2)):
        raise ImageError(Reason.UNSUPPORTED_FORMAT, f"TIFF with transparency of kind {transparency} in {bits} bits")


def _strips(encoded: bytes, order: str, tags: Tags) -> list[tuple[int, int]]:
    """Where the pixels of a page begin and end in the file."""
    strips = []
    for offsets_tag, lengths_tag in ((273, 279), (324, 325)):
        offsets = _values(encoded, order, tags, offsets_tag, ())
        lengths = _values(encoded, order, tags, lengths_tag, ())
        strips += [(offset, offset + length) for offset, length in zip(offsets, lengths, strict=False)]
    if not strips:
        raise ImageError(Reason.CORRUPT, "TIFF page without pixels")
    need(encoded, max(end for _, end in strips), "a TIFF strip")
    return strips


def _verify_deflate(encoded: bytes, strips: list[tuple[int, int]], max_bytes: int) -> None:
    """OpenCV reads 8-bit TIFF in a way that passes over damage; the checksum at the end of each strip tells."""
    num_bytes = 0
    for start, end in strips:
        stream = zlib.decompressobj()
        compressed = encoded[start:end]
        while not stream.eof:
            try:
                inflated = stream.decompress(compressed, _INFLATE_BYTES)
            except zlib.error as error:
                raise ImageError(Reason.CORRUPT, f"TIFF strip: {error}") from None
            compressed = stream.unconsumed_tail
            if not inflated and not stream.eof:
                raise ImageError(Reason.TRUNCATED, "a TIFF strip ends within its compressed data")
            num_bytes += len(inflated)
            if num_bytes > max_bytes:
                raise ImageError(Reason.CORRUPT, f"TIFF strips inflate to more than {max_bytes} bytes")


def _byte_order(encoded: bytes) -> str:
    if encoded.startswith(b"II*\0"):
        return "<"
    if encoded.startswith(b"MM\0*"):
        return ">"
    raise ImageError(Reason.CORRUPT, "EXIF that is no TIFF")


def _page(encoded: bytes, order: str, position: int, *, check_values: bool) -> tuple[Tags, int]:
    """The tags of one page, and the position of the next page (0: none)."""
    (num_tags,) = unpack(order + "H", encoded, position)
    tags: Tags = {}
    for entry in range(position + 2, position + 2 + 12 * num_tags, 12):
        tag, kind, count, value = unpack(order + "HHII", encoded, entry)
        num_bytes = _TYPE_BYTES.get(kind, 1) * count
        start = entry + 8 if num_bytes <= 4 else value
        if check_values:
            need(encoded, start + num_bytes, f"the values of TIFF tag {tag}")
        tags[tag] = kind, count, start
    end = position + 2 + 12 * num_tags
    # EXIF blocks may end without saying that there is no next page.
    following = unpack(order + "I", encoded, end)[0] if check_values or end + 4 <= len(encoded) else 0
    return tags, following


def _values(encoded: bytes, order: str, tags: Tags, tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
    kind, count, start = tags.get(tag, (0, 0, 0))
    if kind not in _INTEGERS or not count:
        return default
    need(encoded, start + count * _TYPE_BYTES[kind], f"the values of TIFF tag {tag}")
    return unpack(f"{order}{count}{_INTEGERS[kind]}", encoded, start)
