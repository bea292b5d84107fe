"""The miniature world: its captions state their scene, its files are COCO's and VQA's, and equal seeds give equal worlds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from vpgtrans.engine.data.coco import read_captions, read_questions
from vpgtrans.engine.data.scenes import (
    Scene,
    attributes_right,
    caption,
    parse_caption,
    questions,
    random_scene,
    render,
    write_world,
)


def test_every_caption_states_its_scene():
    rng = np.random.default_rng(0)
    told = set()
    for _ in range(2000):
        scene = random_scene(rng)
        text = caption(scene, rng)
        told.add(text.split()[0])
        assert parse_caption(text) == scene, text
    assert {"a", "on", "there"} <= told


@pytest.mark.parametrize("change", ["size", "colour", "shape", "relation", "landmark", "background"])
def test_each_wrong_attribute_is_wrong(change):
    other = {
        "size": "large",
        "colour": "blue",
        "shape": "star",
        "relation": "right",
        "landmark": "bar",
        "background": "black",
    }
    scene = Scene("small", "red", "circle", "left", "ring", "white")
    rng = np.random.default_rng(1)
    wrong = Scene(**{**scene.__dict__, change: other[change]})
    for _ in range(20):
        assert attributes_right(caption(scene, rng), [caption(scene, rng)])
        assert not attributes_right(caption(wrong, rng), [caption(scene, rng)])


@pytest.mark.parametrize(
    "text", ["", "a red circle", "a small red circle on white", "a small red circle left of a ring on white on black"]
)
def test_incomplete_captions_state_nothing(text):
    assert parse_caption(text) is None
    assert not attributes_right(text, ["a small red circle left of a ring on white"])


def test_attributes_of_other_data_are_refused():
    with pytest.raises(ValueError, match="miniature-world captions"):
        attributes_right("a dog", ["a dog runs"])


def test_questions_have_the_right_answers():
    scene = Scene("small", "red", "circle", "left", "ring", "white")
    asked = dict(questions(scene, np.random.default_rng(0), count=99))
    assert asked["what colour is the circle?"] == "red"
    assert asked["is the circle left of the ring?"] == "yes"
    assert asked["is the ring left of the circle?"] == "no"
    assert asked["what is beside the circle?"] == "ring"


def test_a_rendered_thing_has_its_colour_where_the_relation_puts_it():
    for relation, half in (
        ("left", np.s_[:, :36]),
        ("right", np.s_[:, 36:]),
        ("above", np.s_[:36]),
        ("below", np.s_[36:]),
    ):
        picture = np.asarray(
            render(Scene("large", "blue", "circle", relation, "ring", "white"), np.random.default_rng(3))
        ).astype(int)
        bluish = (picture[..., 2] - picture[..., 0] > 100).astype(int)
        assert bluish[half].sum() > 0.9 * bluish.sum() > 150


def test_files_are_what_the_readers_expect(tmp_path):
    counts = write_world(tmp_path / "a", train=3, source=2, val=4, text=5, seed=9)
    write_world(tmp_path / "b", train=3, source=2, val=4, text=5, seed=9)
    assert counts == {"train": 3, "source": 2, "val": 4, "text": 5}
    for split in ("train", "source", "val"):
        found = read_captions(
            tmp_path / "a" / f"captions_{split}.json", tmp_path / "a" / "images", verify_images="full"
        )
        assert [len(r.captions) for r in found.records] == [5] * counts[split] and not found.refused.named
    asked = read_questions(tmp_path / "a" / "questions_val.json", tmp_path / "a" / "answers_val.json").records
    assert len(asked) == 12 and all(len(q.answers) == 10 for q in asked)
    for path in (tmp_path / "a").rglob("*.j*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    assert Image.open(next((tmp_path / "a" / "images").iterdir())).size == (72, 72)
    read = (json.loads((tmp_path / "a" / f"captions_{split}.json").read_text()) for split in counts)
    ids = [{image["id"] for image in told["images"]} for told in read]
    assert sum(len(i) for i in ids) == len(set().union(*ids))
