"""The server's address and the inputs that the client scripts share. The scripts run in environments without mmlora."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

ADDRESS = sys.argv[1]
BASE_URL = f"{ADDRESS}/v1"
MODEL = "assistant"
SAMPLES = Path(__file__).resolve().parents[3] / "assets" / "samples"

QUESTION, ANSWER = "what is two plus three?", "five"
CLIP = SAMPLES / "mary_had_lamb.flac"
TRANSCRIPT = "mary had a little lamb its fleece was white as snow"
PICTURE = SAMPLES / "shapes.png"
DESCRIPTION = "a big red circle and a little blue square and a big yellow star"


def encode(path: Path) -> str:
    """Return a file in base64."""
    return base64.b64encode(path.read_bytes()).decode()


def data_url(path: Path) -> str:
    """Return a picture as a data URL."""
    return f"data:image/png;base64,{encode(path)}"


def assert_equal(output: object, expected: object) -> None:
    """Raise an AssertionError that shows both values unless they are equal."""
    if output != expected:
        raise AssertionError(f"got {output!r}, expected {expected!r}")
