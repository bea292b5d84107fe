"""Scores: tiny cases worked out by hand, and the official tools' own numbers where the fixtures are at hand."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from vpgtrans.engine.scoring.bleu_rouge import bleu, rouge_l
from vpgtrans.engine.scoring.cider import cider
from vpgtrans.engine.scoring.ptb_tokenizer import ptb_tokenize
from vpgtrans.engine.scoring.vqa import (
    gqa_accuracy,
    normalise_answer,
    question_accuracy,
    strip_punctuation,
    vqa_accuracy,
)

DATA = Path(os.environ.get("VPGTRANS_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
CAPTIONS = DATA / "metric_fixtures" / "coco_caption_fakecap"
ANSWERS = DATA / "metric_fixtures" / "okvqa_official_vqaeval"

needs_caption_fixtures = pytest.mark.skipif(not CAPTIONS.is_dir(), reason=f"official caption scores: no {CAPTIONS}")
needs_vqa_fixtures = pytest.mark.skipif(not ANSWERS.is_dir(), reason=f"official VQA scores: no {ANSWERS}")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# Tokens. The expectations are what `PTBTokenizer -preserveLines -lowerCase` 3.4.1 printed, less the dropped list.


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man, riding a Horse.", "a man riding a horse"),
        ("", ""),
        (" . , ?\t! ", ""),
        ("two\nlines\r\nof text", "two lines of text"),
        ("It's a dog's bowl; they can't won't don’t I'M", "it 's a dog 's bowl they ca n't wo n't do n't i 'm"),
        ("cannot gonna 'twas 'tissue", "can not gon na 't was 't issue"),
        ("rock'n'roll fish 'n chips y'all o'clock O'Brien", "rock 'n' roll fish 'n chips y' all o'clock o'brien"),
        ("dogs' 'quoted' \"double\" ``ticks''", "dogs quoted double ticks"),
        ("t-shirt a - b a--b -----", "t-shirt a b a b -----"),
        ("wait... what . . . ok…", "wait what ok"),
        ("what?! wow!! no.", "what ?! wow !! no"),
        ("(left) [x] {y}", "-lrb- left -rrb- -lsb- x -rsb- -lcb- y -rcb-"),
        ("R&B black&white AT&amp;T & salt&pepper", "r&b black & white at&t & salt & pepper"),
        ("plan b. St. Louis etc. no. 5 no. five foo., bar.", "plan b. st. louis etc. no. 5 no five foo. bar"),
        ("Vitamin C. The end", "vitamin c the end"),
        ("a u.s. T.V. set at 4:55pm, 10:30a.m.", "a u.s. t.v. set at 4:55 pm 10:30 a.m."),
        ("$5.00 50% #1 1,000 5'10\" -5 +3", "$ 5.00 50 % # 1 1,000 5 10 -5 +3"),
        ("1 1/2 cups", "1\xa01/2 cups"),
        ("fork/knife one/two/three/four w/", "fork/knife one/two/three / four w /"),
        ("see www.foo.com/bar or a@b.com, image.jpg", "see www.foo.com/bar or a@b.com, image.jpg"),
        ("wii:) <3 ^_^ ;D", "wii :-rrb- < 3 ^_^ ;d"),
        ('<b>bold</b> <a href="x y">', '<b> bold </b> <a\xa0href="x\xa0y">'),
        ("dvd_player _ a_ bathroom.with 747-400", "dvd_player _ a _ bathroom.with 747-400"),
        ("café ½ 90° £5 – “hi” 日本", "café 1/2 90 ° # 5 hi 日本"),
        ("smile \U0001f600 here", "smile here"),
    ],
)
def test_tokens_of_awkward_captions(caption: str, expected: str) -> None:
    assert " ".join(ptb_tokenize(caption)) == expected


def test_long_runs_of_marks_are_no_trap() -> None:
    # Each of these is a trap for a backtracking pattern: exponential ones would not end, quadratic ones take seconds.
    started = time.process_time()
    for trap in ("a." * 1000, "<a " * 1000, "x-" * 1000, "a'" * 1000, "1 " * 1000, "a@" * 1000, "(" * 2000):
        assert ptb_tokenize(trap)
    assert time.process_time() - started < 10


def test_tokenizer_refuses_what_is_not_text() -> None:
    with pytest.raises(TypeError, match="caption: expected a string, got NoneType"):
        ptb_tokenize(None)  # type: ignore[arg-type]


# CIDEr-D.


def test_cider_by_hand() -> None:
    # Two images: idf("a") = ln(2/2) = 0, idf of all else ln 2. Image 1 matches in n = 1 and 2 and has no longer n-gram:
    # 10 * (1 + 1 + 0 + 0) / 4. Image 2 shares only "a", which weighs nothing.
    mean, scores = cider({1: ["a cat"], 2: ["a dog"]}, {1: "a cat", 2: "a cat"})
    assert scores == pytest.approx({1: 5.0, 2: 0.0})
    assert mean == pytest.approx(2.5)


def test_cider_clips_counts_and_punishes_length() -> None:
    # n = 1: dot min(2, 1) * 1, norms 2 and sqrt(3), in units of idf; one bigram against two: exp(-1 / (2 * 36)).
    expected = 10 * (1 / (2 * math.sqrt(3))) / 4 * math.exp(-1 / 72)
    _, scores = cider({1: ["red cat sits"], 2: ["blue dog"]}, {1: "cat cat", 2: ""}, tokenized=True)
    assert scores == pytest.approx({1: expected, 2: 0.0}, abs=1e-12)


def test_cider_averages_over_references() -> None:
    # Against "red cat": cosines 1 and 1, so 5.0; against "one dog": 0.
    _, scores = cider({"x": ["red cat", "one dog"], "y": ["blue sky"]}, {"x": "red cat", "y": "blue sky"})
    assert scores == pytest.approx({"x": 2.5, "y": 5.0})


def test_cider_of_one_image_is_zero_because_its_idf_is() -> None:
    assert cider({1: ["a cat sits on a mat"]}, {1: "a cat sits on a mat"})[0] == 0.0


def test_cider_splits_tokens_at_no_break_spaces_as_the_official_tool_does() -> None:
    references = {1: ["1 1/2 cups"], 2: ["a dog"]}
    assert cider(references, {1: "1 1/2 cups", 2: "x"})[1][1] == pytest.approx(7.5)  # three n-gram orders match


@pytest.mark.parametrize("score", [cider, bleu, rouge_l])
@pytest.mark.parametrize(
    ("references", "candidates", "error", "message"),
    [
        ({}, {}, ValueError, "empty set"),
        ({1: ["a"], 2: ["b"]}, {1: "a"}, ValueError, r"candidates: 1 \(2\) of 2 images .* have no caption"),
        ({1: ["a"]}, {1: "a", 7: "b"}, ValueError, r"references: 1 \(7\) have a candidate but no references"),
        ({1: []}, {1: "a"}, ValueError, r"references\[1\]: expected at least one caption"),
        ({1: "a cat"}, {1: "a"}, TypeError, r"references\[1\]: expected a list of caption strings, got 'a cat'"),
        ({1: None}, {1: "a"}, TypeError, r"references\[1\]: expected a list of caption strings, got None"),
        ({1: ["a", 5]}, {1: "a"}, TypeError, r"references\[1\]: expected a list of caption strings"),
        ({1: ["a"]}, {1: ["a"]}, TypeError, r"candidates\[1\]: expected one caption string, got list"),
    ],
)
def test_caption_scores_refuse_bad_sets(
    score: Any, references: Any, candidates: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        score(references, candidates)


# BLEU and ROUGE-L.


def test_bleu_by_hand() -> None:
    # Unigrams: "the" counts twice at most, "cat" once, of 4; bigrams: "the cat", of 3; no trigram of 2.
    corpus, per_image = bleu({1: ["the cat sat on the mat"]}, {1: "the the the cat"})
    brevity = math.exp(1 - 6 / 4)
    assert corpus[0] == pytest.approx(3 / 4 * brevity, abs=1e-8)
    assert corpus[1] == pytest.approx(math.sqrt(3 / 4 * 1 / 3) * brevity, abs=1e-8)
    assert corpus[2] == pytest.approx((3 / 4 * 1 / 3 * 1e-15 / 2) ** (1 / 3) * brevity, rel=1e-6)
    assert per_image == {1: corpus}


def test_bleu_takes_the_closest_reference_length_and_the_shorter_of_two() -> None:
    # Length 4 lies between 3 and 5: 3 is taken, so there is no brevity penalty; with 5 alone there is one.
    tie = bleu({1: ["a b c", "a b c d e"]}, {1: "a b c d"})[0]
    assert tie[0] == pytest.approx(1.0, abs=1e-8)
    assert bleu({1: ["a b c d e"]}, {1: "a b c d"})[0][0] == pytest.approx(math.exp(1 - 5 / 4), abs=1e-8)


def test_bleu_of_a_set_sums_counts_instead_of_averaging() -> None:
    # 1 of 1 and 1 of 3 unigrams: 2 of 4, not the mean 2/3; lengths 4 and 4.
    corpus, per_image = bleu({1: ["a"], 2: ["a b c"]}, {1: "a", 2: "a x y"})
    assert corpus[0] == pytest.approx(2 / 4, abs=1e-8)
    assert [scores[0] for scores in per_image.values()] == pytest.approx([1.0, 1 / 3], abs=1e-8)


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence "a c": precision 2/4, recall 2/3.
    precision, recall, beta2 = 2 / 4, 2 / 3, 1.2**2
    expected = (1 + beta2) * precision * recall / (recall + beta2 * precision)
    assert rouge_l({1: ["a c e"]}, {1: "a b c d"}) == (pytest.approx(expected), {1: pytest.approx(expected)})
    assert rouge_l({1: ["x y"]}, {1: "a b"})[0] == 0.0
    assert rouge_l({1: ["b a"]}, {1: "a b"})[0] == pytest.approx(1 / 2)


def test_rouge_l_takes_best_precision_and_best_recall_from_different_references() -> None:
    # "a b c d e f" gives precision 2/2 (recall 2/6); "a" gives recall 1/1 (precision 1/2).
    assert rouge_l({1: ["a b c d e f", "a"]}, {1: "a b"})[0] == pytest.approx(1.0)


@pytest.mark.parametrize("score", [cider, bleu, rouge_l])
def test_an_empty_caption_scores_nothing_and_breaks_nothing(score: Any) -> None:
    total, per_image = score({1: ["a cat"], 2: ["a dog"]}, {1: "", 2: "..."})
    values = total if isinstance(total, tuple) else (total,)
    assert max(values) < 1e-6
    assert per_image.keys() == {1, 2}


# The official numbers of coco-caption.


@needs_caption_fixtures
def test_all_fixture_images_are_tokenised_as_the_official_tool_does() -> None:
    raw, tokenized = read(CAPTIONS / "raw.json"), read(CAPTIONS / "tokenized.json")
    equal = [
        image
        for image, captions in raw["references_raw"].items()
        if sorted(" ".join(ptb_tokenize(caption)) for caption in captions)
        == sorted(tokenized["references_tokenized"][image])
        and " ".join(ptb_tokenize(raw["candidates_raw"][image])) == tokenized["candidates_tokenized"][image]
    ]
    assert len(equal) == 1000


@needs_caption_fixtures
@pytest.mark.parametrize("form", ["tokenized", "raw"])
def test_caption_scores_equal_the_official_tools(form: str) -> None:
    captions = read(CAPTIONS / f"{form}.json")
    references, candidates = captions[f"references_{form}"], captions[f"candidates_{form}"]
    on_tokenized = read(CAPTIONS / "expected_on_tokenized.json")
    corpus = (read(CAPTIONS / "expected_on_raw_via_ptb.json") if form == "raw" else on_tokenized)["corpus"]
    per_image = on_tokenized["per_image"]

    found = {"CIDEr": cider(references, candidates, tokenized=form == "tokenized")}
    found["ROUGE_L"] = rouge_l(references, candidates, tokenized=form == "tokenized")
    bleu_corpus, bleu_images = bleu(references, candidates, tokenized=form == "tokenized")
    for order in range(4):
        found[f"Bleu_{order + 1}"] = bleu_corpus[order], {image: s[order] for image, s in bleu_images.items()}
    for name, (total, images) in found.items():
        assert total == pytest.approx(corpus[name], abs=1e-6), name
        assert images == pytest.approx(per_image[name], abs=1e-6), name
    assert found["CIDEr"][0] == pytest.approx(0.5997905185, abs=1e-6)


# VQA and GQA.


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The dog.", "dog"),
        ("an apple, a pear", "apple pear"),
        ("TWO dogs", "2 dogs"),
        ("None", "0"),
        ("rock-n-roll", "rock n roll"),
        ("yes/no", "yes no"),
        ("yes /no", "yes no"),
        ("yes / no", "yes no"),
        ("w/ a hat", "w hat"),  # a mark beside a space goes; elsewhere it becomes a space
        ("a-b, c", "b c"),  # "-" touches no space, so it splits, and "a" is an article
        ("1,000-2", "10002"),  # a comma between digits makes every mark vanish
        ("2.5", "2.5"),
        ("u.s.a.", "usa"),
        ("no.1", "no.1"),
        ("7:30 & $5 50%", "7:30 & $5 50%"),
        ("dont know whos", "don't know who's"),
        ("yall'll wed've somebody'd", "y'all'll we'd've somebodyd"),
        ("Im here", "im here"),  # the table's "Im" is never reached after lower-casing
        (" two\nlines\tlong ", "2 lines long"),
        ("." * 40, "." * 8),  # at most 32 periods go
        ("the", ""),
        ("", ""),
    ],
)
def test_answer_normalisation(answer: str, expected: str) -> None:
    assert normalise_answer(answer) == expected


def one_question(answers: list[str], prediction: str) -> float:
    result = vqa_accuracy(
        [{"question_id": 1, "answers": [{"answer": answer} for answer in answers], "question_type": "what"}],
        [{"question_id": 1, "answer": prediction}],
    )
    return result["overall"]


@pytest.mark.parametrize(
    ("matches", "percent"), [(0, 0.0), (1, 30.0), (2, 60.0), (3, 90.0), (4, 100.0), (9, 100.0), (10, 100.0)]
)
def test_vqa_accuracy_by_number_of_matches(matches: int, percent: float) -> None:
    # m of 10: leaving out one of the m leaves m - 1 matches, else m; each worth min(1, . / 3).
    answers = ["red"] * matches + [f"other {k}" for k in range(10 - matches)]
    assert one_question(answers, "red") == pytest.approx(percent)


def test_vqa_accuracy_normalises_only_where_annotators_differ() -> None:
    assert one_question(["red"] * 10, "Red.") == 0.0
    assert one_question(["red"] * 10, " red\n") == 100.0
    assert one_question(["red"] * 9 + ["pink"], "The Red.") == 100.0
    assert one_question(["Two cats"] * 9 + ["pink"], "2 cats") == 100.0


@pytest.mark.parametrize(
    ("answers", "prediction", "expected"),
    [
        (["Red."], "the red", 1.0),  # one answer: exact match after full normalisation
        (["red"], "blue", 0.0),
        (["red", "red"], "red", 1.0),  # complete agreement is always full credit
        (["red", "blue"], "red", 1 / 2),  # left out: 0 matches of 1 needed, then 1 of 1
        (["red", "red", "blue"], "red", (1 / 2 + 1 / 2 + 1) / 3),
        (["red", "red", "red", "blue"], "red", (2 / 3 * 3 + 1) / 4),  # from four on the official rule
    ],
)
def test_questions_with_fewer_answers(answers: list[str], prediction: str, expected: float) -> None:
    assert question_accuracy(answers, prediction) == pytest.approx(expected)


def test_vqa_accuracy_averages_questions_whatever_their_order() -> None:
    annotations = [{"question_id": q, "answers": [{"answer": "yes"}] * 10} for q in (1, 2, 3, 4)]
    predictions = [{"question_id": q, "answer": "yes" if q == 3 else "no"} for q in (4, 3, 2, 1)]
    assert vqa_accuracy(annotations, predictions) == {"overall": 25.0, "per_question": {1: 0, 2: 0, 3: 100, 4: 0}}


GOOD_ANNOTATION = {"question_id": 1, "answers": [{"answer": "yes"}]}
GOOD_PREDICTION = {"question_id": 1, "answer": "yes"}


@pytest.mark.parametrize(
    ("annotations", "predictions", "message"),
    [
        ([], [], "empty set"),
        ([GOOD_ANNOTATION], [], "1 of 1 questions have no answer, the first is 1"),
        ([GOOD_ANNOTATION], [GOOD_PREDICTION, {"question_id": "1", "answer": "x"}], "not in the set, the first is '1'"),
        ([GOOD_ANNOTATION] * 2, [GOOD_PREDICTION], "annotations: question_id 1 occurs twice"),
        ([GOOD_ANNOTATION], [GOOD_PREDICTION] * 2, "predictions: question_id 1 occurs twice"),
        ([{"question_id": 1}], [GOOD_PREDICTION], r"annotations\[0\]: expected an object with the key 'answers'"),
        ([{"question_id": 1, "answers": []}], [GOOD_PREDICTION], "at least one"),
        ([{"question_id": 1, "answers": "yes"}], [GOOD_PREDICTION], "expected a list of answers"),
        ([{"question_id": 1, "answers": ["yes"]}], [GOOD_PREDICTION], r"answers\[0\]: expected an object .* 'answer'"),
        ([GOOD_ANNOTATION], [{"question_id": 1, "answer": 3}], r"predictions\[0\]\['answer'\]: expected a str"),
        ([GOOD_ANNOTATION], ["yes"], r"predictions\[0\]: expected an object with the key 'question_id', got 'yes'"),
    ],
)
def test_vqa_accuracy_refuses_bad_files(annotations: Any, predictions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vqa_accuracy(annotations, predictions)


def test_vqa_functions_refuse_what_is_not_text() -> None:
    with pytest.raises(TypeError, match="text: expected a string, got int"):
        normalise_answer(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="answers: expected at least one"):
        question_accuracy([], "yes")


def test_gqa_accuracy_is_exact_match() -> None:
    questions = {"q1": {"answer": "yes", "imageId": "5"}, "q2": "left", "q3": "white", "q4": "dog"}
    predictions = [
        {"questionId": "q1", "prediction": "Yes."},
        {"questionId": "q2", "prediction": "right"},
        {"question_id": "q3", "answer": " white\n"},
        {"questionId": "q4", "prediction": "a dog"},
    ]
    result = gqa_accuracy(questions, predictions)
    assert result == {"overall": 50.0, "per_question": {"q1": 100.0, "q2": 0.0, "q3": 100.0, "q4": 0.0}}


@pytest.mark.parametrize(
    ("questions", "predictions", "message"),
    [
        ({}, [], "empty set"),
        ({"q": "yes"}, [], "1 of 1 questions have no answer"),
        ({"q": {"question": "?"}}, [{"questionId": "q", "prediction": "x"}], "expected an answer string, got None"),
        ({"q": "yes"}, ["yes"], r"predictions\[0\]: expected an object"),
    ],
)
def test_gqa_accuracy_refuses_bad_files(questions: Any, predictions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gqa_accuracy(questions, predictions)


@needs_vqa_fixtures
@pytest.mark.parametrize(("name", "overall"), [("mixed", 51.07), ("top_answer", 98.78), ("constant", 0.33)])
def test_vqa_accuracy_equals_the_official_evaluation(name: str, overall: float) -> None:
    result = vqa_accuracy(read(ANSWERS / "annotations.json")["annotations"], read(ANSWERS / f"results_{name}.json"))
    official = read(ANSWERS / "expected_vqaEval.json")[name]
    assert round(result["overall"], 2) == overall == official["overall"]
    per_question = {str(question): round(percent, 2) for question, percent in result["per_question"].items()}
    assert per_question == official["perQuestion"]


@needs_vqa_fixtures
def test_normalisation_equals_the_official_evaluation() -> None:
    cases = read(ANSWERS / "normalisation_cases.json")
    assert len(cases) == 148
    assert [normalise_answer(case["in"]) for case in cases] == [case["out"] for case in cases]
    assert [strip_punctuation(case["in"]) for case in cases] == [case["punct"] for case in cases]
