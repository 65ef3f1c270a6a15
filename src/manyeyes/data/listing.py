"""The driver's one pass over a source: counts, class names, and what the splits need; entries go to the scatter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from manyeyes.data.scatter import Scatter
from manyeyes.data.sources.base import Skipped, Source, SourceEntry
from manyeyes.data.splits import Fractions, StratifiedSplit, assign_groups
from manyeyes.errors import Reason

# How often progress is told, in inputs.
_REPORT_EVERY = 1000


@dataclass
class Listing:
    """What a pass over a source has found; memory grows with classes and groups, not with entries.

    Attributes:
        class_names: label i is class_names[i].
        num_classes_found: how many of them have entries.
        num_entries: inputs that should become examples.
        skipped: inputs passed over, by reason.
        problems: entries that can't be used as the listing already knows, by reason.
        explicit_splits: the splits that the source names.
        free_by_label: entries without a group that may go to any split.
        free_by_group: group -> label -> entries that may go to any split.
        held_out_groups: group -> "val" or "test", where the source puts an entry of the group.
    """

    class_names: tuple[str, ...] = ()
    num_classes_found: int = 0
    num_entries: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    explicit_splits: set[str] = field(default_factory=set)
    free_by_label: Counter[str] = field(default_factory=Counter)
    free_by_group: dict[str, Counter[str]] = field(default_factory=dict)
    held_out_groups: dict[str, str] = field(default_factory=dict)

    @property
    def num_usable(self) -> int:
        """Entries without a known problem."""
        return self.num_entries - self.problems.total()

    def shares(self, fractions: Fractions) -> dict[str, float]:
        """The shares of the splits to which entries are dealt, none of them 0; an entry in another is there by name.

        They are dealt by `fractions` if the source names no split but train; if it names test but no val, only val is
        cut from them; else all are train.
        """
        if self.explicit_splits <= {"train"}:
            dealt = fractions
        elif "val" not in self.explicit_splits:
            dealt = Fractions(fractions.val, 0.0)
        else:
            dealt = Fractions(0.0, 0.0)
        shares = {"train": 1 - dealt.val - dealt.test, "val": dealt.val, "test": dealt.test}
        return {split: share for split, share in shares.items() if share > 0}

    def splitter(self, fractions: Fractions, seed: int) -> Callable[[SourceEntry, int], str]:
        """Return the function from an entry and its ordinal to its split.

        An entry whose source says val or test stays there, and those of its group for which the source says nothing
        follow it. The others are dealt by `shares`.
        """
        shares = self.shares(fractions)
        of_share = Fractions(shares.get("val", 0.0), shares.get("test", 0.0))
        stratified = StratifiedSplit(of_share, seed, self.free_by_label)
        of_group = assign_groups(self.free_by_group, shares, seed)

        def split_of(entry: SourceEntry, ordinal: int) -> str:
            if entry.split in ("val", "test"):
                return entry.split
            if entry.group is not None:
                if entry.split is None and entry.group in self.held_out_groups:
                    return self.held_out_groups[entry.group]
                return of_group[entry.group]
            assert entry.label is not None
            return stratified.split_of(entry.label, ordinal)

        return split_of


def list_source(
    source: Source, class_names: tuple[str, ...] | None, scatter: Scatter, on_count: Callable[[int], None]
) -> Listing:
    """Read all entries of a source into `scatter`, each followed by its ordinal among the free ones of its class.

    Args:
        class_names: the only classes allowed; integer labels are indices into them. None: those found.
        on_count: called now and then with the number of inputs so far.

    Raises:
        SourceError: from the source.
    """
    listing = Listing()
    known = class_names or source.class_names or ()
    labels_known = frozenset(known)
    found_labels: set[str] = set()
    for position, found in enumerate(source.entries(), start=1):
        if position % _REPORT_EVERY == 0:
            on_count(position)
        if isinstance(found, Skipped):
            listing.skipped[found.reason] += 1
            continue
        listing.num_entries += 1
        entry = found if not known or found.label in labels_known else _with_known_label(found, known)
        ordinal = -1
        if entry.problem is not None:
            listing.problems[entry.problem.value] += 1
        else:
            assert entry.label is not None
            found_labels.add(entry.label)
            if entry.split is not None:
                listing.explicit_splits.add(entry.split)
            if entry.split in (None, "train"):
                if entry.group is None:
                    ordinal = listing.free_by_label[entry.label]
                    listing.free_by_label[entry.label] += 1
                else:
                    listing.free_by_group.setdefault(entry.group, Counter())[entry.label] += 1
            elif entry.group is not None:
                listing.held_out_groups.setdefault(entry.group, entry.split)
        scatter.add(entry.block, [*entry.to_json(), ordinal])
    listing.num_classes_found = len(found_labels)
    listing.class_names = known or tuple(sorted(found_labels, key=_sort_key(found_labels)))
    return listing


def _with_known_label(entry: SourceEntry, known: tuple[str, ...]) -> SourceEntry:
    if entry.label is None:
        return entry
    if entry.label.isdecimal() and int(entry.label) < len(known):
        return replace(entry, label=known[int(entry.label)])
    return replace(
        entry, problem=Reason.UNKNOWN_LABEL, detail=f"{entry.label!r} is not one of the {len(known)} class names"
    )


def _sort_key(labels: set[str]) -> Callable[[str], tuple[int, str]]:
    if all(label.isdecimal() for label in labels):
        return lambda label: (int(label), label)
    return lambda label: (0, label)
