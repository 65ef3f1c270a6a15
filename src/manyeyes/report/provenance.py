"""Where figures come from: fingerprints, versions, the machine, and the commands that make them again."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyeyes import config
from manyeyes.engines.base import available_cores
from manyeyes.errors import CheckpointError
from manyeyes.report.subject import Subject
from manyeyes.training.run import fingerprint_of
from manyeyes.training.settings import TrainSettings


@dataclass(frozen=True)
class Facts:
    """One block of provenance: terms with their values."""

    title: str
    facts: tuple[tuple[str, str], ...]


def provenance_of(subject: Subject) -> tuple[Facts, ...]:
    """All that is known of where a report's figures come from."""
    blocks = []
    if subject.evaluation is not None:
        found = subject.evaluation
        blocks.append(
            Facts(
                "Evaluation",
                (
                    ("Model", found.model),
                    ("Weights' fingerprint", found.model_fingerprint),
                    ("Dataset", found.dataset),
                    ("Dataset's fingerprint", found.dataset_fingerprint),
                    ("Split", found.split),
                    ("Manyeyes", found.manyeyes_version),
                ),
            )
        )
    if subject.crossval is not None:
        blocks.append(_of_crossval(subject))
    if subject.run is not None:
        blocks.append(_of_run(subject))
    blocks.append(Facts("Commands", tuple((f"{index}.", line) for index, line in enumerate(commands_of(subject), 1))))
    return tuple(blocks)


def commands_of(subject: Subject) -> list[str]:
    """The commands that make what is reported again."""
    lines = []
    if subject.run is not None and subject.run.command:
        lines.append(shlex.join(subject.run.command))
    if subject.evaluation is not None:
        found = subject.evaluation
        line = ["manyeyes", "evaluate", found.model, found.dataset, "--split", found.split]
        if found.metrics.confidence != 0.95:
            line += ["--confidence", str(found.metrics.confidence)]
        if found.model_kind == "bundle" and subject.evaluation_uri is not None:
            line += ["--out", subject.evaluation_uri]
        lines.append(shlex.join(line))
    if subject.crossval is not None:
        lines.append(_crossval_command(subject))
    return lines


def machine() -> str:
    """This machine in a few words."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = available_cores()
    return (
        f"{platform.system()} {platform.machine()}, {model or platform.processor() or 'unknown processor'}, "
        f"{cores} core{'' if cores == 1 else 's'}, {memory:.0f} GiB of memory, Python {platform.python_version()}"
    )


def _of_run(subject: Subject) -> Facts:
    run = subject.run
    assert run is not None
    options = ", ".join(f"{name}={value}" for name, value in run.model.options.items())
    facts = [
        ("Run", run.uri),
        ("Model", f"{run.model.name}{f' ({options})' if options else ''}"),
        ("Input", "unknown" if run.model.input_shape is None else " × ".join(map(str, run.model.input_shape))),
        ("Trained on", run.dataset),
        ("Dataset's fingerprint", run.dataset_fingerprint),
        ("Preprocessing's fingerprint", run.preprocessing.fingerprint),
        ("Settings' fingerprint", run.settings_fingerprint),
        ("Precision", run.precision),
    ]
    try:
        state = run.state("best")
        facts.append(("Checkpoint", f"step {state.global_step:,}, {state.fingerprint}"))
    except (CheckpointError, OSError):
        pass
    facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())))
    return Facts("Training", tuple((term, value) for term, value in facts if value))


def _of_crossval(subject: Subject) -> Facts:
    found = subject.crossval
    assert found is not None
    settings = found.settings
    return Facts(
        "Cross-validation",
        (
            ("Dataset", found.dataset),
            ("Dataset's fingerprint", found.dataset_fingerprint),
            ("Folds' fingerprint", found.folds_fingerprint),
            ("Recipe's fingerprint", fingerprint_of(found.recipe)),
            ("Division", f"{settings.folds} folds, {settings.repeats} time{'' if settings.repeats == 1 else 's'}"),
            ("Seed", str(settings.seed)),
            ("Splits", ", ".join(settings.splits)),
            ("Near-duplicates", "in one fold" if settings.group_duplicates else "not looked for"),
            ("Chooses the best epoch", f"{settings.val:.0%} of what is not held out" if settings.val else "nothing"),
            ("Manyeyes", found.manyeyes_version),
        ),
    )


def _crossval_command(subject: Subject) -> str:
    found = subject.crossval
    assert found is not None
    settings = found.settings
    line = ["manyeyes", "crossval", found.dataset, "--out", "OUT"]
    line += ["--folds", str(settings.folds), "--repeats", str(settings.repeats), "--seed", str(settings.seed)]
    line += ["--splits", ",".join(settings.splits), "--val", str(settings.val)]
    line += [] if settings.group_duplicates else ["--no-group-duplicates"]
    for key, value in _changed(found.recipe, json.loads(json.dumps(config.to_dict(TrainSettings())))):
        line += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join(line)


def _changed(settings: Mapping[str, Any], default: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What is set otherwise than by default, by dotted keys."""
    for name, value in settings.items():
        usual = default.get(name) if isinstance(default, Mapping) else None
        if isinstance(value, Mapping):
            yield from _changed(value, usual, f"{prefix}{name}.")
        elif value != usual and value is not None:
            yield f"{prefix}{name}", value


def settings_of(subject: Subject) -> dict[str, str]:
    """Every setting of the training, by dotted keys."""
    if subject.crossval is not None:
        return config.flatten(subject.crossval.recipe)
    return config.flatten(subject.run.settings) if subject.run is not None else {}
