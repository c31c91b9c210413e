"""Drawn scenes, questions about them, and which answers are right.

Enters: a random generator. Leaves: `Scene`s, one to four things of different shapes and colours in the places of a
three by three grid, each drawn at a size, an outline and a shift of its own; questions with the one right answer to
each. A scene's part is chosen by a hash of its caption, so a scene that is held out here is held out on every machine.

Run it to draw a held-out scene: `python scenes.py scene.png`.
"""

import hashlib
import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (38, 84, 220),
    "yellow": (242, 204, 32),
    "purple": (140, 60, 180),
    "black": (24, 24, 28),
}
PLACES = (
    *("in the upper left", "at the top", "in the upper right"),
    *("on the left", "in the middle", "on the right"),
    *("in the lower left", "at the bottom", "in the lower right"),
)
NUMBERS = ("None", "One", "Two", "Three", "Four")
DESCRIBE = ("What is this?", "Describe the image.", "What do you see?")
KINDS = ("caption", "count", "colour", "what", "where")

HELD_OUT_SHARE = 16
"""One scene in this many is never trained on."""


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape with a colour, in one of the nine places."""

    shape: str
    colour: str
    place: int

    @property
    def name(self) -> str:
        """As a caption calls it."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a scene, its kind, and the one right answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in the order in which they are read, no two of them alike."""

    things: tuple[Thing, ...]

    @property
    def caption(self) -> str:
        """All things and their places, in a sentence."""
        named = [f"a {thing.name} {PLACES[thing.place]}" for thing in self.things]
        return _sentence(" and ".join(filter(None, (", ".join(named[:-1]), named[-1]))))

    @property
    def is_held_out(self) -> bool:
        """Whether the scene is kept for measuring, by its caption alone."""
        return int.from_bytes(hashlib.sha256(self.caption.encode()).digest()[:4], "big") % HELD_OUT_SHARE == 0

    def draw(self, width: int, height: int, rng: random.Random) -> Image.Image:
        """Draws the scene on paper of some light shade; the generator moves, sizes and tints its things."""
        shade = rng.randint(215, 255)
        image = Image.new("RGB", (width, height), tuple(min(255, shade + rng.randint(-6, 6)) for _ in range(3)))
        pen = ImageDraw.Draw(image)
        for thing in self.things:
            row, column = divmod(thing.place, 3)
            radius = min(width, height) / 6 * rng.uniform(0.68, 0.92)
            x = (column + 0.5 + rng.uniform(-0.07, 0.07)) * width / 3
            y = (row + 0.5 + rng.uniform(-0.07, 0.07)) * height / 3
            tint = tuple(max(0, min(255, value + rng.randint(-12, 12))) for value in COLOURS[thing.colour])
            _draw_shape(pen, thing.shape, x, y, radius, tint)
        return image

    def questions(self) -> Iterator[Question]:
        """Every question that has one right answer."""
        for text in DESCRIBE:
            yield Question("caption", text, self.caption)
        yield Question("count", "How many things are there?", f"{NUMBERS[len(self.things)]}.")
        for shape in SHAPES:
            same = [thing for thing in self.things if thing.shape == shape]
            yield Question(
                "count", f"How many {shape}{'e' * shape.endswith('s')}s are there?", f"{NUMBERS[len(same)]}."
            )
            if len(same) == 1:
                yield Question("colour", f"What colour is the {shape}?", _sentence(same[0].colour))
                yield Question("where", f"Where is the {shape}?", _sentence(PLACES[same[0].place]))
        for thing in self.things:
            yield Question("what", f"What is {PLACES[thing.place]}?", f"A {thing.name}.")
            yield Question("where", f"Where is the {thing.name}?", _sentence(PLACES[thing.place]))


def random_scene(rng: random.Random, *, held_out: bool) -> Scene:
    """A scene of one to four things, of the part asked for."""
    names = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    while True:
        count = rng.randint(1, 4)
        places = sorted(rng.sample(range(len(PLACES)), count))
        scene = Scene(tuple(Thing(*name, place) for name, place in zip(rng.sample(names, count), places, strict=True)))
        if scene.is_held_out == held_out:
            return scene


def random_size(rng: random.Random) -> tuple[int, int]:
    """Width and height of a drawing: most are square, some twice as wide or high, which are cut into tiles."""
    side = rng.choice((48, 64, 64, 128))
    return rng.choice(((side, side),) * 4 + ((2 * side, side), (side, 2 * side)))


def random_questions(scene: Scene, count: int, rng: random.Random) -> list[Question]:
    """Questions about a scene, each of a kind drawn first, so that the kinds are asked alike often."""
    by_kind: dict[str, list[Question]] = {}
    for question in scene.questions():
        by_kind.setdefault(question.kind, []).append(question)
    return [rng.choice(by_kind[kind]) for kind in rng.choices(sorted(by_kind), k=count)]


def held_out_questions(count: int, seed: int = 0) -> list[tuple[Image.Image, Question]]:
    """Held-out scenes drawn, each with one question about it, the kinds in turn."""
    rng, asked = random.Random(seed), []
    while len(asked) < count:
        scene = random_scene(rng, held_out=True)
        image, kind = scene.draw(*random_size(rng), rng), KINDS[len(asked) % len(KINDS)]
        if of_kind := [question for question in scene.questions() if question.kind == kind]:
            asked.append((image, rng.choice(of_kind)))
    return asked


def write_conversations(folder: Path, scenes: int, seed: int = 1) -> Path:
    """Writes drawings of scenes to be trained on, and a JSONL file of a conversation about each; returns that file."""
    rng, lines = random.Random(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(scenes):
        scene, name = random_scene(rng, held_out=False), f"scene-{number}.png"
        scene.draw(*random_size(rng), rng).save(folder / name)
        messages = []
        for question in random_questions(scene, 3, rng):
            messages += [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}]
        lines.append(json.dumps({"messages": messages, "images": [name]}) + "\n")
    path = folder / "conversations.jsonl"
    path.write_text("".join(lines), "utf-8")
    return path


def is_right(answer: str, question: Question) -> bool:
    """Whether an answer is the right one, word for word."""
    return answer.strip() == question.answer


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: tuple[int, ...]
) -> None:
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "square":
        side = radius * 0.88
        pen.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    elif shape == "triangle":
        corners = [(x + radius * math.sin(turn), y - radius * math.cos(turn)) for turn in (0, 2.094, 4.189)]
        pen.polygon(corners, fill=colour)
    else:
        arm = radius * 0.32
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


def draw_one(path: Path) -> Scene:
    """Draws a held-out scene of three things into a file."""
    rng = random.Random(12)
    scene = random_scene(rng, held_out=True)
    scene.draw(192, 192, rng).save(path)
    return scene


if __name__ == "__main__":
    print(draw_one(Path(sys.argv[1])).caption)
