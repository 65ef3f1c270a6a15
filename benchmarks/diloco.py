"""What rounds of local steps save and cost: bytes sent and accuracy of diloco beside all-reduce, on Fashion-MNIST.

    python benchmarks/diloco.py DATASET [--epochs 3] [--seeds 3] [--slices 2 4] [--local-steps 50 200 500]

DATASET is made by `make demo` (demo/fashion-mnist) or `manyeyes ingest`. Runs have the same model, batch and schedule.
Bytes of all-reduce are those that a ring sends, 2 (N - 1) / N of the gradients per worker and step; bytes of diloco are
what its tasks read and write, as metrics.jsonl says. Accuracies are means over seeds on the val split, under the last
weights; the goal is 100 times fewer bytes at 0.2 points or less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from manyeyes.engines.registry import create_engine
from manyeyes.training.settings import TrainSettings
from manyeyes.training.trainer import train

COMMON = (
    "model.name=cnn",
    "optimizer.name=sgd",
    "optimizer.learning_rate=0.1",
    "optimizer.momentum=0.9",
    "optimizer.nesterov=true",
    "optimizer.weight_decay=5e-4",
    "train.global_batch_size=128",
    "train.precision=float32",
    "train.tensorboard=false",
    "augment.flip_horizontal=0.5",
)
_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Ending:
    """How one run ended."""

    val_accuracy: float
    sent_bytes: float


def run(dataset: str, slices: int, seed: int, epochs: int, assignments: list[str]) -> Ending:
    """One training, on at most two processes."""
    settings = TrainSettings.load(None, [*COMMON, f"train.epochs={epochs}", f"train.seed={seed}", *assignments])
    workers = min(slices, 2)
    with tempfile.TemporaryDirectory() as folder:
        result = train(dataset, f"{folder}/run", settings, engine=create_engine("local", workers), num_workers=workers)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    val_accuracy = [line["val_accuracy"] for line in lines if line["kind"] == "epoch"][-1]
    if settings.strategy.name == "allreduce":
        sent = 4 * result.num_parameters * 2 * (slices - 1) / slices * slices * result.global_step
    else:
        sent = sum(line["sent_bytes"] for line in lines if line["kind"] == "epoch")
    return Ending(val_accuracy, sent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--slices", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--local-steps", type=int, nargs="*", default=[50, 200, 500])
    parser.add_argument("--wire", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args()
    table = Table("slices", "strategy", "val accuracy", "against allreduce", "MiB sent", "fewer bytes")
    for slices in arguments.slices:
        modes = {"allreduce": ["strategy.name=allreduce", f"strategy.virtual_workers={slices}"]}
        for local_steps in arguments.local_steps:
            modes[f"diloco, H = {local_steps}"] = [
                "strategy.name=diloco",
                f"strategy.virtual_workers={slices}",
                f"strategy.local_steps={local_steps}",
                f"strategy.wire={arguments.wire}",
                "strategy.keep_inner_state=false",
            ]
        base: tuple[float, float] | None = None
        for name, assignments in modes.items():
            ends = [
                run(arguments.dataset, slices, seed, arguments.epochs, assignments) for seed in range(arguments.seeds)
            ]
            accuracy = statistics.mean(end.val_accuracy for end in ends)
            sent = statistics.mean(end.sent_bytes for end in ends)
            base = base or (accuracy, sent)
            table.add_row(
                str(slices),
                name,
                f"{accuracy:.2%}",
                f"{100 * (accuracy - base[0]):+.2f} points",
                f"{sent / _MEBIBYTE:,.1f}",
                f"{base[1] / sent:,.0f}x",
            )
            Console(stderr=True).print(f"{slices} slices, {name}: {accuracy:.2%}, {sent / _MEBIBYTE:,.1f} MiB")
    Console().print(table)


if __name__ == "__main__":
    main()
