"""Pages of other sites in a real browser, and what an attacker's page can make it send: nothing of it is served."""

from __future__ import annotations

import base64
import json
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from mmlora.async_llm import AsyncLLM
from mmlora.config import EngineArgs
from mmlora.server.lora.resolved import ALLOW_VARIABLE
from mmlora.server.observability.access_log import ACCESS_LOGGER
from tests.server.browser import CHROMIUM, FLAGS, needs_browser
from tests.server.conftest import RunningServer, run_server, wait_for

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = needs_browser

FRIEND = "friend.test"  # a host whose origin is allowed
HOSTS = "--host-resolver-rules=MAP *.test 127.0.0.1"
# The browser would ask the user before a public page reaches a private address; all addresses here are local.
NO_PROMPT = "--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests"
BODIES = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    "/v1/responses": {"input": "hi", "max_output_tokens": 1},
    "/tokenize": {"prompt": "hi"},
    "/v1/unload_lora_adapter": {"lora_name": "precious"},
}
# Every way of a page to send a request: each is tried with each body. `target` is the server under attack.
ATTACK = """async ([target, bodies, wav]) => {
    const clip = new Blob([Uint8Array.from(atob(wav), (c) => c.charCodeAt(0))], { type: "audio/wav" });
    const loads = [];
    const wait = (element) => loads.push(new Promise((done) => { element.onload = element.onerror = done; }));
    const form = (name, value) => { const data = new FormData(); data.set(name, value, "a.wav"); return data; };
    const attempt = async (send) => { try { await send(); } catch { /* refused by the browser */ } };
    const submit = (path, enctype, fields, options = {}) => {
        const frame = document.createElement("iframe");
        frame.name = `frame${loads.length}`;
        wait(frame);
        document.body.append(frame);
        const element = document.createElement("form");
        Object.assign(element, { action: target + path, method: "post", enctype, target: frame.name, ...options });
        for (const [name, value] of Object.entries(fields)) {
            const input = document.createElement("textarea");
            Object.assign(input, { name, value });
            element.append(input);
        }
        document.body.append(element);
        element.submit();
    };
    for (const [path, body] of Object.entries(bodies)) {
        const url = target + path;
        const text = JSON.stringify(body);
        const blobs = ["application/json", "text/plain", ""].map((type) => new Blob([text], { type }));
        const contents = [text, ...blobs, new TextEncoder().encode(text), new URLSearchParams({ [text]: "" })];
        for (const content of contents) {
            for (const options of [{ mode: "no-cors" }, { mode: "cors" }, { mode: "no-cors", keepalive: true }]) {
                await attempt(() => fetch(url, { method: "POST", body: content, credentials: "include", ...options }));
            }
            await attempt(() => navigator.sendBeacon(url, content));
        }
        for (const method of ["POST", "PUT", "DELETE"]) {
            const headers = { "Content-Type": "application/json", Authorization: "Bearer none" };
            await attempt(() => fetch(url, { method, headers, body: text }));
        }
        const redirect = `/redirect?to=${encodeURIComponent(url)}`;
        await attempt(() => fetch(redirect, { method: "POST", mode: "no-cors", body: text }));
        await attempt(() => new Promise((done) => {
            const request = new XMLHttpRequest();
            request.onloadend = done;
            request.open("POST", url);
            request.send(text);
        }));
        submit(path, "text/plain", { [`${text.slice(0, -1)},"user":"`]: `"}` });
        submit(path, "application/x-www-form-urlencoded", { [text]: "" });
        submit(path, "multipart/form-data", { body: text });
        const sandbox = document.createElement("iframe");
        sandbox.sandbox = "allow-scripts allow-forms";
        const options = JSON.stringify({ method: "POST", mode: "no-cors", body: text });
        const script = `fetch("${url}", ${options}).finally(() => parent.postMessage("done", "*"))`;
        sandbox.srcdoc = `<script>${script}</script>`;
        loads.push(new Promise((done) => {
            addEventListener("message", (event) => event.source === sandbox.contentWindow && done());
        }));
        document.body.append(sandbox);
    }
    const upload = target + "/v1/audio/transcriptions";
    await attempt(() => fetch(upload, { method: "POST", mode: "no-cors", body: form("file", clip) }));
    await attempt(() => fetch(upload, { method: "POST", body: form("file", clip) }));
    await attempt(() => navigator.sendBeacon(upload, form("file", clip)));
    for (const path of ["/v1/models", "/metrics", "/openapi.json", "/"]) {
        await attempt(() => fetch(target + path));
        await attempt(() => fetch(target + path, { mode: "no-cors" }));
        for (const tag of ["img", "script", "iframe", "audio", "link"]) {
            const element = document.createElement(tag);
            if (tag !== "audio") wait(element);
            element.rel = "stylesheet";
            element[tag === "link" ? "href" : "src"] = target + path;
            document.body.append(element);
        }
    }
    loads.push(new Promise((done) => {
        const socket = new WebSocket(target.replace("http", "ws") + "/v1/completions");
        socket.onopen = socket.onclose = done;
    }));
    await Promise.all(loads);
}"""
SUBMIT = """(action) => {
    const form = Object.assign(document.createElement("form"), { action, method: "post", enctype: "text/plain" });
    document.body.append(form);
    form.submit();
}"""
READ_BACK = """async ([target, path, body, type]) => {
    const headers = { "Content-Type": type };
    const response = await fetch(target + path, { method: "POST", headers, body: JSON.stringify(body) });
    return [response.status, await response.text()];
}"""


class _Site(BaseHTTPRequestHandler):
    """The attacker's web server: an empty page, and redirects."""

    def do_GET(self) -> None:
        content = b"<!doctype html><title>a page</title><body></body>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(307)
        self.send_header("Location", parse_qs(urlsplit(self.path).query)["to"][0])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site_port() -> Iterator[int]:
    site = ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    thread = threading.Thread(target=site.serve_forever)
    thread.start()
    yield site.server_address[1]
    site.shutdown()
    site.server_close()
    thread.join()


@pytest.fixture(scope="module")
def server(tiny_phi4: Path, adapters: dict[str, str], site_port: int) -> Iterator[RunningServer]:
    """A server on a loopback address without an API key, which clients may update."""
    options: dict[str, Any] = {"served_model_name": "tiny", "enable_lora": True, "max_loras": 2, "device": "cpu"}
    llm = AsyncLLM(EngineArgs(str(tiny_phi4), default_mm_loras={"audio": adapters["speech"]}, **options))
    policy = {"allowed_hosts": ["server.test"], "allowed_origins": [f"http://{FRIEND}:{site_port}"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ALLOW_VARIABLE, "true")
        with run_server(llm, **policy, uvicorn_log_level="error") as (_, address):
            body = {"lora_name": "precious", "lora_path": adapters["words"]}
            assert httpx.post(f"{address}/v1/load_lora_adapter", json=body, timeout=60).status_code == 200
            yield RunningServer(llm, address)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, HOSTS, NO_PROMPT])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    context.set_default_timeout(60_000)
    yield context.new_page()
    context.close()


class Records(logging.Handler):
    """Statuses of the access log."""

    def __init__(self) -> None:
        super().__init__()
        self.statuses: Counter[tuple[str, int]] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = record.fields  # type: ignore[attr-defined]
        if fields["path"] != "/favicon.ico":  # the icon of a tab, which browsers request when they like
            self.statuses[fields["method"], fields["status"]] += 1


@contextmanager
def watched(server: RunningServer) -> Iterator[tuple[Counter[tuple[str, int]], list[str]]]:
    """Yield the statuses of the requests that arrive, and the calls by which they change or compute something."""
    calls: list[str] = []
    access, records = logging.getLogger(ACCESS_LOGGER), Records()
    level = access.level
    access.addHandler(records)
    access.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("encode", "prepare", "change_loras", "run_in_pool"):
            method = getattr(server.llm, name)

            def record(*args: Any, _name: str = name, _method: Any = method, **options: Any) -> Any:
                calls.append(_name)
                return _method(*args, **options)

            patch.setattr(server.llm, name, record)
        try:
            yield records.statuses, calls
        finally:
            access.removeHandler(records)
            access.setLevel(level)


def adapters_of(server: RunningServer) -> list[str]:
    return [card["id"] for card in httpx.get(f"{server.address}/v1/models").json()["data"]]


@pytest.mark.parametrize(
    ("site", "host"),
    [("evil.test", "127.0.0.1"), ("evil.test", "server.test"), ("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "localhost")],
)
def test_a_page_of_another_origin_changes_nothing_and_starts_nothing(
    server: RunningServer, page: Page, site_port: int, wav: bytes, site: str, host: str
) -> None:
    """`evil.test` is another site, and a page of another port is another origin. Only `server.test` gets no
    `Sec-Fetch-Site`, because browsers do not trust a plain HTTP address that is not local."""
    target = f"http://{host}:{urlsplit(server.address).port}"
    before = adapters_of(server)
    page.goto(f"http://{site}:{site_port}/")
    with watched(server) as (statuses, calls):
        page.evaluate(ATTACK, [target, BODIES, base64.b64encode(wav).decode()])
        page.wait_for_timeout(300)  # beacons
    assert calls == [] and adapters_of(server) == before
    by_method = {method: {status for other, status in statuses if other == method} for method, _ in statuses}
    assert statuses["POST", 403] >= 60 and by_method["POST"] == {403}  # a preflight precedes the others
    assert by_method["OPTIONS"] == {400}
    print(f"{statuses.total()} requests: {dict(statuses)}")
    if host == "server.test":  # a GET without `Sec-Fetch-Site` and `Origin` may be any client's; it changes nothing
        assert by_method["GET"] <= {200, 206, 403}
    else:
        assert by_method["GET"] == {403}


def test_a_page_with_a_rebound_name_changes_nothing_and_starts_nothing(
    server: RunningServer, page: Page, wav: bytes
) -> None:
    target = f"http://rebound.test:{urlsplit(server.address).port}"
    before = adapters_of(server)
    with watched(server) as (statuses, calls):
        page.goto(target)  # the browser considers the page and the server one origin
        page.evaluate(ATTACK, [target, BODIES, base64.b64encode(wav).decode()])
        assert (
            page.evaluate(READ_BACK, ["", "/v1/completions", BODIES["/v1/completions"], "application/json"])[0] == 421
        )
        page.wait_for_timeout(300)
    assert calls == [] and adapters_of(server) == before
    assert statuses["POST", 421] >= 60 and {status for _, status in statuses} == {421}


def test_a_form_that_opens_in_a_tab_is_refused(server: RunningServer, page: Page, site_port: int) -> None:
    page.goto(f"http://evil.test:{site_port}/")
    with watched(server) as (statuses, calls):
        page.evaluate(SUBMIT, f"{server.address}/v1/unload_lora_adapter")
        wait_for(lambda: statuses)
    assert calls == [] and statuses == {("POST", 403): 1}


def test_a_link_opens_the_playground(server: RunningServer, page: Page, site_port: int) -> None:
    page.goto(f"http://evil.test:{site_port}/")
    page.evaluate("(url) => { location.href = url; }", f"{server.address}/")
    page.wait_for_selector("#text")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "server.test"])
def test_own_pages_are_served(server: RunningServer, page: Page, host: str) -> None:
    page.goto(f"http://{host}:{urlsplit(server.address).port}/")
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    page.locator(".exchange .facts .round").last.wait_for()


def test_pages_of_an_allowed_origin_are_served_but_must_declare_json(
    server: RunningServer, page: Page, site_port: int, wav: bytes
) -> None:
    page.goto(f"http://{FRIEND}:{site_port}/")
    arguments = [server.address, "/v1/completions", BODIES["/v1/completions"]]
    status, text = page.evaluate(READ_BACK, [*arguments, "application/json"])
    assert status == 200 and json.loads(text)["usage"]["completion_tokens"] == 1
    status, text = page.evaluate(READ_BACK, [*arguments, "text/plain"])
    assert status == 415 and "application/json" in text  # readable: it has CORS headers
