"""What rounds of local steps save and cost: bytes sent and accuracy of diloco beside all-reduce, on Fashion-MNIST.

    python benchmarks/diloco.py DATASET [--epochs 3] [--seeds 3] [--slices 2 4] [--results FILE]

DATASET is made by `make demo` (demo/fashion-mnist) or `manyeyes ingest`. Runs have the same model, batch and schedule.
Bytes of all-reduce are those that a ring sends, 2 (N - 1) / N of the gradients per worker and step; bytes of diloco are
what its tasks read and write, as metrics.jsonl says. Accuracies are on the val split, by the last weights, means over
seeds beside the same seeds of all-reduce; the goal is 100 times fewer bytes at 0.2 points or less.

The lower bound: an epoch of local steps and one averaging (one-shot), beside one epoch of all-reduce.

It takes hours of a core. With --results every run adds a line to FILE and is not repeated when called again, so
that several calls can share the work.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from manyeyes.engines.registry import create_engine
from manyeyes.training.settings import TrainSettings
from manyeyes.training.trainer import train

COMMON = (
    "model.name=cnn",
    "optimizer.name=sgd",
    "optimizer.learning_rate=0.05",
    "optimizer.momentum=0.9",
    "optimizer.nesterov=true",
    "optimizer.weight_decay=5e-4",
    "train.global_batch_size=64",
    "train.precision=float32",
    "train.tensorboard=false",
    "augment.flip_horizontal=0.5",
)
_MEBIBYTE = 1 << 20
_GOAL_POINTS, _GOAL_TIMES = 0.2, 100


@dataclass(frozen=True)
class Mode:
    """One row of the table, and the rows that it is compared with.

    Attributes:
        local_steps: of a round; 0: all-reduce.
        outer: learning rate and momentum of the outer optimizer.
    """

    slices: int
    epochs: int
    width: int
    local_steps: int = 0
    outer: tuple[float, float] = (1.0, 0.0)
    wire: str = "bfloat16"
    keeps_inner_state: bool = False
    is_one_shot: bool = False

    @property
    def name(self) -> str:
        if not self.local_steps:
            return "allreduce"
        if self.is_one_shot:
            return "one-shot averaging"
        return f"diloco, H = {self.local_steps}" + (", inner state kept" if self.keeps_inner_state else "")

    @property
    def assignments(self) -> list[str]:
        shared = [
            f"strategy.virtual_workers={self.slices}",
            f"train.epochs={self.epochs}",
            f"model.options={{width={self.width}}}",
        ]
        if not self.local_steps:
            return [*shared, "strategy.name=allreduce"]
        learning_rate, momentum = self.outer
        return [
            *shared,
            "strategy.name=diloco",
            f"strategy.local_steps={self.local_steps}",
            f"strategy.wire={self.wire}",
            f"strategy.outer_learning_rate={learning_rate}",
            f"strategy.outer_momentum={momentum}",
            f"strategy.keep_inner_state={str(self.keeps_inner_state).lower()}",
        ]


@dataclass(frozen=True)
class Ending:
    """How one run ended."""

    val_accuracy: float
    sent_bytes: float


def run(dataset: str, mode: Mode, seed: int) -> Ending:
    """One training. One process computes all slices: weights and bytes are those of any engine."""
    settings = TrainSettings.load(None, [*COMMON, f"train.seed={seed}", *mode.assignments])
    with tempfile.TemporaryDirectory() as folder:
        result = train(dataset, f"{folder}/run", settings, engine=create_engine("inline"))
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    if mode.local_steps:
        sent = sum(line["sent_bytes"] for line in epochs)
    else:
        sent = 4 * result.num_parameters * 2 * (mode.slices - 1) * result.global_step
    return Ending(epochs[-1]["val_accuracy"], sent)


def ending_of(dataset: str, mode: Mode, seed: int, results: Path | None) -> Ending:
    """The run's ending, from `results` where it is there."""
    key = json.loads(json.dumps({**asdict(mode), "seed": seed}))
    if results is not None and results.exists():
        for line in map(json.loads, results.read_text().splitlines()):
            if line["run"] == key:
                return Ending(**line["ending"])
    ending = run(dataset, mode, seed)
    if results is not None:
        with results.open("a") as file:
            file.write(json.dumps({"run": key, "ending": asdict(ending)}) + "\n")
    Console(stderr=True).print(f"{mode}, seed {seed}: {ending}")
    return ending


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=16, help="filters of the CNN's first stage")
    parser.add_argument("--slices", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--local-steps", type=int, nargs="*", default=[50, 200, 500])
    parser.add_argument("--outer", type=float, nargs=2, default=(1.0, 0.6), help="its learning rate and momentum")
    parser.add_argument("--keep-inner-state", action="store_true", help="the momentum of each slice travels too")
    parser.add_argument("--wire", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    table = Table(
        "slices", "epochs", "strategy", "val accuracy", "against allreduce", "MiB sent", "fewer bytes", "goal"
    )
    for slices in arguments.slices:
        base = Mode(slices, arguments.epochs, arguments.width)
        rounds = [
            Mode(
                slices,
                arguments.epochs,
                arguments.width,
                steps,
                tuple(arguments.outer),
                arguments.wire,
                arguments.keep_inner_state,
            )
            for steps in arguments.local_steps
        ]
        short = Mode(slices, 1, arguments.width)
        one_shot = Mode(slices, 1, arguments.width, 1_000_000, (1.0, 0.0), arguments.wire, is_one_shot=True)
        for compared, modes in ((base, rounds), (short, [one_shot])):
            beside = [
                ending_of(arguments.dataset, compared, seed, arguments.results) for seed in range(arguments.seeds)
            ]
            for mode in (compared, *modes):
                ends = [ending_of(arguments.dataset, mode, seed, arguments.results) for seed in range(arguments.seeds)]
                points = [
                    100 * (end.val_accuracy - other.val_accuracy) for end, other in zip(ends, beside, strict=True)
                ]
                error = statistics.stdev(points) / math.sqrt(len(points)) if len(points) > 1 else 0.0
                sent = statistics.mean(end.sent_bytes for end in ends)
                fewer = statistics.mean(other.sent_bytes for other in beside) / sent
                is_met = fewer >= _GOAL_TIMES and statistics.mean(points) >= -_GOAL_POINTS
                table.add_row(
                    str(slices),
                    str(mode.epochs),
                    mode.name,
                    f"{statistics.mean(end.val_accuracy for end in ends):.2%}",
                    f"{statistics.mean(points):+.2f} ± {error:.2f} points" if mode is not compared else "",
                    f"{sent / _MEBIBYTE:,.1f}",
                    f"{fewer:,.0f}x",
                    ("met" if is_met else "missed") if mode in rounds else "",
                )
    Console().print(table)


if __name__ == "__main__":
    main()
