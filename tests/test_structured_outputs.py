"""Structured outputs: completions of a random model follow the constraint, and other requests are unaffected."""

import json
import random
import re
import time

import pytest
import torch
from jsonschema import Draft202012Validator
from transformers import AutoTokenizer

from mmlora import LLM, LoRARequest, SamplingParams, StructuredOutputsParams
from mmlora.assets.models import assistant_path
from mmlora.engine.sampler import sample
from mmlora.errors import ConstraintError, RequestError
from mmlora.structured_outputs import ConstraintCompiler
from tests.checkpoints import END_ID, END_OF_TEXT_ID, build_tokenizer
from tests.engine.sequences import make_sequence
from tests.reference import Reference

HOT = {"temperature": 3.0, "max_tokens": 400}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(tiny_phi4):
    return LLM(str(tiny_phi4), enable_lora=True)


def complete(llm, params, prompts=("hello",), loras=None):
    outputs = llm.generate(list(prompts), params, loras, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [completion for output in outputs for completion in output.outputs]


def under(options=HOT, **constraint):
    return SamplingParams(**options, structured_outputs=StructuredOutputsParams(**constraint))


def random_schema(rng, depth=0):
    kinds = ["string", "integer", "number", "boolean", "enum", "const", "nullable"]
    kind = rng.choice(kinds + (["object", "array", "anyOf"] if depth < 3 else []))
    if kind == "object":
        names = rng.sample(["a", "name", "count of it", 'x"y', "é"], rng.randint(1, 4))
        properties = {name: random_schema(rng, depth + 1) for name in names}
        required = [name for name in names if rng.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": low, "maxItems": low + 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
    return {
        "string": {"type": "string", "minLength": 1, "maxLength": 5},
        "integer": {"type": "integer", "minimum": -20, "exclusiveMaximum": 3000},
        "number": {"type": "number", "minimum": 0, "maximum": 1},
        "boolean": {"type": "boolean"},
        "enum": {"enum": ["red", 7, None, ["x"]]},
        "const": {"const": {"k": "v"}},
        "nullable": {"type": ["string", "null"], "pattern": "^[a-c]{2,4}$"},
    }[kind]


def test_completions_follow_random_schemas(llm):
    rng = random.Random(0)
    schemas = [random_schema(rng) for _ in range(40)]
    params = [under({**HOT, "seed": seed}, json=schema) for seed, schema in enumerate(schemas)]
    found = complete(llm, params, ["go"] * len(schemas))
    num_whole = 0
    for schema, completion in zip(schemas, found, strict=True):
        if completion.finish_reason == "stop":
            num_whole += 1
            Draft202012Validator(schema).validate(json.loads(completion.text))
    assert num_whole >= 30


@pytest.mark.parametrize(
    "regex",
    [
        r"[a-z]{3,9}@[a-z]{2,5}\.(com|org)",
        r"\d{4}-\d{2}-\d{2}",
        r"(yes|no|maybe)( (yes|no))?",
        "é+ü{2}",
        r"[^a-y\n]{1,4}z",
    ],
)
def test_completions_match_an_expression(llm, regex):
    for completion in complete(llm, under({**HOT, "n": 4, "seed": 1}, regex=regex)):
        is_whole = completion.finish_reason == "stop"
        assert re.fullmatch(regex, completion.text) if is_whole else len(completion.token_ids) == 400


def test_completions_follow_a_grammar_in_either_form(llm):
    lark = 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,2}/'
    gbnf = 'root ::= term ("+" term)*\nterm ::= [0-9] [0-9]? | "(" root ")"'
    for grammar in (lark, gbnf):
        whole = [
            c for c in complete(llm, under({**HOT, "n": 8, "seed": 2}, grammar=grammar)) if c.finish_reason == "stop"
        ]
        assert whole
        for completion in whole:
            assert re.fullmatch(r"[0-9+()]+", completion.text)
            assert isinstance(eval(re.sub(r"\b0+(?=\d)", "", completion.text)), int)


def test_json_object_gives_a_json_object(llm):
    choice = complete(llm, under({**HOT, "n": 4, "seed": 3}, json_object=True))
    whole = [completion for completion in choice if completion.finish_reason == "stop"]
    assert all(isinstance(json.loads(completion.text), dict) for completion in whole)
    assert all(completion.text.startswith("{") for completion in choice)


def test_repeated_blanks_are_limited(llm):
    space = llm.get_tokenizer()(" ").input_ids[0]
    options = {"temperature": 0, "max_tokens": 400, "logit_bias": {space: 100}}
    completion = complete(llm, under(options, json=PERSON))[0]
    assert completion.finish_reason == "stop" and json.loads(completion.text)["name"] == " " * 6
    assert max(map(len, re.findall(" +", completion.text))) == 40


def best_choice(reference, choices, prompt, bias=None):
    """Return the greedy path through the choices with the logits of transformers; one byte is one token."""
    tokenizer = reference.tokenizer
    paths = [tokenizer(choice).input_ids for choice in choices]
    prompt_ids, token_ids = tokenizer(prompt).input_ids, []
    while True:
        left = [path for path in paths if path[: len(token_ids)] == token_ids]
        allowed = {path[len(token_ids)] for path in left if len(path) > len(token_ids)}
        if not allowed:
            return tokenizer.decode(token_ids)
        if token_ids in left:
            allowed |= {END_ID, END_OF_TEXT_ID}
        scores = reference.logits(prompt_ids + token_ids)[-1]
        token = max(allowed, key=lambda token: float(scores[token]) + (bias or {}).get(token, 0))
        if token in (END_ID, END_OF_TEXT_ID):
            return tokenizer.decode(token_ids)
        token_ids.append(token)


def test_greedy_takes_the_most_likely_allowed_tokens(llm, tiny_phi4):
    reference = Reference(tiny_phi4)
    choices = ["red", "re", "green", "grey", "gray", "greyish", "blue", "b", "ça va", "ça", "42"]
    bias = {reference.tokenizer("g").input_ids[0]: 3.0}
    taken = set()
    for prompt in ("a", "what colour?", "zzz", "7", "what is it", "colour:"):
        for biased in (None, bias):
            options = {"temperature": 0, "max_tokens": 20, "logit_bias": biased}
            completion = complete(llm, under(options, choice=choices), [prompt])[0]
            assert completion.text == best_choice(reference, choices, prompt, biased)
            assert completion.finish_reason == "stop"
            taken.add(completion.text)
    assert len(taken) > 1


def test_a_choice_that_starts_another_may_end_or_go_on(llm):
    texts = {c.text for c in complete(llm, under({**HOT, "n": 32, "seed": 5}, choice=["a", "ab", "abc"]))}
    assert texts == {"a", "ab", "abc"}


def test_choices_may_be_many(llm):
    choices = [f"word number {index}" for index in range(6000)]
    completion = complete(llm, under({"temperature": 0, "max_tokens": 20}, choice=choices))[0]
    assert completion.text in choices and completion.finish_reason == "stop"


def test_each_completion_has_its_matcher_before_the_engine_gets_the_request(llm):
    """The engine thread does not copy matchers."""
    engine = llm.llm_engine
    ready = engine.process_input("r", "a", under({**HOT, "n": 3}, choice=["a", "b"]))
    assert len(set(map(id, ready.matchers))) == len({id(matcher._matcher) for matcher in ready.matchers}) == 3
    engine.add_input(ready)
    sequences = engine._requests["r"].sequences
    assert all(seq.matcher is matcher for seq, matcher in zip(sequences, ready.matchers, strict=True))
    engine.abort_request("r")


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {"min_tokens": 3}], ids=str)
def test_a_completion_that_must_not_end_continues_while_it_can(llm, options):
    found = complete(llm, under({**HOT, "n": 16, "seed": 5, **options}, choice=["a", "ab", "abc"]))
    assert {(c.text, c.finish_reason) for c in found} == {("abc", "stop")}


def test_the_end_may_come_before_min_tokens_where_nothing_can_follow(llm):
    completion = complete(llm, under({**HOT, "min_tokens": 10}, choice=["ab"]))[0]
    assert (completion.text, completion.finish_reason, len(completion.token_ids)) == ("ab", "stop", 2)


def test_max_tokens_cuts_a_completion(llm):
    completion = complete(llm, under({"temperature": 0, "max_tokens": 3}, json=PERSON))[0]
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 3)
    assert completion.text.startswith("{")


def test_stop_strings_and_log_probabilities_go_with_a_constraint(llm):
    options = {"temperature": 0, "max_tokens": 20, "stop": ["gr"], "logprobs": 2}
    completion = complete(llm, under(options, choice=["red green"]))[0]
    assert (completion.text, completion.stop_reason) == ("red ", "gr")
    assert all(token in top for token, top in zip(completion.token_ids, completion.logprobs, strict=True))


def test_batching_and_adapters_do_not_change_completions(llm, tiny_adapters):
    lora = LoRARequest("a", 1, str(tiny_adapters["a"]))
    free = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    bound = under({"temperature": 0, "max_tokens": 60}, json=PERSON)
    prompts, params, loras = ["one", "two", "one", "two"], [free, bound, bound, free], [None, None, lora, lora]
    together = complete(llm, params, prompts, loras)
    alone = [complete(llm, p, [t], [a])[0] for t, p, a in zip(prompts, params, loras, strict=True)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert together[0].token_ids != together[3].token_ids  # the adapter changes something


def test_preempted_completions_are_the_same(tiny_phi4, llm):
    block_bytes = 3 * 2 * 16 * 3 * 12 * 4
    small = LLM(str(tiny_phi4), kv_cache_memory_bytes=9 * block_bytes, max_model_len=128, enable_prefix_caching=False)
    schema = {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 3}
    params = [under({"temperature": 1.0, "seed": seed, "max_tokens": 90}, json=schema) for seed in range(4)]
    prompts = ["a", "bb", "ccc", "dddd"]
    assert [c.token_ids for c in complete(small, params, prompts)] == [
        c.token_ids for c in complete(llm, params, prompts)
    ]
    assert small.llm_engine.scheduler.num_preemptions > 0


NESTED = {"type": "integer"}
for _ in range(80):
    NESTED = {"type": "array", "items": NESTED}
# Both overflow the stack of llguidance, which ends the process.
CHAIN = {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(2500)} | {"2500": {}}}
RULES = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "a"\n'


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        ({}, "exactly one"),
        ({"json": PERSON, "regex": "a"}, "json and regex"),
        ({"json_object": False}, "exactly one"),
        ({"regex": 5}, "int"),
        ({"json": 5}, "int"),
        ({"choice": []}, "choice"),
        ({"choice": ["a", ""]}, "choice"),
        ({"choice": "ab"}, "choice"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": ""}, "empty completion"),
        ({"regex": "a" * 200_000}, "131072"),
        ({"json": "{"}, "not valid JSON"),
        ({"json": "[" * 100_000}, "too deeply"),
        ({"json": NESTED}, "too deeply"),
        ({"json": CHAIN}, "levels in all; the limit is 1000"),
        ({"grammar": RULES}, "has 4002 colons, one or two for each rule; the limit is 1000"),
        ({"json": "[1]"}, "must be an object"),
        ({"json": "null"}, "must be an object"),
        ({"json": False}, "must be an object"),
        ({"json": {"type": "banana"}}, "banana"),
        ({"json": {"not": {}}}, "not"),
        ({"json": {"enum": ["x" * 200_000]}}, "131072"),
        ({"json": {"multipleOf": 999_983, "type": "integer"}}, "multipleOf"),
        ({"json": {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}], "type": "integer"}}, "multipleOf"),
        ({"json": {"anyOf": [{"multipleOf": 10**300 + i} for i in range(20)]}}, "multipleOf, such as 1000"),
        ({"json": f'{{"maximum": {"9" * 5000}}}'}, "value has 5000 digits"),
        ({"json": {"items": {"$ref": f"#/required/{'9' * 5000}"}, "required": ["a"]}}, "array index"),
        ({"json": {"maximum": float("nan")}}, "not valid JSON"),
        ({"json": {"$ref": "http://example.com/schema"}}, "example.com"),
        ({"json": {"$ref": "#"}}, "no text at all"),
        ({"grammar": "root ::= ("}, "structured_outputs"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"grammar": "start: start"}, "no text at all"),
        ({"grammar": "start: %json {}"}, "%json"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_constraint_that_cannot_be_used_is_refused(llm, constraint, text):
    with pytest.raises(ConstraintError, match="structured_outputs") as caught:
        llm.generate("a", under(**constraint), use_tqdm=False)
    assert text in str(caught.value) and len(str(caught.value)) < 600 and "sys." not in str(caught.value)
    assert caught.value.param == "structured_outputs"


def test_a_constraint_that_turns_out_too_complex_fails_alone(llm):
    schema = {"type": "object", "properties": {f"p{i}": {} for i in range(1000)}, "additionalProperties": False}
    params = [under(json=schema), SamplingParams(temperature=0, max_tokens=4)]
    lost, fine = llm.generate(["a", "b"], params, use_tqdm=False)
    assert isinstance(lost.error, RequestError) and "constraint" in str(lost.error)
    assert fine.error is None and len(fine.outputs[0].token_ids) == 4


def test_sampling_params_take_no_other_form():
    with pytest.raises(RequestError, match="dict"):
        SamplingParams(structured_outputs={"regex": "a"})


def test_without_the_package_the_request_is_refused(llm, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ConstraintError, match="llguidance is not installed"):
        llm.generate("a", under(regex="a"), use_tqdm=False)


@pytest.fixture(scope="module")
def compiler():
    return ConstraintCompiler(build_tokenizer(), frozenset({END_ID, END_OF_TEXT_ID}))


def constrained_sequence(compiler, **constraint):
    seq = make_sequence(params=under({"temperature": 0}, **constraint))
    seq.matcher = compiler.compile(seq.params.structured_outputs)
    return seq


@pytest.mark.parametrize("vocab_size", [100, 263, 300, 1000])
def test_the_vocabulary_may_differ_from_the_rows_of_logits(compiler, vocab_size):
    """Padding rows of the embedding table are never chosen, and tokens without a row are harmless."""
    logits = torch.arange(vocab_size, dtype=torch.float32).expand(2, -1).clone()
    free, bound = make_sequence(params=SamplingParams(temperature=0)), constrained_sequence(compiler, choice=["!", "#"])
    tokens = sample(logits, [free, bound], frozenset())
    assert tokens == [vocab_size - 1, build_tokenizer()("#").input_ids[0]]
    assert torch.equal(logits[0], torch.arange(vocab_size, dtype=torch.float32))


def test_the_vocabulary_may_fill_whole_words_of_a_mask():
    tokenizer = AutoTokenizer.from_pretrained(assistant_path())
    assert len(tokenizer) % 32 == 0
    compiler = ConstraintCompiler(tokenizer, frozenset({tokenizer.eos_token_id}))
    seq, ids = constrained_sequence(compiler, choice=["!"]), tokenizer("!").input_ids
    assert sample(torch.zeros(1, len(tokenizer)), [seq], frozenset()) == ids
    seq.matcher.advance(ids[0])
    assert seq.matcher.is_complete


def test_a_matcher_that_fails_takes_its_own_request_along(compiler):
    lost, fine = (constrained_sequence(compiler, choice=["!"]) for _ in range(2))
    lost.matcher.advance(END_ID + 50)  # not allowed by the mask
    first, second = sample(torch.zeros(2, 263), [lost, fine], frozenset())
    assert isinstance(first, RequestError) and "constraint" in str(first)
    assert second == build_tokenizer()("!").input_ids[0]


def test_a_panic_takes_its_own_request_along(compiler):
    class Panic(BaseException):
        """Like the panics of Rust code."""

    class Broken:
        def consume_token(self, token_id):
            raise Panic

    lost = constrained_sequence(compiler, choice=["!!"])
    lost.matcher._matcher = Broken()
    lost.matcher.advance(build_tokenizer()("!").input_ids[0])
    assert not lost.matcher.is_complete
    (token,) = sample(torch.zeros(1, 263), [lost], frozenset())
    assert isinstance(token, RequestError) and "Panic" in str(token)


def test_many_references_are_allowed_if_they_do_not_form_a_chain(compiler):
    schema = {"anyOf": [{"$ref": f"#/$defs/{i}"} for i in range(200)], "$defs": {str(i): PERSON for i in range(200)}}
    compiler.compile(StructuredOutputsParams(json=schema))


def test_references_take_linear_time(compiler):
    schema = {"anyOf": [{"$ref": f"#/{i}"} for i in range(4000)]}
    start = time.process_time()
    with pytest.raises(ConstraintError, match="levels in all"):
        compiler.compile(StructuredOutputsParams(json=schema))
    assert time.process_time() - start < 5


def test_a_slow_tokenizer_is_refused_by_name():
    with pytest.raises(ConstraintError, match="tokenizer"):
        ConstraintCompiler(object(), frozenset({0})).compile(StructuredOutputsParams(regex="a"))
