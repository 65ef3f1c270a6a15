"""One session of a run in one worker: from a checkpoint, or the start, to the end or the next interruption."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from manyeyes.data.dataset import Dataset
from manyeyes.data.pipeline import InputPipeline
from manyeyes.engines.base import GangContext
from manyeyes.errors import ManyeyesError, UsageError
from manyeyes.training import backend, checkpoint
from manyeyes.training.checkpoint import TrainState
from manyeyes.training.events import Notice, OnEvent, Started, ignore
from manyeyes.training.interrupts import StopWish
from manyeyes.training.reporting import Desk, Life, reporting
from manyeyes.training.run import Run
from manyeyes.training.settings import TrainSettings
from manyeyes.training.strategy import Strategy

# The val split is measured in batches of at least this many examples, however small those of the training are.
MIN_EVALUATION_BATCH_SIZE = 64
# How long a worker that lost its peer waits before it says so, so that the peer's own end is told first.
_YIELD_SECONDS = 3.0


@dataclass(frozen=True)
class Job:
    """What every worker of a session is told.

    Attributes:
        run: what is trained.
        settings: of the run, with the global batch size filled in.
        dataset: URI of the dataset directory.
        checkpoint: the name of the checkpoint to start from, or None for the start.
        desk: where workers report to; None where the driver itself is the only worker.
    """

    run: Run
    settings: TrainSettings
    dataset: str
    checkpoint: str | None
    desk: Desk | None = None


@dataclass(frozen=True)
class Outcome:
    """What a session came to; see trainer.TrainResult."""

    state: TrainState
    num_parameters: int
    seconds: float
    images_per_second: float
    input_wait_share: float
    loss: float | None = None
    accuracy: float | None = None
    val_loss: float | None = None
    interrupted_by: int | None = None


def run_worker(job: Job, context: GangContext) -> Outcome:
    """The life of one worker of a gang.

    Raises:
        TrainingError: another worker is gone.
        ManyeyesError: as `run_session` does.
    """
    assert job.desk is not None
    life = Life()
    with reporting(job.desk, context.rank, life, job.settings.strategy.step_timeout_seconds) as (notify, wish):
        try:
            return run_session(job, context, notify, wish, life)
        except ManyeyesError:
            raise
        except Exception as error:
            if not _lost_a_peer(error):
                raise
            # An exchange that a peer did not come to. What became of the peer is the better message.
            time.sleep(_YIELD_SECONDS)
            raise RuntimeError(f"An exchange with the other workers failed: {error}") from error


def _lost_a_peer(error: Exception) -> bool:
    if isinstance(error, ConnectionError):
        return True
    tf = sys.modules.get("tensorflow")
    if tf is None or not isinstance(error, tf.errors.OpError):
        return False
    # What the ring raises inside of a traced function comes out as an error of TensorFlow that quotes it.
    lost = tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError
    return isinstance(error, lost) or "ConnectionError" in str(error)


def run_session(job: Job, context: GangContext, notify: OnEvent, wish: StopWish, life: Life | None = None) -> Outcome:
    """Train in this process as one worker of a gang, or the only one.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
        CheckpointError: the checkpoint does not fit the model, or one can't be written.
        DatasetError: the dataset is missing or damaged.
    """
    settings, life = job.settings, life or Life()
    strategy_settings = settings.strategy
    virtual = strategy_settings.virtual_workers
    num_threads = strategy_settings.threads_per_virtual_worker if virtual else None
    # XLA refuses the gradient of max pooling where it must be reproducible, because on GPUs its own is not.
    has_threads = backend.prepare(settings.train.seed, num_threads, context, deterministic=not settings.train.xla)
    if virtual and not has_threads:
        notify(
            Notice(
                "TensorFlow ran in this process before, with another number of threads than "
                f"strategy.threads_per_virtual_worker={num_threads}: the weights may differ in their last bits from "
                "those of other workers. Train in a process of its own."
            )
        )

    # Keras is loaded only when all that can be refused without it has been.
    from manyeyes.training.building import build_allreduce
    from manyeyes.training.collective import connect
    from manyeyes.training.loop import Loop

    secret = job.desk.token if job.desk else ""
    collective = connect(context, secret, strategy_settings.collective)
    life.beat("start")
    data = Dataset(job.dataset, verify="auto")
    strategy = build_allreduce(job.run, settings, data, collective, life)
    life.beat("start")
    state = begin(job, strategy)
    life.beat("exchange")
    strategy.check()
    life.beat("input")
    tell: OnEvent = notify if strategy.is_chief else ignore
    pipeline = strategy.train_pipeline
    tell(started_event(job.run, settings, strategy.num_parameters, pipeline, state, context.world_size))
    loop = Loop(job.run, settings, strategy, tell, wish)
    with _xla_explained(job):
        state = loop.run_from(state)
    life.beat("end", state.global_step)
    return outcome_of(loop, state)


@contextlib.contextmanager
def _xla_explained(job: Job) -> Iterator[None]:
    import tensorflow as tf

    try:
        yield
    except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError) as error:
        if not job.settings.train.xla:
            raise
        # Of its many lines one names what XLA lacks; the first names the place only.
        lines = [line for line in error.message.splitlines() if "XLA" in line or "unsupported" in line]
        reason = (lines or error.message.splitlines())[0]
        raise UsageError(
            f"train.xla=true can't compile {job.run.model.name}: {reason} "
            "Train in a process that has trained nothing before, or leave it out."
        ) from error


def begin(job: Job, strategy: Strategy) -> TrainState:
    """Bring a strategy to where the session starts: the job's checkpoint, or a run that is new and is written now.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    if job.checkpoint is not None:
        found = checkpoint.load(job.run.checkpoints_uri, job.checkpoint)
        strategy.load_arrays(found.arrays, f"The checkpoint of step {found.state.global_step}")
        return found.state
    if strategy.is_chief:
        job.run.save()  # only now, as a model that can't be built leaves no run behind
    run = job.run
    return TrainState(0, 0, 0, job.settings.train.seed, run.settings_fingerprint, run.dataset_fingerprint)


def outcome_of(loop, state: TrainState) -> Outcome:  # type: ignore[no-untyped-def]
    """What a loop that ended came to."""
    clock = loop.strategy.clock
    return Outcome(
        state=state,
        num_parameters=loop.strategy.num_parameters,
        seconds=clock.seconds,
        images_per_second=clock.images_per_second,
        input_wait_share=clock.input_wait_share,
        loss=loop.last_train.mean_loss if loop.last_train else None,
        accuracy=loop.last_train.accuracy if loop.last_train else None,
        val_loss=loop.last_val.mean_loss if loop.last_val else None,
        interrupted_by=loop.interrupted_by,
    )


def started_event(
    run: Run,
    settings: TrainSettings,
    num_parameters: int,
    pipeline: InputPipeline,
    state: TrainState,
    world_size: int,
) -> Started:
    """What a session begins with."""
    return Started(
        run=run.uri,
        model=run.model.name,
        num_parameters=num_parameters,
        precision=run.precision,
        num_examples=pipeline.num_examples,
        steps_per_epoch=pipeline.steps_per_epoch,
        epochs=settings.train.epochs,
        global_batch_size=pipeline.global_batch_size,
        global_step=state.global_step,
        world_size=world_size,
    )


def pipelines(
    data: Dataset,
    run: Run,
    settings: TrainSettings,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_parts: int | None = None,
) -> tuple[InputPipeline, InputPipeline | None]:
    """A worker's parts of the train split and, if there is one, of the val split."""
    batch_size = settings.train.global_batch_size
    assert batch_size is not None  # TrainSettings.for_split has filled it in
    extra = run.extra_preprocessing if run.extra_preprocessing.steps else None
    share: dict[str, Any] = {"rank": rank, "world_size": world_size, "num_parts": num_parts}
    train_pipeline = InputPipeline(
        data,
        settings.data.train_split,
        global_batch_size=batch_size,
        seed=settings.train.seed,
        augmentation=settings.augment,
        preprocessing=extra,
        mix=settings.mix,
        **share,
    )
    if settings.data.val_split not in data.split_names:
        return train_pipeline, None
    of_parts = max(1, -(-MIN_EVALUATION_BATCH_SIZE // batch_size))
    val_pipeline = InputPipeline(
        data,
        settings.data.val_split,
        global_batch_size=batch_size * of_parts,
        shuffle=False,
        preprocessing=extra,
        **share,
    )
    return train_pipeline, val_pipeline
