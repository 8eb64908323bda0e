"""`mmlora.inputs.chat` and `chat_template`: messages to a prompt, with templates for parts and for strings."""

import base64
import io
import time

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmlora.config import EngineArgs
from mmlora.errors import ConfigError, MediaError, RequestError
from mmlora.inputs.chat import read_messages
from mmlora.inputs.chat_template import ChatTemplate, load_chat_template
from mmlora.inputs.input_processor import InputProcessor
from mmlora.processors.media import loader
from mmlora.processors.media.items import MediaLimits
from mmlora.processors.media.loader import MediaLoader
from tests.checkpoints import AUDIO_ID, IMAGE_ID, build_tokenizer

TOKENIZER = build_tokenizer()
STRINGS_ONLY = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] + '' }}<|end|>{% endfor %}"
PRINTS_LISTS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
DROPS_MEDIA = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
PARTS_OF_USERS_ONLY = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'user' and m['content'] is not string %}"
    "{% for p in m['content'] %}{{ p['text'] or '<|' + p['type'] + '|>' }}{% endfor %}"
    "{% else %}{{ m['content'] + '' }}{% endif %}<|end|>{% endfor %}"
)
IMAGE = Image.new("RGB", (8, 6), "red")
AUDIO = (np.zeros(1600, np.float32), 16000)


class Processor:
    """Placeholders of the tiny Phi-4-multimodal."""

    modalities = frozenset({"audio", "image"})

    def placeholder_token(self, modality):
        return {"audio": "<|audio|>", "image": "<|image|>"}[modality]

    def placeholder_token_id(self, modality):
        return {"audio": AUDIO_ID, "image": IMAGE_ID}[modality]


PROCESSOR = Processor()


def render(content, **options):
    return render_chat([{"role": "user", "content": content}], **options)


def render_chat(messages, *, processor=PROCESSOR, media=None, limit_mm_per_prompt=None, **options):
    """Return the text, the tokens and the decoded media of a conversation."""
    inputs = InputProcessor(
        EngineArgs("model", limit_mm_per_prompt=limit_mm_per_prompt),
        TOKENIZER,
        vocab_size=len(TOKENIZER),
        max_model_len=2**20,
        processor=processor,
        towers=None,
        host_cache=None,
        defaults={},
        constraints=None,
    )
    inputs.media = media or inputs.media
    prompt = inputs.chat_prompt(messages, **options)
    text, token_ids = inputs.render(prompt)
    return {
        "prompt": text,
        "prompt_token_ids": token_ids,
        "multi_modal_data": prompt.media.load() if prompt.media is not None else {},
    }


def url_of(content, mime):
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def png():
    buffer = io.BytesIO()
    IMAGE.save(buffer, "PNG")
    return buffer.getvalue()


def wav():
    buffer = io.BytesIO()
    soundfile.write(buffer, AUDIO[0], AUDIO[1], format="WAV")
    return buffer.getvalue()


def test_text_is_rendered_by_the_models_template():
    prompt = render("hi")
    assert prompt["prompt"] == "<|user|>hi<|end|><|assistant|>"
    assert prompt["prompt_token_ids"] == TOKENIZER(prompt["prompt"]).input_ids
    assert prompt["multi_modal_data"] == {}
    assert render("hi", add_generation_prompt=False)["prompt"] == "<|user|>hi<|end|>"
    assert render([{"type": "text", "text": "h"}, "i"])["prompt"] == prompt["prompt"]


@pytest.mark.parametrize("template", [None, STRINGS_ONLY, PRINTS_LISTS, DROPS_MEDIA])
def test_placeholders_replace_the_parts_in_place_with_every_kind_of_template(template):
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image", "image": IMAGE},
        {"type": "text", "text": "b"},
        {"type": "audio", "audio": AUDIO},
        {"type": "image", "image": IMAGE},
    ]
    prompt = render(parts, chat_template=template)
    assert "a<|image|>b<|audio|><|image|>" in prompt["prompt"]
    assert prompt["prompt_token_ids"].count(IMAGE_ID) == 2 and prompt["prompt_token_ids"].count(AUDIO_ID) == 1
    assert {key: len(items) for key, items in prompt["multi_modal_data"].items()} == {"image": 2, "audio": 1}


@pytest.mark.parametrize(
    ("part", "modality"),
    [
        ({"type": "image_url", "image_url": {"url": url_of(png(), "image/png")}}, "image"),
        ({"type": "image_url", "image_url": url_of(png(), "application/whatever")}, "image"),
        ({"type": "image", "image": IMAGE}, "image"),
        ({"type": "input_audio", "input_audio": {"data": base64.b64encode(wav()).decode(), "format": "wav"}}, "audio"),
        ({"type": "audio_url", "audio_url": {"url": url_of(wav(), "audio/wav")}}, "audio"),
        ({"type": "audio", "audio": AUDIO}, "audio"),
    ],
)
def test_every_kind_of_part_becomes_an_item(part, modality):
    ((key, items),) = render([part])["multi_modal_data"].items()
    assert key == modality and [item.modality for item in items] == [modality]
    expected = render([{"type": modality, modality: IMAGE if modality == "image" else AUDIO}])
    assert items[0].content_hash == expected["multi_modal_data"][modality][0].content_hash


def test_items_keep_their_order_over_several_messages():
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    messages = [
        {"role": "user", "content": [{"type": "image", "image": pictures[0]}, "first"]},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": [{"type": "image", "image": picture} for picture in pictures[1:]]},
    ]
    items = render_chat(messages)["multi_modal_data"]["image"]
    assert [item.image.getpixel((0, 0)) for item in items] == [p.getpixel((0, 0)) for p in pictures]


def test_a_template_that_fails_on_parts_of_some_messages_gets_strings():
    assert ChatTemplate(TOKENIZER, {"image": "<|image|>"}, PARTS_OF_USERS_ONLY).media_parts == {"image"}
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": ["a", {"type": "image", "image": IMAGE}]},
    ]
    prompt = render_chat(messages, chat_template=PARTS_OF_USERS_ONLY)
    assert prompt["prompt"] == "<|system|>s<|end|><|user|>a<|image|><|end|>"


def test_text_that_looks_like_a_part_is_text():
    """For example a question about a Python dictionary."""
    qwen = (
        "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<v><|image|></v>"
        "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    text = "fix {'type': 'dog'}, 'type': please"
    parts = [{"type": "image", "image": IMAGE}, {"type": "text", "text": text}]
    assert render(parts, chat_template=qwen)["prompt"] == f"<v><|image|></v>{text}"
    assert render([parts[1]], chat_template=qwen)["prompt"] == text
    assert render(parts, chat_template=PRINTS_LISTS)["prompt"].count("<|image|>") == 1


def test_templates_find_reasoning_under_either_name():
    for name in ("reasoning", "reasoning_content"):
        message = {"role": "assistant", "content": "x", name: "y"}
        assert read_messages([message]) == [({**message, "reasoning": "y", "reasoning_content": "y"}, ["x"])]


@pytest.mark.parametrize(
    ("template", "variables"),
    [
        ("{{ messages[0]['thinking'] }}{% generation %}{{ mood }}{% endgeneration %}", {"messages", "mood"}),
        ("{% if not thinking is defined %}{% set thinking = 1 %}{% endif %}{{ thinking }}", {"thinking"}),
        ("{% set thinking = 1 %}{{ thinking }}", set()),
    ],
)
def test_the_variables_of_a_template_are_found(template, variables):
    assert ChatTemplate(TOKENIZER, {}, template).variables == variables


def test_template_arguments_reach_the_template():
    template = "{{ mood }}:{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert render("x", chat_template=template, chat_template_kwargs={"mood": "calm"})["prompt"] == "calm:x"


@pytest.mark.parametrize("name", ["chat_template", "conversation", "messages", "self", "tokenize"])
def test_reserved_template_arguments_are_refused_by_name(name):
    with pytest.raises(RequestError, match=f"chat_template_kwargs has {name}, which") as caught:
        render("x", chat_template_kwargs={"mood": "calm", name: []})
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hi", "must be a list"),
        (["hi"], r"messages\[0\] is a string; it must be an object"),
        ([{"content": "hi"}], "'role' and 'content'"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content is a number; it must be text or a list of parts"),
        ([{"role": "user", "content": [{"type": "video_url"}]}], "'video_url'; videos are not supported"),
        ([{"role": "user", "content": [5]}], "content part is a number; it must be"),
        ([{"role": "user", "content": [{"type": "text"}]}], "lacks its 'text' field"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "'text' has a number; it must be a string"),
        (
            [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
            "has null as 'data'; it must be an object with",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}],
            "has a number as 'url'; it must be a string, or an object",
        ),
    ],
)
def test_a_malformed_message_is_refused_by_name(messages, message):
    with pytest.raises(RequestError, match=message):
        render_chat(messages)


SHOWS_PARTS = (
    "{% for m in messages %}{% for p in m['content'] %}[{% for k in p %}{{ k }}={{ p[k] }} {% endfor %}]"
    "{% if p['type'] != 'text' %}<|{{ p['type'] }}|>{% endif %}{% endfor %}{% endfor %}"
)


def test_the_template_sees_one_form_of_media_whatever_is_sent(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.wav").write_bytes(wav())
    media = MediaLoader(local_path=str(tmp_path))
    contents = {"image": [IMAGE, tmp_path / "a.png", png()], "audio": [AUDIO, f"{tmp_path}/a.wav", wav()]}
    for kind, (sample, path, data) in contents.items():
        url = url_of(data, "x/y")
        parts = [{"type": kind, kind: content} for content in (sample, path, data, url)]
        parts += [{"type": kind, "url": url}, {"type": f"{kind}_url", f"{kind}_url": {"url": url, "detail": "low"}}]
        parts += [{"image_pil": IMAGE}] if kind == "image" else []
        for part in parts:
            prompt = render([part, "x"], chat_template=SHOWS_PARTS, media=media)
            assert prompt["prompt"] == f"[type={kind} ]<|{kind}|>[type=text text=x ]"
            assert [len(items) for items in prompt["multi_modal_data"].values()] == [1]


@pytest.mark.parametrize("path", ["/etc/hostname", "/proc/self/cwd/a.png"])
def test_files_are_read_in_python_only_where_they_are_allowed(path, tmp_path):
    for field, value in (("image", path), ("path", path), ("url", f"file://{path}")):
        part = {"type": "image", field: value}
        with pytest.raises(MediaError, match="file: URLs are not allowed; --allowed-local-media-path"):
            render([part])
        with pytest.raises(MediaError, match="leads to no regular file under"):
            render([part], media=MediaLoader(local_path=str(tmp_path)))


def test_content_of_the_other_modality_is_refused():
    with pytest.raises(MediaError, match="is audio, but image was expected"):
        render([{"type": "image_url", "image_url": {"url": url_of(wav(), "image/png")}}])


def test_a_text_only_model_refuses_media():
    with pytest.raises(RequestError, match="the prompt holds audio; the model takes text only"):
        render([{"type": "audio", "audio": AUDIO}], processor=None)
    assert render("hi", processor=None)["prompt"] == "<|user|>hi<|end|><|assistant|>"


def test_limits_apply_to_parts():
    with pytest.raises(MediaError, match="pixel|px"):
        render([{"type": "image", "image": IMAGE}], media=MediaLoader(MediaLimits(max_pixels=10)))


@pytest.mark.parametrize("template", ["{{ raise_exception('roles must alternate') }}", "{{ nothing.here.at.all }}"])
def test_a_failing_template_is_a_request_error(template):
    with pytest.raises(RequestError, match="the chat template cannot render"):
        render("hi", chat_template=template)


def test_a_template_is_text_or_a_file(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}")
    assert load_chat_template(str(file)) == load_chat_template("{{ messages }}") == "{{ messages }}"
    assert load_chat_template(None) is None
    with pytest.raises(ConfigError, match="neither a Jinja template nor a file"):
        load_chat_template("missing.jinja")


PARTS_ONLY = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for p in m['content'] %}{% if p is mapping %}"
    "{{ p['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
)


def test_text_is_kept_by_a_template_that_takes_only_parts():
    for content in ("what is this?", [{"type": "text", "text": "what is this?"}]):
        assert render(content, chat_template=PARTS_ONLY)["prompt"] == "<|user|>what is this?<|end|>"


def test_a_template_that_drops_text_in_either_form_gets_strings():
    template = "{% for m in messages %}<|{{ m['role'] }}|><|end|>{% endfor %}"
    assert render("dropped", chat_template=template)["prompt"] == "<|user|><|end|>"


def test_a_template_is_rendered_once_for_each_conversation(monkeypatch):
    """Its abilities were detected when it was loaded."""
    template, rendered = ChatTemplate(TOKENIZER, {"image": "<|image|>"}), []
    apply = TOKENIZER.apply_chat_template
    monkeypatch.setattr(TOKENIZER, "apply_chat_template", lambda *a, **k: rendered.append(1) or apply(*a, **k))
    turns = [({"role": "user"}, [f"turn {number:06}"]) for number in range(20_000)]
    start_s = time.monotonic()
    assert template.render(turns, (), {}).count("turn ") == len(turns) and len(rendered) == 1
    assert time.monotonic() - start_s < 15


SYSTEM_TOOLS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'system' and tools %}{{ tools | tojson }}{% endif %}{% endfor %}"
)


def test_tools_that_a_template_skips_in_a_conversation_are_refused():
    tools = [{"type": "function", "function": {"name": "add"}}]
    user = {"role": "user", "content": "go"}
    prompt = render_chat([{"role": "system", "content": "be kind"}, user], chat_template=SYSTEM_TOOLS, tools=tools)
    assert '"name": "add"' in prompt["prompt"]
    with pytest.raises(RequestError, match="does not support tools"):
        render_chat([user], chat_template=SYSTEM_TOOLS, tools=tools)


MEDIA_IN_FIRST_MESSAGE = (
    "{% for m in messages %}{% set is_first = loop.first %}<|{{ m.role }}|>"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% elif is_first %}<|{{ p.type }}|>{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def test_media_that_a_template_skips_in_a_conversation_get_placeholders():
    image, text = {"type": "image", "image": IMAGE}, {"type": "text", "text": "and this?"}
    messages = [{"role": "user", "content": [image]}, {"role": "user", "content": [text, image]}]
    prompt = render_chat(messages, chat_template=MEDIA_IN_FIRST_MESSAGE)
    assert prompt["prompt"] == "<|user|><|image|><|user|>and this?<|image|>"


def test_media_are_counted_before_any_is_decoded(monkeypatch):
    monkeypatch.setattr(loader, "load_data_url", lambda *_, **__: pytest.fail("decoded before it was counted"))
    image = {"type": "image_url", "image_url": {"url": url_of(png(), "image/png")}}
    with pytest.raises(MediaError, match="has 3 image items; limit_mm_per_prompt allows 2"):
        render([image] * 3, limit_mm_per_prompt={"image": 2})


def test_decoding_stops_when_the_media_of_a_conversation_are_too_large(monkeypatch):
    decoded = []
    load = loader.load_data_url
    monkeypatch.setattr(loader, "load_data_url", lambda *args, **options: decoded.append(1) or load(*args, **options))
    image = {"type": "image_url", "image_url": {"url": url_of(png(), "image/png")}}
    num_bytes = 3 * IMAGE.width * IMAGE.height
    tight = MediaLoader(MediaLimits(max_decoded_bytes=2 * num_bytes))
    assert render([image] * 2, media=tight)
    decoded.clear()
    with pytest.raises(MediaError, match=f"have {3 * num_bytes} bytes or more when decoded"):
        render([image] * 9, media=tight)
    assert len(decoded) == 3
