"""Hostile media: their cost to the server until they are refused. `docs/security.md` has the figures."""

from __future__ import annotations

import base64
import gzip
import os
import struct
import time
import wave
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from tests.server.conftest import RunningServer, ServerFactory, still_serving
from tests.server.resource_limits import MIB, bounded
from tests.web_server import FakeDNS, endless, http_response, redirect, run_web_server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, png: bytes) -> Path:
    folder = tmp_path_factory.mktemp("served") / "media"
    folder.mkdir()
    (folder / "a.png").write_bytes(png)
    (folder.parent / "secret.png").write_bytes(png)
    (folder / "link.png").symlink_to("../secret.png")
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.fixture(scope="module")
def shared_server(start_server: ServerFactory, folder: Path) -> RunningServer:
    return start_server(
        allowed_media_networks=["127.0.0.1"], allowed_local_media_path=str(folder), media_fetch_timeout=1.0
    )


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    with still_serving(shared_server):
        yield shared_server


def refuse(server: RunningServer, kind: str, url: str) -> str:
    """Send a URL to every endpoint that takes one, and check that all refuse it with the same message."""
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
    bodies = {
        "chat/completions": {"messages": [{"role": "user", "content": [part]}]},
        "completions": {"prompt": f"<|{kind}|>x", "multi_modal_data": {kind: url}},
    }
    if kind == "image":
        bodies["responses"] = {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]}
    messages = set()
    for path, body in bodies.items():
        response = httpx.post(f"{server.address}/v1/{path}", json=body, timeout=60, verify=False)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "media_error"), response.text
        messages.add(error["message"])
    assert len(messages) == 1
    return messages.pop()


def data_url(data: bytes) -> str:
    return f"data:;base64,{base64.b64encode(data).decode()}"


def png_of(width: int, height: int, packed: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Build a gray PNG with a declared size; `packed` has its pixels, or fewer, deflated."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", packed), (b"IEND", b"")]
    written = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def packed_zeros(num_bytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join([*(packer.compress(bytes(MIB)) for _ in range(num_bytes // MIB)), packer.flush()])


PACKED_ZEROS = packed_zeros(200 * MIB)  # 200 KB


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("tiny PNG of 65000x65000", "65000x65000|decompression bomb"),
        ("PNG of 14000x14000 in 200 KB", "is larger than the allowed 64000000 px"),
        ("PNG of 2147483647x1", "2147483647x1|cannot decode|decompression bomb"),
        ("BMP of 65000x65000", "decompression bomb|larger than the allowed"),
        ("GIF of 65535x65535", "decompression bomb|larger than the allowed"),
        ("PNG with 200 MB of text", "cannot decode"),
        ("PNG with a 200 MB profile", "cannot decode"),
        ("PNG without a header", "its header is damaged"),
        ("gzip", "gzip data"),
    ],
)
def test_pixel_floods(server: RunningServer, case: str, named: str) -> None:
    pixel = zlib.compress(b"\0\0")
    data = {
        "tiny PNG of 65000x65000": png_of(65000, 65000, pixel),
        "PNG of 14000x14000 in 200 KB": png_of(14000, 14000, PACKED_ZEROS),
        "PNG of 2147483647x1": png_of(2**31 - 1, 1, pixel),
        "BMP of 65000x65000": struct.pack(
            "<2sIHHIIiiHHIIiiII", b"BM", 58, 0, 0, 54, 40, 65000, 65000, 1, 24, 0, 4, 1, 1, 0, 0
        )
        + bytes(4),
        "GIF of 65535x65535": b"GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;",
        "PNG with 200 MB of text": png_of(1, 1, pixel, (b"zTXt", b"Comment\0\0" + PACKED_ZEROS)),
        "PNG with a 200 MB profile": png_of(1, 1, pixel, (b"iCCP", b"icc\0\0" + PACKED_ZEROS)),
        "PNG without a header": png_of(1, 1, pixel)[:8],
        "gzip": gzip.compress(bytes(1000)),
    }[case]
    with bounded(case):
        message = refuse(server, "image", data_url(data))
    assert any(part in message for part in named.split("|")), message


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("WAV of 1 Hz", "sample rate 1"),
        ("WAV of 65535 channels", "channels|cannot decode"),
        ("FLAC that claims 2**36 samples", "at most 32000000 are allowed"),
        ("FLAC of 20 minutes in 40 KB", "lasts 1200.0 s, more than the allowed 600 s"),
        ("FLAC of 20 minutes that claims no length", "more than the allowed 600 s"),
    ],
)
def test_audio_with_false_lengths(server: RunningServer, case: str, named: str) -> None:
    data = _audio(case)
    with bounded(case, max_bytes=200 * MIB):
        message = refuse(server, "audio", data_url(data))
    assert any(part in message for part in named.split("|")), message


def test_a_wav_that_claims_1_gb_costs_what_it_holds(server: RunningServer) -> None:
    url = data_url(_audio("WAV that claims 1 GB"))
    with bounded("WAV that claims 1 GB", max_bytes=200 * MIB):
        body = {"messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": url}]}], "max_tokens": 1}
        response = httpx.post(f"{server.address}/v1/chat/completions", json=body, timeout=60, verify=False)
    assert response.status_code == 200, response.text


def _audio(case: str) -> bytes:
    file = BytesIO()
    if case.startswith("WAV"):
        with wave.open(file, "wb") as writer:
            writer.setnchannels(1)
            writer.setsampwidth(2)
            writer.setframerate(8000)
            writer.writeframes(bytes(8000))
        data = bytearray(file.getvalue())
        if case == "WAV that claims 1 GB":
            data[4:8] = data[40:44] = struct.pack("<I", 10**9)
        elif case == "WAV of 1 Hz":
            data[24:32] = struct.pack("<II", 1, 2)
        else:
            data[22:24] = b"\xff\xff"
        return bytes(data)
    soundfile.write(file, np.zeros(1200 * 8000 if "20 minutes" in case else 8000, np.int16), 8000, format="FLAC")
    data = bytearray(file.getvalue())
    if "claims" in case:  # the last 36 bits of bytes 18 to 25
        num_samples = 2**36 - 1 if "2**36" in case else 0
        data[21] = (data[21] & 0xF0) | num_samples >> 32
        data[22:26] = struct.pack(">I", num_samples & 0xFFFFFFFF)
    return bytes(data)


@pytest.mark.parametrize(
    "place",
    ["../secret.png", "%2e%2e/secret.png", "..%2fsecret.png", "link.png", "pipe.png", "", "/etc/passwd", "/dev/zero"],
)
def test_files_outside_the_allowed_directory(server: RunningServer, folder: Path, place: str) -> None:
    path = place if place.startswith("/") else f"{folder}/{place}"
    with bounded(place):
        message = refuse(server, "image", f"file://{path}")
    assert "leads to no regular file under --allowed-local-media-path" in message


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data/", "http://127.0.0.2:{port}/a.png", "http://[::ffff:127.0.0.2]:{port}/",
        "http://metadata.example/computeMetadata/v1/", "http://0/", "http://[64:ff9b::a9fe:a9fe]/",
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["straight", "redirect"])
def test_addresses_in_private_networks(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, target: str, way: str
) -> None:
    names = FakeDNS(monkeypatch)
    names.addresses["metadata.example"] = [["169.254.169.254"]]
    routes: dict[str, Any] = {}
    with run_web_server(routes) as web, bounded(f"{way} {target}"):
        url = target.format(port=web.port)
        routes["/start"] = redirect(url)
        message = refuse(server, "image", web.url("/start") if way == "redirect" else url)
    assert "has an address that is not allowed" in message and set(web.paths) <= {"/start"}


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("endless", "more than the allowed 67108864 bytes|not read within 1 s"),
        ("claim of 1 TB", "claims 1099511627776 bytes"),
        ("gzip", "encoding 'gzip'"),
        ("redirects", "redirected more than 5 times"),
        ("silent", "not read within 1 s|ReadTimeout"),
    ],
)
def test_hostile_web_servers(server: RunningServer, case: str, named: str) -> None:
    head = b"HTTP/1.1 200 OK\r\n"
    routes: dict[str, Any] = {
        "/endless": endless(head + b"\r\n\x89PNG\r\n\x1a\n", bytes(65536)),
        "/claim of 1 TB": head + b"Content-Length: 1099511627776\r\n\r\n",
        "/gzip": http_response(gzip.compress(bytes(10 * MIB)), "Content-Encoding: gzip"),
        "/redirects": redirect("/redirects"),
        "/silent": lambda connection: time.sleep(5),
    }
    routes = {path.replace(" ", "%20"): route for path, route in routes.items()}
    with run_web_server(routes) as web, bounded(case, max_bytes=200 * MIB):
        message = refuse(server, "image", web.url(f"/{case.replace(' ', '%20')}"))
    assert any(part in message for part in named.split("|")), message
