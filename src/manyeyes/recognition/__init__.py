"""Recognition without Keras: bundles, predictors and batch prediction."""

import os

# ONNX Runtime reports to its makers what it runs, on Linux too, from the moment it is imported. All that imports it,
# and tf2onnx, which does so itself, imports this package before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
