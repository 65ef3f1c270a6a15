"""Bundles of models with their initial weights, for benchmarks: speed does not depend on the weights."""

from __future__ import annotations

from collections.abc import Callable


def export_untrained(dataset_uri: str, stem: str, configure: Callable) -> str:
    """Export the model of `configure(dataset)`, a ModelConfig, and return the bundle's URI.

    Args:
        stem: of the URIs of the run and the bundle.
    """
    import keras

    from manyeyes.data.dataset import Dataset
    from manyeyes.imaging.preprocessing import Preprocessing
    from manyeyes.models.registry import build
    from manyeyes.training import checkpoint, weights
    from manyeyes.training.export import export
    from manyeyes.training.run import Run

    dataset = Dataset(dataset_uri)
    keras.utils.set_random_seed(1)
    config = configure(dataset)
    model = build(config)
    run = Run(
        uri=f"{stem}.run",
        class_names=dataset.class_names,
        model=config,
        preprocessing=dataset.preprocessing,
        extra_preprocessing=Preprocessing(),
        dataset=dataset_uri,
        dataset_fingerprint=dataset.manifest.fingerprint,
        precision="float32",
        averages=False,
        settings={},
        versions={},
        command=(),
    )
    run.save()
    state = checkpoint.TrainState(1, 0, 1, 1, "", dataset.manifest.fingerprint, finished=True)
    checkpoint.save(run.checkpoints_uri, state, {"model": weights.arrays_of(model.variables)})
    export(run.uri, f"{stem}.bundle")
    return f"{stem}.bundle"
