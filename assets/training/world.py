"""The closed world of the bundled assistant: its words, its sentences, and which sentences are held out.

It knows nothing of audio, pixels or tokens.
"""

import random
import zlib

NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "black", "white"]
SHAPES = ["circle", "square", "triangle", "star"]
PLURALS = {shape: shape + "s" for shape in SHAPES}
ANIMALS = ["lamb", "dog", "cat", "bird", "fish", "horse", "cow"]
SIZES = ("big", "little")
RELATIONS = ("left of", "right of", "above", "below")

MARY = (
    "mary had a little lamb",
    "its fleece was white as snow",
    "and everywhere that mary went",
    "the lamb was sure to go",
)
TWINKLE = (
    "twinkle twinkle little star",
    "how i wonder what you are",
    "up above the world so high",
    "like a diamond in the sky",
)
RHYMES = {"mary had a little lamb": MARY, "twinkle twinkle little star": TWINKLE}

_GLUE = [
    "a",
    "the",
    "and",
    "of",
    "is",
    "left",
    "right",
    "above",
    "below",
    "how",
    "many",
    "what",
    "color",
    "little",
    "big",
    "plus",
    "minus",
    "are",
    "there",
    "shapes",
    "or",
]
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [*NUMBERS, *COLORS, *SHAPES, *PLURALS.values(), *ANIMALS, *_GLUE]
        + [word for line in MARY + TWINKLE for word in line.split()]
    )
)

ALWAYS_TRAINED = frozenset(
    {" ".join(lines[i:j]) for lines in (MARY, TWINKLE) for i in range(4) for j in range(i + 1, 5)}
    | {"what is two plus three", "what color is the circle", "how many shapes are there"}
)


def is_held_out(sentence: str) -> bool:
    """Return whether `sentence` belongs to the evaluation split (one sentence in ten, by its CRC-32)."""
    return sentence not in ALWAYS_TRAINED and zlib.crc32(sentence.encode()) % 10 == 0


def _thing(rng: random.Random) -> str:
    size = rng.choice([*SIZES, "", ""])
    color = rng.choice([*COLORS, ""])
    noun = rng.choice([*SHAPES, *ANIMALS])
    return " ".join(part for part in (size, color, noun) if part)


def _templated(rng: random.Random) -> str:
    relation = rng.choice(RELATIONS)
    kind = rng.randrange(8)
    if kind == 0:
        return f"the {_thing(rng)} is {relation} the {_thing(rng)}"
    if kind == 1:
        return f"a {_thing(rng)} and a {_thing(rng)}"
    if kind == 2:
        return f"mary had a {_thing(rng)}"
    if kind == 3:
        return f"what color is the {_thing(rng)}"
    if kind == 4:
        return " ".join(rng.choices(NUMBERS, k=rng.randint(2, 8)))
    if kind == 5:
        return f"the {rng.choice(ANIMALS)} was {rng.choice(COLORS)} as the {rng.choice(ANIMALS)}"
    if kind == 6:
        return f"what is {relation} the {_thing(rng)} and the {_thing(rng)}"
    return f"how i wonder what the {_thing(rng)} is {rng.choice(['above', 'below', 'like'])}"


def _verse_fragment(rng: random.Random) -> str:
    words = " ".join(rng.choice((MARY, TWINKLE))).split()
    length = rng.randint(2, 12)
    start = rng.randrange(len(words) - length + 1)
    fragment = words[start : start + length]
    if rng.random() < 0.5:
        fragment[rng.randrange(length)] = rng.choice(WORDS)
    return " ".join(fragment)


def sample_sentence(rng: random.Random, *, held_out: bool) -> str:
    """Draw a sentence of 2 to 12 words of the world from the training or the held-out split."""
    while True:
        kind = rng.random()
        if kind < 0.35:
            sentence = _templated(rng)
        elif kind < 0.85:
            sentence = " ".join(rng.choices(WORDS, k=rng.randint(2, 12)))
        else:
            sentence = _verse_fragment(rng)
        if 2 <= len(sentence.split()) <= 12 and is_held_out(sentence) == held_out:
            return sentence


def sample_sum(rng: random.Random, *, held_out: bool) -> tuple[str, str]:
    """Draw a spoken sum and its answer in words; every operand and result lies in zero to twenty."""
    while True:
        if rng.random() < 0.6:
            total = rng.randint(0, 20)
            a = rng.randint(0, total)
            operands, answer = f"{NUMBERS[a]} plus {NUMBERS[total - a]}", total
        else:
            a = rng.randint(0, 20)
            b = rng.randint(0, a)
            operands, answer = f"{NUMBERS[a]} minus {NUMBERS[b]}", a - b
        sentence = rng.choice(["what is {}", "what is {}", "how many is {}", "{}"]).format(operands)
        if is_held_out(sentence) == held_out:
            return sentence, NUMBERS[answer]
