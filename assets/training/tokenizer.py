"""Train the assistant's byte-level BPE tokenizer and define its chat template."""

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmlora.assets.training import pictures, text_tasks, world

VOCAB_SIZE = 896
END_OF_TEXT, USER, ASSISTANT, SYSTEM, END, AUDIO, IMAGE = SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|audio|>",
    "<|image|>",
)
# The model was not trained to call tools, and their schemas would confuse it: the prompt has only their names.
CHAT_TEMPLATE = (
    "{%- if tools -%}{{- '<|system|>' -}}"
    "{%- for tool in tools -%}{{- tool['function']['name'] + ' ' -}}{%- endfor -%}"
    "{{- '<|end|>' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|' + ('user' if message['role'] == 'tool' else message['role']) + '|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('image', 'image_url', 'input_image') -%}{{- '<|image|>' -}}"
    "{%- elif part['type'] in ('audio', 'input_audio', 'audio_url') -%}{{- '<|audio|>' -}}"
    "{%- elif 'text' in part -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{- '<tool_call>' + call['function'] | tojson + '</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def _corpus() -> list[str]:
    rng = random.Random("tokenizer")
    items = [text_tasks.sample_text_item(rng) for _ in range(4000)]
    lines = [text for item in items for text in (item.question, item.answer, item.spanish or "")]
    for word in (*world.WORDS, *text_tasks.SPANISH.values()):
        lines += [f"{word} {word}"] * 400
    for _ in range(3000):
        scene, question = pictures.sample_picture_question(rng)
        lines += [text_tasks.style(question.text, rng), question.answer, pictures.description(scene)]
    lines += list(text_tasks.TRANSCRIBE_QUESTIONS + text_tasks.ANSWER_QUESTIONS) * 50
    return lines


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; every byte is in its alphabet, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END,
        pad_token=END_OF_TEXT,
        extra_special_tokens={
            "audio_token": AUDIO,
            "image_token": IMAGE,
            "user_token": USER,
            "assistant_token": ASSISTANT,
            "system_token": SYSTEM,
        },
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
