"""Every engine keeps the contract of the seam."""

from __future__ import annotations

import pytest

from manyeyes.engines.registry import create_engine
from manyeyes.engines.testing import EngineContract, GangContract, LazyContract, WorkerProcessContract, rank_and_size
from manyeyes.errors import UsageError


class TestInline(EngineContract, LazyContract):
    engine_name = "inline"
    num_workers = 1


class TestLocal(EngineContract, LazyContract, WorkerProcessContract, GangContract):
    engine_name = "local"


class TestLocalWithOneWorker(EngineContract, LazyContract, WorkerProcessContract):
    engine_name = "local"
    num_workers = 1


def test_the_inline_engine_runs_a_gang_of_one_and_refuses_more():
    engine = create_engine("inline")
    assert engine.gang(rank_and_size, 1) == [(0, 1)]
    with pytest.raises(UsageError, match="Use --engine local"):
        engine.gang(rank_and_size, 2)


def test_an_unknown_engine_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="Choose one of: inline, local"):
        create_engine("loacl")


def test_a_number_of_workers_below_one_is_refused():
    with pytest.raises(UsageError, match="num_workers=0 is below 1"):
        create_engine("local", 0)
