"""The bundled assistant behind the server transcribes its sample clips, asked with nothing but a file."""

from __future__ import annotations

import base64

import pytest
from openai import BadRequestError, OpenAI

from mmlora.assets.audio import AudioAsset
from tests.processors.media.files import FORMATS, RATE, encode

SAMPLES = {
    "mary_had_lamb": "mary had a little lamb its fleece was white as snow",
    "two_plus_three": "what is two plus three",
    "what_color_is_the_circle": "what color is the circle",
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_transcribed_word_for_word(client: OpenAI, name: str) -> None:
    path = AudioAsset(name).path
    found = client.audio.transcriptions.create(model="assistant", file=path)
    assert found.text == SAMPLES[name]
    assert found.to_dict()["lora"]["reason"] == "default:audio"  # type: ignore[index,call-overload]
    base = client.audio.transcriptions.create(model="assistant", file=path, extra_body={"lora": "[]"})
    assert base.text != SAMPLES[name]
    assert client.audio.transcriptions.create(model="assistant", file=path, response_format="text") == found.text
    events = list(client.audio.transcriptions.create(model="assistant", file=path, stream=True, language="en"))
    assert events[-1].type == "transcript.text.done" and events[-1].text == found.text


@pytest.mark.parametrize("name", FORMATS)
def test_other_containers_are_transcribed_as_the_sample_is(client: OpenAI, name: str) -> None:
    samples, rate = AudioAsset("mary_had_lamb").audio_and_sample_rate
    assert rate == RATE
    data = encode(name, samples)
    upload = client.audio.transcriptions.create(model="assistant", file=("clip", data))
    assert upload.text == SAMPLES["mary_had_lamb"]
    content = base64.b64encode(data).decode()
    question = {"type": "text", "text": "transcribe the speech"}
    for part in (
        {"type": "input_audio", "input_audio": {"data": content, "format": name}},
        {"type": "audio_url", "audio_url": {"url": f"data:audio/{name};codecs=any;base64,{content}"}},
    ):
        message = {"role": "user", "content": [part, question]}
        found = client.chat.completions.create(model="assistant", messages=[message], temperature=0)  # type: ignore[list-item]
        assert found.choices[0].message.content == SAMPLES["mary_had_lamb"]


def test_the_language_is_told(client: OpenAI) -> None:
    path = AudioAsset("mary_had_lamb").path
    found = client.audio.transcriptions.create(model="assistant", file=path, response_format="verbose_json")
    samples, rate = AudioAsset("mary_had_lamb").audio_and_sample_rate
    assert (found.language, found.duration) == ("english", len(samples) / rate)


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # openai's word on its translations
def test_what_it_was_not_taught_is_refused(client: OpenAI) -> None:
    path = AudioAsset("mary_had_lamb").path
    for options, named in (({"language": "fr"}, "language='fr'"), ({"prompt": "a nursery rhyme"}, "prompt")):
        with pytest.raises(BadRequestError, match=named):
            client.audio.transcriptions.create(model="assistant", file=path, **options)
    with pytest.raises(BadRequestError, match="not trained to translate"):
        client.audio.translations.create(model="assistant", file=path)
