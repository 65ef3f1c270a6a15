"""How long `manyeyes --help` takes, beside a Python that does nothing.

    python benchmarks/cli_startup.py [--rounds 15]

The commands take turns, so that what else runs on the machine hits all of them. "CPU" is user and system time of the
process, which neighbours disturb less than the time that passed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

BOUND_SECONDS = 0.5
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import manyeyes": [sys.executable, "-c", "import manyeyes"],
    "manyeyes --help": [sys.executable, "-m", "manyeyes.cli.main", "--help"],
    "manyeyes train --help": [sys.executable, "-m", "manyeyes.cli.main", "train", "--help"],
}


def measure(command: list[str]) -> tuple[float, float]:
    """Run once; returns the seconds that passed and the CPU seconds."""
    started, before = time.perf_counter(), os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 1):
        for name, command in COMMANDS.items():
            measured = measure(command)
            if number > 0:  # the first round fills the caches
                seconds[name].append(measured)
    bare_cpu = statistics.median(cpu for _, cpu in seconds["python -c pass"])
    table = Table("command", "median s", "fastest s", "bound s", "CPU s", "CPU, ratio to bare python")
    for name, measured in seconds.items():
        passed, cpu = zip(*measured, strict=True)
        table.add_row(
            name,
            f"{statistics.median(passed):.3f}",
            f"{min(passed):.3f}",
            f"{BOUND_SECONDS}" if name.startswith("manyeyes") else "",
            f"{statistics.median(cpu):.3f}",
            f"{statistics.median(cpu) / bare_cpu:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
