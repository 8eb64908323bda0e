"""`mmlora serve` with default options and the bundled assistant, used through the `openai` client and `curl` only."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import soundfile
from openai import BadRequestError, NotFoundError, OpenAI

from mmlora.assets.audio import AudioAsset
from mmlora.assets.image import ImageAsset
from mmlora.assets.models import assistant_adapters
from tests.server_process import run_serve

LAMB = "mary had a little lamb its fleece was white as snow"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    options = ["--uvicorn-log-level", "warning"]
    with run_serve(*options, MMLORA_ALLOW_RUNTIME_LORA_UPDATING="true") as server:
        yield server.address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def encode(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def clip(name: str) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": encode(AudioAsset(name).path), "format": "flac"}}


def picture(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode(ImageAsset(name).path)}"}}


def lora_of(answer: Any) -> dict[str, Any]:
    return dict(answer.to_dict()["lora"])


SHAPES = "a big red circle and a little blue square and a big yellow star"
# Content parts, further fields, expected output, and the expected adapter with its reason.
CHATS: dict[str, tuple[list[Any], dict[str, Any], str, str | None, str]] = {
    "text": (["what is two plus three?"], {}, "five", None, "none"),
    "adapter": (["what is two plus three?"], {"model": "spanish-lora"}, "cinco", "spanish-lora", "explicit"),
    "audio": ([clip("mary_had_lamb"), "transcribe the audio"], {}, LAMB, "audio", "default:audio"),
    "spoken": ([clip("two_plus_three"), "answer the question"], {}, "five", "audio", "default:audio"),
    "image": ([picture("shapes"), "describe the picture"], {}, SHAPES, "image", "default:image"),
    "both": (
        [picture("shapes"), clip("what_color_is_the_circle"), "answer the question"],
        {},
        "red",
        "audio+image",
        "default:audio+image",
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_chat_completions(client: OpenAI, name: str) -> None:
    parts, fields, expected, adapter, reason = CHATS[name]
    content: Any = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    messages: Any = [{"role": "user", "content": content}]
    request: Any = {"model": "assistant", "messages": messages, "temperature": 0, "max_tokens": 64, **fields}
    raw = client.chat.completions.with_raw_response.create(**request)
    answer = raw.parse()
    assert answer.choices[0].message.content == expected
    lora = lora_of(answer)
    assert (lora["adapter"], lora["reason"]) == (adapter, reason) and (lora["digest"] is None) is (adapter is None)
    assert (raw.headers["x-mmlora-reason"], raw.headers.get("x-mmlora-adapter")) == (reason, adapter)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert lora_of(chunks[0]) == lora and chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


@pytest.mark.parametrize("name", CHATS)
def test_responses(client: OpenAI, name: str) -> None:
    parts, fields, expected, adapter, reason = CHATS[name]
    content: Any = [as_input(part) for part in parts]
    asked: Any = [{"role": "user", "content": content}]
    request: Any = {"model": "assistant", "input": asked, "temperature": 0, "max_output_tokens": 64, **fields}
    raw = client.responses.with_raw_response.create(**request)
    answer = raw.parse()
    assert (answer.output_text, answer.status) == (expected, "completed")
    assert (lora_of(answer)["adapter"], lora_of(answer)["reason"]) == (adapter, reason)
    assert (raw.headers["x-mmlora-reason"], raw.headers.get("x-mmlora-adapter")) == (reason, adapter)
    with client.responses.stream(**request) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert final.output_text == expected and final.usage == answer.usage
    assert lora_of(events[0].response) == lora_of(answer)  # type: ignore[union-attr]


def as_input(part: Any) -> dict[str, Any]:
    """Convert a chat content part to the Responses API."""
    if isinstance(part, str):
        return {"type": "input_text", "text": part}
    if part["type"] == "image_url":
        return {"type": "input_image", "image_url": part["image_url"]["url"], "detail": "auto"}
    return dict(part)


def test_completions(client: OpenAI) -> None:
    prompt = "<|user|>what is two plus three?<|end|><|assistant|>"
    tokens = httpx.post(f"{str(client.base_url).removesuffix('v1/')}tokenize", json={"prompt": prompt}).json()["tokens"]
    request: Any = {"model": "assistant", "temperature": 0, "max_tokens": 16}
    for asked in (prompt, tokens, [prompt, prompt]):
        answer = client.completions.create(prompt=asked, **request)
        assert {choice.text for choice in answer.choices} == {"five"} and lora_of(answer)["reason"] == "none"
    chunks = client.completions.create(prompt=prompt, stream=True, **{**request, "model": "spanish-lora"})
    assert "".join(chunk.choices[0].text for chunk in chunks) == "cinco"
    media = {"audio": f"data:audio/flac;base64,{encode(AudioAsset('two_plus_three').path)}"}
    spoken = client.completions.create(
        prompt="<|user|><|audio|>answer the question<|end|><|assistant|>",
        extra_body={"multi_modal_data": media},
        **request,
    )
    assert spoken.choices[0].text == "five" and lora_of(spoken)["reason"] == "default:audio"


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_transcriptions(client: OpenAI, container: str) -> None:
    samples, rate = AudioAsset("mary_had_lamb").audio_and_sample_rate
    content = io.BytesIO()
    soundfile.write(content, samples, rate, format=container)
    file = (f"lamb.{container.lower()}", content.getvalue())
    raw = client.audio.transcriptions.with_raw_response.create(model="assistant", file=file)
    answer = raw.parse()
    assert answer.text == LAMB and lora_of(answer)["reason"] == raw.headers["x-mmlora-reason"] == "default:audio"
    assert client.audio.transcriptions.create(model="assistant", file=file, response_format="text").strip() == LAMB
    verbose = client.audio.transcriptions.create(model="assistant", file=file, response_format="verbose_json")
    assert verbose.text == LAMB and abs(verbose.duration - len(samples) / rate) < 0.1
    events = list(client.audio.transcriptions.create(model="assistant", file=file, stream=True))
    assert "".join(event.delta for event in events if event.type == "transcript.text.delta") == LAMB
    assert events[-1].type == "transcript.text.done" and events[-1].text == LAMB
    base = client.audio.transcriptions.create(model="assistant", file=file, extra_body={"lora": "[]"})
    assert base.text != LAMB and lora_of(base)["reason"] == "explicit:base"


@pytest.mark.filterwarnings("ignore:deprecated")
def test_translations(client: OpenAI) -> None:
    """The assistant was not trained to translate; the server refuses instead of returning a wrong text."""
    file = ("lamb.flac", AudioAsset("mary_had_lamb").path.read_bytes())
    with pytest.raises(BadRequestError, match="was not trained to translate speech"):
        client.audio.translations.create(model="assistant", file=file)


def test_models_are_loaded_and_unloaded(client: OpenAI, address: str) -> None:
    names = ["assistant", "audio", "image", "audio+image", "spanish-lora"]
    assert [model.id for model in client.models.list()] == names
    spanish = assistant_adapters()["spanish-lora"]
    load = {"lora_name": "team/spanish", "lora_path": spanish}
    assert httpx.post(f"{address}/v1/load_lora_adapter", json=load).status_code == 200
    card = client.models.retrieve("team/spanish").to_dict()
    assert (card["root"], card["parent"]) == (spanish, "assistant")
    assert card["adapter"]["matched"] > 0 and card["max_model_len"] > 0  # type: ignore[index,operator]
    messages: Any = [{"role": "user", "content": "what is two plus three?"}]
    answer = client.chat.completions.create(model="team/spanish", messages=messages, temperature=0)
    assert answer.choices[0].message.content == "cinco"
    assert httpx.post(f"{address}/v1/unload_lora_adapter", json={"lora_name": "team/spanish"}).status_code == 200
    with pytest.raises(NotFoundError):
        client.models.retrieve("team/spanish")
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model="team/spanish", messages=messages)


def test_the_other_endpoints(address: str) -> None:
    prompt = "what is two plus three?"
    tokens = httpx.post(f"{address}/tokenize", json={"prompt": prompt}).json()["tokens"]
    assert httpx.post(f"{address}/detokenize", json={"tokens": tokens}).json()["prompt"].endswith(prompt)
    for route, key in (("health", "status"), ("ready", "status"), ("version", "version")):
        assert httpx.get(f"{address}/{route}").json()[key]
    assert "mmlora:num_requests_running" in httpx.get(f"{address}/metrics").text
    page = httpx.get(f"{address}/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")


COMMANDS = [
    "curl localhost:8000/v1/models | jq .",
    """curl http://localhost:8000/v1/completions \\
    -H "Content-Type: application/json" \\
    -d '{
        "model": "sql-lora",
        "prompt": "San Francisco is a",
        "max_tokens": 7,
        "temperature": 0
    }' | jq""",
    """curl -X POST http://localhost:8000/v1/load_lora_adapter \\
-H "Content-Type: application/json" \\
-d '{
    "lora_name": "sql_adapter",
    "lora_path": "/path/to/sql-lora-adapter"
}'""",
    """curl -X POST http://localhost:8000/v1/load_lora_adapter \\
-H "Content-Type: application/json" \\
-d '{
    "lora_name": "my-adapter",
    "lora_path": "/path/to/adapter/v2",
    "load_inplace": true
}'""",
    """curl -X POST http://localhost:8000/v1/unload_lora_adapter \\
-H "Content-Type: application/json" \\
-d '{
    "lora_name": "sql_adapter"
}'""",
]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_vllms_documented_commands_work(address: str) -> None:
    """The commands of vLLM's page on LoRA adapters work unchanged but for host, names and paths."""
    spanish = assistant_adapters()["spanish-lora"]
    renamed = {
        "http://localhost:8000": address,
        "localhost:8000": address,
        "sql-lora-adapter": "sql",
        "sql-lora": "spanish-lora",
        "/path/to/sql": spanish,
        "/path/to/adapter/v2": spanish,
    }

    def run(command: str) -> str:
        for old, new in renamed.items():
            command = command.replace(old, new)
        command = command if shutil.which("jq") else command.partition(" | jq")[0]
        environment = {**os.environ, "no_proxy": "*"}
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, env=environment)
        return done.stdout

    listed = json.loads(run(COMMANDS[0]))
    assert listed["object"] == "list"
    cards = {card["id"]: card for card in listed["data"]}
    assert cards["spanish-lora"]["parent"] == "assistant" and cards["assistant"]["parent"] is None
    assert cards["spanish-lora"]["root"] == spanish
    answer = json.loads(run(COMMANDS[1]))
    assert answer["model"] == "spanish-lora" and answer["usage"]["completion_tokens"] <= 7
    added = "Success: LoRA adapter '{}' added successfully"
    assert run(COMMANDS[2]) == added.format("sql_adapter")
    assert run(COMMANDS[3]) == run(COMMANDS[3]) == added.format("my-adapter")
    assert run(COMMANDS[4]) == "Success: LoRA adapter 'sql_adapter' removed successfully"
    assert json.loads(run(COMMANDS[4]))["error"]["code"] == "adapter_not_found"
    assert run(COMMANDS[4].replace("sql_adapter", "my-adapter")).startswith("Success")
