"""Counters and histograms, and their text for Prometheus.

Own counters rather than prometheus-client's: they are changed in the event loop alone, so they need no locks, and a
batch is counted at once (figures: docs/decisions/0110-serving.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
Labels = tuple[str, ...]

_MAX_FRESH = 512
_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_BRIGHTNESS = tuple(range(16, 256, 16))
_PIXELS = (1e3, 4e3, 1.6e4, 6.4e4, 2.5e5, 1e6, 4e6, 1.6e7, 6.4e7)


class Counter:
    """Counts by label values."""

    kind = "counter"

    def __init__(self, name: str, help_text: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self.help_text = help_text
        self.labels = tuple(labels)
        self.values: dict[Labels, float] = {}

    def add(self, labels: Labels = (), amount: float = 1) -> None:
        """Count `amount` more."""
        self.values[labels] = self.values.get(labels, 0) + amount

    def samples(self) -> Iterator[tuple[str, Labels, Sequence[str], float]]:
        """(name, label values, label names, value) of each."""
        for values, amount in list(self.values.items()):
            yield self.name, values, self.labels, amount


class Gauge(Counter):
    """A value that is asked for when it is read: `read` gives it by label values."""

    kind = "gauge"

    def __init__(
        self, name: str, help_text: str, labels: Sequence[str], read: Callable[[], dict[Labels, float]]
    ) -> None:
        super().__init__(name, help_text, labels)
        self._read = read

    def samples(self) -> Iterator[tuple[str, Labels, Sequence[str], float]]:
        """See Counter."""
        for values, amount in self._read().items():
            yield self.name, values, self.labels, amount


class Histogram:
    """Counts values by the upper bounds of buckets, for each combination of labels."""

    kind = "histogram"

    def __init__(self, name: str, help_text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self.name = name
        self.help_text = help_text
        self.labels = tuple(labels)
        self._bounds = tuple(bounds)
        self._counts: dict[Labels, np.ndarray] = {}
        self._sums: dict[Labels, float] = {}
        # Values that are not sorted into buckets yet: many at once cost a tenth of one by one.
        self._fresh: dict[Labels, list[float]] = {}

    def observe(self, labels: Labels, value: float) -> None:
        """Count one value."""
        fresh = self._fresh.get(labels)
        if fresh is None:
            fresh = self._fresh[labels] = []
            self._counts[labels] = np.zeros(len(self._bounds) + 1, np.int64)
            self._sums[labels] = 0.0
        fresh.append(value)
        if len(fresh) >= _MAX_FRESH:
            self._sort(labels)

    def _sort(self, labels: Labels) -> None:
        values = np.array(self._fresh[labels], np.float64)
        self._fresh[labels].clear()
        buckets = np.searchsorted(self._bounds, values, side="left")
        self._counts[labels] += np.bincount(buckets, minlength=len(self._bounds) + 1)
        self._sums[labels] += float(values.sum())

    def samples(self) -> Iterator[tuple[str, Labels, Sequence[str], float]]:
        """See Counter."""
        for values in list(self._counts):
            self._sort(values)
            total = 0
            for bound, count in zip((*self._bounds, float("inf")), self._counts[values].tolist(), strict=True):
                total += count
                shown = "+Inf" if bound == float("inf") else f"{bound:g}"
                yield f"{self.name}_bucket", (*values, shown), (*self.labels, "le"), total
            yield f"{self.name}_sum", values, self.labels, self._sums[values]
            yield f"{self.name}_count", values, self.labels, total


class Metrics:
    """All that a server counts."""

    def __init__(self) -> None:
        model = ("model", "version")
        self.requests = Counter("manyeyes_requests_total", "Requests by route and status.", ("route", "status"))
        self.errors = Counter("manyeyes_errors_total", "Failures by reason, of requests and of images.", ("reason",))
        self.images = Counter("manyeyes_images_total", "Images that were answered.", model)
        self.predictions = Counter("manyeyes_predictions_total", "Likeliest classes.", (*model, "class_name"))
        self.shadow = Counter("manyeyes_shadow_total", "Images that a shadow version answered too.", (*model, "agrees"))
        self.loads = Counter("manyeyes_model_loads_total", "Versions loaded or refused.", (*model, "outcome"))
        self.restarts = Counter("manyeyes_worker_restarts_total", "Worker processes that were started again.")
        self.total = Histogram("manyeyes_request_seconds", "From head to answer.", ("route",), _SECONDS)
        self.queue = Histogram("manyeyes_queue_seconds", "An image waits to be decoded.", model, _SECONDS)
        self.decode = Histogram("manyeyes_decode_seconds", "An image is decoded.", model, _SECONDS)
        self.predict = Histogram("manyeyes_predict_seconds", "A batch is predicted.", model, _SECONDS)
        self.batch_size = Histogram("manyeyes_batch_size", "Images in a batch.", model, _SIZES)
        self.brightness = Histogram(
            "manyeyes_input_brightness", "Mean of the model's input in [0, 255].", model, _BRIGHTNESS
        )
        self.pixels = Histogram("manyeyes_input_pixels", "Width times height of an image.", (), _PIXELS)
        self.bytes = Histogram("manyeyes_input_bytes", "Encoded bytes of an image.", (), _PIXELS)
        self._gauges: list[Gauge] = []

    def add_gauge(
        self, name: str, help_text: str, labels: Sequence[str], read: Callable[[], dict[Labels, float]]
    ) -> None:
        """Add a value that is asked for when metrics are read."""
        self._gauges.append(Gauge(name, help_text, labels, read))

    def to_text(self) -> bytes:
        """In Prometheus' text format, 0.0.4."""
        lines = []
        families: Iterable[Counter | Histogram] = (
            value for value in (*vars(self).values(), *self._gauges) if isinstance(value, Counter | Histogram)
        )
        for family in families:
            lines.append(f"# HELP {family.name} {family.help_text}")
            lines.append(f"# TYPE {family.name} {family.kind}")
            for name, values, labels, amount in family.samples():
                shown = ",".join(f'{label}="{_escaped(value)}"' for label, value in zip(labels, values, strict=True))
                lines.append(f"{name}{{{shown}}} {amount:.17g}" if shown else f"{name} {amount:.17g}")
        return ("\n".join(lines) + "\n").encode()


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
