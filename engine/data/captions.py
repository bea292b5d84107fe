"""Text clean-up of captions and questions, as BLIP-2's processors do it.

Lower case; each of `. ! " ( ) * # : ; ~` becomes a space in a caption and is deleted in a question; runs of white
space fold into one space; the ends are stripped; at most 50 words stay. One difference from the reference: there a
single tab or line break inside a text stays, here it becomes a space, because a line break ends a caption for the LLM.
"""

from __future__ import annotations

_MARKS = '.!"()*#:;~'
_MARKS_TO_SPACES = str.maketrans(dict.fromkeys(_MARKS, " "))
_MARKS_DELETED = str.maketrans(dict.fromkeys(_MARKS))


def preprocess_caption(text: str, max_words: int = 50) -> str:
    """The caption a model is trained on; the empty string where nothing is left.

    Raises:
        TypeError: text is not a string. ValueError: max_words below 1.
    """
    return _first_words(text, _MARKS_TO_SPACES, max_words)


def preprocess_question(text: str, max_words: int = 50) -> str:
    """The question as it goes into the prompt; the question mark stays.

    Raises:
        TypeError: text is not a string. ValueError: max_words below 1.
    """
    return _first_words(text, _MARKS_DELETED, max_words)


def _first_words(text: str, marks: dict[int, str | None], max_words: int) -> str:
    if not isinstance(text, str):
        raise TypeError(f"text: expected a string, got {type(text).__name__}; convert or drop it when reading the data")
    if max_words < 1:
        raise ValueError(f"max_words: expected 1 or more, got {max_words}; 50 is the reference's value")
    return " ".join(text.lower().translate(marks).split()[:max_words])
