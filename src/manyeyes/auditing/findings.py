"""What an audit says: plain values, ready for JSON, the same for every engine and any cut into shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import manyeyes
from manyeyes import config
from manyeyes.auditing.outliers import Distribution

FORMAT = "manyeyes.audit"
FORMAT_VERSION = 1


@dataclass(frozen=True, order=True)
class Example:
    """One example, as people find it again."""

    path: str
    split: str
    class_name: str


@dataclass(frozen=True, order=True)
class Cluster:
    """Examples that show the same picture.

    Attributes:
        examples: in the order of their paths.
        all_copies: whether all have the same stored content; otherwise some are near duplicates.
        splits: in which they lie; with more than one the cluster is a leak.
        conflicting_labels: whether they have different labels.
    """

    examples: tuple[Example, ...]
    all_copies: bool
    splits: tuple[str, ...]
    conflicting_labels: bool

    @property
    def is_leak(self) -> bool:
        """Whether it straddles splits."""
        return len(self.splits) > 1


@dataclass(frozen=True)
class StraddlingGroup:
    """A group (of one patient, one place, one scene …) that lies in several splits: split -> number of examples."""

    group: str
    num_examples: dict[str, int]


@dataclass(frozen=True)
class ClassCount:
    """How many examples a class has in each split, and what is wrong with that: "few_in_train", "missing_in_SPLIT"."""

    class_name: str
    num_examples: dict[str, int]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Outlier:
    """An image far outside of what the dataset has.

    Attributes:
        kind: small, large, narrow, wide, dark, bright or blurred.
        value: pixels, width divided by height, mean grey value, or variance of the Laplacian.
        distance: beyond the nearer quartile, in interquartile ranges; more than 3.
    """

    example: Example
    kind: str
    value: float
    distance: float


@dataclass(frozen=True)
class LabelError:
    """A label that is probably wrong, what the model says instead, and the probability that it gives the label."""

    example: Example
    predicted: str
    label_probability: float


@dataclass(frozen=True)
class Fixed:
    """The mended dataset. num_examples + the sum of left_out = the examples of the audited one.

    Attributes:
        left_out: reason -> number of examples.
        num_moved: examples that lie in another split than before.
        written: split -> number of examples; a split without any is not in it.
        emptied: split -> classes that had examples in it and have none now.
        changes: URI of the list of all that was moved or left out, as JSON lines.
    """

    dataset: str
    num_examples: int
    left_out: dict[str, int]
    num_moved: int
    written: dict[str, int]
    emptied: dict[str, tuple[str, ...]]
    changes: str


@dataclass(frozen=True)
class AuditResult:
    """What an audit found; audit.json holds all but `files`.

    Attributes:
        distance: of perceptual hashes that counted as near: less than asked for where too many lie close.
        num_copies: examples beyond the first of each set with the same content.
        num_near_duplicates: examples beyond the first of each cluster, without the copies.
        num_flat: examples without structure (one colour, a plain gradient), of which only copies are found.
        clusters: of duplicates; the leaks among them first, then those with conflicting labels, then the largest.
        straddling_groups: groups in several splits.
        imbalance: examples of the largest class divided by those of the smallest in train; None where one has none.
        distributions: of each measure.
        num_judged: examples whose labels were judged; None without predictions.
        label_errors: the least probable label first.
    """

    dataset: str
    dataset_fingerprint: str
    num_examples: int
    distance: int
    num_copies: int
    num_near_duplicates: int
    num_flat: int
    clusters: tuple[Cluster, ...]
    straddling_groups: tuple[StraddlingGroup, ...]
    classes: tuple[ClassCount, ...]
    imbalance: float | None
    distributions: dict[str, Distribution]
    outliers: tuple[Outlier, ...]
    num_judged: int | None = None
    label_errors: tuple[LabelError, ...] = ()
    fixed: Fixed | None = None
    manyeyes_version: str = manyeyes.__version__
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    files: tuple[str, ...] = field(default=())

    @property
    def leaks(self) -> tuple[Cluster, ...]:
        """The clusters that straddle splits."""
        return tuple(cluster for cluster in self.clusters if cluster.is_leak)

    @property
    def conflicts(self) -> tuple[Cluster, ...]:
        """The clusters with different labels."""
        return tuple(cluster for cluster in self.clusters if cluster.conflicting_labels)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return config.to_dict(self)
