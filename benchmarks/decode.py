"""How many 500x375 JPEGs a second one core decodes: OpenCV, simplejpeg, and our decode() with all its checks.

    python benchmarks/decode.py

They take turns on each image, and for each image the shortest time of all turns counts: a neighbour on the machine can
only make a turn longer. The ratios hold better than the rates.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg

from manyeyes.imaging.decode import decode


def generated_jpegs(num: int, quality: int = 90) -> list[bytes]:
    """Photo-like images: smooth shapes, edges and some grain, about 75 kB each."""
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(num):
        image = cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), (500, 375), interpolation=cv2.INTER_CUBIC)
        for _ in range(12):
            centre = tuple(int(value) for value in rng.integers(0, (500, 375)))
            colour = tuple(int(value) for value in rng.integers(0, 256, 3))
            cv2.circle(image, centre, int(rng.integers(5, 80)), colour, -1, cv2.LINE_AA)
        grain = rng.normal(0, 6, image.shape)
        image = np.clip(image + grain, 0, 255).astype(np.uint8)
        jpegs.append(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes())
    return jpegs


def seconds(function: Callable[[bytes], object], encoded: bytes) -> float:
    start = time.perf_counter()
    function(encoded)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-images", type=int, default=100)
    parser.add_argument("--num-turns", type=int, default=10)
    arguments = parser.parse_args()
    jpegs = generated_jpegs(arguments.num_images)
    ways: dict[str, Callable[[bytes], object]] = {
        "cv2.imdecode": lambda encoded: cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB),
        "simplejpeg.decode_jpeg": lambda encoded: simplejpeg.decode_jpeg(encoded, "RGB"),
        "manyeyes decode()": decode,
        "manyeyes decode(channels=1)": lambda encoded: decode(encoded, channels=1),
    }
    shortest = {name: [float("inf")] * len(jpegs) for name in ways}
    for _ in range(arguments.num_turns):
        for index, encoded in enumerate(jpegs):
            for name, function in ways.items():
                shortest[name][index] = min(shortest[name][index], seconds(function, encoded))
    rates = {name: len(jpegs) / sum(times) for name, times in shortest.items()}
    mean_kilobytes = sum(map(len, jpegs)) / len(jpegs) / 1000
    print(
        f"{len(jpegs)} JPEGs of 500x375, {mean_kilobytes:.0f} kB each, one thread, best of {arguments.num_turns} turns"
    )
    print(f"{'':30}{'images/s':>10}{'of cv2':>10}{'of simplejpeg':>16}")
    for name, rate in rates.items():
        print(
            f"{name:30}{rate:10.0f}{rate / rates['cv2.imdecode']:10.2f}{rate / rates['simplejpeg.decode_jpeg']:16.3f}"
        )


if __name__ == "__main__":
    main()
