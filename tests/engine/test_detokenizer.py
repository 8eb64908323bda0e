"""`Detokenizer`: deltas never split a character and never contain part of a stop string."""

import random

import pytest
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mmlora.engine.detokenizer import Detokenizer
from tests.checkpoints import END_ID, build_tokenizer

TOKENIZER = build_tokenizer()  # one token per byte: every character above U+007F spans tokens
TEXTS = ["plain words", "naïve café", "日本語のテキスト", "👍🏽 and 👩‍👩‍👧!", "a�b", " two  spaces\n\n", "𝔘𝔫𝔦", "é" * 9]


def encode(text):
    return TOKENIZER(text, add_special_tokens=False).input_ids


def stream(detokenizer, token_ids, *, can_stop=True):
    """Feed tokens as the engine does; return the deltas and the stop string."""
    deltas, stop = [], None
    for token_id in token_ids:
        stop = detokenizer.append(token_id, can_stop=can_stop)
        if stop is not None:
            break
        deltas.append(detokenizer.take_new_text(is_finished=False))
    if stop is None:
        detokenizer.finish()
    deltas.append(detokenizer.take_new_text(is_finished=True))
    return deltas, stop


def fallback_tokenizer():
    """Return a tokenizer like Llama-2's and Gemma's: words with a marked space, and byte fallback."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz", "▁a", "an", "▁an"]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [("▁", "a"), ("a", "n"), ("▁a", "n")]
    tokenizer = Tokenizer(BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    replace = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence(
        [replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


FALLBACK = fallback_tokenizer()


@pytest.mark.parametrize("text", [*TEXTS, "€€€", "한국어 a", "ខ្មែរ an ខ្មែរ", "日本" * 12])
@pytest.mark.parametrize("prompt", ["", "x", "an ", "prompt with 👍", "한국어", "€a€"])
def test_bytes_between_words_become_characters_as_soon_as_they_can(text, prompt):
    prompt_ids, ids = (FALLBACK(part, add_special_tokens=False).input_ids for part in (prompt, text))
    expected = FALLBACK.decode([*prompt_ids, *ids])[len(FALLBACK.decode(prompt_ids)) :]
    detokenizer = Detokenizer(FALLBACK, prompt_ids)
    deltas, _ = stream(detokenizer, ids)
    assert "".join(deltas) == detokenizer.text == expected
    if "�" not in text:
        assert deltas[-1] == "" and not any("�" in delta for delta in deltas)


def test_invalid_bytes_are_not_withheld_forever():
    detokenizer = Detokenizer(FALLBACK, [])
    deltas, _ = stream(detokenizer, [FALLBACK.convert_tokens_to_ids("<0x80>")] * 200)
    assert len("".join(deltas)) == 200 and sum(map(len, deltas[:100])) >= 60


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "x", "prompt with 👍"])
def test_deltas_add_up_to_the_text_and_never_split_a_character(text, prompt):
    detokenizer = Detokenizer(TOKENIZER, encode(prompt))
    ids = encode(text)
    deltas, stop = stream(detokenizer, ids)
    assert stop is None
    assert "".join(deltas) == detokenizer.text == TOKENIZER.decode(ids) == text
    if "�" not in text:
        assert not any("�" in delta for delta in deltas)


def test_a_character_appears_with_its_last_byte():
    detokenizer = Detokenizer(TOKENIZER, encode("go: "))
    deltas, _ = stream(detokenizer, encode("👍é"))
    assert deltas == ["", "", "", "👍", "", "é", ""]


def test_incomplete_bytes_are_flushed_at_the_end():
    detokenizer = Detokenizer(TOKENIZER, [])
    deltas, _ = stream(detokenizer, encode("ok👍")[:-1])
    assert deltas[:2] == ["o", "k"] and deltas[2:-1] == ["", "", ""]
    assert "".join(deltas) == detokenizer.text == "ok�"


def test_a_broken_character_does_not_swallow_later_text():
    ids = [*encode("👍")[:2], *encode("abc👍")]
    detokenizer = Detokenizer(TOKENIZER, [])
    deltas, _ = stream(detokenizer, ids)
    assert "".join(deltas) == detokenizer.text == TOKENIZER.decode(ids)
    assert detokenizer.text.endswith("abc👍")


def test_a_prompt_that_ends_within_a_character_does_not_affect_the_output():
    detokenizer = Detokenizer(TOKENIZER, encode("x👍")[:-1])
    stream(detokenizer, [*encode("👍")[-1:], *encode("then é")])
    assert detokenizer.text.endswith("then é")


def test_special_tokens_are_skipped_by_default():
    ids = [*encode("a"), END_ID, *encode("b")]
    for skip, text in ((True, "ab"), (False, "a<|end|>b")):
        detokenizer = Detokenizer(TOKENIZER, encode("x"), skip_special_tokens=skip)
        assert "".join(stream(detokenizer, ids)[0]) == text


STOPS = [
    (("END",), "text END more", "text ", "END"),
    (("END",), "text ENDS", "text ", "END"),
    (("END", "EN"), "text END", "text ", "EN"),
    (("more", "text"), "text more", "", "text"),
    (("é!",), "caféé!x", "café", "é!"),
    (("👍",), "ok 👍 fine", "ok ", "👍"),
    (("abac",), "ababac", "ab", "abac"),
    (("\n\n",), "a\nb\n\nc", "a\nb", "\n\n"),
    (("END",), "text EN", "text EN", None),
    (("abcd", "bc"), "xabcd", "xa", "bc"),
]


@pytest.mark.parametrize(("stops", "text", "expected", "found"), STOPS)
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_across_token_borders(stops, text, expected, found, include):
    detokenizer = Detokenizer(TOKENIZER, encode("p"), stop=stops, include_stop=include)
    deltas, stop = stream(detokenizer, encode(text))
    assert stop == found
    expected += found if include and found else ""
    assert "".join(deltas) == detokenizer.text == expected


def test_a_possible_start_of_a_stop_string_is_withheld():
    deltas, _ = stream(Detokenizer(TOKENIZER, encode("p"), stop=("END",)), encode("aEbENx"))
    assert deltas == ["a", "", "Eb", "", "", "ENx", ""]


def test_no_delta_contains_part_of_a_found_stop_string():
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(generator.choice("abé") for _ in range(12))
        stops = tuple("".join(generator.choice("abé") for _ in range(generator.randint(1, 4))) for _ in range(2))
        detokenizer = Detokenizer(TOKENIZER, encode("p"), stop=stops)
        deltas, stop = stream(detokenizer, encode(text))
        # The stop string completed first wins; among several in one token, the one that starts first.
        ends = [text.find(s) + len(s) for s in stops if s in text]
        cut = text
        if ends:
            starts = [text.find(s) for s in stops if s in text and text.find(s) + len(s) == min(ends)]
            cut = text[: min(starts)]
        assert "".join(deltas) == detokenizer.text == cut, (text, stops)
        assert (stop is not None) == bool(ends)


def test_a_stop_string_before_min_tokens_is_ignored():
    detokenizer = Detokenizer(TOKENIZER, encode("p"), stop=("ab",))
    assert detokenizer.append(encode("a")[0], can_stop=False) is None
    assert detokenizer.append(encode("b")[0], can_stop=False) is None
    assert [detokenizer.append(i) for i in encode("cab")] == [None, None, "ab"]
    assert detokenizer.text == "abc"


def test_a_stop_string_that_ends_after_min_tokens_counts():
    detokenizer = Detokenizer(TOKENIZER, encode("p"), stop=("ab",))
    assert detokenizer.append(encode("a")[0], can_stop=False) is None
    assert detokenizer.append(encode("b")[0]) == "ab"
    assert detokenizer.text == ""


def test_kept_special_tokens_are_inserted_into_the_text_without_special_tokens():
    """Inside a character, between words whose spelling depends on each other, and as part of a stop string."""
    for text in TEXTS:
        ids = encode(text)
        for place in range(len(ids) + 1):
            mixed = [*ids[:place], 1, 3, 1, *ids[place:]]
            detokenizer = Detokenizer(TOKENIZER, encode("p"), kept_token_ids=[1])
            deltas, _ = stream(detokenizer, mixed)
            before = TOKENIZER.decode(ids[:place]).rstrip("\ufffd") if text != "a\ufffdb" else detokenizer.text[:place]
            assert "".join(deltas) == detokenizer.text and detokenizer.text.replace("<|user|>", "") == text
            assert detokenizer.text.count("<|user|>") == 2 and detokenizer.text.startswith(before)
    detokenizer = Detokenizer(TOKENIZER, encode("p"), kept_token_ids=[1], skip_special_tokens=False)
    assert stream(detokenizer, [1, 3])[0] == ["<|user|>", "<|system|>", ""]
    detokenizer = Detokenizer(TOKENIZER, encode("p"), kept_token_ids=[1], stop=("<|user|>!",))
    assert stream(detokenizer, [*encode("a"), 1, *encode("!")]) == (["a", "", ""], "<|user|>!")
