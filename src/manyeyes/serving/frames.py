"""What the server and its worker processes say to each other over a Unix socket: frames of bytes, nothing pickled.

length of the payload, kind, number of the job or model        payload
----------------------------------------------------------    --------------------------------------------
server   CONFIGURE   settings                                 JSON
         LOAD        a model                                  LOAD head, JSON: name, version, …, sizes; files
         UNLOAD      a model
         IMAGE       a job                                    JOB head, encoded bytes
         PIXELS      a job                                    JOB head, the model's input as bytes
         EXPLAIN     a job                                    JOB head (the label + 1 as top_k), encoded bytes
         PING        0                                        nothing; asks for ALIVE
worker   LOADED      a model                                  JSON: its card
         REFUSED     a model                                  the reason as text
         ANSWER      a job                                    ANSWER head, JSON of predictions or float32 logits
         FAILURE     a job                                    JSON of jobs.Failure
         EXPLANATION a job                                    EXPLANATION head, float32 saliency, uint8 pixels
         ALIVE       0                                        nothing
"""

from __future__ import annotations

import dataclasses
import enum
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from manyeyes.serving.jobs import Failure, Job
from manyeyes.serving.models import Explanation

_HEAD = struct.Struct("<IBI")
_LOAD = struct.Struct("<I")  # bytes of the JSON that follows
JOB = struct.Struct("<Ii")  # number of the model, top_k
ANSWER = struct.Struct("<iBHffff")  # label, abstain, batch size, brightness, queue, decode and predict seconds
_ABSTAIN = (None, False, True)
EXPLANATION = struct.Struct("<iHHB")  # label, height, width, channels


class Kind(enum.IntEnum):
    """What a frame is."""

    CONFIGURE = 1
    LOAD = 2
    UNLOAD = 3
    IMAGE = 4
    PIXELS = 5
    EXPLAIN = 6
    LOADED = 7
    REFUSED = 8
    ANSWER = 9
    FAILURE = 10
    EXPLANATION = 11
    PING = 12
    ALIVE = 13


def pack(kind: Kind, number: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return _HEAD.pack(len(payload), kind, number) + payload


def read(stream: BinaryIO) -> tuple[Kind, int, bytes] | None:
    """Read one frame; None at the end of the stream."""
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    size, kind, number = _HEAD.unpack(head)
    payload = stream.read(size)
    return (Kind(kind), number, payload) if len(payload) == size else None


class Splitter:
    """Cuts a stream that comes in pieces into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Kind, int, bytes]]:
        """Yield the frames that are complete now."""
        self._buffer += data
        position = 0
        while len(self._buffer) - position >= _HEAD.size:
            size, kind, number = _HEAD.unpack_from(self._buffer, position)
            end = position + _HEAD.size + size
            if len(self._buffer) < end:
                break
            yield Kind(kind), number, bytes(self._buffer[position + _HEAD.size : end])
            position = end
        del self._buffer[:position]


def pack_load(number: int, source: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """A bundle for a worker: what to do with it, and its files by name."""
    sizes = {name: len(content) for name, content in files.items()}
    text = json.dumps({**source, "sizes": sizes}).encode()
    size = _LOAD.size + len(text) + sum(sizes.values())
    return b"".join([_HEAD.pack(size, Kind.LOAD, number), _LOAD.pack(len(text)), text, *files.values()])


def unpack_load(payload: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The inverse of `pack_load`."""
    position = _LOAD.size + _LOAD.unpack_from(payload)[0]
    source = json.loads(payload[_LOAD.size : position])
    files = {}
    for name, size in source.pop("sizes").items():
        files[name] = payload[position : position + size]
        position += size
    return source, files


def pack_job(number: int, model: int, job: Job) -> bytes:
    """A job for a worker."""
    is_image = isinstance(job.content, bytes)
    content = job.content if isinstance(job.content, bytes) else job.content.tobytes()
    return pack(Kind.IMAGE if is_image else Kind.PIXELS, number, JOB.pack(model, job.top_k) + content)


def pack_result(number: int, job: Job) -> bytes:
    """What became of a job."""
    if job.failure is not None:
        return pack_failure(number, job.failure)
    head = ANSWER.pack(
        job.label,
        _ABSTAIN.index(job.abstain),
        job.batch_size,
        job.brightness,
        job.queue_seconds,
        job.decode_seconds,
        job.predict_seconds,
    )
    return pack(Kind.ANSWER, number, head + job.payload)


def unpack_answer(payload: bytes, job: Job) -> None:
    """Write an ANSWER into its job."""
    label, abstain, batch_size, brightness, queue, decode, predict = ANSWER.unpack_from(payload)
    job.label, job.abstain, job.batch_size, job.brightness = label, _ABSTAIN[abstain], batch_size, brightness
    job.queue_seconds, job.decode_seconds, job.predict_seconds = queue, decode, predict
    job.payload = payload[ANSWER.size :]


def pack_failure(number: int, failure: Failure) -> bytes:
    """Why a job has no answer."""
    return pack(Kind.FAILURE, number, json.dumps(dataclasses.asdict(failure)).encode())


def unpack_failure(payload: bytes) -> Failure:
    """The inverse of `pack_failure`."""
    return Failure(**json.loads(payload))


def pack_explanation(number: int, explanation: Explanation) -> bytes:
    """Which pixels decided."""
    head = EXPLANATION.pack(explanation.label, *explanation.pixels.shape)
    saliency = np.ascontiguousarray(explanation.saliency, np.float32).tobytes()
    return pack(Kind.EXPLANATION, number, head + saliency + explanation.pixels.tobytes())


def unpack_explanation(payload: bytes) -> Explanation:
    """The inverse of `pack_explanation`."""
    label, height, width, channels = EXPLANATION.unpack_from(payload)
    end = EXPLANATION.size + 4 * height * width
    return Explanation(
        label,
        np.frombuffer(payload[EXPLANATION.size : end], np.float32).reshape(height, width),
        np.frombuffer(payload[end:], np.uint8).reshape(height, width, channels),
    )
