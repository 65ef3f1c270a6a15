"""Models: Keras models that take raw uint8 pixels and return float32 logits. `registry.build` is the door.

Every module here that imports keras is imported through this package, so this is where the backend is chosen.
"""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
