"""Prediction on Spark: `predict_dataframe` beside a user's own `predict_batch_udf` with the same ONNX model.

    python benchmarks/predict_spark.py [--images 2000] [--rounds 5] [--only cnn|efficientnet]

The same JPEG photos of 500 x 375, read by Spark's `binaryFile` or by their paths, in one session of local[2], one
thread a task. The user's function is what the documentation of `predict_batch_udf` suggests: decode by `cv2.imdecode`,
resize by `cv2.resize`, stack, run an ONNX Runtime session of the bundle's own `model.onnx`, and return label and
probability. What differs: Manyeyes decodes strictly and averages where it shrinks, gives the five likeliest classes,
and lives through a damaged image. The sides take turns, so that what else runs on the machine hits all. "decode alone"
and "model alone" are one core's bounds of the user's function, without Spark.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table
from untrained import export_untrained

GOAL = 3.0
BATCH = 32
MODELS = {
    "cnn": ("cnn", 64, {"width": 16, "stages": 3, "convolutions": 1}),
    "efficientnet": ("efficientnet_lite0", 224, {}),
}


def write_photos(folder: Path, count: int) -> None:
    """Smooth pictures with some noise, as large as photos of that size are: about 60 KB."""
    draw = np.random.default_rng(0)
    for index in range(count):
        small = draw.integers(0, 256, (12, 16, 3), np.uint8)
        image = cv2.resize(small, (500, 375), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        image += draw.integers(-12, 13, image.shape, np.int16)
        path = folder / f"class{index % 2}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.clip(image, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])


def write_bundle(root: Path, photos: Path, name: str) -> str:
    """A bundle of an untrained model: speed does not depend on the weights."""
    from manyeyes.data.ingest import IngestSettings, ingest
    from manyeyes.engines.registry import create_engine
    from manyeyes.models.registry import ModelConfig

    model_name, size, options = MODELS[name]
    uri = str(root / f"{name}.dataset")
    settings = IngestSettings(size=(size, size), encoding="jpeg")
    ingest(str(photos), uri, settings=settings, engine=create_engine("local", 2))
    return export_untrained(
        uri, str(root / name), lambda _: ModelConfig(model_name, (size, size, 3), 2, weights="none", options=options)
    )


def user_function(bundle: str, size: int) -> Callable[[], Callable[[np.ndarray], dict[str, np.ndarray]]]:
    """What is given to `predict_batch_udf`."""

    def make() -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        import cv2
        import numpy as np
        import onnxruntime

        cv2.setNumThreads(1)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(f"{bundle}/model.onnx", options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def predict(content: np.ndarray) -> dict[str, np.ndarray]:
            images = []
            for encoded in content:
                image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
                images.append(cv2.cvtColor(cv2.resize(image, (size, size)), cv2.COLOR_BGR2RGB))
            (logits,) = session.run(None, {name: np.stack(images)})
            exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
            probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
            return {"label": probabilities.argmax(axis=1), "probability": probabilities.max(axis=1)}

        return predict

    return make


def bounds(bundle: str, photos: Path, size: int) -> tuple[float, float]:
    """Images/s of the user's decoding alone, and of the model alone, on one core."""
    import onnxruntime

    cv2.setNumThreads(1)
    encoded = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))[: 4 * BATCH]]
    started = time.perf_counter()
    for content in encoded:
        cv2.resize(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR), (size, size))
    decode = len(encoded) / (time.perf_counter() - started)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(f"{bundle}/model.onnx", options, providers=["CPUExecutionProvider"])
    batch = np.zeros((BATCH, size, size, 3), np.uint8)
    name = session.get_inputs()[0].name
    session.run(None, {name: batch})
    started = time.perf_counter()
    for _ in range(4):
        session.run(None, {name: batch})
    return decode, 4 * BATCH / (time.perf_counter() - started)


def measure(session: Any, bundle: str, photos: Path, size: int, count: int, rounds: int) -> dict[str, list[float]]:
    """Images/s of every side in every round; a round that only warms up comes first."""
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql.types import FloatType, LongType, StructField, StructType

    from manyeyes.spark import predict_dataframe

    def files() -> Any:
        reader = session.read.format("binaryFile").option("recursiveFileLookup", "true")
        return reader.load(str(photos)).select("path", "content")

    kind = StructType([StructField("label", LongType()), StructField("probability", FloatType())])
    function = predict_batch_udf(user_function(bundle, size), return_type=kind, batch_size=BATCH)
    paths = session.createDataFrame([(str(path),) for path in sorted(photos.rglob("*.jpg"))], "path string")
    paths = paths.repartition(8).cache()
    paths.count()
    sides = {
        "predict_batch_udf": lambda: files().select("path", function("content")),
        "onnxruntime": lambda: predict_dataframe(files(), bundle, backend="onnxruntime"),
        "default": lambda: predict_dataframe(files(), bundle),
        "default, paths": lambda: predict_dataframe(paths, bundle, image_column="path"),
    }
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side, frame in sides.items():
            started = time.perf_counter()
            frame().write.format("noop").mode("overwrite").save()
            if turn:
                speeds[side].append(count / (time.perf_counter() - started))
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=tuple(MODELS))
    arguments = parser.parse_args()
    from manyeyes.engines.registry import create_engine

    names = [name for name in MODELS if arguments.only in (None, name)]
    table = Table(
        "model", "side", "images/s\n(median)", "of one core:\ndecode alone", "model alone", f"ratio\n(goal {GOAL})"
    )
    with tempfile.TemporaryDirectory() as root:
        photos = Path(root) / "photos"
        write_photos(photos, arguments.images)
        bundles = {name: write_bundle(Path(root), photos, name) for name in names}
        create_engine("spark", 2, {"master": "local[2]", "properties": {"spark.ui.enabled": "false"}}).context  # noqa: B018
        from pyspark.sql import SparkSession

        session = SparkSession.builder.getOrCreate()
        for name in names:
            size = MODELS[name][1]
            decode, model = bounds(bundles[name], photos, size)
            speeds = measure(session, bundles[name], photos, size, arguments.images, arguments.rounds)
            for side, found in speeds.items():
                ratios = [ours / theirs for ours, theirs in zip(found, speeds["predict_batch_udf"], strict=True)]
                table.add_row(
                    f"{name} {size}px",
                    side,
                    f"{statistics.median(found):,.0f}",
                    f"{decode:,.0f}",
                    f"{model:,.0f}",
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
