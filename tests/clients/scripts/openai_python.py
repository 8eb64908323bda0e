"""The official Python client: chat, streams, media, tools, structured output, Responses, completions, transcription."""

from __future__ import annotations

from typing import Any, Literal

from openai import BadRequestError, OpenAI
from pydantic import BaseModel
from samples import ANSWER, BASE_URL, CLIP, DESCRIPTION, MODEL, PICTURE, QUESTION, TRANSCRIPT, assert_equal, encode
from samples import data_url as url_of


class Shape(BaseModel):
    color: Literal["red", "green", "blue"]
    is_big: bool


ADD = {
    "name": "paint",
    "description": "Paint a shape",
    "parameters": {
        "type": "object",
        "properties": {"color": {"enum": ["red", "green"]}, "big": {"type": "boolean"}},
        "required": ["color", "big"],
        "additionalProperties": False,
    },
    "strict": True,
}
PARTS: list[tuple[list[dict[str, Any]], str]] = [
    ([{"type": "text", "text": QUESTION}], ANSWER),
    (
        [
            {"type": "input_audio", "input_audio": {"data": encode(CLIP), "format": "flac"}},
            {"type": "text", "text": "transcribe the audio"},
        ],
        TRANSCRIPT,
    ),
    (
        [
            {"type": "image_url", "image_url": {"url": url_of(PICTURE)}},
            {"type": "text", "text": "describe the picture"},
        ],
        DESCRIPTION,
    ),
]
client = OpenAI(base_url=BASE_URL, api_key="none", max_retries=0)
options: Any = {"model": MODEL, "temperature": 0, "max_tokens": 512}

assert_equal([MODEL in {model.id for model in client.models.list()}], [True])
for content, expected in PARTS:
    messages: Any = [{"role": "user", "content": content}]
    whole = client.chat.completions.create(messages=messages, **options)
    assert_equal(whole.choices[0].message.content, expected)
    chunks = list(
        client.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    assert_equal("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), expected)
    assert_equal(chunks[-1].usage.total_tokens, whole.usage.total_tokens)

question: Any = [{"role": "user", "content": QUESTION}]
tools: Any = [{"type": "function", "function": ADD}]
forced = client.chat.completions.create(
    messages=question, tools=tools, tool_choice="required", parallel_tool_calls=False, **options
)
calls: Any = forced.choices[0].message.tool_calls
assert_equal((forced.choices[0].finish_reason, calls[0].function.name), ("tool_calls", "paint"))
turns: Any = [
    *question,
    forced.choices[0].message,
    {"role": "tool", "tool_call_id": calls[0].id, "content": "painted"},
    *question,
]
client.chat.completions.create(messages=turns, tools=tools, **options)
parsed = client.chat.completions.parse(messages=question, response_format=Shape, **options)
assert isinstance(parsed.choices[0].message.parsed, Shape), parsed
with client.chat.completions.stream(messages=question, response_format=Shape, **options) as stream:
    stream.until_done()
    assert isinstance(stream.get_final_completion().choices[0].message.parsed, Shape)

response = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=512)
assert_equal(response.output_text, ANSWER)
with client.responses.stream(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=512) as events:
    events.until_done()
    assert_equal(events.get_final_response().output_text, ANSWER)
shape = client.responses.parse(model=MODEL, input=QUESTION, text_format=Shape, temperature=0, max_output_tokens=512)
assert isinstance(shape.output_parsed, Shape), shape
called = client.responses.create(
    model=MODEL,
    input=QUESTION,
    tools=[{"type": "function", **ADD}],
    tool_choice="required",
    parallel_tool_calls=False,
    max_output_tokens=512,
)
assert_equal(called.output[0].type, "function_call")

completion = client.completions.create(model=MODEL, prompt=["<|user|>one", "<|user|>two"], max_tokens=4, logprobs=1)
assert_equal(len(completion.choices), 2)
with CLIP.open("rb") as clip:
    assert_equal(client.audio.transcriptions.create(model=MODEL, file=clip).text, TRANSCRIPT)

try:
    client.chat.completions.create(messages=[{"role": "user", "content": "one " * 5000}], **options)
    raise AssertionError("a prompt longer than the context was accepted")
except BadRequestError as error:
    assert_equal(error.code, "context_length_exceeded")
