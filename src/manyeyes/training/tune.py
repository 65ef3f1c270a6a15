"""`tune`: a recipe with ranges in, the values that did best on the val split out, as a recipe.

OUT/
  plan.json                what is searched; the same command goes on, also with more trials
  trials/0000/
    trial.json             the values, written before the trial starts
    run/                   as of any training
    progress.json          the metric after each epoch
    result.json            written last
  recipe.toml, tune.json   the best values, and all trials
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import manyeyes
from manyeyes import config, storage
from manyeyes.data.dataset import Dataset
from manyeyes.engines.base import Engine
from manyeyes.engines.registry import create_engine
from manyeyes.errors import ManyeyesError, TaskError, TrainingError, UsageError
from manyeyes.training.events import EpochEnd, Event
from manyeyes.training.kept_plan import keep_plan
from manyeyes.training.run import CONFIG_NAME
from manyeyes.training.search import Metric, Search, Trial, create_study, is_worse_than_most
from manyeyes.training.trainer import train

FORMAT = "manyeyes.tune"
FORMAT_VERSION = 1
TRIAL, PROGRESS, RESULT = "trial.json", "progress.json", "result.json"
RECIPE, SUMMARY = "recipe.toml", "tune.json"
# What a trial's run needs only to be gone on with.
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TuneResult:
    """What a search found; tune.json holds it.

    Attributes:
        recipe: URI of the recipe with the best values.
        best: the trial that they are of.
        trials: all, by number.
    """

    dataset: str
    dataset_fingerprint: str
    metric: Metric
    recipe: str
    best: Trial
    trials: tuple[Trial, ...]
    manyeyes_version: str = manyeyes.__version__
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return config.to_dict(self)


def tune(
    dataset: str,
    out: str,
    search: Search,
    *,
    num_trials: int = 20,
    metric: Metric = "val_accuracy",
    prune: bool = True,
    seed: int = 0,
    engine: Engine | None = None,
    on_trial: Callable[[int, int, Trial | None], None] | None = None,
) -> TuneResult:
    """Search the values with which a recipe does best on the val split.

    A second call with the same arguments, or more trials, goes on. Which values are chosen depends on the seed and on
    which trials have ended by then: a search by one worker comes out the same each time, by several it need not.

    Args:
        dataset: URI of the dataset directory; must have a val split.
        out: URI of the directory to write.
        num_trials: in all, with those of earlier calls; those that failed are tried again.
        metric: what counts: the best val accuracy (or val loss) of all epochs of a trial.
        prune: give up a trial whose best is worse than the median of the others at its epoch.
        engine: that runs trials side by side, one a task; default: processes of this machine.
        on_trial: called with the number of trials that have ended, of all, and the last one (None at the start).

    Raises:
        UsageError: `out` holds another search, or the dataset has no val split.
        TrainingError: every trial failed.
        MissingExtraError: Optuna is not installed.
    """
    search.distributions()  # what Optuna refuses is told before anything is written
    dataset, out = storage.absolute(dataset), storage.absolute(out)
    data = Dataset(dataset)
    val_split = search.settings({}).data.val_split
    if val_split not in data.split_names:
        raise UsageError(f"{dataset} has no split {val_split!r} to choose values by. Ingest with a share for val.")
    plan = {
        "dataset_fingerprint": data.manifest.fingerprint,
        "search": config.to_dict(search),
        "metric": metric,
    }
    keep_plan(out, plan, "search")
    engine = engine or create_engine("local")
    driver = _Driver(dataset, out, search, metric, prune, seed, num_trials, on_trial)
    driver.run(engine)
    ended = [trial for trial in ranked(driver.trials.values(), metric) if trial.state == "complete"]
    if not ended:
        whys = {trial.why for trial in driver.trials.values() if trial.why}
        raise TrainingError(f"No trial was completed: {'; '.join(sorted(whys)[:3]) or 'none was started'}.")
    best = ended[0]
    for trial in driver.trials.values():
        if trial.number != best.number:
            _forget_checkpoints(_uri_of(out, trial.number))
    recipe = storage.join(out, RECIPE)
    storage.write_bytes(recipe, _to_toml(search.recipe(best.values), best, metric, len(driver.trials), dataset))
    result = TuneResult(
        dataset=dataset,
        dataset_fingerprint=data.manifest.fingerprint,
        metric=metric,
        recipe=recipe,
        best=best,
        trials=tuple(driver.trials[number] for number in sorted(driver.trials)),
    )
    storage.write_json(storage.join(out, SUMMARY), result.to_dict())
    return result


def ranked(trials: Iterable[Trial], metric: Metric) -> list[Trial]:
    """The trials of which an epoch ended, the best first; of equals the earlier."""
    sign = -1 if metric == "val_accuracy" else 1
    reached = [(sign * trial.best, trial.number, trial) for trial in trials if trial.best is not None]
    return [trial for _, _, trial in sorted(reached, key=lambda each: each[:2])]


class _Driver:
    """Chooses values as workers come free."""

    def __init__(
        self,
        dataset: str,
        out: str,
        search: Search,
        metric: Metric,
        prune: bool,
        seed: int,
        num_trials: int,
        on_trial: Callable[[int, int, Trial | None], None] | None,
    ) -> None:
        # What failed is tried again: a disk may have been full.
        self.trials = {
            number: Trial(number, trial.values) if trial.state == "failed" else trial
            for number, trial in _read_trials(out).items()
        }
        self._num_trials = max(num_trials, len(self.trials))
        self._task = _Task(dataset, out, search, metric, prune)
        self._on_trial = on_trial or (lambda num_done, num_all, last: None)
        self._seed = seed
        self._handed_out: list[int] = []

    def run(self, engine: Engine) -> None:
        """Run what is left."""
        self._tell_people(None)
        # The local engine asks for an item when a worker is free; a cluster may ask for all at once, and nothing would
        # be learned from one trial for the next.
        at_once = self._num_trials if engine.name in ("local", "inline") else max(1, engine.num_workers)
        while self._left():
            self._handed_out = []
            try:
                engine.map(self._task, self._choose(at_once), on_result=lambda _, trial: self._note(trial))
            except TaskError as error:
                # Its process ended on every attempt, as one does that takes all memory. The others are worth it.
                if error.index is None or error.index >= len(self._handed_out):
                    raise
                number = self._handed_out[error.index]
                failed = dataclasses.replace(self.trials[number], state="failed", why=error.message)
                storage.write_json(storage.join(_uri_of(self._task.out, number), RESULT), config.to_dict(failed))
                self._note(failed)

    def _left(self) -> int:
        return self._num_trials - sum(trial.state is not None for trial in self.trials.values())

    def _choose(self, num: int) -> Iterator[Trial]:
        begun = [trial for trial in self.trials.values() if trial.state is None]
        for trial in begun[:num]:
            self._handed_out.append(trial.number)
            yield trial
        for _ in range(min(num - len(begun), self._num_trials - len(self.trials))):
            # Afresh each time, so that a choice depends on the trials so far and on nothing that a restart forgets.
            known = [self.trials[number] for number in sorted(self.trials)]
            study = create_study(self._task.search, self._task.metric, self._seed + len(known), known)
            asked = study.ask(self._task.search.distributions())
            trial = Trial(asked.number, dict(asked.params))
            storage.write_json(storage.join(_uri_of(self._task.out, trial.number), TRIAL), config.to_dict(trial))
            self.trials[trial.number] = trial
            self._handed_out.append(trial.number)
            yield trial

    def _note(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        self._tell_people(trial)

    def _tell_people(self, last: Trial | None) -> None:
        self._on_trial(self._num_trials - self._left(), self._num_trials, last)


class _Pruned(Exception):  # noqa: N818 - no error
    """The trial is given up."""


@dataclass(frozen=True)
class _Task:
    """Trains one trial; idempotent."""

    dataset: str
    out: str
    search: Search
    metric: Metric
    prune: bool

    def __call__(self, trial: Trial) -> Trial:
        uri = _uri_of(self.out, trial.number)
        before = _read(storage.join(uri, RESULT))
        if before is not None and before["state"] != "failed":
            return config.from_dict(Trial, before)
        started = time.perf_counter()
        watch = _Watch(self, trial, list((_read(storage.join(uri, PROGRESS)) or {}).get("by_epoch", ())))
        state, why = "complete", ""
        try:
            run = storage.join(uri, "run")
            done = train(
                self.dataset,
                run,
                self.search.settings(trial.values),
                resume=storage.exists(storage.join(run, CONFIG_NAME)),
                engine=create_engine("inline"),
                num_workers=1,
                on_event=watch,
            )
            if done.interrupted_by is not None:
                raise KeyboardInterrupt
        except _Pruned:
            state = "pruned"
            _forget_checkpoints(uri)
        except ManyeyesError as error:
            state, why = "failed", str(error)
        best = None
        if watch.by_epoch:
            best = max(watch.by_epoch) if self.metric == "val_accuracy" else min(watch.by_epoch)
        result = dataclasses.replace(
            trial,
            state=state,  # type: ignore[arg-type]
            by_epoch=tuple(watch.by_epoch),
            best=best,
            seconds=time.perf_counter() - started,
            why=why,
        )
        storage.write_json(storage.join(uri, RESULT), config.to_dict(result))
        return result


class _Watch:
    """Writes down a trial's epochs, and ends it where it is worse than most."""

    def __init__(self, task: _Task, trial: Trial, by_epoch: list[float]) -> None:
        self.by_epoch = by_epoch
        self._task = task
        self._uri = _uri_of(task.out, trial.number)
        self._ended: dict[int, Trial] = {}

    def __call__(self, event: Event) -> None:
        if not isinstance(event, EpochEnd):
            return
        value = event.val_accuracy if self._task.metric == "val_accuracy" else event.val_loss
        if value is None:
            return
        # An epoch that was measured before a death may be measured again.
        self.by_epoch = [*self.by_epoch[: event.epoch - 1], value]
        storage.write_json(storage.join(self._uri, PROGRESS), {"by_epoch": self.by_epoch})
        if not self._task.prune or event.epoch == event.epochs:
            return
        self._ended |= _read_ended(self._task.out, self._ended)
        if is_worse_than_most(self._task.search, self._task.metric, self._ended.values(), self.by_epoch):
            raise _Pruned


def _uri_of(out: str, number: int) -> str:
    return storage.join(out, "trials", f"{number:04d}")


def _read(uri: str) -> dict[str, Any] | None:
    try:
        return storage.read_json(uri)
    except FileNotFoundError:
        return None


def _read_trials(out: str) -> dict[int, Trial]:
    """All trials so far, by number."""
    folder = storage.join(out, "trials")
    if not storage.exists(folder):
        return {}
    trials: dict[int, Trial] = {}
    for name in sorted(item.name for item in storage.iterate_directory(folder) if item.is_directory):
        uri = storage.join(folder, name)
        found = _read(storage.join(uri, RESULT)) or _read(storage.join(uri, TRIAL))
        # Numbers are Optuna's, without gaps: what comes after one was begun later and never told of.
        if found is None or found["number"] != len(trials):
            break
        trials[len(trials)] = config.from_dict(Trial, found)
    return trials


def _read_ended(out: str, known: dict[int, Trial]) -> dict[int, Trial]:
    ended: dict[int, Trial] = {}
    for item in storage.iterate_directory(storage.join(out, "trials")):
        if item.name.isdigit() and int(item.name) not in known:
            found = _read(storage.join(out, "trials", item.name, RESULT))
            if found is not None:
                ended[found["number"]] = config.from_dict(Trial, found)
    return ended


def _forget_checkpoints(uri: str) -> None:
    checkpoints = storage.join(uri, "run", _CHECKPOINTS)
    if storage.exists(checkpoints):
        storage.remove(checkpoints, recursive=True)


def _to_toml(recipe: dict[str, Any], best: Trial, metric: Metric, num_trials: int, dataset: str) -> bytes:
    import tomli_w

    header = (
        f"# Trial {best.number}, the best of {num_trials}: {metric.replace('_', ' ')} {best.best:.4f}, by which it was "
        f"chosen.\n#\n#   manyeyes train {dataset} --recipe {RECIPE} --out RUN\n\n"
    )
    return (header + tomli_w.dumps(recipe)).encode()
