"""Batches on their way to a GPU: the images of the next step are copied while the step before computes."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import tensorflow as tf

from manyeyes.data.pipeline import Batch

_GPU = "GPU:0"  # of those that this process sees (see backend.prepare)


def on_device(batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    """Yield the same batches in the same order, with their images where the model computes.

    With a GPU, `images` is a tensor in its memory, and one batch beyond the one in use is held there. Labels are few:
    they stay where they are. Without a GPU, batches are passed on as they come, and nothing is asked for ahead.

    Args:
        batches: are closed when the generator that is returned ends or is closed.
    """
    with contextlib.closing(batches):
        yield from _ahead(batches) if tf.config.get_visible_devices("GPU") else batches


def _ahead(batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    # One thread: a generator can't be asked by two. The `with` waits for it, so that `batches` may be closed after.
    with ThreadPoolExecutor(1, "manyeyes-device") as copier:
        coming = copier.submit(_next_on_gpu, batches)
        while (batch := coming.result()) is not None:
            # The step that the caller begins now is still being queued, so the copy is not behind it on the GPU.
            coming = copier.submit(_next_on_gpu, batches)
            yield batch


def _next_on_gpu(batches: Generator[Batch, None, None]) -> Batch | None:
    batch = next(batches, None)
    return None if batch is None else replace(batch, images=_copied(batch.images))


def _copied(images: Any) -> tf.Tensor:
    """A copy in the GPU's memory; it is whole on return, so that the buffer of the images may be used again.

    By an operation, because one lets other Python threads run while it waits for the GPU; a conversion does not.
    """
    with tf.device("CPU"):
        host = tf.convert_to_tensor(images)
    with tf.device(_GPU):
        return tf.identity(host)
