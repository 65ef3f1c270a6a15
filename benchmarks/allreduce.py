"""What all-reduce costs: two workers with one thread each against twice one worker with one thread.

    python benchmarks/allreduce.py [--steps 60] [--rounds 3] [--only cnn|resnet]

Every worker is pinned to a core. The same global batch of generated pixels (resident, so that input costs nothing to
speak of) goes through the strategy that `manyeyes train` uses. "Linear" is the images per second of two workers over
twice those of one; the goal is 0.85 for the CNN of the demo and 0.95 for a ResNet-18 of width 16. With synchronized
norms every normalisation adds an exchange forwards and one backwards; with virtual workers sums are exact. The bound is
two workers that never exchange anything, side by side, each with half of the batch: what the machine itself allows.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import numpy as np
from rich.console import Console
from rich.table import Table

from manyeyes.data.dataset import Dataset
from manyeyes.data.ingest import ingest
from manyeyes.engines.base import GangContext
from manyeyes.engines.registry import create_engine
from manyeyes.training import backend
from manyeyes.training.settings import TrainSettings
from manyeyes.training.strategy import Strategy

BATCH = 128
WARMUP_STEPS = 5
MODELS = {
    "cnn": (28, 0.85, ["model.name=cnn"]),
    "resnet": (32, 0.95, ["model.name=resnet18", "model.options={width=16}"]),
}
BOUND = "no exchange (bound)"
MODES = {
    BOUND: ["strategy.sync_norms=false"],
    "own norms": ["strategy.sync_norms=false"],
    "synchronized norms": ["strategy.sync_norms=true"],
    "2 virtual workers": ["strategy.virtual_workers=2"],
}


@dataclass(frozen=True)
class Pace:
    """Seconds of a step, and of the exchanges in it that are not inside the computation."""

    step_seconds: float
    communication_seconds: float


def measure(dataset: str, assignments: list[str], num_steps: int, is_alone: bool, context: GangContext) -> Pace:
    """The life of one worker; one that is alone knows of no other beside it."""
    os.sched_setaffinity(0, {context.rank % os.cpu_count()})  # type: ignore[operator]
    batch = BATCH
    if is_alone:
        batch = BATCH // context.world_size
        context = GangContext(0, 1, context.addresses[:1])
    backend.prepare(0, 1, context)
    import keras

    from manyeyes.training.building import build_allreduce
    from manyeyes.training.collective import connect
    from manyeyes.training.run import describe_run

    collective = connect(context)
    keras.utils.set_random_seed(0)
    data = Dataset(dataset)
    settings = TrainSettings.load(None, ["train.precision=float32", f"train.global_batch_size={batch}", *assignments])
    run = describe_run(data, "", settings)
    strategy = build_allreduce(run, settings, data, collective)
    step_seconds, clock = time_steps(strategy, num_steps), strategy.clock
    return Pace(step_seconds, clock.communication_seconds / max(1, clock.num_timed_steps))


def time_steps(strategy: Strategy, num_steps: int) -> float:
    """Median seconds of a step, after some that are not counted."""
    times: list[float] = []
    done = epoch = 0
    while len(times) < num_steps + WARMUP_STEPS:
        asked = time.perf_counter()
        for num in strategy.steps(epoch, 0, done):
            times.append(time.perf_counter() - asked)
            done += num
            asked = time.perf_counter()
        epoch += 1
    return statistics.median(times[WARMUP_STEPS:])


def write_dataset(folder: str, size: int) -> str:
    """Noise in ten classes, as IDX files through ingest."""
    draw = np.random.default_rng(0)
    source = Path(folder) / "source"
    source.mkdir()
    arrays = {
        "images-idx3": draw.integers(0, 256, (2048, size, size), dtype=np.uint8),
        "labels-idx1": np.arange(2048, dtype=np.uint8) % 10,
    }
    for name, array in arrays.items():
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (source / f"train-{name}-ubyte").write_bytes(header + array.tobytes())
    ingest(str(source), str(Path(folder) / "dataset"), engine=create_engine("inline"))
    return str(Path(folder) / "dataset")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3, help="turns of one and two workers")
    parser.add_argument("--only", choices=MODELS)
    arguments = parser.parse_args()
    engine = create_engine("local", 2)
    table = Table("model", "norms and sums", "1 worker", "2 workers", "of which exchange", "linear", "goal")
    for name in [arguments.only] if arguments.only else MODELS:
        size, goal, model = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            dataset = write_dataset(folder, size)
            for mode, more in MODES.items():
                alone, two = [], []
                for _ in range(arguments.rounds):
                    one = [*model, *(["strategy.sync_norms=false"] if "virtual" in mode else more)]
                    alone += engine.gang(functools.partial(measure, dataset, one, arguments.steps, True), 1)
                    of_two = functools.partial(measure, dataset, [*model, *more], arguments.steps, mode == BOUND)
                    # A step takes as long as it takes the slower one.
                    two.append(max(engine.gang(of_two, 2), key=lambda pace: pace.step_seconds))
                one_step = min(pace.step_seconds for pace in alone)
                two_steps = min(pace.step_seconds for pace in two)
                exchange = min(pace.communication_seconds for pace in two)
                table.add_row(
                    name,
                    mode,
                    f"{one_step * 1e3:.1f} ms",
                    f"{two_steps * 1e3:.1f} ms",
                    f"{exchange * 1e3:.1f} ms",
                    f"{one_step / two_steps / 2:.2f}",
                    f"{goal:.2f}",
                )
    Console().print(table)


if __name__ == "__main__":
    main()
