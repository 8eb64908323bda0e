"""`lora_hf_hub_resolver` against a local server with the part of the Hub's protocol that downloads need."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from mmlora.errors import AdapterError, ResolverError
from mmlora.lora.loading.files import WEIGHTS_FILE
from mmlora.plugins.lora_hf_hub_resolver import HubResolver
from tests.plugins.conftest import FILES, read_files, resolve

COMMITS = {"main": "a" * 40, "v1": "b" * 40, "refs/pr/1": "c" * 40}
ALL_COMMITS = {*COMMITS.values(), "d" * 40}
REPOSITORY = {**FILES, "README.md": b"not needed", **{f"sub/{name}": content for name, content in FILES.items()}}


class FakeHub(BaseHTTPRequestHandler):
    """Serves `/org/repo/resolve/REVISION/FILE`."""

    requests: list[tuple[str, str]] = []

    def do_HEAD(self) -> None:
        self._respond(is_head=True)

    def do_GET(self) -> None:
        self._respond(is_head=False)

    def _respond(self, is_head: bool) -> None:
        self.requests.append((self.command, self.path))
        repo_id, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, filename = rest.partition("/")
        commit = COMMITS.get(revision, revision if revision in ALL_COMMITS else None)
        content = REPOSITORY.get(filename) if repo_id == "org/repo" and commit else None
        if content is None:
            code = "EntryNotFound" if repo_id == "org/repo" and commit else "RepoNotFound"
            self._send(404, {"X-Error-Code": code, "X-Repo-Commit": commit or ""}, b"", is_head)
        else:
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._send(200, {"X-Repo-Commit": str(commit), "ETag": etag}, content, is_head)

    def _send(self, status: int, headers: dict[str, str], content: bytes, is_head: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not is_head:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HfApi]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(FakeHub, "requests", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token=False)
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("name", ["org/repo", "org/repo/sub"])
def test_an_adapter_is_a_repository_or_a_folder_in_it(hub: HfApi, name: str) -> None:
    request = resolve(HubResolver({"org/repo": None}, api=hub), name)
    assert request is not None and request.lora_name == name
    directory = Path(request.lora_path)
    assert {file: (directory / file).read_bytes() for file in FILES} == FILES
    assert COMMITS["main"] in request.lora_path
    fetched = [path.rpartition("/")[2] for method, path in FakeHub.requests if method == "GET"]
    assert sorted(fetched) == sorted(FILES)


def test_the_operator_chooses_the_revision(hub: HfApi) -> None:
    request = resolve(HubResolver({"org/repo": "v1"}, api=hub), "org/repo")
    assert request is not None and COMMITS["v1"] in request.lora_path


def test_both_files_are_from_one_commit_even_if_the_branch_moves(hub: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    respond = FakeHub._respond

    def respond_and_move(self: FakeHub, is_head: bool) -> None:
        respond(self, is_head)
        if not is_head:
            monkeypatch.setitem(COMMITS, "main", "d" * 40)

    monkeypatch.setattr(FakeHub, "_respond", respond_and_move)
    request = resolve(HubResolver({"org/repo": None}, api=hub), "org/repo")
    assert request is not None and read_files(request.lora_path) == FILES and "a" * 40 in request.lora_path


@pytest.mark.parametrize(
    "name", ["org/other", "org", "other/repo", "org/repo@refs/pr/1", "org/repo/../repo", "org/repo/"]
)
def test_a_name_that_is_not_listed_sends_no_request(hub: HfApi, name: str) -> None:
    assert resolve(HubResolver({"org/repo": None}, api=hub), name) is None
    assert FakeHub.requests == []


@pytest.mark.parametrize("name", ["org/gone", "org/repo/gone"])
def test_a_missing_repository_or_file_is_unknown(hub: HfApi, name: str) -> None:
    assert resolve(HubResolver({"org/repo": None, "org/gone": None}, api=hub), name) is None


def test_a_file_that_is_too_large_is_not_downloaded(hub: HfApi) -> None:
    with pytest.raises(
        AdapterError, match=f"org/repo/{WEIGHTS_FILE} has 10240 bytes or more; .*MAX_BYTES allows 10239"
    ):
        resolve(HubResolver({"org/repo": None}, 10239, api=hub), "org/repo")
    assert not [path for method, path in FakeHub.requests if method == "GET" and path.endswith(WEIGHTS_FILE)]


def test_an_error_of_the_hub_is_not_a_missing_adapter(hub: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ResolverError, match="cannot be reached, and its cache does not contain org/repo"):
        resolve(HubResolver({"org/repo": None}, api=hub), "org/repo")


def test_without_a_connection_the_cache_of_the_hub_is_used(hub: HfApi) -> None:
    online = resolve(HubResolver({"org/repo": None}, api=hub), "org/repo")
    assert online is not None
    nowhere = HfApi(endpoint="http://127.0.0.1:9", token=False)
    assert resolve(HubResolver({"org/repo": None}, api=nowhere), "org/repo") == online


def test_a_cache_with_links_to_the_outside_is_refused(hub: HfApi, tmp_path: Path) -> None:
    resolver = HubResolver({"org/repo": None}, api=hub)
    request = resolve(resolver, "org/repo")
    assert request is not None and set(read_files(request.lora_path)) == set(FILES)
    weights = Path(request.lora_path) / WEIGHTS_FILE
    weights.unlink()
    (tmp_path / "elsewhere").write_bytes(FILES[WEIGHTS_FILE])
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match="lies outside of"):
        resolve(resolver, "org/repo")
