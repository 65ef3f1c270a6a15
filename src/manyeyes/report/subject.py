"""What a report is about: a run, an evaluation or a cross-validation, read from its files."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from manyeyes import config, storage
from manyeyes.data.manifest import SPLITS
from manyeyes.errors import CheckpointError, ConfigError, UsageError
from manyeyes.evaluation.crossval import RESULT as CROSSVAL_NAME
from manyeyes.evaluation.crossval import CrossvalResult, load_crossval
from manyeyes.evaluation.evaluate import RESULT_NAME, EvaluationResult
from manyeyes.training.run import CONFIG_NAME, METRICS_NAME, Run

Kind = Literal["run", "evaluation", "crossval"]
# val has chosen the checkpoint and train was learned by heart, so their figures are too good.
_PREFERRED = sorted(SPLITS, key=("test", "val", "train").index)


@dataclass(frozen=True)
class Subject:
    """What there is to report.

    Attributes:
        kind: what `uri` is.
        run: that was trained or evaluated; None for a cross-validation, and for a bundle.
        evaluation, evaluation_uri: with its directory; None where a run was not evaluated.
        crossval: of a cross-validation.
        notices: what is missing or doubtful, for people.
    """

    kind: Kind
    uri: str
    run: Run | None = None
    evaluation: EvaluationResult | None = None
    evaluation_uri: str | None = None
    crossval: CrossvalResult | None = None
    notices: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For titles: of the model, or of the directory."""
        if self.crossval is not None:
            return str(self.crossval.recipe.get("model", {}).get("name", "model"))
        if self.evaluation is not None:
            return self.evaluation.model_name
        assert self.run is not None
        return self.run.model.name


def open_subject(uri: str, split: str | None = None) -> Subject:
    """Find out what is at `uri`, and read it.

    Args:
        uri: of a run, of a directory that `evaluate` wrote, or of one that `crossval` wrote.
        split: of a run: which of its evaluations; default: test, else val, else train.

    Raises:
        UsageError: there is none of these, it is damaged or not finished, or a run has no evaluation on `split`.
    """
    uri = storage.absolute(str(uri).rstrip("/"))
    for name in (CROSSVAL_NAME, RESULT_NAME):
        if split is not None and storage.exists(storage.join(uri, name)):
            raise UsageError(f"{uri} is not a run: it has no other split. Leave out --split.")
    if storage.exists(storage.join(uri, CROSSVAL_NAME)):
        try:
            return Subject("crossval", uri, crossval=load_crossval(uri))
        except (ConfigError, ValueError) as error:
            raise UsageError(f"{storage.join(uri, CROSSVAL_NAME)} can't be used: {error}. Run it again.") from None
    if storage.exists(storage.join(uri, CONFIG_NAME)):
        return _open_run(uri, split)
    if storage.exists(storage.join(uri, RESULT_NAME)):
        found = load_evaluation(uri)
        run, notices = None, []
        if found.model_kind == "run":
            try:
                run = Run.open(found.model)
            except (UsageError, OSError) as error:
                notices.append(
                    f"The run is not where it was evaluated, so that its learning curves are missing: {error}"
                )
        return Subject("evaluation", uri, run, found, uri, notices=tuple(notices))
    raise UsageError(
        f"{uri} holds no run ({CONFIG_NAME}), evaluation ({RESULT_NAME}) or finished cross-validation "
        f"({CROSSVAL_NAME}). Give what `manyeyes train`, `evaluate --out` or `crossval` made."
    )


def load_evaluation(directory: str) -> EvaluationResult:
    """Read what `evaluate` wrote.

    Raises:
        UsageError: there is none, or it is damaged or of another version.
    """
    uri = storage.join(directory, RESULT_NAME)
    try:
        values = storage.read_json(uri)
        # A thousand classes have a million cells: they are not looked at one by one.
        matrix = values["metrics"].pop("confusion_matrix")
        found = config.from_dict(EvaluationResult, {**values, "metrics": {**values["metrics"], "confusion_matrix": []}})
        rows = tuple(map(tuple, matrix))
    except FileNotFoundError:
        raise UsageError(
            f"There is no evaluation at {directory} ({RESULT_NAME}). Make it with: manyeyes evaluate"
        ) from None
    except (ConfigError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{uri} can't be used ({type(error).__name__}: {error}). Evaluate again.") from None
    return dataclasses.replace(found, metrics=dataclasses.replace(found.metrics, confusion_matrix=rows))


def read_metrics(run_uri: str) -> tuple[list[dict[str, Any]], int]:
    """The lines of a run's metrics.jsonl, none if there is no such file; and how many more can't be read."""
    uri = storage.join(run_uri, METRICS_NAME)
    if not storage.exists(uri):
        return [], 0
    lines = storage.read_bytes(uri).decode("utf-8", "replace").splitlines()
    found, num_damaged = [], 0
    for line in lines:
        try:
            found.append(json.loads(line, parse_constant=lambda name: None))
        except ValueError:
            num_damaged += 1
    # A killed training may have left half a line at the end.
    ends_within = bool(lines) and not lines[-1].endswith("}")
    return [line for line in found if isinstance(line, dict)], num_damaged - ends_within


def _open_run(uri: str, split: str | None) -> Subject:
    run = Run.open(uri)
    for name in _PREFERRED if split is None else (split,):
        directory = storage.join(uri, "evaluation", name)
        if storage.exists(storage.join(directory, RESULT_NAME)):
            found = load_evaluation(directory)
            return Subject("run", uri, run, found, directory, notices=tuple(_doubts(run, found)))
    command = f"manyeyes evaluate {uri} {run.dataset}"
    if split is not None:
        raise UsageError(f"{uri} was not evaluated on {split}. Do so with: {command} --split {split}")
    return Subject("run", uri, run, notices=(f"The run was not evaluated yet. Do so with: {command}",))


def _doubts(run: Run, found: EvaluationResult) -> list[str]:
    try:
        newest = run.state("best").fingerprint
    except CheckpointError as error:
        return [f"The weights that were evaluated are gone: {error}"]
    if newest != found.model_fingerprint:
        return [
            "The run was trained on since: these figures are of earlier weights. Evaluate again with: "
            f"manyeyes evaluate {run.uri} {found.dataset} --split {found.split}"
        ]
    return []
