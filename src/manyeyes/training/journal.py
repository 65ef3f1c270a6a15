"""What a run writes about itself: metrics.jsonl, and TensorBoard events where the run directory is local.

metrics.jsonl has one JSON object a line. Every `log_every_steps` steps, over the steps since the line before:
    {"kind": "step", "epoch", "step", "global_step", "loss", "accuracy", "learning_rate", "images_per_second",
     "input_wait_share"}
and after every epoch:
    {"kind": "epoch", "epoch", "global_step", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate",
     "seconds"}
`epoch` counts from 1 in files and on screens; `val_…` is null where there is no val split. What is not finite is null.
"""

from __future__ import annotations

import json
import math
from typing import Any

from manyeyes import storage
from manyeyes.training.run import METRICS_NAME

TENSORBOARD = "tb"

# tensorflow.DataClass.DATA_CLASS_SCALAR
_DATA_CLASS_SCALAR = 1


class Journal:
    """Appends to the metrics of one run.

    Args:
        run_uri: the run directory.
        global_step: lines of later steps, left by a session that was killed, are removed.
        tensorboard: whether events are written too.
    """

    def __init__(self, run_uri: str, global_step: int, tensorboard: bool) -> None:
        self._uri = storage.join(run_uri, METRICS_NAME)
        self._lines = [line for line in _read_lines(self._uri) if json.loads(line)["global_step"] <= global_step]
        self._local = storage.is_local(run_uri)
        storage.write_bytes(self._uri, "".join(self._lines).encode())
        self._writer: Any = None
        if tensorboard and self._local:
            import tensorflow as tf

            self._writer = tf.summary.create_file_writer(storage.join(run_uri, TENSORBOARD).removeprefix("file://"))

    def write(self, **values: Any) -> None:
        """Add one line; it needs `kind` and `global_step`."""
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        line = json.dumps(finite, ensure_ascii=False) + "\n"
        if self._local:
            with open(self._uri.removeprefix("file://"), "a", encoding="utf-8") as file:
                file.write(line)
        else:
            # Other file systems may not append; the file is small, so it is written anew at each epoch.
            self._lines.append(line)
            if values["kind"] == "epoch":
                storage.write_bytes(self._uri, "".join(self._lines).encode())
        if self._writer is not None:
            self._write_events(**values)

    def _write_events(self, kind: str, global_step: int, **values: Any) -> None:
        import tensorflow as tf

        # What tf.summary.scalar writes, which needs TensorBoard itself to be installed.
        metadata = tf.compat.v1.SummaryMetadata(data_class=_DATA_CLASS_SCALAR)
        metadata.plugin_data.plugin_name = "scalars"
        with self._writer.as_default():
            for name, value in values.items():
                if name not in ("epoch", "step") and value is not None:
                    tensor = tf.constant(value, tf.float32)
                    tf.summary.write(f"{kind}/{name}", tensor, step=global_step, metadata=metadata)
        self._writer.flush()

    def close(self) -> None:
        """Flush the events."""
        if self._writer is not None:
            self._writer.close()


def _read_lines(uri: str) -> list[str]:
    if not storage.exists(uri):
        return []
    # A killed process may have left half a line at the end.
    return [
        line
        for line in storage.read_bytes(uri).decode("utf-8", "replace").splitlines(keepends=True)
        if line.endswith("}\n")
    ]
