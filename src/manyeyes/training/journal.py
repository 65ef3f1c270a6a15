"""What a run writes about itself: metrics.jsonl, and TensorBoard events where the run directory is local.

metrics.jsonl has one JSON object a line. Every `log_every_steps` steps, over the steps since the line before:
    {"kind": "step", "epoch", "step", "global_step", "loss", "accuracy", "learning_rate", "images_per_second",
     "input_wait_share"}
with, where there are several workers, "workers": one object each (see clock.WorkerSpeed); and after every epoch:
    {"kind": "epoch", "epoch", "global_step", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate",
     "seconds"}
Both have "sent_bytes" where workers meet in the run directory: what they read from and wrote to it meanwhile.
`epoch` counts from 1 in files and on screens; `val_…` is null where there is no val split. What is not finite is null.
"""

from __future__ import annotations

import json
import math
from typing import Any

from manyeyes import storage
from manyeyes.training.run import METRICS_NAME, Run

TENSORBOARD = "tb"

# tensorflow.DataClass.DATA_CLASS_SCALAR
_DATA_CLASS_SCALAR = 1


class Journal:
    """Appends to the metrics of one run.

    Args:
        run: whose directory it writes to.
        global_step: lines of later steps, left by a session that was killed, are removed.
        tensorboard: whether events are written too.
        mlflow: a tracking URI of MLflow, or "".

    Attributes:
        is_finished: whether the run is over, for those who ask when the journal is closed.
    """

    def __init__(self, run: Run, global_step: int, tensorboard: bool, mlflow: str = "") -> None:
        run_uri = run.uri
        self._uri = storage.join(run_uri, METRICS_NAME)
        self._lines = [line for line in _read_lines(self._uri) if json.loads(line)["global_step"] <= global_step]
        self._local = storage.is_local(run_uri)
        storage.write_bytes(self._uri, "".join(self._lines).encode())
        self._writer: Any = None
        self._tracker: Any = None
        self.is_finished = False
        if mlflow:
            from manyeyes.training.mlflow_tracker import MlflowTracker

            self._tracker = MlflowTracker(run, mlflow, resumed=global_step > 0)
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
        scalars = scalars_of(values)
        if self._writer is not None:
            self._write_events(scalars, values["global_step"])
        if self._tracker is not None:
            self._tracker.log(scalars, values["global_step"])

    def _write_events(self, scalars: dict[str, float], global_step: int) -> None:
        import tensorflow as tf

        # What tf.summary.scalar writes, which needs TensorBoard itself to be installed.
        metadata = tf.compat.v1.SummaryMetadata(data_class=_DATA_CLASS_SCALAR)
        metadata.plugin_data.plugin_name = "scalars"
        with self._writer.as_default():
            for name, value in scalars.items():
                tf.summary.write(name, tf.constant(value, tf.float32), step=global_step, metadata=metadata)
        self._writer.flush()

    def close(self) -> None:
        """Flush the events."""
        if self._writer is not None:
            self._writer.close()
        if self._tracker is not None:
            self._tracker.close(is_finished=self.is_finished)


def scalars_of(values: dict[str, Any]) -> dict[str, float]:
    """What can be drawn as curves: `step/loss`, and of each worker `step/worker0/images_per_second`."""
    kind = values["kind"]
    scalars = {
        f"{kind}/{name}": value
        for name, value in values.items()
        if name not in ("kind", "epoch", "step", "global_step", "workers") and value is not None
    }
    for worker in values.get("workers", ()):
        prefix = f"{kind}/worker{worker['rank']}"
        scalars |= {f"{prefix}/{name}": float(value) for name, value in worker.items() if name != "rank"}
    return scalars


def _read_lines(uri: str) -> list[str]:
    if not storage.exists(uri):
        return []
    # A killed process may have left half a line at the end.
    return [
        line
        for line in storage.read_bytes(uri).decode("utf-8", "replace").splitlines(keepends=True)
        if line.endswith("}\n")
    ]
