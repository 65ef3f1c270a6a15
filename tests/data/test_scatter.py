from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyeyes.data.scatter import Scatter


def shuffled(blocks, seed, max_in_memory=4096):
    with Scatter(seed, max_in_memory) as scatter:
        for index, block in enumerate(blocks):
            scatter.add(block, [index, f"é\udcff{index}"])
        first, second = list(scatter), list(scatter)
    assert first == second
    return [index for index, _ in first]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 5), max_size=60), st.integers(0, 2**40))
def test_every_record_comes_once_and_blocks_stay_together(sizes, seed):
    blocks = [block for block, size in enumerate(sizes) for _ in range(size)]
    order = shuffled(blocks, seed)
    assert sorted(order) == list(range(len(blocks)))
    seen = [blocks[index] for index in order]
    starts = [block for position, block in enumerate(seen) if position == 0 or seen[position - 1] != block]
    assert len(starts) == len(set(starts))
    for block in set(blocks):
        members = [index for index in order if blocks[index] == block]
        assert members == sorted(members)


@pytest.mark.parametrize("seed", [None, 3])
def test_the_order_is_the_same_in_memory_and_on_disk(seed):
    assert shuffled(range(5000), seed) == shuffled(range(5000), seed, max_in_memory=100)


def test_files_too_long_for_memory_are_dealt_again_in_the_same_order():
    blocks = [block // 3 for block in range(6000)]
    assert shuffled(blocks, 5, max_in_memory=1) == shuffled(blocks, 5, max_in_memory=10_000)


def test_without_a_seed_the_order_stays():
    assert shuffled(range(1000), None, max_in_memory=10) == list(range(1000))


def test_a_source_sorted_by_class_comes_out_mixed():
    order = np.array(shuffled(range(10_000), 0)) // 1000
    for start in range(0, 10_000, 1000):
        counts = Counter(order[start : start + 1000].tolist())
        assert len(counts) == 10 and max(counts.values()) < 160


def test_spool_files_are_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Scatter(0, 10) as scatter:
        for index in range(100):
            scatter.add(index, index)
        assert list(Path(tmp_path).iterdir())
    assert not list(Path(tmp_path).iterdir())


def test_a_full_disk_is_said_with_the_place_and_leaves_nothing(tmp_path):
    script = (
        "import resource, signal; from manyeyes.data.scatter import Scatter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "with Scatter(0, 10) as scatter:\n"
        "    for block in range(20_000): scatter.add(block, 'x' * 100)\n"
    )
    command, environment = [sys.executable, "-c", script], os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"manyeyes.errors.StorageError: {tmp_path}/manyeyes-scatter-"), done.stderr
    assert "can't be written: File too large" in said
    assert list(tmp_path.iterdir()) == []
