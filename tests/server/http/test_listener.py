"""Listening sockets, TLS, and the limit on open files."""

from __future__ import annotations

import datetime
import ipaddress
import resource
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mmlora.async_llm import AsyncLLM
from mmlora.cli import commands as cli
from mmlora.config import EngineArgs
from mmlora.errors import ConfigError
from mmlora.server.http.listener import listen_tcp, listen_unix, listening, raise_file_limit
from tests.server.conftest import connect, run_server


@pytest.mark.parametrize("host", ["a" * 70, "a..b"])
def test_an_invalid_host_name_is_a_config_error(host: str) -> None:
    with pytest.raises(ConfigError, match=f"host='{host}'"):
        listen_tcp(host, 0)


@pytest.fixture
def llm(tiny_phi4: Path) -> AsyncLLM:
    return AsyncLLM(EngineArgs(str(tiny_phi4), served_model_name="tiny", max_model_len=64, device="cpu"))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Paths of a server's `cert` and `key`, both in `pem`, an `encrypted` key, and `broken` and `missing` files."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(
        now + datetime.timedelta(days=1)
    )
    builder = builder.add_extension(address, False).add_extension(x509.BasicConstraints(True, None), True)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    plain = key.private_bytes(*form, serialization.NoEncryption())
    files = {"cert": pem, "key": plain, "pem": pem + plain, "broken": b"nonsense"}
    files["encrypted"] = key.private_bytes(*form, serialization.BestAvailableEncryption(b"secret"))
    for file, content in files.items():
        (folder / file).write_bytes(content)
    yield {file: str(folder / file) for file in files} | {"missing": str(folder / "missing")}


def test_a_unix_socket_is_served_and_removed(llm: AsyncLLM, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with run_server(llm, uds=str(path), uvicorn_log_level="error") as (_, address):
        assert address == f"unix:{path}"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://localhost/v1/models").json()["data"][0]["id"] == "tiny"
        with pytest.raises(ConfigError, match="another process listens on it"):
            listen_unix(str(path))
    assert not path.exists()


def test_only_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    with listening("", 0, str(path)):
        path.unlink()
        other = listen_unix(str(path))  # now another server's
    assert path.exists()
    other.close()
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        listen_unix(str(file))
    assert file.read_text() == "precious"
    with pytest.raises(ConfigError, match="too long"):
        listen_unix(str(tmp_path / ("x" * 200)))


def test_tls_serves_clients_and_limits_the_handshake_time(llm: AsyncLLM, certificates: dict[str, str]) -> None:
    options = {"ssl_certfile": certificates["cert"], "ssl_keyfile": certificates["key"], "header_timeout": 1.0}
    with run_server(llm, **options, uvicorn_log_level="critical") as (_, address):
        assert address.startswith("https://127.0.0.1:")
        trust = ssl.create_default_context(cafile=certificates["cert"])
        assert httpx.get(f"{address}/health", verify=trust).status_code == 200
        with connect(address) as silent:
            assert silent.recv(1) == b""  # after the header timeout of a second, not asyncio's minute


def test_client_certificates_can_be_required(llm: AsyncLLM, certificates: dict[str, str]) -> None:
    options = {"ssl_certfile": certificates["pem"], "ssl_ca_certs": certificates["cert"], "ssl_cert_reqs": 2}
    with run_server(llm, **options, uvicorn_log_level="critical") as (_, address):
        trust = ssl.create_default_context(cafile=certificates["cert"])
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{address}/health", verify=trust)
        trust.load_cert_chain(certificates["pem"])
        assert httpx.get(f"{address}/health", verify=trust).status_code == 200


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"certfile": "missing"}, "No such file"),
        ({"certfile": "broken"}, "not a usable PEM file"),
        ({"certfile": "cert"}, "not a usable PEM file"),
        ({"certfile": "cert", "keyfile": "encrypted"}, "encrypted"),
        ({"certfile": "pem", "ca-certs": "missing"}, "No such file"),
        ({"certfile": "pem", "ca-certs": "broken"}, "not a usable PEM file"),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_invalid_tls_files_are_reported_before_the_model_is_loaded(
    certificates: dict[str, str], capsys: pytest.CaptureFixture[str], options: dict[str, str], text: str
) -> None:
    arguments = [word for name, file in options.items() for word in (f"--ssl-{name}", certificates[file])]
    assert cli.main(["serve", "/no/such/model", "--port", "0", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert text in line and certificates[list(options.values())[-1]] in line


def test_the_limit_on_open_files_is_raised_up_to_the_hard_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = [(256, 2000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    raise_file_limit(1000)
    assert limits[-1] == (1256, 2000) and not caplog.records
    raise_file_limit(100)
    assert len(limits) == 2
    raise_file_limit(5000)
    assert limits[-1] == (2000, 2000) and "max_connections=5000" in caplog.text
