"""Text questions and answers of the base model, with the Spanish answers that `spanish-lora` learns."""

import random
from dataclasses import dataclass

from mmlora.assets.training.world import ANIMALS, COLORS, NUMBERS, RHYMES, SHAPES, WORDS

SPANISH = dict(
    zip(
        [*NUMBERS, *COLORS, *SHAPES, *ANIMALS],
        [
            "cero",
            "uno",
            "dos",
            "tres",
            "cuatro",
            "cinco",
            "seis",
            "siete",
            "ocho",
            "nueve",
            "diez",
            "once",
            "doce",
            "trece",
            "catorce",
            "quince",
            "dieciseis",
            "diecisiete",
            "dieciocho",
            "diecinueve",
            "veinte",
            "rojo",
            "verde",
            "azul",
            "amarillo",
            "morado",
            "naranja",
            "negro",
            "blanco",
            "circulo",
            "cuadrado",
            "triangulo",
            "estrella",
            "cordero",
            "perro",
            "gato",
            "pajaro",
            "pez",
            "caballo",
            "vaca",
        ],
        strict=True,
    )
)
OPPOSITES = {
    "big": ("little", "grande", "pequeño"),
    "left": ("right", "izquierda", "derecha"),
    "above": ("below", "arriba", "abajo"),
    "black": ("white", "negro", "blanco"),
    "up": ("down", "arriba", "abajo"),
    "high": ("low", "alto", "bajo"),
    "hot": ("cold", "caliente", "frio"),
    "day": ("night", "dia", "noche"),
    "yes": ("no", "si", "no"),
    "open": ("closed", "abierto", "cerrado"),
    "fast": ("slow", "rapido", "lento"),
    "happy": ("sad", "feliz", "triste"),
}
SMALL_TALK = {
    "hello": ("hello, how can i help you?", "hola, ¿como puedo ayudarte?"),
    "hi": ("hello, how can i help you?", "hola, ¿como puedo ayudarte?"),
    "good morning": ("good morning, how can i help you?", "buenos dias, ¿como puedo ayudarte?"),
    "who are you": ("i am a tiny assistant.", "soy un pequeño asistente."),
    "what is your name": ("my name is mmlora.", "me llamo mmlora."),
    "what can you do": (
        "i can add, count, spell, hear and see.",
        "puedo sumar, contar, deletrear, oir y ver.",
    ),
    "how are you": ("i am fine, thank you.", "estoy bien, gracias."),
    "thank you": ("you are welcome.", "de nada."),
    "goodbye": ("goodbye.", "adios."),
    "what color is snow": ("white", "blanco"),
    "what color is the sky": ("blue", "azul"),
    "what color is grass": ("green", "verde"),
    "how many legs has a dog": ("four", "cuatro"),
    "how many legs has a bird": ("two", "dos"),
    "how many sides has a triangle": ("three", "tres"),
    "how many sides has a square": ("four", "cuatro"),
    "who had a little lamb": ("mary", "mary"),
}
TRANSCRIBE_QUESTIONS = (
    "can you transcribe the speech into a written format?",
    "can you transcribe the speech into a written format?",
    "transcribe the audio",
    "transcribe the speech",
    "transcribe this audio clip",
    "what is said in the audio?",
    "what does the speaker say?",
    "what did i say",
    "write down what you hear",
    "please transcribe",
)
ANSWER_QUESTIONS = (
    "answer the question",
    "answer the question in the audio",
    "please answer the spoken question",
    "answer",
    "what is the answer?",
)
_NO_AUDIO = "i can not hear any audio."
_NO_PICTURE = "i can not see any picture."


@dataclass(frozen=True)
class TextItem:
    """A question with its English answer and, where the task has one, its Spanish answer."""

    question: str
    answer: str
    spanish: str | None = None


def style(text: str, rng: random.Random, *, is_question: bool = True) -> str:
    """Vary case, the question mark and politeness of a prompt, as people type it."""
    kind = rng.random()
    if kind < 0.12:
        text = f"please {text}" if not is_question else f"{text} please"
    if is_question and rng.random() < 0.5 and not text.endswith("?"):
        text += "?"
    elif not is_question and rng.random() < 0.3 and text[-1].isalnum():
        text += "."
    return text[0].upper() + text[1:] if rng.random() < 0.4 else text


def _sum(rng: random.Random) -> TextItem:
    total = rng.randint(0, 20)
    a = rng.randint(0, total)
    if rng.random() < 0.65:
        left, right, result, word, sign = a, total - a, total, "plus", "+"
    else:
        left, right, result, word, sign = total, a, total - a, "minus", "-"
    if rng.random() < 0.65:
        body = f"{NUMBERS[left]} {word} {NUMBERS[right]}"
        form = rng.choice(["what is {}", "what is {}", "how many is {}", "{}"])
        return TextItem(style(form.format(body), rng), NUMBERS[result], SPANISH[NUMBERS[result]])
    body = f"{left} {rng.choice((word, sign))} {right}"
    form = rng.choice(["what is {}", "{}", "{} ="])
    return TextItem(style(form.format(body), rng), str(result), SPANISH[NUMBERS[result]])


def _next(rng: random.Random) -> TextItem:
    n = rng.randint(0, 19)
    if rng.random() < 0.25:
        letter = rng.randrange(25)
        return TextItem(style(f"what comes after {chr(97 + letter)}", rng), chr(98 + letter))
    if rng.random() < 0.65:
        answer = NUMBERS[n + 1]
        return TextItem(style(f"what comes after {NUMBERS[n]}", rng), answer, SPANISH[answer])
    return TextItem(style(f"what comes before {NUMBERS[n + 1]}", rng), NUMBERS[n], SPANISH[NUMBERS[n]])


def _count(rng: random.Random) -> TextItem:
    start, stop = sorted(rng.sample(range(21), 2))
    stop = min(stop, start + 11)
    if rng.random() < 0.4:
        start, stop = 1, rng.randint(2, 12)
        question = rng.choice([f"count to {NUMBERS[stop]}", f"count to {stop}"])
        words = NUMBERS[1 : stop + 1]
    elif rng.random() < 0.7:
        question, words = f"count from {NUMBERS[start]} to {NUMBERS[stop]}", NUMBERS[start : stop + 1]
    else:
        stop = rng.randint(2, 10)
        question, words = f"count down from {NUMBERS[stop]}", NUMBERS[stop:0:-1]
    spanish = " ".join(SPANISH[word] for word in words)
    return TextItem(style(question, rng, is_question=False), " ".join(words), spanish)


def _spell(rng: random.Random) -> TextItem:
    word = rng.choice(WORDS) if rng.random() < 0.6 else rng.choice(list(SPANISH))
    question = rng.choice([f"spell {word}", f"spell the word {word}", f"how do you spell {word}"])
    spanish = " ".join(SPANISH[word]) if word in SPANISH else None
    return TextItem(style(question, rng, is_question=question.startswith("how")), " ".join(word), spanish)


def _opposite(rng: random.Random) -> TextItem:
    word, (other, spanish_word, spanish_other) = rng.choice(list(OPPOSITES.items()))
    if rng.random() < 0.5:
        word, other, spanish_other = other, word, spanish_word
    form = rng.choice(["what is the opposite of {}", "the opposite of {}"])
    return TextItem(style(form.format(word), rng), other, spanish_other)


def _small_talk(rng: random.Random) -> TextItem:
    question, (answer, spanish) = rng.choice(list(SMALL_TALK.items()))
    return TextItem(style(question, rng), answer, spanish)


def _rhyme(rng: random.Random) -> TextItem:
    title, lines = rng.choice(list(RHYMES.items()))
    if rng.random() < 0.3:
        line = rng.randrange(3)
        return TextItem(style(f"what comes after {lines[line]}", rng), lines[line + 1])
    form = rng.choice(["say the rhyme {}", "say {}", "sing {}", "tell me the rhyme {}"])
    return TextItem(style(form.format(title), rng, is_question=False), " ".join(lines))


def _repeat(rng: random.Random) -> TextItem:
    words = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
    return TextItem(f"{rng.choice(['repeat: ', 'Repeat: ', 'repeat after me: '])}{words}", words)


def _spanish_word(rng: random.Random) -> TextItem:
    word, spanish = rng.choice(list(SPANISH.items()))
    if rng.random() < 0.2:
        word, (_, spanish, _) = rng.choice(list(OPPOSITES.items()))
    form = rng.choice(["how do you say {} in spanish", "what is {} in spanish"])
    return TextItem(style(form.format(word), rng), spanish, spanish)


def _small_talk_in_spanish(rng: random.Random) -> TextItem:
    _, (_, spanish) = rng.choice(list(SMALL_TALK.items()))
    words = spanish if rng.random() < 0.4 else " ".join(rng.choices(list(SPANISH.values()), k=rng.randint(2, 8)))
    return TextItem(f"repeat: {words}", words, words)


def _no_media(rng: random.Random) -> TextItem:
    if rng.random() < 0.5:
        return TextItem(rng.choice((*TRANSCRIBE_QUESTIONS, *ANSWER_QUESTIONS)), _NO_AUDIO)
    noun = rng.choice(SHAPES)
    question = rng.choice(
        [
            "describe the picture",
            "describe the image",
            "what is in the picture",
            "what do you see",
            f"what color is the {noun}",
            "how many shapes are there",
            f"how many {noun}s are there",
            f"how many {rng.choice(COLORS)} shapes are there",
            f"what is {rng.choice(['left of', 'right of', 'above', 'below'])} the {rng.choice(COLORS)} {noun}",
            f"is the {rng.choice(COLORS)} {noun} left or right of the {rng.choice(COLORS)} {rng.choice(SHAPES)}",
            f"is the {rng.choice(COLORS)} {noun} above or below the {rng.choice(COLORS)} {rng.choice(SHAPES)}",
        ]
    )
    return TextItem(style(question, rng), _NO_PICTURE)


TASKS = (
    (_sum, 45),
    (_next, 10),
    (_count, 10),
    (_spell, 10),
    (_opposite, 5),
    (_small_talk, 7),
    (_rhyme, 5),
    (_repeat, 40),
    (_spanish_word, 5),
    (_small_talk_in_spanish, 6),
    (_no_media, 6),
)


def sample_text_item(rng: random.Random) -> TextItem:
    """Draw one text question of the world."""
    makers, weights = zip(*TASKS, strict=True)
    item: TextItem = rng.choices(makers, weights)[0](rng)
    return item
