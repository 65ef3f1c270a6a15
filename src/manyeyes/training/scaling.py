"""The proof that the number of workers changes nothing: the same examples, the same gradients, the same weights.

Rounding makes float32 weights drift apart chaotically over many steps, whatever the code does, so each claim is proved
where it can be: sums of float64 after many steps, float32 within one step, and with virtual workers float32 bit by bit.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from manyeyes import storage
from manyeyes.data.dataset import Dataset
from manyeyes.data.ingest import IngestSettings, ingest
from manyeyes.engines.base import Engine, GangContext
from manyeyes.engines.registry import create_engine
from manyeyes.errors import UsageError
from manyeyes.imaging.augment import Augmentation
from manyeyes.models.registry import ModelConfig
from manyeyes.training import backend
from manyeyes.training.settings import DataSettings, LoopSettings, OptimizerSettings, StrategySettings, TrainSettings

FLOAT64_TOLERANCE = 1e-9
GRADIENT_TOLERANCE = 1e-5
_SEED = 7
# Of the dataset that is generated where none is given. The last batch of an epoch has one example: most workers none.
_NUM_EXAMPLES, _SIZE, _NUM_CLASSES = 32 * 18 + 1, 16, 4


@dataclass(frozen=True)
class Spec:
    """What is trained for the proof: a small CNN with batch normalisation, by SGD 0.05 with momentum 0.9.

    Attributes:
        dataset: URI of a dataset directory.
        num_steps: steps after which weights are compared.
        global_batch_size: examples per step.
        virtual_workers: parts of the exact mode.
    """

    dataset: str
    num_steps: int
    global_batch_size: int
    virtual_workers: int


@dataclass(frozen=True)
class Measured:
    """What one number of workers came to.

    Attributes:
        digests: the step, the example_index and a hash of the pixels of each example that a worker saw, in order.
        gradient: float32 (n,) of the first step.
        weights: float64 (n,) after the last step.
        exact_weights: float32 bytes after the last step with virtual workers.
        halfway: model and optimizer arrays in the middle of that, to go on from.
        step_seconds, exact_step_seconds: in float32, without and with virtual workers.
    """

    digests: list[tuple[int, int, str]]
    gradient: np.ndarray
    weights: np.ndarray
    exact_weights: bytes
    halfway: dict[str, dict[str, np.ndarray]]
    step_seconds: float
    exact_step_seconds: float


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        claim: what must hold.
        workers: for which numbers of workers, compared with the first.
        found, allowed: the largest relative difference; 0 allowed means the same bits.
    """

    claim: str
    workers: str
    found: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the claim holds."""
        return self.found <= self.allowed


@dataclass(frozen=True)
class Report:
    """What `verify_scaling` found.

    Attributes:
        checks: the table.
        exact_cost: {workers: time of a step with virtual workers / without}.
    """

    checks: tuple[Check, ...]
    exact_cost: dict[int, float]

    @property
    def holds(self) -> bool:
        """Whether all claims hold."""
        return all(check.holds for check in self.checks)


def verify_scaling(
    engine: Engine,
    world_sizes: Sequence[int] = (1, 2, 4),
    dataset: str | None = None,
    num_steps: int = 100,
    on_measured: Callable[[int], None] = lambda world_size: None,
) -> Report:
    """Train on each number of workers and compare.

    Args:
        engine: with a gang of that many workers.
        world_sizes: numbers of workers, two or more; all are compared with the first.
        dataset: URI of a dataset directory whose images have one size; None: one is generated.
        num_steps: after which weights are compared.
        on_measured: called after each number of workers.

    Raises:
        UsageError: fewer than two numbers of workers, or a dataset that can't be used for it.
        TaskError: a worker failed.
    """
    if len(set(world_sizes)) < 2 or min(world_sizes) < 1:
        raise UsageError(f"world_sizes={list(world_sizes)} leaves nothing to compare. Give two or more, e.g. 1,2,4.")
    virtual_workers = max(world_sizes)
    multiple = math.lcm(*world_sizes)
    with tempfile.TemporaryDirectory() as folder:
        spec = Spec(
            dataset=storage.absolute(dataset or _generate(folder)),
            num_steps=num_steps,
            global_batch_size=multiple * -(-32 // multiple),
            virtual_workers=virtual_workers,
        )
        found: dict[int, Measured] = {}
        for world_size in world_sizes:
            found[world_size] = _of_chief(engine.gang(functools.partial(measure, spec, None), world_size))
            on_measured(world_size)
        first, *others = world_sizes
        # Elastic: begun on the largest number of workers, ended on the smallest.
        halfway = found[max(world_sizes)].halfway
        elastic = _of_chief(engine.gang(functools.partial(measure, spec, halfway), min(world_sizes)))
    base = found[first]
    named = f"{', '.join(map(str, others))} against {first}"
    checks = (
        Check(
            "examples, order and augmented pixels",
            named,
            float(sum(found[other].digests != base.digests for other in others)),
            0.0,
        ),
        Check(
            "float32: gradients of one step",
            named,
            max(_difference(found[other].gradient, base.gradient) for other in others),
            GRADIENT_TOLERANCE,
        ),
        Check(
            f"float64: weights after {num_steps} steps",
            named,
            max(_difference(found[other].weights, base.weights) for other in others),
            FLOAT64_TOLERANCE,
        ),
        Check(
            f"float32, {virtual_workers} virtual workers: weights after {num_steps} steps",
            named,
            max(_bits_difference(found[other].exact_weights, base.exact_weights) for other in others),
            0.0,
        ),
        Check(
            "the same, restarted halfway on another number",
            f"{max(world_sizes)}, then {min(world_sizes)}",
            _bits_difference(elastic.exact_weights, base.exact_weights),
            0.0,
        ),
    )
    cost = {size: measured.exact_step_seconds / measured.step_seconds for size, measured in found.items()}
    return Report(checks, cost)


def measure(spec: Spec, halfway: dict[str, dict[str, np.ndarray]] | None, context: GangContext) -> Measured | None:
    """The life of one worker; rank 0 returns what was measured.

    Args:
        halfway: go on from the middle of the exact run only.
    """
    # One thread for every operation: sums depend on their number, and workers would have other shares of the cores.
    backend.prepare(_SEED, 1, context)
    from manyeyes.training.collective import connect

    collective = connect(context)
    trainer = _Trainer(spec, collective)
    half = spec.num_steps // 2
    if halfway is not None:
        strategy = trainer.make(virtual_workers=spec.virtual_workers)
        strategy.load_arrays(halfway, "The state halfway")
        trainer.run(strategy, half, spec.num_steps)
        exact = trainer.weights(strategy).tobytes()
        return Measured([], np.zeros(0), np.zeros(0), exact, {}, 1.0, 1.0) if context.rank == 0 else None

    strategy = trainer.make()
    digests = trainer.digests(strategy)
    gradient = trainer.gradient(strategy)
    step_seconds = trainer.run(strategy, 0, spec.num_steps)
    strategy = trainer.make(precision="float64")
    trainer.run(strategy, 0, spec.num_steps)
    weights = trainer.weights(strategy)
    strategy = trainer.make(virtual_workers=spec.virtual_workers)
    trainer.run(strategy, 0, half)
    arrays = {part: dict(values) for part, values in strategy.arrays().items()}
    exact_step_seconds = trainer.run(strategy, half, spec.num_steps)
    exact = trainer.weights(strategy).tobytes()
    if context.rank != 0:
        return None
    return Measured(digests, gradient, weights, exact, arrays, step_seconds, exact_step_seconds)


class _Trainer:
    """What one worker does for the proof, with the strategy that training uses."""

    def __init__(self, spec: Spec, collective) -> None:  # type: ignore[no-untyped-def]
        self._spec = spec
        self._collective = collective
        self._data = Dataset(spec.dataset, verify="auto")

    def settings(self, virtual_workers: int | None, precision: str) -> TrainSettings:
        return TrainSettings(
            model=ModelConfig("cnn", options={"width": 8, "convolutions": 1}),
            data=DataSettings(),
            augment=Augmentation(shift=0.1, rotate_degrees=10.0, brightness=0.2),
            optimizer=OptimizerSettings(name="sgd", learning_rate=0.05, momentum=0.9, weight_decay=1e-4),
            train=LoopSettings(global_batch_size=self._spec.global_batch_size, seed=_SEED, precision=precision),  # type: ignore[arg-type]
            strategy=StrategySettings(virtual_workers=virtual_workers),
        )

    def make(self, virtual_workers: int | None = None, precision: str = "float32"):  # type: ignore[no-untyped-def]
        import keras

        from manyeyes.training.building import build_allreduce
        from manyeyes.training.run import describe_run

        keras.utils.set_random_seed(_SEED)
        settings = self.settings(virtual_workers, precision)
        return build_allreduce(describe_run(self._data, "", settings), settings, self._data, self._collective)

    def digests(self, strategy) -> list[tuple[int, int, str]]:  # type: ignore[no-untyped-def]
        """See Measured.digests; of all workers, on each."""
        own = []
        with contextlib.closing(strategy.train_pipeline.batches(0)) as batches:
            for batch in itertools.islice(batches, self._spec.num_steps):
                for index, image in zip(batch.example_indices.tolist(), batch.images, strict=True):
                    own.append([batch.step, index, int(hashlib.sha256(image.tobytes()).hexdigest()[:12], 16)])
        # As numbers, which is what workers exchange.
        most = int(self._collective.gather_numbers([len(own)]).max())
        padded = np.full((most, 3), -1.0)
        padded[: len(own)] = np.array(own, np.float64).reshape(-1, 3)
        told = np.asarray(self._collective.gather(padded)).reshape(-1, 3)
        # Workers follow one another in a batch, so that a stable sort by step gives the order of the global batch.
        in_order = told[np.argsort(told[:, 0], kind="stable")]
        return [(int(step), int(index), f"{int(digest):012x}") for step, index, digest in in_order if step >= 0]

    def gradient(self, strategy) -> np.ndarray:  # type: ignore[no-untyped-def]
        """Of the first step, before anything was learnt."""
        with contextlib.closing(strategy.train_pipeline.batches(0)) as batches:
            total = strategy.summed(next(batches), 0).numpy()
        num = sum(int(np.prod(variable.shape)) for variable in strategy.replica.model.trainable_variables)
        return total[:num]

    def run(self, strategy, start: int, stop: int) -> float:  # type: ignore[no-untyped-def]
        """Do the steps [start, stop) of a run; returns the seconds of a step, without the first."""
        done, seconds, num_timed = start, 0.0, 0
        while done < stop:
            epoch, step = divmod(done, strategy.steps_per_epoch)
            steps = strategy.steps(epoch, step, done)
            asked = time.perf_counter()
            for num in steps:
                now = time.perf_counter()
                if done > start:
                    seconds, num_timed = seconds + now - asked, num_timed + 1
                asked = now
                done += num
                if done == stop:
                    break
            steps.close()
        return seconds / max(1, num_timed)

    @staticmethod
    def weights(strategy) -> np.ndarray:  # type: ignore[no-untyped-def]
        arrays = strategy.arrays()["model"]
        return np.concatenate([value.ravel() for key, value in sorted(arrays.items()) if value.dtype.kind == "f"])


def _of_chief(results: list[Measured | None]) -> Measured:
    measured = results[0]
    assert measured is not None
    return measured


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs.astype(np.float64)))


def _bits_difference(ours: bytes, theirs: bytes) -> float:
    if ours == theirs:
        return 0.0
    # Bytes may differ where numbers don't: 0 and -0.
    tiny = float(np.finfo(np.float64).tiny)
    return max(tiny, _difference(np.frombuffer(ours, np.float32), np.frombuffer(theirs, np.float32)))


def _generate(folder: str) -> str:
    """A dataset of noisy stripes, whose class is where they lie; returns its URI."""
    draw = np.random.default_rng(_SEED)
    labels = np.arange(_NUM_EXAMPLES, dtype=np.uint8) % _NUM_CLASSES
    images = draw.integers(0, 160, (_NUM_EXAMPLES, _SIZE, _SIZE), dtype=np.uint8)
    height = _SIZE // _NUM_CLASSES
    for image, label in zip(images, labels.tolist(), strict=True):
        image[label * height : (label + 1) * height] += 60
    source = Path(folder) / "source"
    source.mkdir()
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (source / f"train-{name}-ubyte").write_bytes(header + array.tobytes())
    dataset = str(Path(folder) / "dataset")
    ingest(str(source), dataset, settings=IngestSettings(val=0, test=0), engine=create_engine("inline"))
    return dataset
