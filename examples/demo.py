"""What `make demo` runs: one server, one base model, and the adapter that it applies automatically to each request."""

import base64
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI

from mmlora.assets.audio import AudioAsset
from mmlora.assets.image import ImageAsset


@contextmanager
def server() -> Iterator[str]:
    """Run `mmlora serve` on a free port, yield its address, and always stop it."""
    command = [sys.executable, "-m", "mmlora.cli", "serve", "--port", "0", "--uvicorn-log-level", "warning"]
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        ready = next((line for line in process.stdout if line.startswith("mmlora is ready")), None)
        if ready is None:
            raise SystemExit(f"the server ended with exit code {process.wait()} before it was ready")
        print(f"$ mmlora serve\n{ready}")
        yield ready.split()[3]
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def audio(name: str) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": encode(AudioAsset(name).path), "format": "flac"}}


def image(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode(ImageAsset(name).path)}"}}


def encode(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def main() -> None:
    transcribe = [audio("mary_had_lamb"), text("can you transcribe the speech into a written format?")]
    describe = [image("shapes"), text("describe the picture")]
    spoken = [image("shapes"), audio("what_color_is_the_circle"), text("answer the question")]
    requests: list[tuple[str, str, list[dict[str, Any]], dict[str, Any]]] = [
        ("text", "what is two plus three?", [text("what is two plus three?")], {}),
        ("audio", "mary_had_lamb.flac: transcribe", transcribe, {}),
        ("  the same", 'with "lora": []', transcribe, {"lora": []}),
        ("image", "shapes.png: describe the picture", describe, {}),
        ("  the same", 'with "lora": []', describe, {"lora": []}),
        ("audio+image", "shapes.png, what_color_is_the_circle.flac", spoken, {}),
        (
            "text",
            "what is two plus three? (spanish-lora)",
            [text("what is two plus three?")],
            {"model": "spanish-lora"},
        ),
    ]
    with server() as address:
        client = OpenAI(base_url=address, api_key="none", max_retries=0)
        row = "{:<12} {:<42} {:<13} {:<20} {:>6}"
        print(row.format("request", "question", "adapter", "reason", "time") + "\n" + "-" * 97)
        for kind, question, content, extra in requests:
            start = time.perf_counter()
            answer = client.chat.completions.create(
                model=extra.get("model", "assistant"),
                messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
                temperature=0,
                max_tokens=64,
                extra_body={name: value for name, value in extra.items() if name != "model"},
            )
            lora = answer.to_dict()["lora"]
            assert isinstance(lora, dict)
            seconds = f"{time.perf_counter() - start:.2f} s"
            print(row.format(kind, question, lora["adapter"] or "(base)", lora["reason"], seconds))
            print(f"{'':<12} → {answer.choices[0].message.content}\n")


if __name__ == "__main__":
    main()
