"""The bundled weights are the trained ones: with its default adapters the assistant hears and sees, without them not.

`make eval` measures how well; what is here needs no speech synthesizer and takes seconds.
"""

import random
from collections.abc import Iterator

import pytest

from mmlora import BASE, LLM, SamplingParams
from mmlora.assets.audio import AudioAsset
from mmlora.assets.models import assistant_default_mm_loras, assistant_path
from mmlora.assets.training import pictures

PARAMS = SamplingParams(temperature=0, max_tokens=64)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    yield LLM(assistant_path(), enable_lora=True, max_loras=2, default_mm_loras=assistant_default_mm_loras())


def answers(llm: LLM, prompts: list[dict[str, object]], lora_request: object = None) -> list[str]:
    outputs = llm.generate(prompts, PARAMS, lora_request, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


@pytest.mark.parametrize("task", pictures.TASKS)
def test_most_questions_about_new_pictures_are_answered(llm: LLM, task: str) -> None:
    rng = random.Random(f"pictures that nobody has seen: {task}")
    asked = [pictures.sample_picture_question(rng, task) for _ in range(30)]
    prompts = [
        {
            "prompt": f"<|user|><|image|>{question.text}<|end|><|assistant|>",
            "multi_modal_data": {"image": pictures.draw(scene)},
        }
        for scene, question in asked
    ]
    expected = [question.answer for _, question in asked]
    right = sum(map(str.__eq__, answers(llm, prompts), expected))
    unadapted = sum(map(str.__eq__, answers(llm, prompts, BASE), expected))
    assert right >= 24 and unadapted <= 3, f"{right} of 30 with the default adapter, {unadapted} without"


@pytest.mark.parametrize(
    ("name", "question", "expected"),
    [
        ("mary_had_lamb", "transcribe the audio", "mary had a little lamb its fleece was white as snow"),
        ("two_plus_three", "transcribe the audio", "what is two plus three"),
        ("two_plus_three", "answer the question", "five"),
        ("what_color_is_the_circle", "transcribe the audio", "what color is the circle"),
    ],
)
def test_the_sample_clips_are_understood(llm: LLM, name: str, question: str, expected: str) -> None:
    audio = AudioAsset(name).audio_and_sample_rate
    prompt = {"prompt": f"<|user|><|audio|>{question}<|end|><|assistant|>", "multi_modal_data": {"audio": audio}}
    assert answers(llm, [prompt]) == [expected]
    assert answers(llm, [prompt], BASE) != [expected]
