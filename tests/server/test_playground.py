"""The playground in a browser with the bundled assistant: what users do, and what the page must not do."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import soundfile
from fastapi import FastAPI

from mmlora.assets.audio import AudioAsset
from mmlora.assets.image import ImageAsset
from mmlora.assets.models import assistant_adapters, assistant_default_mm_loras, assistant_path
from mmlora.async_llm import AsyncLLM
from mmlora.config import EngineArgs
from mmlora.processors.media.audio import AudioItem
from mmlora.processors.media.loader import load_media
from mmlora.server.api import build_app
from mmlora.server.args import LoRAModule
from mmlora.server.launch import load_served_models
from mmlora.server.lora.served_models import ServedModels
from tests.server.browser import CHROMIUM, FLAGS, needs_browser
from tests.server.conftest import run_app, wait_for

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request, Route

TIMEOUT_MS = 120_000
MICROPHONE = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")
DESCRIPTION = "a big red circle and a little blue square and a big yellow star"
HAND_OVER = """([kind, name, type, content]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name, { type }));
    const options = { bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer };
    const events = kind === "drop" ? ["dragover", "drop"] : ["paste"];
    const Event = kind === "drop" ? DragEvent : ClipboardEvent;
    for (const name of events) document.activeElement.dispatchEvent(new Event(name, options));
}"""


@pytest.fixture(scope="module")
def assistant() -> Iterator[tuple[AsyncLLM, ServedModels]]:
    args = EngineArgs.from_kwargs(
        assistant_path(),
        served_model_name="assistant",
        enable_lora=True,
        max_loras=2,
        default_mm_loras=assistant_default_mm_loras(),
        device="cpu",
    )
    llm = AsyncLLM(args)
    try:
        spanish = LoRAModule("spanish-lora", assistant_adapters()["spanish-lora"])
        yield llm, load_served_models(llm, [spanish])
    finally:
        llm.shutdown()


@pytest.fixture(scope="module")
def address(assistant: tuple[AsyncLLM, ServedModels]) -> Iterator[str]:
    with run_app(build_app(*assistant)) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium with a fake microphone: "what is two plus three", then silence."""
    from playwright.sync_api import sync_playwright

    samples, rate = AudioAsset("two_plus_three").audio_and_sample_rate
    samples = np.concatenate([np.zeros(rate // 2), samples, np.zeros(60 * rate)])
    path = tmp_path_factory.mktemp("microphone") / "microphone.wav"
    soundfile.write(path, samples, rate, subtype="PCM_16")
    with sync_playwright() as playwright:
        flags = [*FLAGS, *MICROPHONE, f"--use-file-for-fake-audio-capture={path}%noloop"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


class Visit:
    """An open page, with its requests and console messages."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self._context = browser.new_context(permissions=["microphone"], **options)
        self._context.set_default_timeout(TIMEOUT_MS)
        self.page: Page = self._context.new_page()
        self.requests: list[Request] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self._url = url
        self.response = self.page.goto(url)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """Bodies of the chat requests."""
        return [json.loads(request.post_data or "") for request in self.requests if request.method == "POST"]

    def ask(self, text: str) -> tuple[str, str]:
        """Type a message, send it, and return `answer()`."""
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")
        return self.answer()

    def answer(self) -> tuple[str, str]:
        """Wait until the last answer is complete; return its text and facts."""
        last = self.page.locator(".exchange").last
        last.locator(".facts .round").wait_for()
        return last.locator(".answer").inner_text(), " ".join(last.locator(".facts").inner_text().split())

    def hand_over(self, kind: str, path: Path, mime: str) -> None:
        """Drop or paste a file and wait until it is attached."""
        content = base64.b64encode(path.read_bytes()).decode()
        self.page.evaluate(HAND_OVER, [kind, path.name, mime, content])
        self.page.wait_for_selector("#attachments .tile")

    def wait_until(self, expression: str) -> None:
        """Poll an expression; Playwright's `wait_for_function` uses `eval`, which the page's policy forbids."""
        deadline = time.monotonic() + TIMEOUT_MS / 1000
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, expression
            self.page.wait_for_timeout(20)

    def fulfil(self, status: int, body: str, **headers: str) -> None:
        """Respond to chat requests in place of the server."""
        self.page.route("**/chat/completions", lambda route: route.fulfill(status=status, body=body, headers=headers))

    def width(self) -> int:
        """Return the width of the content in CSS pixels."""
        wide = "Math.max(...[...document.querySelectorAll('html, #transcript, #panel')].map((e) => e.scrollWidth))"
        return int(self.page.evaluate(wide))

    def close(self) -> None:
        """Check that the page sent requests only to its server and logged no errors."""
        elsewhere = [request.url for request in self.requests if not request.url.startswith((self._url, "blob:"))]
        self._context.close()
        assert elsewhere == [] and self.complaints == []


Open = Callable[..., Visit]


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Open]:
    visits: list[Visit] = []

    def open_page(url: str = address, **options: Any) -> Visit:
        visits.append(Visit(browser, url, **options))
        return visits[-1]

    yield open_page
    for each in visits:
        each.close()


def test_the_page_needs_no_key_and_loads_only_from_its_server(assistant: tuple[AsyncLLM, ServedModels]) -> None:
    with run_app(build_app(*assistant, api_key="secret")) as address:
        page = httpx.get(address)
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"} <= set(policy)
        assert not any(source in page.headers["content-security-policy"] for source in ("http", "unsafe", "*"))
        assert httpx.head(address).status_code == 200
        assert httpx.get(f"{address}/v1/models").status_code == 401
        script = httpx.get(f"{address}/playground/app.js")
        assert script.status_code == 200 and script.headers["content-type"].startswith("text/javascript")
        for name in ("nothing.js", "..%2Fapi.py", "..%2F..%2Fpyproject.toml", "%2Fetc%2Fpasswd"):
            assert httpx.get(f"{address}/playground/{name}").status_code == 404, name
        headers = {"Authorization": "Bearer secret"}
        described = httpx.get(f"{address}/openapi.json", headers=headers).json()["paths"]
        assert "/health" in described and not {"/", "/playground/{name}"} & set(described)


@needs_browser
def test_a_spoken_question_is_recorded_and_answered(visit: Open) -> None:
    seen = visit()
    page = seen.page
    page.click("#record-button")
    seen.wait_until("document.getElementById('level').value > 0.1")
    seen.wait_until("document.getElementById('recorded-time').textContent >= '0:03'")
    page.click("#keep")
    page.wait_for_selector("#attachments .waveform")
    answer, facts = seen.ask("answer the question")
    assert answer == "five"
    assert facts.startswith("speech-lora default:audio 2 tokens first token ")
    url = seen.bodies[0]["messages"][0]["content"][0]["audio_url"]["url"]
    kind, _, content = url.partition(",")
    assert kind == "data:audio/webm;codecs=opus;base64"
    clip = load_media(base64.b64decode(content))
    assert isinstance(clip, AudioItem)
    assert clip.sample_rate >= 16000 and 2.9 < clip.duration_s < 30
    assert page.evaluate("document.getElementById('level').value") == 0


@needs_browser
def test_a_recording_can_be_discarded_and_an_attachment_removed(visit: Open) -> None:
    page = visit().page
    page.click("#record-button")
    page.wait_for_selector("#recording:visible")
    page.keyboard.press("Escape")
    page.wait_for_selector("#recording", state="hidden")
    page.set_input_files("#files", [AudioAsset("two_plus_three").path, ImageAsset("shapes").path])
    page.wait_for_selector(".tile.image")
    assert page.locator(".tile.audio").inner_text().strip() == "0:02"
    page.get_by_role("button", name="Remove two_plus_three.flac").click()
    assert page.locator("#attachments .tile").count() == 1
    assert page.locator(".tile.audio").count() == 0


@needs_browser
@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_picture_is_described(visit: Open, kind: str) -> None:
    seen = visit()
    seen.hand_over(kind, ImageAsset("shapes").path, "image/png")
    answer, facts = seen.ask("describe the picture")
    assert answer == DESCRIPTION
    assert re.fullmatch(r"vision-lora default:image 15 tokens [\d.]+ tokens/s first token [\d.]+ m?s", facts)


@needs_browser
def test_a_clip_is_sent_unchanged_and_other_files_are_refused(visit: Open, tmp_path: Path) -> None:
    seen = visit()
    seen.hand_over("drop", AudioAsset("two_plus_three").path, "audio/flac")
    assert seen.ask("transcribe the speech")[0] == "what is two plus three"
    sent = seen.bodies[0]["messages"][0]["content"][0]["audio_url"]["url"].partition(",")[2]
    assert base64.b64decode(sent) == AudioAsset("two_plus_three").path.read_bytes()
    notes = tmp_path / "notes.txt"
    notes.write_text("hello")
    seen.page.set_input_files("#files", notes)
    seen.page.wait_for_selector("#notice:has-text('notes.txt is neither audio nor an image')")


@needs_browser
def test_sending_before_the_models_are_known_lists_adapters_once(visit: Open) -> None:
    seen = visit()
    held: list[Route] = []
    page = seen.page
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    page.fill("#text", "what is two plus three?")
    page.press("#text", "Enter")
    page.wait_for_timeout(500)  # sending requests the models, too
    assert held
    for route in held:
        route.continue_()
    assert seen.answer()[1].startswith("base model no default applies")
    assert page.locator(".adapter[data-name=audio]").count() == 1


@needs_browser
def test_the_selected_adapters_are_sent(visit: Open) -> None:
    seen = visit()
    page, question = seen.page, "what is two plus three?"
    assert seen.ask(question)[1].startswith("base model no default applies")
    page.check("input[value=chosen]")
    page.check(".adapter[data-name=spanish-lora] [type=checkbox]")
    assert seen.ask(question)[0] == "cinco"
    page.fill(".adapter[data-name=spanish-lora] [type=number]", "0.7")
    page.check(".adapter[data-name=audio] [type=checkbox]")
    page.locator(".adapter[data-name=audio] [type=range]").evaluate(
        "(slider) => { slider.value = 0.3; slider.dispatchEvent(new InputEvent('input', { bubbles: true })); }"
    )
    assert seen.ask(question)[1].startswith("0.3*audio+0.7*spanish-lora explicit")
    page.check("input[value=base]")
    assert seen.ask(question)[1].startswith("base model explicit:base")
    page.check("input[value=automatic]")
    assert seen.ask(question)[1].startswith("base model no default applies")
    weights = [{"name": "audio", "scale": 0.3}, {"name": "spanish-lora", "scale": 0.7}]
    sent = [body.get("lora", "automatic") for body in seen.bodies]
    assert sent == ["automatic", [{"name": "spanish-lora", "scale": 1}], weights, [], "automatic"]
    assert {body["model"] for body in seen.bodies} == {"assistant"}
    facts = page.locator(".adapter[data-name=image] small").inner_text()
    assert facts == "default for image · 16 modules of the language model"
    assert page.locator("#defaults").inner_text().splitlines()[0] == "audio → speech-lora"


@needs_browser
def test_settings_and_earlier_turns_are_sent(visit: Open) -> None:
    seen = visit()
    page = seen.page
    page.click("#settings summary")
    page.fill("#temperature", "0.5")
    page.fill("#max-tokens", "2")
    page.fill("#system", "be brief")
    first, facts = seen.ask("count to five")
    assert facts.find("token limit reached") > 0
    page.check("#memory")
    seen.ask("hello")
    system = {"role": "system", "content": "be brief"}
    turn = {"role": "user", "content": [{"type": "text", "text": "count to five"}]}
    last = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    assert [body["messages"] for body in seen.bodies] == [
        [system, turn],
        [system, turn, {"role": "assistant", "content": first}, last],
    ]
    assert {(body["temperature"], body["max_tokens"], body["stream"]) for body in seen.bodies} == {(0.5, 2, True)}
    page.click("#clear")
    assert page.locator(".exchange").count() == 0
    seen.ask("hello")
    assert seen.bodies[-1]["messages"] == [system, last]


@needs_browser
def test_a_sample_is_sent_with_one_click(visit: Open) -> None:
    seen = visit()
    seen.page.click("#samples button:has-text('answer the question')")
    assert seen.answer()[0] == "five"


@needs_browser
def test_an_answer_can_be_stopped_and_regenerated(
    visit: Open, assistant: tuple[AsyncLLM, ServedModels], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = assistant[0].engine
    step = engine.step

    def slow_step(**options: Any) -> Any:
        time.sleep(0.3)
        return step(**options)

    seen = visit()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", slow_step)
        seen.page.fill("#text", "count from one to twelve")
        seen.page.press("#text", "Enter")
        seen.page.wait_for_selector(".running .answer:has-text('one two')")
        assert seen.page.locator(".badge").inner_text() == "base model"
        seen.page.keyboard.press("Escape")
        answer, facts = seen.answer()
        assert facts.endswith("stopped") and answer.startswith("one two") and "twelve" not in answer
        wait_for(lambda: not engine.has_unfinished_requests)  # the server aborted the request
    seen.page.locator(".facts .round").click()
    assert seen.answer()[0].endswith("eleven twelve")
    assert seen.page.locator(".exchange").count() == 1


@needs_browser
def test_failures_are_shown_as_text(visit: Open) -> None:
    seen = visit()
    full = json.dumps({"error": {"message": "The queue is full.", "type": "rate_limit_error"}})
    seen.fulfil(429, full, **{"retry-after": "7"})
    assert seen.ask("hello")[1] == "The queue is full. Try again in 7 s."
    seen.fulfil(502, "<h1>Bad Gateway</h1>")
    assert seen.ask("hello")[1] == "The server responded with 502 Bad Gateway."
    begun = 'data: {"choices": [{"delta": {"content": "so"}, "finish_reason": null}]}\n\n'
    seen.fulfil(200, begun + 'data: {"error": {"message": "The engine died."}}\n\ndata: [DONE]\n\n')
    assert seen.ask("hello") == ("so", "The engine died.")
    seen.fulfil(200, begun)
    assert seen.ask("hello") == ("so", "The connection ended before the response was complete.")
    seen.page.unroute_all()
    seen.page.route("**/chat/completions", lambda route: route.abort())
    assert seen.ask("hello")[1] == "The server cannot be reached."
    seen.page.unroute_all()
    seen.page.check("input[value=chosen]")
    seen.page.check(".adapter[data-name=spanish-lora] [type=checkbox]")
    seen.page.fill(".adapter[data-name=spanish-lora] [type=number]", "")
    assert "it must be a finite number" in seen.ask("hello")[1]
    assert seen.page.locator("#status").inner_text().startswith("Failed: lora")
    seen.complaints[:] = [text for text in seen.complaints if not text.startswith("Failed to load resource")]


@needs_browser
def test_model_output_is_never_html(visit: Open) -> None:
    seen = visit()
    said = "<img src=x onerror=\"document.title = 'run'\"><b>bold</b>"
    warning = "<i>two</i> defaults"
    chunk = {
        "lora": {"adapter": "<b>a</b>", "digest": "d", "reason": "conflict:audio+image", "warning": warning},
        "choices": [{"delta": {"content": said}, "finish_reason": None}],
    }
    seen.fulfil(200, f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")
    answer, facts = seen.ask("<u>hello</u>")
    assert answer == said
    assert facts.startswith(f"<b>a</b> conflict:audio+image {warning}")
    assert seen.page.locator(".exchange :is(img, b, i, u)").count() == 0
    assert seen.page.title() == "mmlora playground"


@needs_browser
def test_the_api_key_is_requested_and_kept_for_the_session(
    visit: Open, assistant: tuple[AsyncLLM, ServedModels]
) -> None:
    with run_app(build_app(*assistant, api_key="sécret")) as address:
        seen = visit(address)
        page = seen.page
        page.wait_for_selector("#key-dialog[open]")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=The server rejected this key.")
        page.keyboard.type("sécret")
        page.keyboard.press("Enter")
        assert seen.ask("what is two plus three?")[0] == "five"
        page.reload()
        page.wait_for_selector("#model:has-text('assistant')")
        assert page.evaluate("[localStorage.length, Object.values(sessionStorage)]") == [0, ["sécret"]]
        page.evaluate("sessionStorage.clear()")
        page.fill("#text", "hello")
        page.press("#text", "Enter")
        page.wait_for_selector("#key-dialog[open]")
        page.keyboard.press("Escape")
        assert "a valid API key is required" in seen.answer()[1]
        seen.complaints[:] = [text for text in seen.complaints if "status of 401" not in text]


@needs_browser
def test_the_page_works_under_a_path_prefix(visit: Open, assistant: tuple[AsyncLLM, ServedModels]) -> None:
    outer = FastAPI()
    outer.mount("/some/prefix", build_app(*assistant))
    with run_app(outer) as address:
        seen = visit(f"{address}/some/prefix/")
        seen.page.click("#samples button:has-text('describe the picture')")
        assert seen.answer()[0] == DESCRIPTION


@needs_browser
def test_a_phone_needs_no_horizontal_scrolling(visit: Open) -> None:
    seen = visit(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = seen.page
    page.wait_for_selector("#samples:visible")
    assert seen.width() == 360
    page.tap("#panel > summary")
    page.check("input[value=chosen]")
    for box in page.locator(".adapter [type=checkbox]").all():
        box.check()
    assert seen.width() == 360
    page.check("input[value=automatic]")
    page.tap("#panel > summary")
    page.set_input_files("#files", [AudioAsset("two_plus_three").path, ImageAsset("shapes").path])
    page.wait_for_selector(".tile.image")
    assert seen.width() == 360
    seen.ask("answer the question " + "m" * 200)
    assert seen.width() == 360
    chunk = {"choices": [{"delta": {"content": "w" * 500}, "finish_reason": None}]}
    seen.fulfil(200, f"data: {json.dumps(chunk)}\n\n")
    seen.ask("hello")
    assert seen.width() == 360
    rest = "(e) => e.scrollHeight - e.scrollTop - e.clientHeight"
    assert page.locator("#transcript").evaluate(rest) < 2  # the error below the answer is visible, too
    page.set_viewport_size({"width": 1200, "height": 740})
    page.wait_for_selector("#choice:visible")


@needs_browser
def test_the_keyboard_is_sufficient(visit: Open) -> None:
    seen = visit()
    page = seen.page
    page.on("filechooser", lambda chooser: chooser.set_files(ImageAsset("shapes").path))
    page.wait_for_selector("#samples:visible")

    def tab_to(selector: str) -> None:
        """Press Tab until an element has the focus, which must be visible."""
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none" or selector == "#text"  # the box around the text shows its focus
                return
        raise AssertionError(f"{selector} cannot be reached")

    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    assert page.input_value("#text") == "first line\n" and not seen.bodies
    page.fill("#text", "")
    tab_to("#attach-button")
    page.keyboard.press("Enter")
    page.wait_for_selector(".tile.image")
    page.keyboard.type("describe the picture")
    page.keyboard.press("Enter")
    assert seen.answer()[0] == DESCRIPTION
    assert page.locator("#status").inner_text() == f"Answer: {DESCRIPTION}"
    tab_to("input[name=mode]")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    tab_to(".adapter[data-name=spanish-lora] [type=checkbox]")
    page.keyboard.press("Space")
    tab_to(".adapter[data-name=spanish-lora] [type=range]")
    page.keyboard.press("ArrowLeft")
    tab_to("#text")
    page.keyboard.type("what is two plus three?")
    page.keyboard.press("Enter")
    assert seen.answer()[0] == "cinco"
    assert seen.bodies[-1]["lora"] == [{"name": "spanish-lora", "scale": 0.95}]
    tab_to("#clear")
    page.keyboard.press("Enter")
    assert page.locator(".exchange").count() == 0


@needs_browser
def test_the_theme_follows_the_system_until_one_is_selected(visit: Open) -> None:
    page = visit(color_scheme="dark").page

    def brightness() -> float:
        colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return sum(map(float, colour[4:-1].split(","))) / 3

    assert brightness() < 40
    page.emulate_media(color_scheme="light")
    assert brightness() > 220
    toggle = page.locator("#theme-toggle")
    assert toggle.get_attribute("aria-label") == "Theme: system"
    toggle.click()
    toggle.click()
    assert brightness() < 40
    page.reload()
    assert brightness() < 40 and toggle.get_attribute("aria-label") == "Theme: dark"


@needs_browser
def test_reduced_motion_disables_animations(visit: Open) -> None:
    page = visit(reduced_motion="reduce").page
    assert page.evaluate("getComputedStyle(document.querySelector('.dot')).animationName") == "none"
