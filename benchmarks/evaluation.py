"""Evaluation of a million predictions, and how often its intervals hold the true figures.

    python benchmarks/evaluation.py [--examples 1000000] [--shards 64] [--workers 2] [--repetitions 1000]

First table: predictions over 10 and 1,000 classes are made up in tasks of the local engine, one a shard, added up there
and merged in the driver. The bound is the least that an accuracy costs: NumPy's argmax and a bincount of the confusion
matrix over the same arrays in one process; beside it scikit-learn, which needs all scores in one place, for the figures
that it has. All are counted by CPU seconds, as each has one thread. Every size runs in a process of its own, which
reports its peak memory (not its workers'); that must not grow with the number of shards.

Second table: test sets are drawn again and again from a population whose figures are known (a draw of two million), and
it is counted how often the 95 % intervals hold them. Goal: 93 to 97 %.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from manyeyes.engines.registry import create_engine
from manyeyes.evaluation.metrics import Summary, summarize
from manyeyes.evaluation.notable import Notable, Place
from manyeyes.evaluation.sums import ClassificationSums
from manyeyes.evaluation.tasks import Findings

FIGURES = ("accuracy", "balanced_accuracy", "macro_f1", "mcc", "log_loss", "brier_score", "ece", "roc_auc")
FIGURES = (*FIGURES, "average_precision")


@dataclass(frozen=True)
class Population:
    """Logits of a made-up model.

    Attributes:
        lead: of the true class's logit over the others, which are normal.
        sharpness: what all logits are multiplied by; at `lead` the probabilities are calibrated.
        imbalance: the last class is exp(imbalance) times rarer than the first.
    """

    num_classes: int
    lead: float
    sharpness: float
    imbalance: float

    def draw(self, num_examples: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        shares = np.exp(-self.imbalance * np.linspace(0, 1, self.num_classes))
        labels = random.choice(self.num_classes, num_examples, p=shares / shares.sum())
        logits = random.standard_normal((num_examples, self.num_classes), np.float32)
        logits[np.arange(num_examples), labels] += self.lead
        logits *= self.sharpness
        return logits, labels


COVERAGE = [
    (Population(2, 1.5, 1.5, 1.0), 200),
    (Population(3, 2.0, 2.4, 1.0), 1000),
    (Population(10, 2.5, 3.0, 1.0), 1000),
    (Population(10, 2.5, 2.5, 0.0), 1000),
    (Population(10, 3.0, 4.0, 2.0), 5000),
    (Population(100, 4.0, 4.0, 0.0), 5000),
    (Population(100, 4.0, 4.0, 2.0), 1000),
]


def evaluate_shard(num_classes: int, shard: tuple[int, int]) -> tuple[Findings, float, float]:
    """The task: its findings, and the CPU seconds that making them up and adding them up took."""
    index, num_examples = shard
    started = time.process_time()
    logits, labels = Population(num_classes, 3.0, 3.0, 0.0).draw(num_examples, np.random.default_rng(index))
    paths = [f"{index}/{row}.jpg" for row in range(num_examples)]
    places = [Place(f"test-{index:05d}.parquet", 0, row) for row in range(num_examples)]
    made = time.process_time()
    first = index * num_examples
    sums = ClassificationSums.from_logits(logits, labels, example_indices=np.arange(first, first + num_examples))
    found = Findings(sums, Notable.from_logits(logits, labels, paths, places))
    return found, made - started, time.process_time() - made


def merge(one: tuple[Findings, float, float], other: tuple[Findings, float, float]) -> tuple[Findings, float, float]:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def run_driver(num_classes: int, num_examples: int, num_shards: int, num_workers: int) -> None:
    """The measured process: evaluate and report as JSON."""
    engine = create_engine("local", num_workers)
    shards = [(index, num_examples // num_shards) for index in range(num_shards)]
    started = time.perf_counter()
    reduced = engine.map_reduce(functools.partial(evaluate_shard, num_classes), merge, shards)
    assert reduced is not None
    found, making_seconds, adding_seconds = reduced
    merged = time.perf_counter()
    summary = summarize(found.sums, [str(label) for label in range(num_classes)])
    report = {
        "num_examples": summary.num_examples,
        "accuracy": summary.accuracy,
        "seconds": merged - started,
        "making_seconds": making_seconds,
        "adding_seconds": adding_seconds,
        "summary_seconds": time.perf_counter() - merged,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }
    print(json.dumps(report))


def in_a_process(*arguments: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--driver", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def seconds_of_bound(num_classes: int, num_examples: int) -> float:
    logits, labels = Population(num_classes, 3.0, 3.0, 0.0).draw(num_examples, np.random.default_rng(0))
    started = time.process_time()
    cells = labels * num_classes + logits.argmax(axis=1)
    np.bincount(cells, minlength=num_classes**2)
    return time.process_time() - started


def seconds_of_scikit_learn(num_classes: int, num_examples: int) -> float:
    import sklearn.metrics as metrics

    logits, labels = Population(num_classes, 3.0, 3.0, 0.0).draw(num_examples, np.random.default_rng(0))
    started = time.process_time()
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    predicted, every = logits.argmax(axis=1), np.arange(num_classes)
    metrics.confusion_matrix(labels, predicted, labels=every)
    metrics.classification_report(labels, predicted, labels=every, output_dict=True, zero_division=0)
    metrics.matthews_corrcoef(labels, predicted)
    metrics.log_loss(labels, probabilities, labels=every)
    metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=every)
    truth = labels[:, None] == every
    metrics.roc_auc_score(truth, probabilities, average="macro")
    metrics.average_precision_score(truth, probabilities, average="macro")
    return time.process_time() - started


def measure_speed(console: Console, num_examples: int, num_shards: int, num_workers: int) -> None:
    table = Table(
        title=f"{num_examples:,} predictions, {num_shards} shards, {num_workers} workers", title_justify="left"
    )
    for name in ("classes", "seconds", "CPU s making up", "CPU s adding up", "1,000 examples a CPU s", "the bound's"):
        table.add_column(name, justify="right")
    for name in ("scikit-learn's", "summary s", "driver peak MiB", f"with {num_shards // 8} shards"):
        table.add_column(name, justify="right")
    for num_classes in (10, 1000):
        whole = in_a_process(num_classes, num_examples, num_shards, num_workers)
        part = in_a_process(num_classes, num_examples // 8, num_shards // 8, num_workers)
        per_shard = num_examples // num_shards
        bound = per_shard / min(seconds_of_bound(num_classes, per_shard) for _ in range(3))
        some = max(20 * num_classes, 10_000)
        of_others = some / seconds_of_scikit_learn(num_classes, some)
        table.add_row(
            f"{num_classes:,}",
            f"{whole['seconds']:.1f}",
            f"{whole['making_seconds']:.1f}",
            f"{whole['adding_seconds']:.1f}",
            f"{whole['num_examples'] / whole['adding_seconds'] / 1e3:,.1f}",
            f"{bound / 1e3:,.1f}",
            f"{of_others / 1e3:,.1f}",
            f"{whole['summary_seconds']:.1f}",
            f"{whole['peak_bytes'] / 2**20:.0f}",
            f"{part['peak_bytes'] / 2**20:.0f}",
        )
    console.print(table)


def figures_of(summary: Summary) -> dict[str, float]:
    return {name: summary.macro.f1 if name == "macro_f1" else getattr(summary, name) for name in FIGURES}


def coverage_of(
    population: Population, num_examples: int, repetitions: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The true figures, and how often their intervals hold them."""
    random = np.random.default_rng(1)
    names = [str(label) for label in range(population.num_classes)]
    sums = ClassificationSums.zero(population.num_classes)
    for _ in range(20):
        sums += ClassificationSums.from_logits(*population.draw(100_000, random))
    truth = figures_of(summarize(sums, names))
    held = dict.fromkeys(FIGURES, 0)
    for _ in range(repetitions):
        logits, labels = population.draw(num_examples, random)
        found = summarize(
            ClassificationSums.from_logits(logits, labels, example_indices=np.arange(num_examples)), names
        )
        for name in FIGURES:
            interval = found.accuracy_interval if name == "accuracy" else found.intervals[name]
            held[name] += interval is not None and interval.low <= truth[name] <= interval.high
    return truth, {name: number / repetitions for name, number in held.items()}


def measure_coverage(console: Console, repetitions: int) -> None:
    margin = 196 * (0.95 * 0.05 / repetitions) ** 0.5
    title = f"How often 95 % intervals hold the true figure, in %, ± {margin:.1f} ({repetitions:,} test sets each)"
    table = Table(title=title, title_justify="left")
    for name in ("classes", "examples", "true accuracy", "true ECE", *(name.replace("_", " ") for name in FIGURES)):
        table.add_column(name, justify="right")
    for population, num_examples in COVERAGE:
        truth, held = coverage_of(population, num_examples, repetitions)
        shown = (f"{100 * held[name]:.1f}" for name in FIGURES)
        table.add_row(
            f"{population.num_classes}", f"{num_examples:,}", f"{truth['accuracy']:.3f}", f"{truth['ece']:.3f}", *shown
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=1000, help="test sets for the coverage; 0 leaves it out")
    parser.add_argument("--driver", type=int, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.driver:
        run_driver(*options.driver)
        return
    warnings.simplefilter("ignore")
    console = Console(width=180)
    if options.examples:
        measure_speed(console, options.examples, options.shards, options.workers)
    if options.repetitions:
        measure_coverage(console, options.repetitions)


if __name__ == "__main__":
    main()
