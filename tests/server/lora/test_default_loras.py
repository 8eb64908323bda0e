"""Default adapters over HTTP: each behaviour of the reference document."""

from __future__ import annotations

import pytest

from mmlora.server.args import LoRAModule
from tests.server.conftest import RunningServer, ServerFactory, input_audio_part, text_part, url_part

QUESTION = text_part("what is it?")


@pytest.fixture(scope="module")
def server(start_server: ServerFactory, adapters: dict[str, str]) -> RunningServer:
    """Server with defaults for both modalities and one adapter that must be requested."""
    defaults = {"audio": adapters["speech"], "image": adapters["vision"]}
    return start_server(LoRAModule("words", adapters["words"], "parent-model"), default_mm_loras=defaults)


@pytest.fixture(scope="module")
def one_default_server(start_server: ServerFactory, adapters: dict[str, str]) -> RunningServer:
    """Server with a default for audio only, and an adapter named `image` that is not a default."""
    return start_server(LoRAModule("image", adapters["vision"]), default_mm_loras={"audio": adapters["speech"]})


@pytest.mark.parametrize("kind", ["input_audio", "audio_url"])
def test_audio_uses_its_default_in_every_part_type(server: RunningServer, wav: bytes, kind: str) -> None:
    part = input_audio_part(wav) if kind == "input_audio" else url_part("audio_url", wav, "audio/wav")
    answer = server.ask(part, QUESTION)
    assert answer["lora"]["adapter"] == "audio"
    assert answer["lora"]["reason"] == "default:audio"
    assert answer["model"] == "tiny"

    by_key = server.ask(part, QUESTION, model="audio")
    assert (by_key["lora"]["reason"], by_key["model"]) == ("explicit", "audio")
    assert by_key["lora"]["digest"] == answer["lora"]["digest"]
    assert by_key["choices"] == answer["choices"]

    base = server.ask(part, QUESTION, lora=[])
    assert base["lora"] == {"adapter": None, "digest": None, "reason": "explicit:base", "warning": None}
    assert base["choices"][0]["message"] != answer["choices"][0]["message"]


def test_an_image_uses_its_default(server: RunningServer, png: bytes) -> None:
    part = url_part("image_url", png, "image/png")
    answer = server.ask(part, QUESTION)
    assert (answer["lora"]["adapter"], answer["lora"]["reason"]) == ("image", "default:image")
    assert server.ask(part, QUESTION, lora=[])["choices"][0]["message"] != answer["choices"][0]["message"]


def test_the_content_determines_the_modality_not_the_mime_type(server: RunningServer, wav: bytes) -> None:
    answer = server.ask(url_part("audio_url", wav, "application/octet-stream"), QUESTION)
    assert answer["lora"]["reason"] == "default:audio"


def test_text_alone_uses_no_adapter(server: RunningServer) -> None:
    assert server.ask(QUESTION)["lora"] == {"adapter": None, "digest": None, "reason": "none", "warning": None}


def test_two_mapped_modalities_use_no_adapter_and_warn(server: RunningServer, wav: bytes, png: bytes) -> None:
    parts = url_part("image_url", png, "image/png"), input_audio_part(wav), QUESTION
    answer = server.ask(*parts)
    assert (answer["lora"]["adapter"], answer["lora"]["reason"]) == (None, "conflict:audio+image")
    assert "audio and image" in answer["lora"]["warning"]
    assert answer["choices"] == server.ask(*parts, lora=[])["choices"]


def test_the_only_mapped_modality_decides(one_default_server: RunningServer, wav: bytes, png: bytes) -> None:
    answer = one_default_server.ask(url_part("image_url", png, "image/png"), input_audio_part(wav), QUESTION)
    assert (answer["lora"]["adapter"], answer["lora"]["reason"]) == ("audio", "default:audio")


def test_an_adapter_named_image_is_not_a_default(one_default_server: RunningServer, png: bytes) -> None:
    part = url_part("image_url", png, "image/png")
    assert one_default_server.ask(part, QUESTION)["lora"]["reason"] == "none"
    assert one_default_server.ask(part, QUESTION, model="image")["lora"]["adapter"] == "image"


def test_a_combination_key_selects_the_adapter_for_both(
    start_server: ServerFactory, adapters: dict[str, str], wav: bytes, png: bytes
) -> None:
    defaults = {"audio": adapters["speech"], "image": adapters["vision"], "audio+image": adapters["words"]}
    server = start_server(default_mm_loras=defaults)
    both = server.ask(url_part("image_url", png, "image/png"), input_audio_part(wav), QUESTION)
    assert (both["lora"]["adapter"], both["lora"]["reason"]) == ("audio+image", "default:audio+image")
    assert server.ask(input_audio_part(wav), QUESTION)["lora"]["reason"] == "default:audio"


@pytest.mark.parametrize("lora", ["words", [{"name": "words"}], [{"name": "words", "scale": 1.0}]])
def test_an_explicit_adapter_wins_over_the_default(server: RunningServer, wav: bytes, lora: object) -> None:
    by_field = server.ask(input_audio_part(wav), QUESTION, lora=lora)
    by_model = server.ask(input_audio_part(wav), QUESTION, model="words")
    assert by_field["lora"]["adapter"] == by_model["lora"]["adapter"] == "words"
    assert by_field["lora"]["reason"] == by_model["lora"]["reason"] == "explicit"
    assert by_field["choices"] == by_model["choices"]


def test_headers_name_the_adapter_and_the_reason(server: RunningServer, wav: bytes) -> None:
    for stream in (False, True):
        with (
            server.client as client,
            client.chat.completions.with_streaming_response.create(
                model="tiny",
                messages=[{"role": "user", "content": [input_audio_part(wav)]}],  # type: ignore[list-item]
                max_tokens=1,
                stream=stream,
            ) as response,
        ):
            assert response.headers["x-mmlora-adapter"] == "audio"
            assert response.headers["x-mmlora-reason"] == "default:audio"
            response.read()


def test_models_lists_the_base_the_defaults_and_the_adapters(server: RunningServer, adapters: dict[str, str]) -> None:
    with server.client as client:
        cards = {card.id: card.to_dict() for card in client.models.list()}
        assert client.models.retrieve("words").to_dict() == cards["words"]
    assert list(cards) == ["tiny", "audio", "image", "words"]
    assert {"object", "created", "owned_by", "root", "max_model_len", "permission"} <= cards["tiny"].keys()
    assert cards["tiny"]["parent"] is None and cards["tiny"]["max_model_len"] == 512
    assert cards["audio"]["parent"] == "tiny" and cards["audio"]["root"] == adapters["speech"]
    assert cards["words"]["parent"] == "parent-model"
    report = cards["audio"]["adapter"]
    assert isinstance(report, dict)
    assert report["default_for"] == "audio" and len(report["digest"]) == 64
    assert all(count > 0 for count in report["parts"].values())  # it changes every part of the model
    assert cards["words"]["adapter"]["parts"]["audio_tower"] == 0  # type: ignore[index,call-overload]


def test_several_adapters_with_scales(server: RunningServer) -> None:
    """A mix has its own output and identity; one adapter at scale 1 is the adapter itself."""
    mixed = server.ask(QUESTION, lora=[{"name": "audio", "scale": 0.7}, {"name": "image", "scale": 0.3}])
    assert (mixed["lora"]["adapter"], mixed["lora"]["reason"]) == ("0.7*audio+0.3*image", "explicit")
    alone, whole = server.ask(QUESTION, lora="audio"), server.ask(QUESTION, lora=[{"name": "audio", "scale": 1}])
    assert alone["lora"] == whole["lora"] and alone["choices"] == whole["choices"]
    half = server.ask(QUESTION, model="audio", lora=[{"name": "audio", "scale": 0.5}])
    assert half["lora"]["adapter"] == "0.5*audio"
    assert len({answer["lora"]["digest"] for answer in (mixed, alone, half)}) == 3
