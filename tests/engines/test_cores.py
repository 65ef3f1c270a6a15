"""How many cores there are for a process that others limit."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from manyeyes.engines import base


@pytest.mark.parametrize(
    "quotas, cores",
    [
        ({"": "100000 100000"}, 1),  # docker run --cpus 1: the container's own group is the outermost it sees
        ({"": "150000 100000"}, 1.5),
        ({"a.slice": "400000 100000", "a.slice/b.service": "max 100000"}, 4),
        ({"a.slice": "200000 100000", "a.slice/b.service": "300000 100000"}, 2),
        ({"a.slice/b.service": "5000 100000", "other": "1000 100000"}, 0.05),
        ({"a.slice": "max 100000"}, math.inf),
        ({"a.slice": "rubbish"}, math.inf),
        ({}, math.inf),
    ],
)
def test_the_least_quota_of_the_groups_around_a_process_counts(
    tmp_path: Path, quotas: dict[str, str], cores: float
) -> None:
    groups, membership = tmp_path / "cgroup", tmp_path / "membership"
    inner = "" if "" in quotas else "a.slice/b.service"
    membership.write_text(f"4:memory:/elsewhere\n0::/{inner}\n")
    (groups / inner).mkdir(parents=True)
    for name, quota in quotas.items():
        (groups / name).mkdir(parents=True, exist_ok=True)
        (groups / name / "cpu.max").write_text(f"{quota}\n")
    # A file outside of the groups is none of them.
    (tmp_path / "cpu.max").write_text("1000 100000\n")
    assert base._cores_of_quota(groups, membership) == cores
    assert base._cores_of_quota(groups, tmp_path / "gone") == math.inf


@pytest.mark.parametrize("quota, cores", [(0.05, 1), (1.0, 1), (1.01, 2), (math.inf, 64), (100.0, 64)])
def test_a_process_has_as_many_cores_as_its_quota_pays_for_rounded_up(
    monkeypatch: pytest.MonkeyPatch, quota: float, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(base, "_cores_of_quota", lambda: quota)
    monkeypatch.delenv(base.THREADS_VARIABLE, raising=False)
    assert (base.available_cores(), base.threads_per_worker()) == (cores, cores)
