"""`audit`: a dataset in, what is wrong with it out; with `fix` also a view of it without copies and leaks."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from manyeyes import storage
from manyeyes.auditing import sheets
from manyeyes.auditing.findings import (
    AuditResult,
    ClassCount,
    Cluster,
    Example,
    LabelError,
    Outlier,
    StraddlingGroup,
)
from manyeyes.auditing.fix import write_fixed
from manyeyes.auditing.label_errors import Suspect, find_label_errors
from manyeyes.auditing.lookup import Named, find_paths, read_names
from manyeyes.auditing.measuring import Measured, measure
from manyeyes.auditing.order import in_order
from manyeyes.auditing.outliers import find_outliers
from manyeyes.data.dataset import Dataset
from manyeyes.data.duplicates import DEFAULT_DISTANCE, Duplicates, find_duplicates
from manyeyes.engines.base import Engine
from manyeyes.engines.registry import create_engine
from manyeyes.errors import DataError, UsageError

RESULT_NAME = "audit.json"
# A class with fewer examples to train on is called tiny.
MIN_CLASS_EXAMPLES = 10


def audit(
    dataset: str,
    *,
    engine: Engine | None = None,
    distance: int = DEFAULT_DISTANCE,
    predictions: str | None = None,
    out: str | None = None,
    fix: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> AuditResult:
    """Look for what makes the figures of a dataset dishonest or its training worse.

    Args:
        dataset: URI of the dataset directory; it is never changed.
        engine: where it runs; default: local, a worker per core. The result is the same for every engine.
        distance: in how many of 64 bits the perceptual hashes of near duplicates may differ, 0 to 8.
        predictions: directory of predictions for examples that the model was not trained on; finds label errors.
        out: directory for audit.json and sheets of the images in question; default: nothing is written.
        fix: directory for a view of the dataset without copies and leaks.
        on_progress: called with the number of examples that were handed out so far, and the number of all.

    Raises:
        UsageError: an argument is wrong, or `out` or `fix` can't be written.
        DatasetError: the dataset is missing or damaged.
        DataError: the predictions are missing or of another dataset.
        MissingExtraError: label errors are asked for and cleanlab is not installed.
    """
    data = Dataset(storage.absolute(dataset))
    out, fix = (None if uri is None else storage.absolute(uri) for uri in (out, fix))
    for uri in (out, fix):
        if uri is not None:
            storage.check_writable(uri)
    if fix is not None and storage.exists(fix) and any(True for _ in storage.iterate_directory(fix)):
        raise UsageError(f"{fix} is not empty. Give a new or an empty directory for the mended dataset.")
    engine = engine or create_engine()
    # First, as it takes least and fails where a library is missing.
    suspects, num_judged = (
        find_label_errors(storage.absolute(predictions), len(data.class_names)) if predictions else ([], None)
    )
    measured = measure(data, engine, on_progress or (lambda done, total: None))
    duplicates = find_duplicates(data, engine, distance, hashes=measured.hashes)
    distributions, odd = find_outliers(measured)
    straddling = _straddling(measured)
    suspected = _examples_of(suspects, data, engine, measured, predictions)
    wanted = {
        *np.flatnonzero(duplicates.clusters >= 0).tolist(),
        *(each.example for each in odd),
        *straddling,
        *suspected,
    }
    found = _Found(data, measured, duplicates, read_names(data, engine, wanted))
    classes, imbalance = _classes(data)
    clusters = found.clusters()
    errors = [
        (LabelError(found.example(number), data.class_names[suspect.predicted], suspect.label_probability), number)
        for suspect, number in zip(suspects, suspected, strict=True)
    ]
    outliers = sorted(
        ((each, found.example(each.example)) for each in odd),
        key=lambda pair: (pair[0].kind, -pair[0].distance, pair[1]),
    )
    result = AuditResult(
        dataset=data.uri,
        dataset_fingerprint=data.manifest.fingerprint,
        num_examples=len(measured.labels),
        distance=duplicates.distance,
        num_copies=_num_beyond_first(duplicates.copies),
        num_near_duplicates=_num_beyond_first(duplicates.clusters) - _num_beyond_first(duplicates.copies),
        num_flat=duplicates.num_flat,
        clusters=tuple(cluster for cluster, _ in clusters),
        straddling_groups=found.straddling_groups(straddling),
        classes=classes,
        imbalance=imbalance,
        distributions=distributions,
        outliers=tuple(Outlier(example, each.kind, each.value, each.distance) for each, example in outliers),
        num_judged=num_judged,
        label_errors=tuple(error for error, _ in errors),
    )
    if fix is not None:
        result = dataclasses.replace(result, fixed=write_fixed(data, engine, measured, duplicates, fix))
    if out is None:
        return result
    numbers = sheets.Numbers(
        [numbers for _, numbers in clusters], [each.example for each, _ in outliers], [number for _, number in errors]
    )
    files = [storage.join(out, RESULT_NAME), *sheets.write_sheets(data, result, numbers, out)]
    values = result.to_dict()
    del values["files"]
    storage.write_json(files[0], values)
    return dataclasses.replace(result, files=tuple(files))


@dataclasses.dataclass(frozen=True)
class _Found:
    """Turns numbers of examples into what people read."""

    data: Dataset
    measured: Measured
    duplicates: Duplicates
    names: dict[int, Named]

    def example(self, number: int) -> Example:
        label = int(self.measured.labels[number])
        split = self.measured.split_names[self.measured.splits[number]]
        return Example(self.names[number].path, split, self.data.class_names[label])

    def clusters(self) -> list[tuple[Cluster, list[int]]]:
        """Each with the numbers of its examples, in the same order."""
        members = np.flatnonzero(self.duplicates.clusters >= 0)
        members = members[np.argsort(self.duplicates.clusters[members], kind="stable")]
        ids = self.duplicates.clusters[members]
        found: list[tuple[Cluster, list[int]]] = []
        for rows in np.split(members, np.flatnonzero(np.diff(ids)) + 1) if len(members) else []:
            pairs = sorted((self.example(row), row) for row in rows.tolist())
            examples, numbers = tuple(example for example, _ in pairs), [row for _, row in pairs]
            copies = set(self.duplicates.copies[rows].tolist())
            cluster = Cluster(
                examples,
                all_copies=len(copies) == 1 and copies != {-1},
                splits=in_order({example.split for example in examples}),
                conflicting_labels=len({example.class_name for example in examples}) > 1,
            )
            found.append((cluster, numbers))
        return sorted(found, key=lambda pair: _severity(pair[0]))

    def straddling_groups(self, straddling: dict[int, dict[str, int]]) -> tuple[StraddlingGroup, ...]:
        found = [StraddlingGroup(str(self.names[number].group), counts) for number, counts in straddling.items()]
        return tuple(sorted(found, key=lambda each: each.group))


def _examples_of(
    suspects: list[Suspect], data: Dataset, engine: Engine, measured: Measured, predictions: str | None
) -> list[int]:
    """The number of each suspect's example, each taken once: a source may list a file under two labels or twice."""
    left: dict[tuple[str, int], list[int]] = defaultdict(list)
    for path, numbers in find_paths(data, engine, {suspect.path for suspect in suspects}).items():
        # What is held out goes first, as predictions are for what was not trained on.
        for number in sorted(numbers, key=lambda number: measured.splits[number]):
            left[path, int(measured.labels[number])].append(number)
    found = []
    for suspect in suspects:
        if not (numbers := left[suspect.path, suspect.label]):
            raise DataError(
                f"{predictions} is not of this dataset: it has {suspect.path} with label {suspect.label}, which "
                f"{data.uri} has not, or not as often. Give predictions for this dataset."
            )
        found.append(numbers.pop())
    return found


def _num_beyond_first(ids: np.ndarray) -> int:
    members = ids[ids >= 0]
    return len(members) - len(np.unique(members))


def _severity(cluster: Cluster) -> tuple[object, ...]:
    return (not cluster.is_leak, not cluster.conflicting_labels, -len(cluster.examples), cluster.examples)


def _straddling(measured: Measured) -> dict[int, dict[str, int]]:
    """One example of each group that lies in several splits, and how many examples the group has in each."""
    rows = np.flatnonzero(measured.groups >= 0)
    pairs = np.stack([measured.groups[rows], measured.splits[rows].astype(np.int64)], axis=1)
    pairs, first, counts = np.unique(pairs, axis=0, return_index=True, return_counts=True)
    found: dict[int, dict[str, int]] = {}
    for of_one in np.split(np.arange(len(pairs)), np.flatnonzero(np.diff(pairs[:, 0])) + 1):
        if len(of_one) > 1:
            names = (measured.split_names[split] for split in pairs[of_one, 1].tolist())
            found[int(rows[first[of_one[0]]])] = dict(zip(names, counts[of_one].tolist(), strict=True))
    return found


def _classes(data: Dataset) -> tuple[tuple[ClassCount, ...], float | None]:
    written = data.manifest.counts.written
    splits = in_order(written)
    found = []
    for label, name in enumerate(data.class_names):
        counts = {split: written[split][label] for split in splits}
        problems = [f"missing_in_{split}" for split in splits if not counts[split]]
        if 0 < counts.get("train", 0) < MIN_CLASS_EXAMPLES:
            problems.append("few_in_train")
        found.append(ClassCount(name, counts, tuple(problems)))
    trained = [each.num_examples.get("train", 0) for each in found]
    least = min(trained)
    return tuple(found), round(max(trained) / least, 4) if least else None
