"""Caption and question clean-up against BLIP-2's rules, written down as regular expressions."""

from __future__ import annotations

import random
import re

import pytest

from vpgtrans.engine.data.captions import preprocess_caption, preprocess_question

MARKS = r'[.!"()*#:;~]'


def caption_by_rules(text: str, max_words: int = 50) -> str:
    text = re.sub(r"\s{2,}", " ", re.sub(MARKS, " ", text.lower())).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A dog runs.", "a dog runs"),
        ('  "Two" MEN (standing): on #1 ~street*; ok!  ', "two men standing on 1 street ok"),
        ("a twin-hulled boat, isn't it?", "a twin-hulled boat, isn't it?"),
        ("a.b", "a b"),
        ("a dog\n", "a dog"),
        ("a dog . \n\n", "a dog"),
        ("line one\nline two\tend", "line one line two end"),
        ("Ein Café, 東京 – ÉTÉ", "ein café, 東京 – été"),
        ("...!!", ""),
        ("", ""),
        (" \n\t ", ""),
    ],
)
def test_caption(raw: str, clean: str) -> None:
    assert preprocess_caption(raw) == clean


def test_caption_follows_the_rules_on_random_text() -> None:
    rng = random.Random(0)
    alphabet = "abC .!\"()*#:;~,-'?&/é"
    for _ in range(2000):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(60)))
        text += rng.choice(["", "\n", " \n"])
        assert preprocess_caption(text, 7) == caption_by_rules(text, 7), ascii(text)


def test_caption_is_cut_to_max_words() -> None:
    words = [f"w{index}" for index in range(80)]
    assert preprocess_caption(" ".join(words)) == " ".join(words[:50])
    assert preprocess_caption(" . ".join(words), max_words=3) == "w0 w1 w2"
    assert preprocess_caption(" ".join(words[:50])) == " ".join(words[:50])


def test_clean_captions_stay_as_they_are() -> None:
    once = preprocess_caption('A  "Dog"; with #2 balls.\n')
    assert preprocess_caption(once) == once


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("What is this?", "what is this?"),
        ('Is "it" U.S.A. or (maybe) No.1: ok; #3*~!?', "is it usa or maybe no1 ok 3?"),
        ("  how   many\n", "how many"),
        ("a.b", "ab"),
    ],
)
def test_question_marks_are_deleted_not_spaced(raw: str, clean: str) -> None:
    assert preprocess_question(raw) == clean
    assert len(preprocess_question("why " * 90).split()) == 50


@pytest.mark.parametrize("function", [preprocess_caption, preprocess_question])
@pytest.mark.parametrize("value", [None, 3, b"bytes", ["a"]])
def test_other_types_are_refused_by_name(function, value) -> None:
    with pytest.raises(TypeError, match=f"text: expected a string, got {type(value).__name__}"):
        function(value)
    with pytest.raises(ValueError, match="max_words: expected 1 or more, got 0"):
        function("a", 0)
