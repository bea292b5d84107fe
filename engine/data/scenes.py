"""The miniature world: rendered scenes of a coloured shape and a landmark, their captions and questions, written as a user's own data would be.

A scene is a thing (size, colour, shape) in a spatial relation to a brown landmark on a background.  Every caption states all of it in one of
many paraphrases, so a caption can be parsed back and judged attribute by attribute.  On disk it is COCO: JPEG files, a captions file and
official-format VQA files for each split, and captions without images for training language models.

    vpgtrans scenes OUT --train 6000 --source 6000 --val 500 --text 16000
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 205, 40),
    "purple": (130, 50, 160),
    "orange": (245, 130, 30),
    "cyan": (60, 200, 215),
    "pink": (245, 130, 180),
}
SHAPES = ("circle", "square", "triangle", "star")
LANDMARKS = ("ring", "cross", "diamond", "bar")
BROWN = (150, 95, 50)
SIZES = ("small", "large")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (25, 25, 25),
    "grey": (135, 135, 135),
}
RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "on top of"),
    "below": ("below", "under"),
}

_THING = re.compile(rf"\b({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_LANDMARK = re.compile(rf"\b({'|'.join(LANDMARKS)})\b")
_BACKGROUND = re.compile(rf"\bon (?:a )?({'|'.join(BACKGROUNDS)})\b")
_RELATION = re.compile(r"\b(left of|right of|above|on top of|below|under)\b")
_RELATION_OF = {
    "left of": "left",
    "right of": "right",
    "above": "above",
    "on top of": "above",
    "below": "below",
    "under": "below",
}


@dataclass(frozen=True)
class Scene:
    """A thing of `size`, `colour` and `shape` that is `relation` of a brown `landmark`, on `background`."""

    size: str
    colour: str
    shape: str
    relation: str
    landmark: str
    background: str


def random_scene(rng: np.random.Generator) -> Scene:
    """Every attribute drawn on its own: 3,072 different scenes."""
    return Scene(
        _pick(rng, SIZES), _pick(rng, tuple(COLOURS)), _pick(rng, SHAPES), _pick(rng, tuple(RELATIONS)), _pick(rng, LANDMARKS),
        _pick(rng, tuple(BACKGROUNDS)),
    )  # fmt: skip


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many paraphrases that state every attribute of the scene."""
    first, second = f"a {scene.size} {scene.colour} {scene.shape}", f"a {scene.landmark}"
    stated, ground = _pick(rng, RELATIONS[scene.relation]), scene.background
    return _pick(
        rng,
        (
            f"{first} {stated} {second} on {ground}",
            f"{first} is {stated} {second} on {ground}",
            f"on {ground} {first} is {stated} {second}",
            f"there is {first} {stated} {second} on a {ground} background",
        ),
    )


def parse_caption(text: str) -> Scene | None:
    """The scene that a caption states; None when it does not state exactly one scene."""
    things, landmarks, relations, grounds = (
        found.findall(text) for found in (_THING, _LANDMARK, _RELATION, _BACKGROUND)
    )
    if any(len(found) != 1 for found in (things, landmarks, relations, grounds)):
        return None
    return Scene(*things[0], _RELATION_OF[relations[0]], landmarks[0], grounds[0])


def attributes_right(candidate: str, references: list[str]) -> bool:
    """Whether the caption states every attribute of the scene that its references describe.

    Raises ValueError when no reference can be parsed, which means that the data are not miniature-world scenes.
    """
    for reference in references:
        truth = parse_caption(reference)
        if truth is not None:
            return parse_caption(candidate) == truth
    raise ValueError(
        f"references: expected miniature-world captions, got {references[:1]!r}; score attributes only on scenes"
    )


def questions(scene: Scene, rng: np.random.Generator, count: int = 3) -> list[tuple[str, str]]:
    """Question-answer pairs with one right answer each (one word, as most of VQA's)."""
    side = RELATIONS[scene.relation][0]
    found = [
        ("what colour is the background?", scene.background),
        (f"what colour is the {scene.shape}?", scene.colour),
        (f"what size is the {scene.shape}?", scene.size),
        (f"what shape is the {scene.colour} thing?", scene.shape),
        (f"what is beside the {scene.shape}?", scene.landmark),
        (f"is the {scene.shape} {side} the {scene.landmark}?", "yes"),
        (f"is the {scene.landmark} {side} the {scene.shape}?", "no"),
    ]
    return [found[int(i)] for i in rng.permutation(len(found))[:count]]


def render(scene: Scene, rng: np.random.Generator, pixels: int = 72) -> Image.Image:
    """An RGB picture of the scene, `pixels` square, with jittered places, sizes and colours and a little noise."""
    scale = 3  # drawn three times larger and averaged down, so edges are smooth as in photographs
    side = pixels * scale
    ground = _rgb(np.array(BACKGROUNDS[scene.background]) + rng.integers(-12, 13, 3))
    canvas = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(canvas)
    # Places are the outer cells of a 3 x 3 grid, so that a tower with one patch a cell learns to see within a minute.
    place = {"left": (1 / 6, 0.5), "right": (5 / 6, 0.5), "above": (0.5, 1 / 6), "below": (0.5, 5 / 6)}[scene.relation]
    places = np.array([place, (1 - place[0], 1 - place[1])]) + rng.uniform(-0.02, 0.02, (2, 2))
    radius = rng.uniform(0.1, 0.112) if scene.size == "small" else rng.uniform(0.152, 0.164)
    drawn = ((scene.shape, COLOURS[scene.colour], radius), (scene.landmark, BROWN, rng.uniform(0.12, 0.135)))
    for (shape, colour, reach), (x, y) in zip(drawn, places, strict=True):
        _draw_shape(
            draw, shape, x * side, y * side, reach * side, _rgb(np.array(colour) + rng.integers(-14, 15, 3)), ground
        )
    small = np.asarray(canvas.resize((pixels, pixels), Image.Resampling.BOX), dtype=np.int16)
    noisy = small + rng.normal(0, 4, small.shape).astype(np.int16)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _rgb(values: np.ndarray) -> tuple[int, int, int]:
    r, g, b = (int(v) for v in np.clip(values, 0, 255))
    return r, g, b


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour, ground) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, fill=colour)
        draw.ellipse((x - 0.55 * r, y - 0.55 * r, x + 0.55 * r, y + 0.55 * r), fill=ground)
    elif shape == "square":
        draw.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=colour)
    elif shape == "cross":
        draw.rectangle((x - r, y - 0.34 * r, x + r, y + 0.34 * r), fill=colour)
        draw.rectangle((x - 0.34 * r, y - r, x + 0.34 * r, y + r), fill=colour)
    elif shape == "bar":
        draw.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=colour)
    elif shape == "diamond":
        draw.polygon([(x, y - r), (x + 0.7 * r, y), (x, y + r), (x - 0.7 * r, y)], fill=colour)
    else:
        draw.polygon(
            _corners(x, y, 1.08 * r, 3 if shape == "triangle" else 5, 1.0 if shape == "triangle" else 0.42), fill=colour
        )


def _corners(x: float, y: float, r: float, points: int, inner: float) -> list[tuple[float, float]]:
    """A regular polygon (inner 1) or a star whose notches reach `inner` of its radius; the first corner is on top."""
    count = points if inner == 1.0 else 2 * points
    reach = [r if inner == 1.0 or i % 2 == 0 else inner * r for i in range(count)]
    angles = [-np.pi / 2 + 2 * np.pi * i / count for i in range(count)]
    return [(x + d * np.cos(a), y + d * np.sin(a)) for d, a in zip(reach, angles, strict=True)]


def write_world(
    out: Path, *, train: int, source: int, val: int, text: int, pixels: int = 72, seed: int = 0
) -> dict[str, int]:
    """Write the world under `out`: `images/`, `captions_SPLIT.json`, `questions_SPLIT.json`, `answers_SPLIT.json`.

    Splits: `source` trains the source model, `train` the target arms, `val` judges them; `text` holds captions and questions of
    further scenes without images, the corpus of the language models.  The captions files are COCO's format, the questions official
    VQA's with ten equal answers.  Returns the number of images (or text scenes) of each split.  Complete files only: JSON is written last.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    first_id = 1
    counts = {"train": train, "source": source, "val": val, "text": text}
    for index, (split, count) in enumerate(counts.items()):
        rng = np.random.default_rng((seed, index))
        _write_split(out, split, count, first_id, rng, pixels)
        first_id += count
    return counts


def _write_split(out: Path, split: str, count: int, first_id: int, rng: np.random.Generator, pixels: int) -> None:
    images, captions, asked, answered = [], [], [], []
    for image_id in range(first_id, first_id + count):
        scene = random_scene(rng)
        name = f"scene_{image_id:06d}.jpg"
        if split != "text":
            render(scene, rng, pixels).save(out / "images" / name, quality=92)
        images.append({"id": image_id, "file_name": name, "width": pixels, "height": pixels})
        for _ in range(5):
            captions.append({"id": len(captions) + 1, "image_id": image_id, "caption": caption(scene, rng)})
        for question, answer in questions(scene, rng):
            question_id = image_id * 10 + len(asked) % 10
            asked.append({"question_id": question_id, "image_id": image_id, "image": name, "question": question})
            answers = [{"answer": answer, "answer_id": k + 1, "answer_confidence": "yes"} for k in range(10)]
            answered.append(
                {"question_id": question_id, "image_id": image_id, "multiple_choice_answer": answer, "answers": answers}
            )
    info = {"description": f"vpgtrans miniature world, {split} split"}
    _dump(out / f"captions_{split}.json", {"info": info, "images": images, "annotations": captions})
    _dump(out / f"questions_{split}.json", {"info": info, "questions": asked})
    _dump(out / f"answers_{split}.json", {"info": info, "annotations": answered})


def _dump(path: Path, value: object) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)
