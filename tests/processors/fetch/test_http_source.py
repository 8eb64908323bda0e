"""Media from http(s) URLs, with local servers and host names that the tests resolve."""

import asyncio
import datetime
import gzip
import ssl
import threading
import time
import tracemalloc

import httpcore
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mmlora.errors import MediaError
from mmlora.processors.fetch import checked_network
from mmlora.processors.media.items import MediaLimits
from mmlora.processors.media.loader import MAX_URLS, MediaLoader, MediaReference, PromptMedia, load_media
from tests.web_server import FakeDNS, drip, endless, http_response, redirect, run_web_server

HERE = ["127.0.0.1/32"]  # the only allowed address; the servers listen on all of 127.0.0.0/8
SMALL = MediaLimits(max_bytes=100_000)
HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.fixture
def names(monkeypatch):
    return FakeDNS(monkeypatch)


@pytest.fixture
def png(picture, encode_image):
    return encode_image(picture())


def load(url, limits=SMALL, networks=HERE, timeout_s=20.0, **options):
    return MediaLoader(limits, networks=networks, timeout_s=timeout_s, **options).load_url(url)


def refuse(url, **options):
    """Load a URL that must be refused; return the message and the seconds until then."""
    start = time.monotonic()
    with pytest.raises(MediaError) as refusal:
        load(url, **options)
    return str(refusal.value), time.monotonic() - start


def test_a_host_is_resolved_once_and_its_address_is_connected_to(names, png, encode_audio):
    names.addresses["media.example"] = names.addresses["media.example."] = [["127.0.0.1"]]
    with run_web_server(
        {"/a.png?size=1": http_response(png), "/b": http_response(encode_audio(), "Content-Type: text/html")}
    ) as web:
        item = load(web.url("/a.png?size=1#top", "media.example"))
        assert item.content_hash == load_media(png).content_hash and names.lookups == ["media.example"]
        assert load(web.url("/b", "MEDIA.example.")).modality == "audio"
    head = web.requests[0].lower()
    assert f"host: media.example:{web.port}\r\n" in head and "accept-encoding: identity\r\n" in head
    assert "cookie" not in head and "authorization" not in head


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.2"], ["10.0.0.1"], ["169.254.169.254"], ["::1"], ["::ffff:127.0.0.2"], ["::ffff:169.254.169.254"],
        ["64:ff9b::a9fe:a9fe"], ["fe80::1"], ["fd00:ec2::254"], ["0.0.0.0"], ["127.0.0.1", "10.0.0.1"],
        ["8.8.8.8", "::1"],
    ],
    ids=", ".join,
)  # fmt: skip
def test_a_host_with_one_disallowed_address_is_refused(names, monkeypatch, addresses):
    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", lambda *_: pytest.fail("connected"))
    names.addresses["inner.example"] = [addresses]
    message, _ = refuse("http://inner.example:8080/a.png")
    assert "'inner.example'" in message and "has an address that is not allowed" in message
    assert not any(address in message for address in addresses)


@pytest.mark.parametrize(
    "host", ["127.0.0.2", "2130706434", "0x7f.2", "127.2", "[::1]", "[::ffff:127.0.0.2]", "[::ffff:7f00:2]", "0"]
)
def test_addresses_are_checked_in_every_spelling(host):
    with run_web_server({"/": http_response(b"")}) as web:
        message, _ = refuse(web.url("/", host))
    assert "has an address that is not allowed" in message or "malformed" in message
    assert not web.requests


def test_dns_rebinding_after_the_check_has_no_effect(names, png):
    names.addresses["rebind.example"] = [["127.0.0.1"], ["127.0.0.2"]]
    peers = []

    def route(connection):
        peers.append(connection.getsockname()[0])
        connection.sendall(http_response(png))

    with run_web_server({"/a": route}) as web:
        load(web.url("/a", "rebind.example"))
        assert peers == ["127.0.0.1"] and names.lookups == ["rebind.example"]
        assert "not allowed" in refuse(web.url("/a", "rebind.example"))[0]
    assert peers == ["127.0.0.1"]


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_a_host_that_is_rebound_between_two_redirects_is_refused(names, png, status):
    names.addresses["rebind.example"] = [["127.0.0.1"], ["127.0.0.1"], ["127.0.0.2"]]
    routes = {"/secret": http_response(png)}
    with run_web_server(routes) as web:
        routes["/1"] = http_response(b"", "Location: /2", status=status)
        routes["/2"] = http_response(b"", f"Location: {web.url('/secret', 'rebind.example')}", status=status)
        message, _ = refuse(web.url("/1", "rebind.example"))
    assert "'rebind.example'" in message and "not allowed" in message and "127.0.0" not in message
    assert web.paths == ["/1", "/2"] and len(names.lookups) == 3  # one lookup for each connection


def test_the_next_address_is_tried_if_one_refuses(names, png):
    names.addresses["two.example"] = [["127.0.0.3", "127.0.0.1"]]
    with run_web_server({"/a": http_response(png)}, host="127.0.0.1") as web:
        assert load(web.url("/a", "two.example"), networks=["127.0.0.0/8"]).modality == "image"


def test_a_public_address_of_this_machine_is_refused(monkeypatch, png):
    monkeypatch.setattr(checked_network, "is_public", lambda address: True)
    with run_web_server({"/a": http_response(png)}) as web:
        assert "not allowed" in refuse(web.url("/a"), networks=[])[0]
        assert load(web.url("/a")).modality == "image"
    assert len(web.requests) == 1


@pytest.mark.parametrize(
    "location, named",
    [
        ("http://127.0.0.2:{port}/a", "not allowed"),
        ("http://[::ffff:127.0.0.2]:{port}/a", "not allowed"),
        ("//169.254.169.254/latest/meta-data", "not allowed"),
        ("http://inner.example/", "not allowed"),
        ("http://other.example/", "--allowed-media-domains allows"),
        ("file:///etc/passwd", "must be an http(s) URL"),
        ("data:image/png;base64,AAAA", "must be an http(s) URL"),
        ("gopher://127.0.0.1:{port}/", "must be an http(s) URL"),
        ("http://user:secret@127.0.0.1:{port}/a", "user name or password"),
        ("http://127.0.0.1:22/", "port 22"),
        ("", "which is not a URL"),
        ("http://127.0.0.1:x/", "which is not a URL"),
    ],
)
def test_redirect_targets_are_checked_like_urls(names, png, location, named):
    names.addresses["inner.example"] = [["10.0.0.1"]]
    domains = ["127.0.0.1", "127.0.0.2", "::ffff:127.0.0.2", "::ffff:7f00:2", "169.254.169.254", "inner.example"]
    routes = {"/a": http_response(png)}
    with run_web_server(routes) as web:
        routes["/start"] = redirect(location.format(port=web.port))
        message, _ = refuse(web.url("/start"), domains=domains)
    assert named in message and web.paths == ["/start"] and "secret" not in message


def test_the_number_of_redirects_is_limited(png):
    routes = {f"/{index}": redirect(f"{index + 1}") for index in range(20)}
    routes |= {"/5": http_response(png), "/loop": redirect("/loop")}
    with run_web_server(routes) as web:
        assert load(web.url("/0")).modality == "image" and len(web.requests) == 6
        routes["/5"] = redirect("/6")
        assert "redirected more than 5 times" in refuse(web.url("/0"))[0] and len(web.requests) == 12
        assert "redirected more than 5 times" in refuse(web.url("/loop"))[0] and len(web.requests) == 18


@pytest.mark.parametrize(
    "url, named",
    [
        ("http://user:secret@127.0.0.1/a", "user name or password"),
        ("http://user@127.0.0.1/a", "user name or password"),
        ("http://127.0.0.1:22/", "port 22; allowed are 80, 443 and 1024 to 65535"),
        ("http://127.0.0.1:99999/", "malformed|port"),
        ("http:///a.png", "must be an http"),
        ("http:a.png", "must be an http"),
        ("http://a.example/" + "a" * 9000, "the limit is 8192"),
        ("http://a.example/\x00", "malformed"),
        ("http://a.example\r\nX: y/", "malformed"),
        ("http://[::1/", "malformed"),
        ("http://" + "a" * 70 + ".example/", "cannot be found|malformed"),
        ("http://not-there.invalid/", "cannot be found"),
    ],
    ids=lambda value: value[:30],
)
def test_bad_urls_are_refused_by_name(url, named):
    with pytest.raises(MediaError, match=named) as refusal:
        load(url)
    assert "secret" not in str(refusal.value) and len(str(refusal.value)) < 400


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "host",
    [
        "xn--", "XN--", "xn--.example", "a.xn--a", "xn--a-.example", "xn--\x80", "xn--" + "a" * 60,
        "xn--zckzah..example", "a..example", ".example", "-", "%41.example", "[fe80::1%25eth0]", "[fe80::1%25eth0]ä",
        "ä" * 300, "\udc80",
    ],
    ids=lambda host: ascii(host[:20]),
)  # fmt: skip
def test_a_malformed_host_is_refused(names, scheme, host):
    for url in (f"{scheme}://{host}/a.png", f"{scheme}://{host}:8080/"):
        message, _ = refuse(url)
        assert "cannot be found" in message or "malformed" in message or "not allowed" in message, message
        assert len(message) < 300
        with run_web_server({"/": redirect(url.encode("utf-8", "replace").decode("latin-1"))}) as web:
            refuse(web.url("/"))


@pytest.mark.parametrize("host", ["xn--ls8h.example", "xn--a.example", "xn--a-.example", "a_b.example", "xn--"])
def test_a_host_that_dns_knows_is_fetched_though_idna_does_not_allow_it(names, monkeypatch, png, tmp_path, host):
    names.addresses[host] = [["127.0.0.1"]]
    server_tls, trusting = _certificate("media.example", tmp_path)
    monkeypatch.setattr(httpcore, "default_ssl_context", lambda: trusting)
    with run_web_server({"/": http_response(png)}) as web:
        assert load(web.url("/", host)).modality == "image"
        assert load(web.url("/", host), domains=[host]).modality == "image"
    with run_web_server({"/": http_response(png)}, server_tls) as web:
        assert "CERTIFICATE_VERIFY_FAILED" in refuse(web.url("/", host, "https"))[0]


def test_only_allowed_hosts_are_fetched(names, png):
    hosts = ["a.example", "sub.b.example", "b.example", "xb.example", "a.example.evil", "bücher.example"]
    names.addresses.update({host: [["127.0.0.1"]] for host in [*hosts, "xn--bcher-kva.example"]})

    def is_loaded(host):
        try:
            return load(web.url("/", host), domains=["A.example", "*.b.example", "bücher.example"]).modality == "image"
        except MediaError as error:
            assert "--allowed-media-domains allows a.example, *.b.example" in str(error)
            return False

    with run_web_server({"/": http_response(png)}) as web:
        assert [is_loaded(host) for host in hosts] == [True, True, False, False, False, True]
        assert "allows none" in refuse(web.url("/"), domains=[])[0]


@pytest.mark.parametrize("name", ["endless", "endless chunks", "claim", "endless head", "endless headers", "100"])
def test_an_endless_response_is_stopped_at_the_limit(name):
    piece = b"\x89PNG" * 4096
    routes = {
        "endless": endless(HEAD, piece),
        "endless chunks": endless(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"4000\r\n" + piece + b"\r\n"
        ),
        "claim": endless(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", piece),
        "endless head": endless(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 4096),
        "endless headers": endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 100),
        "100": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    }
    tracemalloc.start()
    try:
        with run_web_server({"/": routes[name]}) as web:
            message, seconds = refuse(web.url("/"), timeout_s=2.0)
            _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    named = {"claim": "claims 99999999999 bytes, more than the allowed 100000 bytes", "100": "within 2 s"}
    assert named.get(name, "more than the allowed 100000" if "chunks" in name or name == "endless" else "") in message
    assert seconds < 15 and peak < 8_000_000


@pytest.mark.parametrize("name", ["silent", "slow head", "slow body", "slow redirects"])
def test_a_slow_server_times_out(name, png):
    slow = {
        "silent": lambda connection: time.sleep(3),
        "slow head": drip(HEAD + png, 0.1),
        "slow body": lambda connection: (connection.sendall(HEAD), drip(png, 0.1)(connection)),
        "slow redirects": lambda connection: (time.sleep(0.4), connection.sendall(redirect("/"))),
    }[name]
    with run_web_server({"/": slow}) as web:
        message, seconds = refuse(web.url("/"), timeout_s=1.0)
    assert "was not read within 1 s" in message or "ReadTimeout" in message
    assert 0.5 < seconds < 10


def test_a_compressed_response_is_refused_and_not_decompressed():
    bomb = gzip.compress(bytes(10_000_000))
    assert len(bomb) < 20_000
    tracemalloc.start()
    try:
        with run_web_server({"/": http_response(bomb, "Content-Encoding: gzip")}) as web:
            message, _ = refuse(web.url("/"))
            _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "in the encoding 'gzip'; only identity is allowed" in message and peak < 8_000_000


@pytest.mark.parametrize(
    "raw, named",
    [
        (http_response(b"\x89PNG\r\n\x1a\n", length=500), "RemoteProtocolError|ReadError"),
        (http_response(b"", status="404 Not Found"), "status 404"),
        (http_response(b"", status="204 No Content"), "status 204"),
        (http_response(b"root:x:0:0:root:/root"), "neither audio nor an image"),
        (http_response(b""), "neither audio nor an image"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", "RemoteProtocolError"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "RemoteProtocolError"),
        (b"", "RemoteProtocolError"),
    ],
)
def test_content_that_is_not_media_is_refused_and_not_quoted(raw, named):
    with run_web_server({"/": raw}) as web, pytest.raises(MediaError, match=named) as refusal:
        load(web.url("/"))
    assert "root:x" not in str(refusal.value)


def test_a_content_length_that_is_too_short_truncates_the_image(png):
    with (
        run_web_server({"/": http_response(png, length=len(png) // 2)}) as web,
        pytest.raises(MediaError, match="decode"),
    ):
        load(web.url("/"))


def test_the_certificate_must_match_the_host(names, monkeypatch, png, tmp_path):
    names.addresses["media.example"] = names.addresses["other.example"] = [["127.0.0.1"]]
    server_tls, trusting = _certificate("media.example", tmp_path)
    asked = []
    server_tls.sni_callback = lambda _, name, __: asked.append(name)
    with run_web_server({"/": http_response(png)}, server_tls) as web:
        assert "CERTIFICATE_VERIFY_FAILED" in refuse(web.url("/", "media.example", "https"))[0]
        monkeypatch.setattr(httpcore, "default_ssl_context", lambda: trusting)
        assert load(web.url("/", "media.example", "https")).modality == "image"
        assert "CERTIFICATE_VERIFY_FAILED" in refuse(web.url("/", "other.example", "https"))[0]
    assert asked == ["media.example", "media.example", "other.example"] and web.paths == ["/"]


def _certificate(name, folder):
    """TLS contexts of a server with a certificate for a host, and of a client that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1, now, now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = folder / "server.pem"
    file.write_bytes(key_pem + pem)
    server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_tls.load_cert_chain(file)
    return server_tls, ssl.create_default_context(cadata=pem.decode())


def test_proxies_and_netrc_of_the_environment_are_ignored(monkeypatch, tmp_path, png):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    with run_web_server({"/": http_response(png)}) as web:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        assert load(web.url("/")).modality == "image"
    assert "authorization" not in web.requests[0].lower()


async def _fetch(loader, *urls):
    media = PromptMedia(loader, [MediaReference("image", url) for url in urls])
    await media.fetch()
    return media.load()["image"]


def run(coroutine):
    return asyncio.run(coroutine)


def test_the_urls_of_a_prompt_are_downloaded_concurrently_and_only_once(png):
    barrier = threading.Barrier(8, timeout=20)  # passes once all of them are being downloaded

    def route(connection):
        barrier.wait()
        connection.sendall(http_response(png))

    with run_web_server({f"/{index}": route for index in range(8)}) as web:
        urls = [web.url(f"/{index % 8}") for index in range(16)]
        items = run(_fetch(MediaLoader(SMALL, networks=HERE), *urls))
    assert len(items) == 16 and sorted(web.paths) == [f"/{index}" for index in range(8)]


def test_a_failed_download_cancels_the_others():
    asked, left = threading.Event(), threading.Event()

    def slow(connection):
        asked.set()
        connection.sendall(HEAD)
        while connection.recv(1):
            pass
        left.set()

    def missing(connection):
        asked.wait(10)
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    with run_web_server({"/slow": slow, "/missing": missing}) as web, pytest.raises(MediaError, match="status 404"):
        run(_fetch(MediaLoader(SMALL, networks=HERE), web.url("/slow"), web.url("/missing")))
    assert left.wait(10)


def test_the_number_and_bytes_of_a_prompts_urls_are_limited(png):
    loader = MediaLoader(SMALL, networks=HERE)
    with pytest.raises(MediaError, match=rf"has {MAX_URLS + 1} http\(s\) URLs; the limit is {MAX_URLS}"):
        run(_fetch(loader, *["http://127.0.0.1/"] * (MAX_URLS + 1)))
    loader = MediaLoader(MediaLimits(max_decoded_bytes=3 * len(png)), networks=HERE)
    message = f"have {4 * len(png)} bytes or more; the limit is {3 * len(png)}"
    routes = {f"/{index}": http_response(png) for index in range(50)}
    with run_web_server(routes) as web, pytest.raises(MediaError, match=message):
        run(_fetch(loader, *[web.url(path) for path in routes]))
    assert len(web.requests) < 20


def test_a_hundred_silent_servers_do_not_block_another(png):
    def silent(connection):
        connection.recv(1)

    with run_web_server({"/": http_response(png), "/silent": silent}) as web:
        loader = MediaLoader(SMALL, networks=HERE, timeout_s=30)
        waiting = [loader.http.read([web.url("/silent")]) for _ in range(100)]
        try:
            deadline = time.monotonic() + 20
            while len(web.requests) < 100 and time.monotonic() < deadline:
                time.sleep(0.01)
            start = time.monotonic()
            assert loader.load_url(web.url("/")).modality == "image"
            assert time.monotonic() - start < 5 and not any(future.done() for future in waiting)
        finally:
            for future in waiting:
                future.cancel()
