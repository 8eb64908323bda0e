"""`Channel`: messages between the server and a decoding worker over a socket pair.

A message is a length, a JSON header of that length, and raw bytes, whose number follows from the header.
"""

import json
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

MAX_HEADER_BYTES: Final = 1 << 16

_LENGTH: Final = struct.Struct(">I")


class Channel:
    """One end of a socket pair.

    Attributes:
        deadline_s: by `time.monotonic`, the time by which each call must have ended; None for no limit.

    Raises:
        TimeoutError: a call did not end by the deadline.
        EOFError, OSError: the other process has ended.
        ValueError: a header is malformed.
    """

    def __init__(self, end: socket.socket) -> None:
        self.deadline_s: float | None = None
        self._socket = end

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def send(self, header: Mapping[str, Any], chunks: Iterable[bytes | memoryview] = ()) -> None:
        """Send a header and the bytes that belong to it."""
        text = json.dumps(header).encode()
        self._send(_LENGTH.pack(len(text)) + text)
        for chunk in chunks:
            self._send(chunk)

    def receive(self) -> dict[str, Any]:
        """Receive a header; `read` receives the bytes that belong to it."""
        (length,) = _LENGTH.unpack(self.read(_LENGTH.size))
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        header = json.loads(self.read(length))
        if not isinstance(header, dict):
            raise ValueError("a header must be an object")
        return header

    def read(self, num_bytes: int) -> bytearray:
        """Receive exactly `num_bytes` bytes."""
        content = bytearray(num_bytes)
        rest = memoryview(content)
        while rest:
            self._limit_time()
            count = self._socket.recv_into(rest)
            if count == 0:
                raise EOFError("the other process has closed the channel")
            rest = rest[count:]
        return content

    def _send(self, chunk: bytes | memoryview) -> None:
        self._limit_time()
        self._socket.sendall(chunk)

    def _limit_time(self) -> None:
        rest_s = None if self.deadline_s is None else max(self.deadline_s - time.monotonic(), 0.001)
        self._socket.settimeout(rest_s)
