"""Measure the bundled assistant on held-out speech and pictures, with and without its default adapters.

This is what `make eval` runs. Sentences, voices and pictures come from fixed seeds; no sentence was trained on.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mmlora.assets.training import pictures, world
from mmlora.assets.training.metrics import word_errors
from mmlora.assets.training.speech import RATE, SEEN_VOICES, UNSEEN_VOICES, require_espeak, speak
from mmlora.assets.training.text_tasks import ANSWER_QUESTIONS, TRANSCRIBE_QUESTIONS

Generate = Callable[[list[dict[str, Any]], bool], list[str]]


@dataclass(frozen=True)
class Case:
    """One request of the evaluation and the answer it should have."""

    question: str
    answer: str
    media: dict[str, Any]

    @property
    def prompt(self) -> dict[str, Any]:
        """The request as `LLM.generate` takes it."""
        markers = "".join(f"<|{modality}|>" for modality in self.media)
        return {
            "prompt": f"<|user|>{markers}{self.question}<|end|><|assistant|>",
            "multi_modal_data": self.media,
        }


@dataclass
class Metric:
    """A line of the table: its cases and whether it counts word errors or exact answers."""

    name: str
    target: str
    cases: list[Case] = field(default_factory=list)
    is_wer: bool = False

    def score(self, texts: list[str]) -> float:
        """Return the word error rate or the share of exact answers."""
        pairs = [(case.answer, normalize(text)) for case, text in zip(self.cases, texts, strict=True)]
        if self.is_wer:
            return sum(word_errors(*pair) for pair in pairs) / sum(len(answer.split()) for answer, _ in pairs)
        return sum(answer == text for answer, text in pairs) / len(pairs)


def normalize(text: str) -> str:
    """Lower the case and drop punctuation, so that only words count."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _audio(text: str, voices: tuple[str, ...], rng: random.Random) -> tuple[Any, int]:
    return speak(text, rng.choice(voices), rng), RATE


def _transcription(name: str, target: str, voices: tuple[str, ...], size: int) -> Metric:
    rng, metric = random.Random(f"evaluate {name}"), Metric(name, target, is_wer=True)
    for _ in range(size):
        text = world.sample_sentence(rng, held_out=True)
        question = rng.choice(TRANSCRIBE_QUESTIONS)
        metric.cases.append(Case(question, text, {"audio": _audio(text, voices, rng)}))
    return metric


def _sums(name: str, target: str, voices: tuple[str, ...], size: int) -> Metric:
    rng, metric = random.Random(f"evaluate {name}"), Metric(name, target)
    for _ in range(size):
        text, answer = world.sample_sum(rng, held_out=True)
        question = rng.choice(ANSWER_QUESTIONS)
        metric.cases.append(Case(question, answer, {"audio": _audio(text, voices, rng)}))
    return metric


def _picture_task(task: str, size: int) -> Metric:
    rng, metric = random.Random(f"evaluate {task}"), Metric(f"picture: {task}", ">= 92 %")
    for _ in range(size):
        scene, question = pictures.sample_picture_question(rng, task)
        metric.cases.append(Case(question.text, question.answer, {"image": pictures.draw(scene)}))
    return metric


def _spoken_questions(size: int) -> Metric:
    rng, metric = random.Random("evaluate spoken questions"), Metric("spoken question about a picture", ">= 80 %")
    for _ in range(size):
        text = pictures.sample_spoken_question(rng, held_out=True)
        scene, answer = pictures.scene_for(text, rng)
        media = {"audio": _audio(text, SEEN_VOICES, rng), "image": pictures.draw(scene)}
        metric.cases.append(Case(rng.choice(["", ANSWER_QUESTIONS[0]]), answer, media))
    return metric


def build_metrics(size: int) -> list[Metric]:
    """Render the evaluation: `size` cases for each line of the table."""
    require_espeak()
    return [
        _transcription("word error rate, seen voices", "<= 5 %", SEEN_VOICES, size),
        _transcription("word error rate, unseen voices", "<= 15 %", UNSEEN_VOICES, size),
        _sums("spoken sums, seen voices", ">= 90 %", SEEN_VOICES, size),
        _sums("spoken sums, unseen voices", "", UNSEEN_VOICES, size),
        *(_picture_task(task, size) for task in pictures.TASKS),
        _spoken_questions(size),
    ]


def evaluate(metrics: list[Metric], generate: Generate) -> list[tuple[Metric, float, float]]:
    """Return every metric with its score with the default adapters and without them."""
    rows = []
    for metric in metrics:
        prompts = [case.prompt for case in metric.cases]
        rows.append((metric, metric.score(generate(prompts, True)), metric.score(generate(prompts, False))))
        print(format_row(*rows[-1]), flush=True)
    return rows


def format_row(metric: Metric, adapted: float, base: float) -> str:
    """Format a line of the table."""
    return f"{metric.name:34} {len(metric.cases):5} {adapted:10.1%} {metric.target:>8} {base:12.1%}"


def engine_generate() -> Generate:
    """Return a function that answers prompts with the engine, greedily."""
    from mmlora import BASE, LLM, SamplingParams
    from mmlora.assets.models import assistant_default_mm_loras, assistant_path

    llm = LLM(model=assistant_path(), enable_lora=True, max_loras=2, default_mm_loras=assistant_default_mm_loras())
    params = SamplingParams(temperature=0, max_tokens=64)

    def generate(prompts: list[dict[str, Any]], is_adapted: bool) -> list[str]:
        request = None if is_adapted else BASE
        outputs = llm.generate(prompts, params, lora_request=request, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    return generate


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--size", type=int, default=200, help="cases per line")
    args = parser.parse_args()
    metrics = build_metrics(args.size)
    print(f"{'':34} {'cases':>5} {'adapter':>10} {'target':>8} {'base model':>12}")
    evaluate(metrics, engine_generate())


if __name__ == "__main__":
    main()
