"""What `manyeyes evaluate` left in a run: the figures that go into its bundle."""

from __future__ import annotations

from typing import Any

from manyeyes import config, storage
from manyeyes.errors import ConfigError
from manyeyes.recognition.bundle import Evaluation
from manyeyes.training.checkpoint import TrainState

# In the order in which they are preferred: val has chosen the checkpoint, so that its figures are a little too good.
_SPLITS = ("test", "val")


def read_evaluation(run_uri: str, state: TrainState) -> tuple[Evaluation | None, str]:
    """Find the figures of a checkpoint in RUN/evaluation/SPLIT/evaluation.json, test before val.

    Returns:
        The figures, and ""; or None, and why there are none, for people.
    """
    refused = ""
    for split in _SPLITS:
        uri = storage.join(run_uri, "evaluation", split, "evaluation.json")
        try:
            values = storage.read_json(uri)
            if values["model_fingerprint"] != state.fingerprint:
                refused = refused or f"{uri} is of another checkpoint"
                continue
            return _to_figures(values), ""
        except FileNotFoundError:
            continue
        except (ConfigError, ValueError, LookupError, TypeError) as error:
            refused = refused or f"{uri} can't be used ({type(error).__name__}: {error})"
    return None, refused or "it was not evaluated"


def _to_figures(values: dict[str, Any]) -> Evaluation:
    metrics = values["metrics"]
    found = {
        "dataset": values["dataset"],
        "dataset_fingerprint": values["dataset_fingerprint"],
        "split": values["split"],
        "accuracy_interval": [metrics["accuracy_interval"]["low"], metrics["accuracy_interval"]["high"]],
        "macro_f1": metrics["macro"]["f1"],
        "support": [each["support"] for each in metrics["per_class"]],
    }
    found |= {name: metrics[name] for name in ("num_examples", "confidence", "accuracy", "top_k_accuracy")}
    for name in ("precision", "recall", "f1"):
        shares = [each[name] for each in metrics["per_class"]]
        # Digits beyond these say nothing, and there may be thousands of classes.
        found[name] = [None if share is None else round(share, 4) for share in shares]
    return config.from_dict(Evaluation, found)
