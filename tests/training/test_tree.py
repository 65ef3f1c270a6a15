"""Laws of sums in a fixed order."""

from __future__ import annotations

import operator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from manyeyes.data.order import parts_of_rank
from manyeyes.training import tree


@given(num_parts=st.integers(1, 40), world_size=st.integers(1, 40))
def test_the_nodes_of_all_workers_make_up_the_tree(num_parts: int, world_size: int) -> None:
    world_size = min(world_size, num_parts)
    covered = []
    for rank in range(world_size):
        parts = parts_of_rank(rank, world_size, num_parts)
        nodes = tree.nodes_of(parts)
        assert [part for start, size in nodes for part in range(start, start + size)] == list(parts)
        assert all(size & (size - 1) == 0 and start % size == 0 for start, size in nodes)
        covered += list(parts)
    assert covered == list(range(num_parts))


@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), world_size=st.integers(1, 40))
def test_every_number_of_workers_comes_to_the_same_bits(values: list[float], world_size: int) -> None:
    parts = np.array(values, np.float32)

    def total(world_size: int) -> bytes:
        nodes = {}
        for rank in range(world_size):
            for node in tree.nodes_of(parts_of_rank(rank, world_size, len(parts))):
                nodes[node] = tree.sum_node(node, lambda part: parts[part], operator.add)
        return np.float32(tree.sum_all(nodes, len(parts), operator.add)).tobytes()

    assert total(min(world_size, len(parts))) == total(1)


@given(values=st.lists(st.integers(-1000, 1000), min_size=1, max_size=40), world_size=st.integers(1, 40))
def test_the_sum_is_the_sum(values: list[int], world_size: int) -> None:
    nodes = {}
    for rank in range(min(world_size, len(values))):
        for node in tree.nodes_of(parts_of_rank(rank, min(world_size, len(values)), len(values))):
            nodes[node] = tree.sum_node(node, values.__getitem__, operator.add)
    assert tree.sum_all(nodes, len(values), operator.add) == sum(values)
