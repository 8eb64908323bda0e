"""lm-eval: loglikelihoods with the server's tokenizer, and generation through chat completions."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager
from samples import ADDRESS, BASE_URL, MODEL

CHOICE = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["five", "seven"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
GENERATE = """task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "five"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 16}}
metric_list: [{{metric: exact_match}}]
"""


def evaluate(folder: Path, task: str, model: str, arguments: dict[str, object], **options: object) -> float:
    """Return the task's score."""
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[task], task_manager=tasks, bootstrap_iters=0, **options
    )
    scores = results["results"][task]
    return float(next(value for name, value in scores.items() if name.startswith(("acc", "exact_match"))))


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    data = folder / "data.json"
    question = "<|user|>what is two plus three?<|end|><|assistant|>"
    data.write_text("\n".join(json.dumps({"question": question}) for _ in range(3)))
    (folder / "choice.yaml").write_text(CHOICE.format(data=data))
    choices = {
        "model": MODEL,
        "base_url": f"{BASE_URL}/completions",
        "tokenizer_backend": "remote",
        "num_concurrent": 1,
    }
    score = evaluate(folder, "tiny_choice", "local-completions", choices)
    assert score == 1.0, f"loglikelihoods: {score}"
    data.write_text("\n".join(json.dumps({"question": "what is two plus three?"}) for _ in range(3)))
    (folder / "generate.yaml").write_text(GENERATE.format(data=data))
    chat = {"model": MODEL, "base_url": f"{BASE_URL}/chat/completions", "num_concurrent": 1}
    score = evaluate(folder, "tiny_generate", "local-chat-completions", chat, apply_chat_template=True)
    assert score == 1.0, f"generation at {ADDRESS}: {score}"
