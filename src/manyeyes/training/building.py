"""What trains a run, made as its settings say: the model with loss and optimizer, and the strategy of a gang."""

from __future__ import annotations

from manyeyes.data.dataset import Dataset
from manyeyes.models.registry import build
from manyeyes.training.allreduce import AllReduce
from manyeyes.training.collective import Collective
from manyeyes.training.norms import fuse_norms
from manyeyes.training.optimizers import create_optimizer
from manyeyes.training.plan import Plan
from manyeyes.training.replica import Replica
from manyeyes.training.reporting import Life
from manyeyes.training.run import Run
from manyeyes.training.session import pipelines
from manyeyes.training.settings import TrainSettings
from manyeyes.training.step import Loss


def build_replica(run: Run, settings: TrainSettings, data: Dataset, *, synced_by: Collective | None = None) -> Replica:
    """Make what trains; equal in every process.

    Args:
        synced_by: normalise over the examples of all workers that this connects; None: of each part alone.
    """
    weighted = settings.train.class_weights == "balanced"
    loss = Loss(
        num_classes=len(run.class_names),
        label_smoothing=settings.train.label_smoothing,
        class_weights=balanced_weights(data.manifest.counts.written[settings.data.train_split]) if weighted else (),
    )
    replica = Replica(loss, settings.optimizer.ema, settings.train.seed, settings.train.xla)
    replica.build(
        lambda: build(run.model, run.precision),
        lambda model: create_optimizer(settings.optimizer, model, loss_scaling=run.precision == "float16"),
    )
    fuse_norms(replica.model, synced_by, lambda: replica.present)
    return replica


def build_allreduce(
    run: Run, settings: TrainSettings, data: Dataset, collective: Collective, life: Life | None = None
) -> AllReduce:
    """Make the strategy of one of the workers that `collective` connects."""
    world_size = collective.world_size
    train_pipeline, val_pipeline = pipelines(
        data,
        run,
        settings,
        rank=collective.rank,
        world_size=world_size,
        num_parts=settings.strategy.num_parts(world_size),
    )
    syncs_norms = settings.strategy.syncs_norms(world_size)
    return AllReduce(
        build_replica(run, settings, data, synced_by=collective if syncs_norms else None),
        Plan(settings, train_pipeline.steps_per_epoch),
        train_pipeline,
        val_pipeline,
        collective,
        syncs_norms=syncs_norms,
        is_exact=settings.strategy.virtual_workers is not None,
        life=life,
    )


def balanced_weights(num_by_label: list[int]) -> tuple[float, ...]:
    """num_examples / (num_classes * examples of the class): all classes weigh the same in sum; 0 where none."""
    total, num_classes = sum(num_by_label), len(num_by_label)
    return tuple(total / (num_classes * num) if num else 0.0 for num in num_by_label)
