"""VQA accuracy as the official VQA evaluation computes it, and GQA exact match.

VQA accuracy (Antol et al. 2015; Goyal et al. 2017): a prediction scores min(1, matches / 3) against the answers of the
other annotators, averaged over leaving each annotator out. With ten annotators 1, 2, 3, 4 matches give 30, 60, 90, 100.
The official evaluation normalises in ways that matter, kept here:

- both sides are normalised only where the annotators do not all agree. Where they do, only line breaks, tabs and outer
  spaces go: against ten times `red`, neither `Red` nor `red.` scores. So a model's answers should be brought to the
  form of the annotators' (short, lower case, no final period) before they are scored;
- a punctuation mark becomes a space, or nothing where it touches a space anywhere in the answer or where the answer
  has a comma between digits; apostrophes, colons, `&`, `%` and `$` stay;
- periods go unless a digit follows, and at most 32 of them;
- `none` counts as `0`; contractions get their apostrophe back, after lower-casing, so `im` stays `im`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
_NUMBER_WORDS = {"none": "0"} | {
    word: str(value)
    for value, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
_ARTICLES = frozenset(["a", "an", "the"])
_FULL_CREDIT_MATCHES = 3
_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've
who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_TWO_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've you'd've
"""


def _with_apostrophe() -> dict[str, str]:
    """The official table: words that lost an apostrophe, and what they become.

    Its entries with a capital I are left out: words are lower-cased before the look-up and never reach them.
    """
    table = {restored.replace("'", ""): restored for restored in _ONE_APOSTROPHE.split()}
    # Two apostrophes: one of them may be there already.
    for restored in _TWO_APOSTROPHES.split():
        start, middle, end = restored.split("'")
        table[f"{start}{middle}'{end}"] = restored
        table[f"{start}'{middle}{end}"] = restored
    # The table takes this one apostrophe away.
    table["somebody'd"] = "somebodyd"
    table |= dict.fromkeys(["ow's'at", "'ows'at", "'ow'sat"], "'ow's'at")
    table |= dict.fromkeys(["yall'll", "y'allll"], "y'all'll")
    table |= dict.fromkeys(["yall'd've", "y'alld've", "y'all'dve"], "y'all'd've")
    return table


_CONTRACTIONS = _with_apostrophe()


def strip_punctuation(text: str) -> str:
    """The first half of the official normalisation: marks and periods, letters untouched."""
    delete_all = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _MARKS:
        touches_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if touches_space or delete_all else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def normalise_answer(text: str) -> str:
    """An answer as the official VQA evaluation compares it where annotators differ.

    Punctuation goes, words are lower-cased, articles go, number words become digits, contractions are mended.

    Raises TypeError if `text` is not a string.
    """
    if not isinstance(text, str):
        raise TypeError(f"text: expected a string, got {type(text).__name__}; convert answers to strings first")
    words = (_NUMBER_WORDS.get(word, word) for word in strip_punctuation(_one_line(text)).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def question_accuracy(answers: Sequence[str], prediction: str) -> float:
    """Accuracy of one prediction against one question's answers, 0 to 1.

    Two or more answers: the official rule, except that full credit needs min(3, other annotators) matches, so that
    with two or three annotators complete agreement still scores 1; from four answers on this changes nothing.
    One answer, which the official rule cannot score: 1 if both sides are equal after full normalisation, else 0.

    Raises ValueError if there are no answers.
    """
    if not answers:
        raise ValueError("answers: expected at least one, got none; drop the question")
    if len(answers) == 1:
        return float(normalise_answer(prediction) == normalise_answer(answers[0]))
    predicted, compared = _one_line(prediction), [_one_line(answer) for answer in answers]
    if len(set(compared)) > 1:
        predicted, compared = normalise_answer(predicted), [normalise_answer(answer) for answer in compared]
    matching = sum(answer == predicted for answer in compared)
    needed = min(_FULL_CREDIT_MATCHES, len(answers) - 1)
    left_out_matches = min(1.0, max(0, matching - 1) / needed)
    left_out_others = min(1.0, matching / needed)
    return (matching * left_out_matches + (len(answers) - matching) * left_out_others) / len(answers)


def vqa_accuracy(annotations: Iterable[Mapping[str, Any]], predictions: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """VQA accuracy in percent: {"overall": float, "per_question": {question_id: float}}, not rounded.

    annotations: {"question_id", "answers": [{"answer": str}, ...]} each, as in the official files; other keys are
    ignored. predictions: {"question_id", "answer": str} each, one for every annotated question.
    How fewer than ten answers are scored: see `question_accuracy`.

    Raises ValueError for missing keys, repeated, missing or extra questions, or an empty set.
    """
    answers = {}
    for position, entry in enumerate(annotations):
        question = _key(entry, "question_id", "annotations", position)
        if question in answers:
            raise ValueError(f"annotations: question_id {question!r} occurs twice; keep one")
        listed = _key(entry, "answers", "annotations", position)
        if isinstance(listed, str) or not isinstance(listed, Sequence) or not listed:
            raise ValueError(
                f"annotations[{position}] (question_id {question!r}): expected a list of answers with at least one "
                f'{{"answer": ...}}, got {_short(listed)}; drop the question or mend the file'
            )
        name = f"annotations[{position}].answers"
        answers[question] = [_text(one, "answer", name, at) for at, one in enumerate(listed)]
    predicted = _by_question(predictions)
    _check_same_questions(answers, predicted)
    per_question = {q: 100.0 * question_accuracy(listed, predicted[q]) for q, listed in answers.items()}
    return {"overall": math.fsum(per_question.values()) / len(per_question), "per_question": per_question}


def gqa_accuracy(
    questions: Mapping[str, str | Mapping[str, Any]], predictions: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """GQA accuracy in percent: {"overall": float, "per_question": {question id: float}}, by exact match.

    questions: question id -> its answer, or the official entry with an "answer" (testdev_balanced_questions.json).
    predictions: {"questionId" or "question_id", "prediction" or "answer"} each, one for every question.
    GQA's evaluation compares strings as they are. Here both sides first lose outer spaces, capital letters and a final
    period, which is how free-form models are scored; for answers written as GQA's are, that is the official number.

    Raises ValueError for missing keys, repeated, missing or extra questions, or an empty set.
    """
    answers = {}
    for question, entry in questions.items():
        answer = entry.get("answer") if isinstance(entry, Mapping) else entry
        if not isinstance(answer, str):
            raise ValueError(f"questions[{question!r}]: expected an answer string, got {_short(answer)}; mend the file")
        answers[question] = answer
    predicted = _by_question(_gqa_renamed(entry) for entry in predictions)
    _check_same_questions(answers, predicted)
    per_question = {q: 100.0 * (_plain(predicted[q]) == _plain(answer)) for q, answer in answers.items()}
    return {"overall": math.fsum(per_question.values()) / len(per_question), "per_question": per_question}


def _gqa_renamed(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    names = {"questionId": "question_id", "prediction": "answer"}
    return {names.get(key, key): value for key, value in entry.items()} if isinstance(entry, Mapping) else entry


def _plain(answer: str) -> str:
    return answer.strip().lower().removesuffix(".").rstrip()


def _by_question(predictions: Iterable[Mapping[str, Any]]) -> dict[Any, str]:
    predicted: dict[Any, str] = {}
    for position, entry in enumerate(predictions):
        question = _key(entry, "question_id", "predictions", position)
        if question in predicted:
            raise ValueError(f"predictions: question_id {question!r} occurs twice; keep one")
        predicted[question] = _text(entry, "answer", "predictions", position)
    return predicted


def _check_same_questions(answers: Mapping[Any, Any], predicted: Mapping[Any, str]) -> None:
    missing = [question for question in answers if question not in predicted]
    if missing:
        raise ValueError(
            f"predictions: {len(missing)} of {len(answers)} questions have no answer, the first is {missing[0]!r}; "
            "predict them (an empty string counts as wrong) or score a subset of the questions"
        )
    extra = [question for question in predicted if question not in answers]
    if extra:
        raise ValueError(
            f"predictions: {len(extra)} answer questions that are not in the set, the first is {extra[0]!r}; "
            "drop them, and check that the ids have the same type"
        )
    if not answers:
        raise ValueError("annotations: expected at least one question, got an empty set; nothing can be scored")


def _key(entry: Mapping[str, Any], key: str, name: str, position: int) -> Any:
    if not isinstance(entry, Mapping) or key not in entry:
        raise ValueError(f"{name}[{position}]: expected an object with the key {key!r}, got {_short(entry)}; mend it")
    return entry[key]


def _text(entry: Mapping[str, Any], key: str, name: str, position: int) -> str:
    value = _key(entry, key, name, position)
    if not isinstance(value, str):
        raise ValueError(
            f"{name}[{position}][{key!r}]: expected a string, got {_short(value)} "
            f"({type(value).__name__}); write it as text"
        )
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
