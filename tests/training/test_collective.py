"""What workers exchange: the ring in threads, and both kinds of collectives in processes of their own."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyeyes.engines.base import GangContext
from manyeyes.engines.registry import create_engine
from manyeyes.training import ring
from manyeyes.training.ring import Ring


def addresses(count: int) -> tuple[str, ...]:
    holders = [socket.socket() for _ in range(count)]
    for holder in holders:
        holder.bind(("127.0.0.1", 0))
    found = tuple(f"127.0.0.1:{holder.getsockname()[1]}" for holder in holders)
    for holder in holders:
        holder.close()
    return found


def in_a_ring(world_size: int, fn: Callable[[Ring], Any], secrets: tuple[str, ...] = ()) -> list[Any]:
    """Run `fn` in one thread for each rank."""
    at = addresses(world_size)

    def run(rank: int) -> Any:
        member = Ring(GangContext(rank, world_size, at), secrets[rank] if secrets else "secret")
        try:
            return fn(member)
        finally:
            member.close()

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


@settings(deadline=None, max_examples=20)
@given(world_size=st.integers(2, 5), size=st.one_of(st.integers(0, 40), st.integers(15_000, 90_000)))
def test_all_workers_get_the_same_sum_and_the_arrays_by_rank(world_size: int, size: int) -> None:
    arrays = [np.random.default_rng(rank).normal(size=size).astype(np.float32) for rank in range(world_size)]
    found = in_a_ring(world_size, lambda member: (member.sum(arrays[member.rank]), member.gather(arrays[member.rank])))
    for total, gathered in found:
        assert total.tobytes() == found[0][0].tobytes()
        np.testing.assert_allclose(total, np.sum(arrays, axis=0, dtype=np.float64), rtol=1e-4, atol=1e-4)
        assert np.array_equal(gathered, np.stack(arrays))


def test_the_array_of_a_worker_is_left_as_it_is() -> None:
    arrays = [np.full((300, 200), rank, np.float64) for rank in range(2)]
    totals = in_a_ring(2, lambda member: member.sum(arrays[member.rank]))
    assert [array.max() for array in arrays] == [0, 1]
    assert all(total.shape == (300, 200) and (total == 1).all() for total in totals)


def test_workers_that_are_out_of_step_are_told() -> None:
    with pytest.raises(ConnectionError, match=r"out of step .* bytes was expected|is gone"):
        in_a_ring(2, lambda member: member.gather(np.zeros(3 + member.rank)))


def test_a_worker_that_is_gone_ends_the_exchange_of_the_others() -> None:
    with pytest.raises(ConnectionError):
        in_a_ring(2, lambda member: None if member.rank else member.gather(np.zeros(3)))


def test_a_stranger_is_not_let_into_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_CONNECT_SECONDS", 1.0)
    with pytest.raises(ConnectionError):
        in_a_ring(2, lambda member: member.gather(np.zeros(3)), secrets=("secret", "guess"))


def exchange(kind: Any, context: GangContext) -> dict[str, np.ndarray]:
    """Gang: what one rank gets; its tensor is [rank + 1, 10]."""
    from manyeyes.training import backend

    backend.prepare(0, 1, context)
    import tensorflow as tf

    from manyeyes.training.collective import connect

    collective = connect(context, "secret", kind)
    mine = tf.constant([context.rank + 1.0, 10.0])

    @tf.function
    def gradients(tensor: Any) -> Any:
        def inside(tensor: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(tensor)
                # Rank r weighs what worker i sent by (r + 1) * (i + 1).
                weights = (context.rank + 1.0) * tf.constant([[i + 1.0] for i in range(context.world_size)])
                result = tf.reduce_sum(weights * collective.gather_inside(tensor) ** 2)
            return tape.gradient(result, tensor)

        return collective.among_workers(inside)(tensor)

    return {
        "sum": collective.sum(mine).numpy(),
        "gather": collective.gather(mine).numpy(),
        "numbers": collective.gather_numbers([context.rank / 3]),
        "gradients": gradients(mine).numpy(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ring", "tensorflow"])
def test_both_collectives_sum_gather_and_have_gradients(kind: str) -> None:
    found = create_engine("local", 2).gang(functools.partial(exchange, kind), 2)
    for rank, got in enumerate(found):
        assert got["sum"].tolist() == [3, 20]
        assert got["gather"].tolist() == [[1, 10], [2, 10]]
        assert got["numbers"].tolist() == [[0], [1 / 3]]
        # d/dx of sum over ranks r of (r + 1) * (rank + 1) * x ** 2 = 3 * (rank + 1) * 2 * x
        assert got["gradients"].tolist() == [6 * (rank + 1) * (rank + 1), 60 * (rank + 1)]


def agreement(context: GangContext, are_own: list[list[bool]]) -> tuple[list[str], float]:
    """Gang: what the workers agree on by themselves, each time with GPUs of their own or not, and a last sum."""
    from manyeyes.training import backend, collective

    backend.prepare(0, 1, context)
    agreed = []
    for are in are_own:
        backend.has_own_gpu = lambda context, are=are: are[context.rank]  # type: ignore[assignment]
        found = collective.connect(context, "secret")
        agreed.append(type(found).__name__)
    return agreed, float(found.sum(np.float32(context.rank + 1)))


@pytest.mark.slow
def test_workers_exchange_by_nccl_only_if_each_has_a_gpu_of_its_own() -> None:
    are_own = [[True, False], [False, False], [True, True]]
    found = create_engine("local", 2).gang(functools.partial(agreement, are_own=are_own), 2)
    assert found == [(["RingCollective", "RingCollective", "TensorFlowCollective"], 3)] * 2
