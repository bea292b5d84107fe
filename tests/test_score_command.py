"""`vpgtrans score` on files: the official tools' numbers where the fixtures are at hand, samples worked out by hand, bad input."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from vpgtrans.engine.cli import main
from vpgtrans.engine.scoring import java_metrics, okvqa
from vpgtrans.engine.scoring.files import ScoreError
from vpgtrans.engine.scoring.java_metrics import java_metric_unsupported_reason

REFERENCES = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
    "annotations": [
        {"id": 10, "image_id": 1, "caption": "A red cat."},
        {"id": 11, "image_id": 1, "caption": "One dog"},
        {"id": 12, "image_id": 2, "caption": "a blue sky"},
    ],
}
PREDICTIONS = [{"image_id": 2, "caption": "A blue sky!"}, {"image_id": 1, "caption": "red cat"}]
ANNOTATIONS = {
    "annotations": [
        {
            "question_id": question,
            "question_type": question_type,
            "answer_type": answer_type,
            "answers": [{"answer": answer} for answer in answers],
        }
        for question, question_type, answer_type, answers in [
            (1, "is the", "yes/no", ["yes"] * 10),
            (2, "what", "other", ["surfer"] * 2 + ["man"] * 8),
            (3, "what", "other", ["dog"] * 9 + ["cat"]),
        ]
    ]
}
ANSWERS = [
    {"question_id": 1, "answer": "no"},
    {"question_id": 2, "answer": "the surfers"},
    {"question_id": 3, "answer": "a dog"},
]


def write(path: Path, value: Any) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def score(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["score", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def scored(capsys, tmp_path: Path, task: str, references: Any, predictions: Any, *options: str) -> dict[str, Any]:
    files = ["--references", write(tmp_path / "r.json", references)]
    files += ["--predictions", write(tmp_path / "p.json", predictions)]
    code, out, err = score(capsys, "--task", task, *files, "--json", *options)
    assert (code, err) == (0, "")
    return json.loads(out)


# The official tools' numbers.


@pytest.fixture
def caption_fixtures(measuring_data) -> Path:
    return measuring_data / "metric_fixtures" / "coco_caption_fakecap"


@pytest.fixture
def answer_fixtures(measuring_data) -> Path:
    return measuring_data / "metric_fixtures" / "okvqa_official_vqaeval"


@pytest.mark.parametrize("form", ["raw", "tokenized"])
def test_caption_files_score_what_the_official_tool_says(capsys, tmp_path, caption_fixtures, form: str) -> None:
    if form == "raw":
        references = caption_fixtures / "captions_val2014_1000.json"
        predictions = caption_fixtures / "captions_val2014_fakecap_results.json"
    else:
        tokens = json.loads((caption_fixtures / "tokenized.json").read_text())
        listed = tokens["references_tokenized"]
        references = tmp_path / "r.json"
        annotations = [{"image_id": image, "caption": text} for image, texts in listed.items() for text in texts]
        write(references, {"images": [{"id": image} for image in listed], "annotations": annotations})
        candidates = tokens["candidates_tokenized"].items()
        predictions = tmp_path / "p.json"
        write(predictions, [{"image_id": image, "caption": text} for image, text in candidates])
    options = ["--tokenized"] if form == "tokenized" else []
    files = ["--references", str(references), "--predictions", str(predictions)]
    code, out, _ = score(capsys, "--task", "caption", *files, "--json", *options)
    official = json.loads((caption_fixtures / "expected_on_raw_via_ptb.json").read_text())["corpus"]
    found = json.loads(out)
    assert (code, found["count"], found["counted"]) == (0, 1000, "images")
    names = {"cider": "CIDEr", "rouge_l": "ROUGE_L"} | {f"bleu_{order}": f"Bleu_{order}" for order in range(1, 5)}
    assert found["metrics"] == pytest.approx({ours: official[theirs] for ours, theirs in names.items()}, abs=1e-6)


@pytest.mark.parametrize("name", ["mixed", "top_answer", "constant"])
def test_vqa_files_score_what_the_official_evaluation_says(capsys, answer_fixtures, name: str) -> None:
    files = ["--references", str(answer_fixtures / "annotations.json")]
    files += ["--predictions", str(answer_fixtures / f"results_{name}.json")]
    files += ["--questions", str(answer_fixtures / "questions.json")]
    code, out, _ = score(capsys, "--task", "okvqa", *files, "--json")
    official = json.loads((answer_fixtures / "expected_vqaEval.json").read_text())[name]
    metrics = json.loads(out)["metrics"]
    assert code == 0
    assert round(metrics["accuracy_percent"], 2) == official["overall"]
    rounded = {kind: round(percent, 2) for kind, percent in metrics["question_type_percent"].items()}
    assert rounded == official["perQuestionType"]
    # Every question of OK-VQA is of the answer type 'other'.
    assert metrics["answer_type_percent"] == {"other": pytest.approx(metrics["accuracy_percent"], abs=1e-9)}


@pytest.mark.slow
def test_meteor_scores_what_the_official_tool_says(capsys, caption_fixtures) -> None:
    reason = java_metric_unsupported_reason("meteor")
    if reason is not None:
        pytest.skip(f"METEOR cannot run: {reason}")
    files = ["--references", str(caption_fixtures / "captions_val2014_1000.json")]
    files += ["--predictions", str(caption_fixtures / "captions_val2014_fakecap_results.json")]
    _, out, _ = score(capsys, "--task", "caption", *files, "--metrics", "meteor", "--json")
    assert json.loads(out)["metrics"] == {"meteor": pytest.approx(0.1952546718, abs=1e-6)}


# Captions by hand.


def test_captions_by_hand_and_what_the_record_says(capsys, tmp_path) -> None:
    found = scored(capsys, tmp_path, "caption", REFERENCES, PREDICTIONS)
    # Image 2 equals its reference in n = 1, 2, 3 and has no 4-gram: 7.5. Image 1 against "a red cat", where "a" is in
    # both images and weighs nothing: cosine 1 of unigrams, 1 / sqrt 2 of {red cat} and {a red, red cat}; one bigram
    # against two: exp(-1 / 72). Against "one dog": 0.
    first = 10 * (1 + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72) / 2
    assert found["metrics"]["cider"] == pytest.approx((7.5 + first) / 2)
    assert found["metrics"]["bleu_1"] == pytest.approx(1.0, abs=1e-8)  # the shorter of two references is as long
    assert list(found["metrics"]) == ["cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]
    assert (found["task"], found["count"], found["counted"]) == ("caption", 2, "images")
    assert found["settings"]["metrics"] == ["cider", "bleu", "rouge"]
    assert found["settings"]["tokenizer"].startswith("PTB")
    digest = hashlib.sha256((tmp_path / "p.json").read_bytes()).hexdigest()
    assert found["files"]["predictions"] == {"name": str(tmp_path / "p.json"), "sha256": digest}
    assert found["versions"] == {"vpgtrans": importlib.metadata.version("vpgtrans")}


def test_tokenized_captions_are_left_alone(capsys, tmp_path) -> None:
    raw = scored(capsys, tmp_path, "caption", REFERENCES, PREDICTIONS, "--metrics", "bleu")
    given = scored(capsys, tmp_path, "caption", REFERENCES, PREDICTIONS, "--metrics", "bleu", "--tokenized")
    # As tokens, "A", "sky!" and "cat." differ from "a", "sky" and "cat": "blue" of 3 and "red" of 2 match.
    assert raw["metrics"]["bleu_1"] == pytest.approx(1.0, abs=1e-8)
    assert given["metrics"]["bleu_1"] == pytest.approx(2 / 5, abs=1e-8)
    assert given["settings"]["tokenizer"].startswith("none")


def test_a_gzipped_file_is_read_and_its_own_bytes_are_hashed(capsys, tmp_path) -> None:
    packed = tmp_path / "r.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(REFERENCES).encode()))
    predictions = write(tmp_path / "p.json", PREDICTIONS)
    _, out, _ = score(capsys, "--task=caption", f"--references={packed}", f"--predictions={predictions}", "--json")
    assert json.loads(out)["files"]["references"]["sha256"] == hashlib.sha256(packed.read_bytes()).hexdigest()


def test_nocaps_scores_each_domain_as_a_set_of_its_own(capsys, tmp_path) -> None:
    rows = [
        (1, "in-domain", "a red cat", "red cat"),
        (2, "in-domain", "one dog", "one dog"),
        (3, "out-domain", "two dugongs", "two dugongs"),
        (4, "out-domain", "a grey axolotl", "two dugongs"),
    ]
    references = {
        "images": [{"id": image, "domain": domain} for image, domain, _, _ in rows],
        "annotations": [{"image_id": image, "caption": text} for image, _, text, _ in rows],
    }
    predictions = [{"image_id": image, "caption": text} for image, _, _, text in rows]
    found = scored(capsys, tmp_path, "nocaps", references, predictions)
    # In-domain: image 1 has unigrams {red, cat} against {a, red, cat}, bigrams {red cat} against {a red, red cat}, all
    # of idf ln 2: cosines sqrt(2/3) and sqrt(1/2), and one bigram less; image 2 matches in n = 1, 2.
    first = 10 * (math.sqrt(2 / 3) + math.sqrt(1 / 2)) / 4 * math.exp(-1 / 72)
    assert found["metrics"]["in-domain"]["cider"] == pytest.approx((first + 5.0) / 2)
    assert found["metrics"]["out-domain"]["cider"] == pytest.approx((5.0 + 0.0) / 2)
    # Over all four, "a" is in two images: idf ln 2 beside ln 4 for every other word, that is 1 beside 2.
    first = 10 * (math.sqrt(8 / 9) + math.sqrt(1 / 2)) / 4 * math.exp(-1 / 72)
    assert found["metrics"]["overall"]["cider"] == pytest.approx((first + 5.0 + 5.0 + 0.0) / 4)
    assert "near-domain" not in found["metrics"]
    assert (found["count"], found["domain_counts"]) == (4, {"in-domain": 2, "near-domain": 0, "out-domain": 2})


# Questions by hand.


@pytest.mark.parametrize("task", ["vqa", "okvqa"])
def test_vqa_by_hand(capsys, tmp_path, task: str) -> None:
    found = scored(capsys, tmp_path, task, ANNOTATIONS, ANSWERS)
    # "no": 0; "surfers" is none of the ten: 0; "a dog" loses its article, 9 of 10: 100.
    assert found["metrics"] == {
        "accuracy_percent": pytest.approx(100 / 3),
        "answer_type_percent": {"yes/no": 0.0, "other": 50.0},
        "question_type_percent": {"is the": 0.0, "what": 50.0},
    }
    assert (found["count"], found["counted"], found["settings"]["lemmatise"]) == (3, "questions", None)


def test_vqa_scores_only_the_questions_of_a_questions_file(capsys, tmp_path) -> None:
    questions = write(tmp_path / "q.json", {"questions": [{"question_id": 3, "image_id": 7, "question": "?"}]})
    found = scored(capsys, tmp_path, "vqa", ANNOTATIONS, ANSWERS[2:], "--questions", questions)
    assert found["metrics"]["accuracy_percent"] == 100.0
    assert found["count"] == 1
    assert found["files"]["questions"]["name"] == questions
    both = ["--references", str(tmp_path / "r.json"), "--predictions", write(tmp_path / "all.json", ANSWERS)]
    code, _, err = score(capsys, "--task", "vqa", *both, "--questions", questions)
    assert code == 2
    assert f"2 predictions (1, 2) for questions that {questions} does not have" in err
    more = write(tmp_path / "q.json", {"questions": [{"question_id": 3}, {"question_id": 8}]})
    code, _, err = score(capsys, "--task", "vqa", *both, "--questions", more)
    assert code == 2
    assert "no annotation for 1 question (8) of 2" in err


def test_gqa_by_hand(capsys, tmp_path) -> None:
    questions = {
        "20": {"answer": "yes", "imageId": "5", "question": "?"},
        "21": {"answer": "left"},
        "22": {"answer": "dog"},
    }
    predictions = [
        {"questionId": "20", "prediction": "Yes."},
        {"questionId": "21", "prediction": "right"},
        {"questionId": "22", "prediction": "a dog"},
    ]
    found = scored(capsys, tmp_path, "gqa", questions, predictions)
    assert found["metrics"] == {"accuracy_percent": pytest.approx(100 / 3)}
    assert found["count"] == 3


# OK-VQA: lemmas of nouns and verbs.


@pytest.fixture
def stand_in_spacy(monkeypatch) -> None:
    """A spaCy of four words, so that the rule of the reference is tested without its model."""
    words = {
        "surfers": ("NOUN", "surfer"),
        "surfing": ("VERB", "surf"),
        "the": ("DET", "THE"),
        "better": ("ADJ", "good"),
    }

    def pipeline(text: str) -> list[types.SimpleNamespace]:
        return [
            types.SimpleNamespace(text=w, pos_=words.get(w, ("X",))[0], lemma_=words.get(w, ("", "?"))[1])
            for w in text.split()
        ]

    module = types.ModuleType("spacy")
    module.load = {"en_core_web_sm": pipeline}.__getitem__  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spacy", module)
    monkeypatch.setattr(okvqa, "lemmatiser_unsupported_reason", lambda: None)


def test_lemmatised_nouns_and_verbs_only(stand_in_spacy) -> None:
    pipeline, _ = okvqa.load_lemmatiser()
    answers = {1: "the  better surfers", 2: "surfing", 3: ""}
    assert okvqa.lemmatise(answers, pipeline) == {1: "the better surfer", 2: "surf", 3: ""}


def test_lemmatised_okvqa_by_hand(capsys, tmp_path, stand_in_spacy) -> None:
    found = scored(capsys, tmp_path, "okvqa", ANNOTATIONS, ANSWERS, "--lemmatise")
    # "the surfers" is now "the surfer", 2 of 10 annotators: 60.
    assert found["metrics"]["accuracy_percent"] == pytest.approx((0 + 60 + 100) / 3)
    assert found["settings"]["lemmatise"].startswith("spacy ")
    assert found["settings"]["lemmatise"].endswith("NOUN and VERB")


@pytest.mark.parametrize(
    ("installed", "remedy"),
    [
        ([], r"spaCy is not installed; run: pip install spacy && python -m spacy download en_core_web_sm"),
        (["spacy"], r"model en_core_web_sm is not installed; run: python -m spacy download en_core_web_sm"),
    ],
)
def test_lemmatising_without_spacy_is_an_error_with_the_remedy(
    capsys, tmp_path, monkeypatch, installed: list[str], remedy: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    files = ["--references", write(tmp_path / "r.json", ANNOTATIONS)]
    files += ["--predictions", write(tmp_path / "p.json", ANSWERS)]
    code, out, err = score(capsys, "--task", "okvqa", *files, "--lemmatise")
    assert (code, out) == (2, "")
    assert remedy in err


def test_a_spacy_that_does_not_load_is_an_error_with_the_remedy(monkeypatch, stand_in_spacy) -> None:
    def broken(name: str) -> None:
        raise OSError("[E053] Could not read config file")

    monkeypatch.setattr(sys.modules["spacy"], "load", broken)
    with pytest.raises(ScoreError, match=r"does not load \(OSError: \[E053\].*python -m spacy download en_core_web_sm"):
        okvqa.load_lemmatiser()


# Java metrics.


def test_an_asked_metric_that_cannot_run_is_an_error(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(java_metrics, "_scorer_folder", lambda metric: None)
    files = ["--references", write(tmp_path / "r.json", REFERENCES)]
    files += ["--predictions", write(tmp_path / "p.json", PREDICTIONS)]
    code, out, err = score(capsys, "--task", "caption", *files, "--metrics", "cider,spice")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "--metrics spice: cannot run: the package pycocoevalcap is not installed; run: pip install" in err


# Output.


@pytest.mark.parametrize(
    ("task", "references", "predictions", "shown"),
    [
        ("caption", REFERENCES, PREDICTIONS, ["caption: 2 images", "cider", "bleu_4", "rouge_l", "tokenizer: PTB"]),
        ("vqa", ANNOTATIONS, ANSWERS, ["vqa: 3 questions", "33.33 %", "answer type yes/no", "question type what", "50.00 %"]),
        (
            "nocaps",
            {"images": [{"id": 1, "domain": "near-domain"}], "annotations": [{"image_id": 1, "caption": "a cat"}]},
            [{"image_id": 1, "caption": "a cat"}],
            ["overall", "near-domain", "1 images", "1.0000"],
        ),
        ("gqa", {"1": {"answer": "yes"}}, [{"questionId": "1", "prediction": "yes"}], ["accuracy", "100.00 %"]),
    ],
)  # fmt: skip
def test_the_table(capsys, tmp_path, task: str, references: Any, predictions: Any, shown: list[str]) -> None:
    out = tmp_path / "scores.json"
    files = ["--references", write(tmp_path / "r.json", references)]
    files += ["--predictions", write(tmp_path / "p.json", predictions)]
    code, printed, err = score(capsys, "--task", task, *files, "--out", str(out))
    assert (code, err) == (0, "")
    for text in shown:
        assert text in printed
    assert json.loads(out.read_text())["task"] == task
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_scoring_imports_neither_torch_nor_transformers(tmp_path) -> None:
    files = ["--references", write(tmp_path / "r.json", REFERENCES)]
    files += ["--predictions", write(tmp_path / "p.json", PREDICTIONS)]
    script = (
        "import sys; from vpgtrans.engine.cli import main; code = main(sys.argv[1:]); "
        "print(code, [name for name in ('torch', 'transformers', 'spacy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, "score", "--task", "caption", *files]
    told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), check=True)
    assert told.stdout.splitlines()[-1] == "0 []"


# Bad input: exit code 2, one message that names the file, nothing on stdout, nothing written.


def without(value: Any, *path: Any) -> Any:
    """A deep copy of `value` less the item at `path`."""
    copy = json.loads(json.dumps(value))
    place = copy
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return copy


def with_image(image: Any) -> dict[str, Any]:
    return {**REFERENCES, "images": [*REFERENCES["images"], image]}


NOCAPS_WITHOUT_DOMAIN = {**REFERENCES, "images": [{"id": 1, "domain": "in-domain"}, {"id": 2, "domain": "sky"}]}

BAD_CAPTIONS = [
    ("{", PREDICTIONS, r"r.json: line 1, column 2: not valid JSON"),
    ("[" * 100_000, PREDICTIONS, r"r.json: JSON that cannot be read"),
    ([], PREDICTIONS, r"r.json: expected an object with the list 'images', got a list; is this the right file?"),
    ({"images": []}, PREDICTIONS, r"expected an object with the list 'annotations', got an object with the keys ['images']"),
    (with_image({"id": True}), PREDICTIONS, r"r.json: images[2]: expected a number or string as 'id', got True"),
    (with_image("x"), PREDICTIONS, r"r.json: images[2]: expected an object with 'id', got 'x'"),
    (with_image({"id": 2}), PREDICTIONS, r"r.json: duplicate image ids: 1 id (2) more than once"),
    (with_image({"id": 3}), PREDICTIONS, r"r.json: 1 image (3) of 3 without a reference caption"),
    (without(REFERENCES, "images", 1), PREDICTIONS, r"r.json: 1 annotation (2) whose image is not listed under 'images'"),
    (without(REFERENCES, "annotations", 0, "caption"), PREDICTIONS, r"r.json: annotations[0]: expected an object with 'caption'"),
    (REFERENCES, "", r"p.json: line 1, column 1: not valid JSON"),
    (REFERENCES, {"annotations": PREDICTIONS}, r"p.json: expected a list of {image_id, caption}, got a top-level object"),
    (REFERENCES, [], r"p.json: an empty list"),
    (REFERENCES, PREDICTIONS[:1], r"p.json: no prediction for 1 image (1) of 2 in "),
    (REFERENCES, [*PREDICTIONS, *PREDICTIONS], r"p.json: duplicate image_ids: 2 ids (2, 1) more than once"),
    (REFERENCES, [*PREDICTIONS, {"image_id": 9, "caption": "x"}], r"p.json: 1 prediction (9) for images that "),
    (REFERENCES, [{"image_id": str(p["image_id"]), "caption": "x"} for p in PREDICTIONS],
     r"no prediction for 2 images (1, 2) of 2 in"),
    (REFERENCES, [{"image_id": str(p["image_id"]), "caption": "x"} for p in PREDICTIONS], r"numbers in one file and strings"),
    (REFERENCES, [PREDICTIONS[0], {"image_id": 1, "caption": " \n"}], r"p.json: 1 empty caption (1) of 2"),
    (REFERENCES, [PREDICTIONS[0], {"image_id": 1, "caption": None}], r"p.json: [1]: expected text as 'caption', got None"),
    (REFERENCES, [PREDICTIONS[0], {"caption": "x"}], r"p.json: [1]: expected an object with 'image_id'"),
]  # fmt: skip
BAD_OTHERS = [
    ("nocaps", REFERENCES, PREDICTIONS, r"r.json: 2 images (1, 2) of 2 with a 'domain' other than in-domain, near-domain"),
    ("nocaps", NOCAPS_WITHOUT_DOMAIN, PREDICTIONS, r"r.json: 1 image (2) of 2 with a 'domain' other than"),
    ("vqa", REFERENCES, ANSWERS, r"r.json: annotations[0]: expected an object with 'question_id'"),
    ("vqa", {"questions": []}, ANSWERS, r"expected an object with the list 'annotations', got an object with the keys"),
    ("vqa", ANNOTATIONS, ANSWERS[:1], r"p.json: no prediction for 2 questions (2, 3) of 3 in"),
    ("vqa", ANNOTATIONS, ANSWERS * 2, r"p.json: duplicate question_ids: 3 ids (1, 2, 3) more than once"),
    ("vqa", {"annotations": ANNOTATIONS["annotations"] * 2}, ANSWERS, r"r.json: duplicate question_ids: 3 ids"),
    ("vqa", ANNOTATIONS, [*ANSWERS, {"question_id": 8, "answer": ""}], r"p.json: 1 prediction (8) for questions that"),
    ("vqa", ANNOTATIONS, [*ANSWERS[:2], {"question_id": 3, "answer": 4}], r"p.json: [2]: expected text as 'answer', got 4"),
    ("okvqa", without(ANNOTATIONS, "annotations", 2, "answers"), ANSWERS, r"r.json: annotations[2]: expected an object with"),
    ("gqa", [{"answer": "yes"}], [{"questionId": "1", "prediction": "yes"}], r"r.json: expected an object {question id: {answer}}"),
    ("gqa", {"1": {"answer": 1}}, [{"questionId": "1", "prediction": "yes"}], r"r.json: questions['1']: expected an answer string"),
    ("gqa", {"1": {"answer": "yes"}}, [{"questionId": 1, "prediction": "yes"}], r"numbers in one file and strings in the other"),
    ("gqa", {"1": {"answer": "yes"}}, [{"questionId": "1"}], r"p.json: [0]: expected an object with 'prediction'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "references", "predictions", "message"), [*(("caption", *case) for case in BAD_CAPTIONS), *BAD_OTHERS]
)
def test_bad_files(capsys, tmp_path, task: str, references: Any, predictions: Any, message: str) -> None:
    out = tmp_path / "scores.json"
    files = ["--references", write(tmp_path / "r.json", references)]
    files += ["--predictions", write(tmp_path / "p.json", predictions)]
    code, printed, err = score(capsys, "--task", task, *files, "--json", "--out", str(out))
    assert (code, printed, out.exists()) == (2, "", False)
    assert err.startswith("score error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"\xff\xfe{\x00", "not UTF-8"),
        (gzip.compress(b"[]" * 50, mtime=0)[:-9], "damaged gzip file"),
        ("folder", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(capsys, tmp_path, content: bytes | str | None, message: str) -> None:
    predictions = tmp_path / "p.json"
    if content == "folder":
        predictions.mkdir()
    elif content is not None:
        predictions.write_bytes(content)
    references = write(tmp_path / "r.json", REFERENCES)
    code, out, err = score(capsys, "--task=caption", f"--references={references}", f"--predictions={predictions}")
    assert (code, out) == (2, "")
    assert f"{predictions}: " in err
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "vqa", "--metrics", "cider"], "--metrics: for caption and nocaps only, the task is vqa"),
        (["--task", "gqa", "--tokenized"], "--tokenized: for caption and nocaps only, the task is gqa"),
        (["--task", "vqa", "--lemmatise"], "--lemmatise: for okvqa only, the task is vqa"),
        (["--task", "caption", "--questions", "q.json"], "--questions: for vqa and okvqa only, the task is caption"),
        (
            ["--task", "caption", "--metrics", "cider,wmd"],
            "--metrics: expected some of cider,bleu,rouge,spice,meteor, got",
        ),
        (["--task", "caption", "--metrics", ""], "('' is none of them)"),
        (["--task", "caption", "--out", "none/there.json"], "--out: expected a file in a folder that exists"),
        (["--task", "caption", "--out", "r.json"], "--out: r.json is an input of this command"),
    ],
)
def test_options_that_do_not_fit(capsys, tmp_path, monkeypatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "r.json", REFERENCES)
    write(tmp_path / "p.json", PREDICTIONS)
    code, out, err = score(capsys, *arguments, "--references", "r.json", "--predictions", "p.json")
    assert (code, out) == (2, "")
    assert message in err
    assert json.loads((tmp_path / "r.json").read_text()) == REFERENCES
