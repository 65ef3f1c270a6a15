from __future__ import annotations

import numpy as np
import pytest

from manyeyes.data.dataset import Dataset
from manyeyes.recognition.predictor import Predictor
from manyeyes.training.run import Run


@pytest.fixture(scope="module")
def val_images(small_dataset: str) -> np.ndarray:
    dataset = Dataset(small_dataset)
    return np.concatenate([rows.images for shard in dataset.split("val").shards for rows in dataset.rows(shard)])


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_served_logits_equal_training_logits(small_run, small_bundle, val_images, backend, batch_size) -> None:
    trained = np.asarray(Run.open(small_run).load_model()(val_images[:batch_size], training=False))
    served = Predictor.load(small_bundle, backend).logits(val_images[:batch_size])
    assert served.dtype == np.float32
    np.testing.assert_allclose(served, trained, atol=1e-4 * max(1, np.abs(trained).max()))
