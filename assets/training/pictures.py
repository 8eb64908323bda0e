"""Draw pictures of a few shapes and ask questions about them, with their answers.

Shapes are named from left to right; no two centres are closer than `MIN_GAP` pixels horizontally.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from mmlora.assets.training.world import COLORS, NUMBERS, PLURALS, RELATIONS, SHAPES, is_held_out

SIDE = 112
PATCH = 14
PATCHES_PER_SIDE = SIDE // PATCH
MIN_GAP = 16
RADIUS = {"little": (8.0, 11.0), "big": (16.5, 21.0)}
RGB = {
    "red": (215, 30, 35),
    "green": (30, 150, 50),
    "blue": (35, 70, 215),
    "yellow": (245, 220, 40),
    "purple": (130, 45, 165),
    "orange": (245, 135, 20),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}
TASKS = ("describe", "count", "color", "relation")
DESCRIBE_QUESTIONS = ("describe the picture", "describe the image", "what is in the picture", "what do you see")


@dataclass(frozen=True)
class Shape:
    """A shape with its centre and radius in pixels of a 112-px picture."""

    kind: str
    color: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"

    @property
    def patch(self) -> int:
        """The 14-px patch, of an 8 x 8 grid row by row, in which the shape ends.

        The vision tower of `transformers` attends causally to square pictures: at the centre of a shape it has
        only seen the upper half.
        """
        bottom = min(SIDE - 1, self.y + 0.85 * self.radius)
        return int(bottom // PATCH) * PATCHES_PER_SIDE + int(self.x // PATCH)

    @property
    def cell(self) -> int:
        """The cell of a 4 x 4 grid, row by row, in which the shape ends; the model pools 2 x 2 patches into one."""
        row, column = divmod(self.patch, PATCHES_PER_SIDE)
        return row // 2 * (PATCHES_PER_SIDE // 2) + column // 2


@dataclass(frozen=True)
class Scene:
    """One to four shapes from left to right, with the seed of everything that only affects how it looks."""

    shapes: tuple[Shape, ...]
    look_seed: int


@dataclass(frozen=True)
class Question:
    """A question about a scene, its answer, and the task it belongs to (see `TASKS`).

    `cells` holds, for each word of the answer, the cell of a 4 x 4 grid that shows it (-1: none); it may be empty.
    `named` holds the kind and the cell of each shape that the question names, in its order.
    """

    task: str
    text: str
    answer: str
    cells: tuple[int, ...] = ()
    named: tuple[tuple[str, int], ...] = ()


def sample_scene(rng: random.Random) -> Scene:
    """Draw one to four shapes that neither overlap nor share a column."""
    count = rng.randint(1, 4)
    while True:
        shapes: list[Shape] = []
        for _ in range(count):
            size = rng.choice(("big", "little"))
            radius = rng.uniform(*RADIUS[size])
            x, y = (rng.uniform(radius + 2, SIDE - radius - 2) for _ in range(2))
            shapes.append(Shape(rng.choice(SHAPES), rng.choice(COLORS), size, x, y, radius))
        pairs = [(a, b) for i, a in enumerate(shapes) for b in shapes[:i]]
        if all(abs(a.x - b.x) >= MIN_GAP and _apart(a, b) for a, b in pairs):
            shapes.sort(key=lambda shape: shape.x)
            return Scene(tuple(shapes), rng.randrange(2**32))


def _apart(a: Shape, b: Shape) -> bool:
    return math.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius + 3


def _jitter(color: str, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, channel + rng.randint(-14, 14))) for channel in RGB[color])
    return red, green, blue


def _ground_color(scene: Scene, rng: random.Random) -> np.ndarray:
    used = [np.array(RGB[shape.color]) for shape in scene.shapes]
    while True:
        gray = rng.uniform(40, 235)
        color = np.clip(gray + np.array([rng.uniform(-30, 30) for _ in range(3)]), 0, 255)
        if all(np.abs(color - other).sum() > 130 for other in used):
            return color


def _ground(scene: Scene, rng: random.Random, side: int) -> Image.Image:
    first = _ground_color(scene, rng)
    pixels = np.broadcast_to(first, (side, side, 3)).astype(np.float32)
    if rng.random() < 0.35:
        ramp = np.linspace(0, 1, side, dtype=np.float32)
        ramp = ramp[:, None, None] if rng.random() < 0.5 else ramp[None, :, None]
        pixels = pixels + ramp * (_ground_color(scene, rng) - first).clip(-60, 60).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _outline(shape: Shape, scale: float, rng: random.Random) -> list[tuple[float, float]]:
    x, y, r = shape.x * scale, shape.y * scale, shape.radius * scale
    if shape.kind == "square":
        half = r * 0.86
        return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    turn = -math.pi / 2 + rng.uniform(-0.15, 0.15)
    corners = 3 if shape.kind == "triangle" else 10
    radii = [r, r * 0.42] if shape.kind == "star" else [r]
    return [
        (
            x + radii[i % len(radii)] * math.cos(turn + 2 * math.pi * i / corners),
            y + radii[i % len(radii)] * math.sin(turn + 2 * math.pi * i / corners),
        )
        for i in range(corners)
    ]


def draw(scene: Scene, *, side: int = SIDE) -> Image.Image:
    """Draw the scene as an RGB picture of `side` px, antialiased or not, on a plain, gradient or noisy ground."""
    return draw_with_mask(scene, side=side)[0]


def draw_with_mask(scene: Scene, *, side: int = SIDE) -> tuple[Image.Image, Image.Image]:
    """Draw the scene, and the mask of its shapes: 255 inside, 0 outside, both of `side` px."""
    rng = random.Random(scene.look_seed)
    oversample = rng.choice((1, 2, 3))
    scale = side * oversample / SIDE
    image = _ground(scene, rng, side * oversample)
    mask = Image.new("L", image.size)
    canvas, mask_canvas = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    for shape in scene.shapes:
        fill = _jitter(shape.color, rng)
        if shape.kind == "circle":
            x, y, r = shape.x * scale, shape.y * scale, shape.radius * scale
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
            mask_canvas.ellipse((x - r, y - r, x + r, y + r), fill=255)
        else:
            outline = _outline(shape, scale, rng)
            canvas.polygon(outline, fill=fill)
            mask_canvas.polygon(outline, fill=255)
    if oversample > 1:
        image, mask = (drawn.resize((side, side), Image.Resampling.BOX) for drawn in (image, mask))
    if rng.random() < 0.35:
        noise = np.random.default_rng(rng.randrange(2**32)).normal(0, rng.uniform(2, 12), (side, side, 3))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    return image, mask


def description(scene: Scene) -> str:
    """Name every shape from left to right: `a big red circle and a little blue square`."""
    return " and ".join(f"a {shape.size} {shape.name}" for shape in scene.shapes)


def _describe(scene: Scene, rng: random.Random) -> Question:
    cells = tuple(cell for shape in scene.shapes for cell in (-1, -1, *[shape.cell] * 3))
    return Question("describe", rng.choice(DESCRIBE_QUESTIONS), description(scene), cells[1:])


def _count(scene: Scene, rng: random.Random) -> Question:
    kind, color = rng.choice(scene.shapes).kind, rng.choice(scene.shapes).color
    if rng.random() < 0.2:
        kind, color = rng.choice(SHAPES), rng.choice(COLORS)
    form = rng.randrange(3)
    if form == 0:
        return Question("count", "how many shapes are there", NUMBERS[len(scene.shapes)])
    if form == 1:
        total = sum(shape.kind == kind for shape in scene.shapes)
        return Question("count", f"how many {PLURALS[kind]} are there", NUMBERS[total])
    total = sum(shape.color == color for shape in scene.shapes)
    return Question("count", f"how many {color} shapes are there", NUMBERS[total])


def _color(scene: Scene, rng: random.Random) -> Question | None:
    shape = rng.choice(scene.shapes)
    if sum(other.kind == shape.kind for other in scene.shapes) == 1:
        name = shape.kind
    elif sum((other.kind, other.size) == (shape.kind, shape.size) for other in scene.shapes) == 1:
        name = f"{shape.size} {shape.kind}"
    else:
        return None
    return Question("color", f"what color is the {name}", shape.color, (shape.cell,), ((shape.kind, shape.cell),))


def offset(shape: Shape, other: Shape, relation: str) -> float:
    """Return how many pixels `shape` lies in direction `relation` from `other` (negative: the other way)."""
    return {
        "left of": other.x - shape.x,
        "right of": shape.x - other.x,
        "above": other.y - shape.y,
        "below": shape.y - other.y,
    }[relation]


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    names = [shape.name for shape in scene.shapes]
    if len(scene.shapes) < 2:
        return None
    shape, other = rng.sample(scene.shapes, 2)
    relation = rng.choice(RELATIONS)
    if names.count(other.name) > 1 or names.count(shape.name) > 1:
        return None
    if rng.random() < 0.5:
        near = [s for s in scene.shapes if s is not other and offset(s, other, relation) > -8]
        if near != [shape] or offset(shape, other, relation) < MIN_GAP:
            return None
        cells = (-1, shape.cell, shape.cell)
        text = f"what is {relation} the {other.name}"
        return Question("relation", text, f"a {shape.name}", cells, ((other.kind, other.cell),))
    return _compare(shape, other, rng.choice((("left of", "right of"), ("above", "below"))))


def _compare(shape: Shape, other: Shape, axis: tuple[str, str]) -> Question | None:
    if abs(offset(shape, other, axis[0])) < MIN_GAP:
        return None
    answer = axis[0] if offset(shape, other, axis[0]) > 0 else axis[1]
    text = f"is the {shape.name} {axis[0].removesuffix(' of')} or {axis[1]} the {other.name}"
    named = ((shape.kind, shape.cell), (other.kind, other.cell))
    return Question("relation", text, answer.removesuffix(" of"), named=named)


def _height(scene: Scene, rng: random.Random) -> Question | None:
    names = [shape.name for shape in scene.shapes]
    pairs = [(a, b) for a in scene.shapes for b in scene.shapes if names.count(a.name) == names.count(b.name) == 1]
    shape, other = rng.choice(pairs) if pairs else (scene.shapes[0], scene.shapes[0])
    return _compare(shape, other, ("above", "below"))


_MAKERS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "describe": _describe,
    "count": _count,
    "color": _color,
    "relation": _relation,
    "height": _height,  # not a separate task: a relation that needs more training than the others
}


def ask(scene: Scene, task: str, rng: random.Random) -> Question | None:
    """Ask a question of `task` about the scene, or return None after a few tries that had no clear answer."""
    for _ in range(4):
        question = _MAKERS[task](scene, rng)
        if question is not None:
            return question
    return None


def sample_picture_question(rng: random.Random, task: str | None = None) -> tuple[Scene, Question]:
    """Draw a scene and a question about it, of a given task or of a random one."""
    while True:
        scene = sample_scene(rng)
        question = ask(scene, task or rng.choice(TASKS), rng)
        if question is not None:
            return scene, question


def sample_spoken_question(rng: random.Random, *, held_out: bool) -> str:
    """Draw the text of a count, color or relation question from the training or the held-out split."""
    while True:
        text = sample_picture_question(rng, rng.choice(TASKS[1:]))[1].text
        if is_held_out(text) == held_out:
            return text


def _named(scene: Scene, words: list[str]) -> list[Shape]:
    """Return the shapes that a phrase such as `big circle` or `red star` fits."""
    return [s for s in scene.shapes if all(word in (s.size, s.color, s.kind) for word in words)]


def _answer_relation(scene: Scene, text: str) -> str | None:
    if text.startswith("what is"):
        relation = next(r for r in RELATIONS if f"is {r} the" in text)
        others = _named(scene, text.split(" the ")[1].split())
        if len(others) != 1:
            return None
        near = [s for s in scene.shapes if s is not others[0] and offset(s, others[0], relation) > -8]
        unique = len(near) == 1 and len(_named(scene, near[0].name.split())) == 1
        clear = unique and offset(near[0], others[0], relation) >= MIN_GAP
        return f"a {near[0].name}" if clear else None
    words = text.split()
    first, second = _named(scene, words[2:4]), _named(scene, words[-2:])
    if len(first) != 1 or len(second) != 1:
        return None
    axis = ("left of", "right of") if "left or right" in text else ("above", "below")
    distance = offset(first[0], second[0], axis[0])
    if abs(distance) < MIN_GAP:
        return None
    return axis[0 if distance > 0 else 1].removesuffix(" of")


def answer(scene: Scene, text: str) -> str | None:
    """Answer a count, color or relation question about a scene, or return None where no answer is clear."""
    words = text.split()
    if text.startswith("how many"):
        singular = {"shapes": [], **{plural: [kind] for kind, plural in PLURALS.items()}}
        wanted = [part for word in words[2:-2] for part in singular.get(word, [word])]
        return NUMBERS[len(_named(scene, wanted))]
    if text.startswith("what color"):
        shapes = _named(scene, words[4:])
        return shapes[0].color if len(shapes) == 1 else None
    return _answer_relation(scene, text)


def _with_names(scene: Scene, text: str, rng: random.Random) -> Scene:
    """Rename shapes at random so that those the question names are there."""
    words = text.split()
    pairs = [(a, b) for a, b in zip(words, words[1:], strict=False) if a in COLORS and b in SHAPES]
    shapes = list(scene.shapes)
    for index, (color, kind) in zip(rng.sample(range(len(shapes)), min(len(shapes), len(pairs))), pairs, strict=False):
        shapes[index] = replace(shapes[index], color=color, kind=kind)
    if words[1] == "many" and rng.random() < 0.7:
        for index in rng.sample(range(len(shapes)), rng.randint(1, len(shapes))):
            color = next((w for w in words if w in COLORS), shapes[index].color)
            kind = next((kind for kind, plural in PLURALS.items() if plural in words), shapes[index].kind)
            shapes[index] = replace(shapes[index], color=color, kind=kind)
    return replace(scene, shapes=tuple(shapes))


def scene_for(text: str, rng: random.Random) -> tuple[Scene, str]:
    """Draw a scene in which the question has a clear answer, and return both."""
    while True:
        scene = _with_names(sample_scene(rng), text, rng)
        found = answer(scene, text)
        if found is not None:
            return scene, found
