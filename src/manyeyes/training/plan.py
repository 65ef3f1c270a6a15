"""What a run does when: pure functions of its settings and of (epoch, step)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from manyeyes.training.schedules import scale_at
from manyeyes.training.settings import TrainSettings

Learning = Literal["all", "all_but_norms", "head"]


@dataclass(frozen=True)
class Plan:
    """The course of a run.

    Attributes:
        settings: of the run, with the global batch size filled in.
        steps_per_epoch: global batches in an epoch.
    """

    settings: TrainSettings
    steps_per_epoch: int

    def learning_rate(self, epoch: int, step: int) -> float:
        """The learning rate of a step; both count from 0."""
        settings, position = self.settings, epoch + step / self.steps_per_epoch
        scale = scale_at(settings.schedule, position, settings.train.epochs, 1 / self.steps_per_epoch)
        if settings.train.freeze_backbone_epochs and not self._is_frozen(epoch):
            scale *= settings.train.unfrozen_scale
        return settings.optimizer.peak_learning_rate(settings.train.global_batch_size) * scale

    def learning(self, epoch: int) -> Learning:
        """What learns in an epoch: "all", "all_but_norms" (of the backbone), or only the "head"."""
        settings = self.settings.train
        if self._is_frozen(epoch):
            return "head"
        return "all_but_norms" if settings.freeze_backbone_epochs and settings.freeze_norms else "all"

    def frees_backbone(self, epoch: int) -> bool:
        """Whether the backbone learns from this epoch on, so that the optimizer starts afresh."""
        return 0 < epoch == self.settings.train.freeze_backbone_epochs

    def _is_frozen(self, epoch: int) -> bool:
        return epoch < self.settings.train.freeze_backbone_epochs
