"""Sums in an order that does not depend on who computes them.

Floating-point sums depend on their order. The parts of a global batch are therefore added along one fixed binary tree
over part numbers: a node is (start, size) with `size` a power of two and `start` a multiple of it, and its value is
that of its left half plus that of its right half. A worker that holds a range of parts adds up the largest nodes that
lie in it, and what is left of the tree is added from the nodes of all workers. So every number of workers, down to one,
comes to the same bits. Parts beyond the last are absent, and an absent half is left out of a sum, not added as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

Node = tuple[int, int]
Value = TypeVar("Value")


def nodes_of(parts: range) -> list[Node]:
    """The fewest nodes that make up a range of parts, in order."""
    nodes = []
    start = parts.start
    while start < parts.stop:
        size = 1
        while start % (2 * size) == 0 and start + 2 * size <= parts.stop:
            size *= 2
        nodes.append((start, size))
        start += size
    return nodes


def sum_node(node: Node, value_of_part: Callable[[int], Value], add: Callable[[Value, Value], Value]) -> Value:
    """The value of a node from those of its parts, asked for one by one; at most log2(size) sums are held."""
    start, size = node
    if size == 1:
        return value_of_part(start)
    half = size // 2
    left = sum_node((start, half), value_of_part, add)
    return add(left, sum_node((start + half, half), value_of_part, add))


def sum_all(values: Mapping[Node, Value], num_parts: int, add: Callable[[Value, Value], Value]) -> Value:
    """The value of the root over [0, num_parts) from those of nodes that make up the range."""
    size = 1 << (num_parts - 1).bit_length()

    def value(start: int, size: int) -> Value | None:
        if start >= num_parts:
            return None
        if (start, size) in values:
            return values[start, size]
        half = size // 2
        left, right = value(start, half), value(start + half, half)
        return left if right is None else add(left, right)  # type: ignore[arg-type]

    total = value(0, size)
    assert total is not None
    return total
