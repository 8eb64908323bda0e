"""Slow, malformed and excess connections are closed in time while other requests are served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mmlora.async_llm import AsyncLLM
from mmlora.config import EngineArgs
from mmlora.server.http.server import HTTPServer
from tests.server.conftest import connect, read_answer, run_server, wait_for

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "ignore_eos": True}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def served(tiny_phi4: Path) -> Iterator[tuple[HTTPServer, str]]:
    args = EngineArgs(str(tiny_phi4), served_model_name="tiny", max_model_len=512, device="cpu")
    options: dict[str, Any] = {"header_timeout": 1.0, "body_timeout": 1.5, "write_timeout": 1.0, "max_connections": 80}
    with run_server(AsyncLLM(args), **options, uvicorn_log_level="error") as found:
        yield found


@pytest.fixture
def address(served: tuple[HTTPServer, str]) -> Iterator[str]:
    """Address of the server, which must have no connection and no request left after the test."""
    server, address = served
    yield address
    assert ask(address) == 200
    wait_for(lambda: not server.server_state.connections and not server._admission.num_open)


def ask(address: str) -> int:
    return httpx.post(f"{address}/v1/chat/completions", json=CHAT, timeout=60).status_code


def wait_until_closed(connection: socket.socket) -> tuple[bytes, float]:
    """Return the remaining data and the seconds until the server closed the connection."""
    start, received = time.monotonic(), b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
    return received, time.monotonic() - start


@pytest.mark.parametrize(
    "sent", [b"", b"P", HEAD, HEAD + b"content-length: 100\r\n\r\n{"], ids=["nothing", "a byte", "half a head", "body"]
)
def test_fifty_slow_clients_are_closed_and_delay_no_other_request(address: str, sent: bytes) -> None:
    async def drip() -> list[float]:
        async def one() -> float:
            parts = address.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(parts[0], int(parts[1]))
            start = time.monotonic()
            writer.write(sent)
            with contextlib.suppress(ConnectionError):
                while not writer.is_closing() and not reader.at_eof():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(65536), 0.2)
                    if sent:
                        writer.write(b"x")
            writer.close()
            return time.monotonic() - start

        drippers = [asyncio.create_task(one()) for _ in range(50)]
        async with httpx.AsyncClient(timeout=60) as client:
            for _ in range(5):
                answer = await client.post(f"{address}/v1/chat/completions", json=CHAT)
                assert answer.status_code == 200
        async with asyncio.timeout(30):
            return list(await asyncio.gather(*drippers))

    assert max(asyncio.run(drip())) < 20


def test_a_head_sent_byte_by_byte_is_closed_in_time(address: str) -> None:
    with connect(address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert read_answer(connection).startswith(b"HTTP/1.1 200")  # later heads of a connection are limited as well
        connection.sendall(b"GET ")
        connection.settimeout(0.1)
        start = time.monotonic()
        while time.monotonic() - start < 20:
            try:
                connection.sendall(b"x")
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        assert 0.5 < time.monotonic() - start < 15


def test_a_kept_alive_connection_serves_many_requests(address: str) -> None:
    with httpx.Client(timeout=60) as client:
        for _ in range(3):
            assert client.post(f"{address}/v1/chat/completions", json=CHAT).status_code == 200
            time.sleep(0.5)  # in total longer than the header timeout


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 100_000, 431),
        (b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 20_000, 431),
        (b"\x16\x03\x01 what is this\r\n\r\n", 400),
        (HEAD + b"content-length: -1\r\n\r\n", 400),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
    ids=["a long line", "many lines", "TLS", "length", "a bad chunk"],
)
def test_malformed_http_gets_openais_error_body(address: str, sent: bytes, status: int) -> None:
    with connect(address) as connection:
        connection.sendall(sent)
        answer, seconds = wait_until_closed(connection)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert seconds < 15


def test_garbage_after_a_request_is_refused_after_its_stream(address: str) -> None:
    body = json.dumps({**CHAT, "max_tokens": 480, "stream": True}).encode()
    with connect(address) as connection:
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n%s" % (len(body), body))
        assert b"HTTP/1.1 200" in connection.recv(65536)
        connection.sendall(b"\0\1\2\r\n\r\n" * 10)
        received, _ = wait_until_closed(connection)
    stream, mark, refusal = received.partition(b"HTTP/1.1 400 ")
    assert b'"finish_reason":"length"' in stream and b"data: [DONE]" in stream
    assert mark and b"invalid_request_error" in refusal


@pytest.mark.parametrize("is_claimed", [True, False], ids=["claimed", "in chunks"])
def test_an_oversized_body_is_refused_and_not_read_to_its_end(address: str, is_claimed: bool) -> None:
    claim = b"content-length: 999999999999" if is_claimed else b"transfer-encoding: chunked"
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    with connect(address) as connection:
        connection.sendall(HEAD + claim + b"\r\n\r\n")
        if not is_claimed:
            for _ in range(129):
                connection.sendall(chunk)
        assert read_answer(connection).startswith(b"HTTP/1.1 413 ")
        start = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() - start < 30:
                connection.sendall(chunk)
        assert time.monotonic() - start < 15


def test_a_refused_small_body_leaves_the_connection_usable(address: str) -> None:
    with connect(address) as connection:
        for _ in range(2):
            connection.sendall(b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3\r\n\r\n")
            assert read_answer(connection).startswith(b"HTTP/1.1 404")
            connection.sendall(b"abc")


def test_a_stream_that_is_not_read_is_aborted(served: tuple[HTTPServer, str], address: str) -> None:
    server, _ = served
    fields = {**CHAT, "max_tokens": 480, "stream": True, "n": 8, "logprobs": True, "top_logprobs": 20}
    body = json.dumps(fields).encode()
    with connect(address) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n%s" % (len(body), body))
        wait_for(lambda: server._admission.num_open)
        wait_for(lambda: not server._admission.num_open)  # the response has megabytes, more than the buffers hold


def test_over_the_connection_limit_the_longest_idle_connection_is_closed(
    address: str, served: tuple[HTTPServer, str]
) -> None:
    with contextlib.ExitStack() as stack:
        first = [stack.enter_context(connect(address)) for _ in range(100)]
        assert ask(address) == 200
        wait_for(lambda: len(served[0].server_state.connections) <= 80)
        assert wait_until_closed(first[0])[0] == b""
