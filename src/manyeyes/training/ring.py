"""A ring of workers over TCP: sums and gathers NumPy arrays, with the latency of a socket. For CPUs.

TensorFlow's own collectives on CPUs take two milliseconds for a handful of numbers (docs/decisions/0100), and a step
with synchronized normalisations makes dozens of such exchanges.
"""

from __future__ import annotations

import functools
import hmac
import selectors
import socket
import struct
import time

import numpy as np

from manyeyes.engines.base import GangContext

_CONNECT_SECONDS = 120.0
_HEADER = struct.Struct("<QQ")
_GREETING = struct.Struct("<I32s")
_BUFFER_BYTES = 4 << 20
_SMALL_BYTES = 64 << 10


class Ring:
    """Each worker sends to the next and receives from the one before.

    All workers must make the same calls in the same order; one that does not is found by the number and the size that
    stand before every message.

    Args:
        context: says where the others listen.
        secret: without which nobody takes part.

    Raises:
        ConnectionError: another worker did not come within two minutes, or is gone.
    """

    def __init__(self, context: GangContext, secret: str = "") -> None:
        self.rank = context.rank
        self.world_size = context.world_size
        self._num_messages = 0
        self._digest = hmac.digest(secret.encode(), b"manyeyes ring", "sha256")
        with _listen(context.addresses[context.rank]) as listener:
            self._next = self._call(context.addresses[(context.rank + 1) % context.world_size])
            self._before = self._answer(listener)
        for connection in (self._next, self._before):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
            connection.setblocking(False)

    def sum(self, array: np.ndarray) -> np.ndarray:
        """The sum over all workers, the same bits on each: 2 (N - 1) / N of the array goes over each link."""
        if array.nbytes <= _SMALL_BYTES:
            return functools.reduce(np.add, self.gather(array))  # N - 1 messages in a row instead of 2 (N - 1)
        total = np.array(array).reshape(-1)
        chunks = np.array_split(total, self.world_size)
        spare = np.empty_like(chunks[0])
        for step in range(self.world_size - 1):
            sent, received = (
                chunks[(self.rank - step) % self.world_size],
                chunks[(self.rank - step - 1) % self.world_size],
            )
            self._exchange(sent, spare[: len(received)])
            received += spare[: len(received)]
        for step in range(self.world_size - 1):
            self._exchange(
                chunks[(self.rank + 1 - step) % self.world_size], chunks[(self.rank - step) % self.world_size]
            )
        return total.reshape(array.shape)

    def gather(self, array: np.ndarray) -> np.ndarray:
        """The arrays of all workers by rank: shape (n, …) becomes (world_size, n, …)."""
        gathered = np.empty((self.world_size, *array.shape), array.dtype)
        gathered[self.rank] = array
        for step in range(self.world_size - 1):
            self._exchange(
                gathered[(self.rank - step) % self.world_size], gathered[(self.rank - step - 1) % self.world_size]
            )
        return gathered

    def close(self) -> None:
        """Leave the ring."""
        self._next.close()
        self._before.close()

    def _exchange(self, sent: np.ndarray, received: np.ndarray) -> None:
        """Send one array to the next worker while one comes from the worker before."""
        self._num_messages += 1
        header = bytearray(_HEADER.size)
        outgoing = [memoryview(_HEADER.pack(self._num_messages, sent.nbytes)), _bytes_of(sent)]
        incoming = [memoryview(header), _bytes_of(received)]
        is_checked = False
        while outgoing or incoming:
            moved = _send(self._next, outgoing) + _receive(self._before, incoming)
            if not is_checked and len(incoming) < 2:
                is_checked = True
                if _HEADER.unpack(header) != (self._num_messages, received.nbytes):
                    raise ConnectionError(
                        f"Worker {self.rank} is out of step with the worker before it: message {self._num_messages} of "
                        f"{received.nbytes} bytes was expected, {_HEADER.unpack(header)} came."
                    )
            if not moved and (outgoing or incoming):
                self._wait(bool(outgoing), bool(incoming))

    def _wait(self, to_send: bool, to_receive: bool) -> None:
        with selectors.PollSelector() as selector:
            if to_receive:
                selector.register(self._before, selectors.EVENT_READ)
            if to_send:
                selector.register(self._next, selectors.EVENT_WRITE)
            selector.select()

    def _call(self, address: str) -> socket.socket:
        deadline = time.monotonic() + _CONNECT_SECONDS
        host, _, port = address.rpartition(":")
        while True:
            try:
                connection = socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS)
                connection.sendall(_GREETING.pack(self.rank, self._digest))
                return connection
            except OSError as error:
                # It may still be loading its libraries.
                if time.monotonic() > deadline:
                    raise ConnectionError(
                        f"Worker {(self.rank + 1) % self.world_size} at {address} can't be reached: {error}."
                    ) from error
                time.sleep(0.05)

    def _answer(self, listener: socket.socket) -> socket.socket:
        expected = (self.rank - 1) % self.world_size
        listener.settimeout(_CONNECT_SECONDS)
        while True:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise ConnectionError(f"Worker {expected} did not come within {_CONNECT_SECONDS:.0f} s.") from None
            connection.settimeout(5.0)
            try:
                rank, digest = _GREETING.unpack(_read(connection, _GREETING.size))
            except (OSError, struct.error):
                connection.close()
                continue
            if rank == expected and hmac.compare_digest(digest, self._digest):
                return connection
            connection.close()


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, int(port)))
    except OSError:
        listener.bind(
            ("", int(port))
        )  # behind an address translation a host does not have the address it is reached by
    listener.listen(8)
    return listener


def _read(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            raise ConnectionError("closed")
        content += part
    return content


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def _send(connection: socket.socket, parts: list[memoryview]) -> int:
    """Send what the socket takes now, and drop it from `parts`."""
    moved = 0
    while parts:
        try:
            size = connection.send(parts[0]) if len(parts[0]) else 0
        except BlockingIOError:
            return moved
        moved += size
        parts[0] = parts[0][size:]
        if not len(parts[0]):
            parts.pop(0)
    return moved


def _receive(connection: socket.socket, parts: list[memoryview]) -> int:
    """Fill `parts` with what is there now, and drop what is full."""
    moved = 0
    while parts:
        if len(parts[0]):
            try:
                size = connection.recv_into(parts[0])
            except BlockingIOError:
                return moved
            if not size:
                raise ConnectionError("The worker before this one in the ring is gone.")
            moved += size
            parts[0] = parts[0][size:]
        if not len(parts[0]):
            parts.pop(0)
    return moved
