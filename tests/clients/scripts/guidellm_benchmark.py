"""GuideLLM: a short benchmark with synthetic prompts; every request must succeed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from samples import ADDRESS, MODEL, SAMPLES, assert_equal

TOKENIZER = SAMPLES.parent / "assistant"
GUIDELLM = Path(sys.executable).with_name("guidellm")
with tempfile.TemporaryDirectory() as folder:
    output = Path(folder) / "benchmarks.json"
    options = {
        "backend": f"kind=openai_http,target={ADDRESS},model={MODEL}",
        "profile": "kind=synchronous",
        "constraint": "kind=max_requests,count=5",
        "tokenizer": f"kind=hf_auto,model={TOKENIZER}",
        "data": "kind=synthetic_text,prompt_tokens=32,output_tokens=8",
        "output": f"kind=json,path={output}",
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    subprocess.run([GUIDELLM, "run", *arguments, "--disable-console"], check=True)
    (benchmark,) = json.loads(output.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert_equal((totals["successful"], totals["errored"]), (5, 0))
