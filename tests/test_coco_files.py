"""Caption and question files: records in order, damage refused by name, unusable files as clear errors."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vpgtrans.engine.data import reading
from vpgtrans.engine.data.coco import (
    CaptionSet,
    DataError,
    ImageRecord,
    QuestionRecord,
    read_captions,
    read_questions,
)

DATA = Path(os.environ.get("VPGTRANS_DATA") or Path(__file__).resolve().parents[1].parent / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data for measuring at {DATA}")


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def captions_value(images: list[Any], annotations: list[Any]) -> dict[str, Any]:
    return {"info": {}, "images": images, "annotations": annotations}


def simple(count: int = 3, captions_each: int = 2) -> dict[str, Any]:
    images = [{"id": 10 + index, "file_name": f"{index}.png"} for index in range(count)]
    annotations = [
        {"id": 100 * turn + index, "image_id": 10 + index, "caption": f"Caption {turn} of {index}."}
        for turn in range(captions_each)
        for index in range(count)
    ]
    return captions_value(images, annotations)


@pytest.fixture
def images_root(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for index in range(6):
        Image.new("RGB", (8, 6), (40 * index, 0, 0)).save(root / f"{index}.png")
    return root


def reasons(refused: reading.RefusalReport, unit: str) -> dict[str, int]:
    return dict(refused.counts.get(unit, {}))


def test_records_in_file_order(tmp_path: Path, images_root: Path) -> None:
    value = simple()
    value["images"].reverse()
    result = read_captions(write(tmp_path / "captions_train.json", value), images_root)
    assert result.name == "captions_train"
    assert result.records == [
        ImageRecord(10 + index, images_root / f"{index}.png", [f"caption 0 of {index}", f"caption 1 of {index}"])
        for index in (2, 1, 0)
    ]
    assert result.caption_count == 6
    assert result.refused.summary() == "0 of 3 images refused; 0 of 6 captions refused"
    raw = read_captions(tmp_path / "captions_train.json", images_root, preprocess=False, name="raw")
    assert raw.records[0].captions[0] == "Caption 0 of 2." and raw.name == "raw"


def test_text_only_set_needs_no_images(tmp_path: Path) -> None:
    value = simple()
    del value["images"][0]["file_name"]
    result = read_captions(write(tmp_path / "a.json", value))
    assert [record.path for record in result.records] == [None] * 3


def test_gzip_and_bom_and_string_ids(tmp_path: Path) -> None:
    value = captions_value([{"id": "a"}, {"id": "1"}, {"id": 1}], [])
    value["annotations"] = [
        {"image_id": 1, "caption": "number"},
        {"image_id": "1", "caption": "text"},
        {"image_id": "a", "caption": "letter"},
    ]
    data = b"\xef\xbb\xbf" + json.dumps(value).encode()
    (tmp_path / "set.json.gz").write_bytes(gzip.compress(data))
    (tmp_path / "set.json").write_bytes(gzip.compress(data))
    for name in ("set.json.gz", "set.json"):
        result = read_captions(tmp_path / name)
        assert result.name == "set"
        assert [(r.image_id, r.captions) for r in result.records] == [
            ("a", ["letter"]),
            ("1", ["text"]),
            (1, ["number"]),
        ]


def test_long_captions_are_cut(tmp_path: Path) -> None:
    value = captions_value([{"id": 1}], [{"image_id": 1, "caption": "word " * 70}])
    path = write(tmp_path / "a.json", value)
    assert read_captions(path).records[0].captions == [" ".join(["word"] * 50)]
    assert read_captions(path, max_words=2).records[0].captions == ["word word"]


def test_refused_captions_by_name(tmp_path: Path) -> None:
    bad = [
        ("...", "caption_empty"),
        ("  \n", "caption_empty"),
        (None, "caption_not_a_string"),
        (7, "caption_not_a_string"),
        (["a dog"], "caption_not_a_string"),
        ("a \ud83d dog", "caption_lone_surrogate"),
        ("a \udc9f dog", "caption_lone_surrogate"),
    ]
    annotations: list[Any] = [{"id": index, "image_id": 1, "caption": text} for index, (text, _) in enumerate(bad)]
    annotations += [
        {"id": 50, "image_id": 99, "caption": "nowhere"},
        {"id": 51, "image_id": "1", "caption": "other type of id"},
        {"id": 52, "image_id": 1},
        {"id": 53, "caption": "no image id"},
        {"id": 54, "image_id": True, "caption": "a boolean is no id"},
        {"id": 55, "image_id": [1], "caption": "nor is a list"},
        {"id": 57, "image_id": "", "caption": "nor nothing"},
        {"id": 58, "image_id": "\ud800", "caption": "nor what cannot be printed"},
        "not an object",
        {"id": 56, "image_id": 1, "caption": "A real \U0001f415 one."},
    ]
    result = read_captions(write(tmp_path / "a.json", captions_value([{"id": 1}], annotations)))
    assert result.records == [ImageRecord(1, None, ["a real \U0001f415 one"])]
    assert reasons(result.refused, "captions") == {
        "caption_empty": 2,
        "caption_not_a_string": 3,
        "caption_lone_surrogate": 2,
        "annotation_without_image": 2,
        "malformed_entry": 7,
    }
    assert result.refused.refused("captions") == 16 and result.refused.examined["captions"] == 17
    named = {refusal.where: refusal for refusal in result.refused.named}
    for index, (_, reason) in enumerate(bad):
        assert named[f"annotations[{index}], id {index}, image_id 1"].reason == reason


def test_refused_images_by_name(tmp_path: Path, images_root: Path) -> None:
    Image.effect_noise((64, 64), 50).save(images_root / "cut.png")
    whole = (images_root / "cut.png").read_bytes()
    (images_root / "empty.png").touch()
    (images_root / "text.png").write_text("no picture")
    (images_root / "cut.png").write_bytes(whole[: len(whole) // 2])
    names: list[Any] = ["0.png", "absent.png", "empty.png", "text.png", "../outside.png", "/etc/hostname", "", 5, "\0"]
    entries: list[Any] = [{"id": index, "file_name": name} for index, name in enumerate(names)]
    entries += [
        {"id": 0, "file_name": "1.png"},
        {"id": 50, "file_name": "2.png"},
        {"id": 51},
        {"id": 52, "file_name": "a\udcff.png"},
        {"id": None, "file_name": "3.png"},
        {"id": 1.5, "file_name": "3.png"},
        {"file_name": "3.png"},
        "not an object",
        {"id": 60, "file_name": "cut.png"},
        {"id": 61, "file_name": "sub/../4.png"},
        {"id": 62, "file_name": str(images_root / "5.png")},
    ]
    captioned = [*range(9), 51, 52, 60, 61, 62]
    annotations = [{"image_id": image_id, "caption": f"picture {image_id}"} for image_id in captioned]
    path = write(tmp_path / "a.json", captions_value(entries, annotations))
    result = read_captions(path, images_root, verify_images="full", max_refused_share=1)
    assert [(r.image_id, r.path) for r in result.records] == [
        (0, images_root / "0.png"),
        (61, images_root / "4.png"),
        (62, images_root / "5.png"),
    ]
    expected = {
        "missing": 1,
        "empty": 1,
        "not_an_image": 1,
        "truncated": 1,
        "file_name_outside_images_root": 2,
        "file_name_missing": 2,
        "file_name_not_a_string": 1,
        "file_name_malformed": 1,
        "file_name_lone_surrogate": 1,
        "duplicate_image_id": 1,
        "without_captions": 1,
        "malformed_entry": 4,
    }
    assert reasons(result.refused, "images") == expected
    duplicate = next(refusal for refusal in result.refused.named if refusal.reason == "duplicate_image_id")
    assert duplicate.where == "images[9], id 0"

    header_only = read_captions(path, images_root, max_refused_share=1)
    truncated_passes = {reason: count for reason, count in expected.items() if reason != "truncated"}
    assert reasons(header_only.refused, "images") == truncated_passes
    unverified = read_captions(path, images_root, verify_images="none", max_refused_share=1)
    assert {"missing", "empty", "not_an_image"}.isdisjoint(reasons(unverified.refused, "images"))
    small = read_captions(path, images_root, max_pixels=48, max_refused_share=1)
    assert [record.image_id for record in small.records] == [0, 61, 62]  # 8 x 6 pixels are just allowed
    with pytest.raises(DataError, match="too many pixels"):
        read_captions(path, images_root, max_pixels=47, max_refused_share=1)


def test_an_image_whose_captions_are_all_refused(tmp_path: Path) -> None:
    value = captions_value([{"id": 1}, {"id": 2}], [{"image_id": 1, "caption": "!"}, {"image_id": 2, "caption": "ok"}])
    result = read_captions(write(tmp_path / "a.json", value))
    assert [record.image_id for record in result.records] == [2]
    assert result.refused.summary() == (
        "1 of 2 images refused: 1 without captions; 1 of 2 captions refused: 1 caption empty"
    )


def test_bytes_that_are_not_utf8_cost_only_their_caption(tmp_path: Path) -> None:
    value = captions_value(
        [{"id": 1}],
        [{"image_id": 1, "caption": text} for text in ("caf\u00e9 good", "caf@ bad", "surrogate #", "fine")],
    )
    text = json.dumps(value, ensure_ascii=False).encode().replace(b"@", b"\xe9").replace(b"#", b"\\ud800")
    path = tmp_path / "a.json"
    path.write_bytes(text)
    result = read_captions(path)
    assert result.records[0].captions == ["caf\u00e9 good", "fine"]
    assert reasons(result.refused, "captions") == {"caption_not_utf8": 1, "caption_lone_surrogate": 1}
    result.refused.write_json(tmp_path / "refused.json")
    assert "caf\\\\udce9 bad" in (tmp_path / "refused.json").read_text(encoding="ascii")


def test_report_as_json_and_one_line(tmp_path: Path, images_root: Path) -> None:
    value = simple(6)
    for index in (1, 4):
        (images_root / f"{index}.png").unlink()
    (images_root / "2.png").write_bytes(b"")
    result = read_captions(write(tmp_path / "a.json", value), images_root)
    line = "3 of 6 images refused: 2 missing, 1 empty; 0 of 12 captions refused"
    assert result.refused.summary() == line
    result.refused.write_json(tmp_path / "refused.json")
    report = json.loads((tmp_path / "refused.json").read_text())
    assert report["summary"] == line
    assert report["counts"]["images"] == {"missing": 2, "empty": 1}
    assert report["named"][0]["where"] == "images[1], id 11"
    assert str(images_root / "1.png") in report["named"][0]["detail"]


def test_summary_groups_thousands_and_caps_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "NAMED_PER_REASON", 2)
    report = reading.RefusalReport("a.json")
    report.examined["images"] = 5000
    for index in range(12):
        report.add("images", "truncated" if index < 7 else "missing", f"images[{index}]")
    assert report.summary() == "12 of 5,000 images refused: 7 truncated, 5 missing"
    assert [refusal.reason for refusal in report.named] == ["truncated"] * 2 + ["missing"] * 2


def test_limit_and_share(tmp_path: Path, images_root: Path) -> None:
    path = write(tmp_path / "a.json", simple(6))
    for index in (0, 2, 3):
        (images_root / f"{index}.png").unlink()
    result = read_captions(path, images_root, limit=2, max_refused_share=0.6)
    assert [record.image_id for record in result.records] == [11, 14]
    assert result.refused.examined["images"] == 5
    assert len(read_captions(path, images_root).records) == 3  # exactly half is still allowed
    message = r"50\.0% of the images refused, max_refused_share allows 40\.0%.*3 missing.*images\[0\], id 10: missing"
    with pytest.raises(DataError, match=message):
        read_captions(path, images_root, max_refused_share=0.4)


def error_of(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_captions(path, **options)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def test_unusable_files_are_clear_errors(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    assert "no such file" in error_of(path) and str(path) in error_of(path)
    assert "cannot be read" in error_of(tmp_path)
    contents = {
        b"": "empty file",
        b" \n": "empty file",
        b'{"images": [],\n "annotations": [1, 2,, 3]}': "line 2, column 23: not valid JSON",
        b'{"images": [], "annota': "line 1, column 16: not valid JSON (Unterminated string",
        json.dumps(simple()).encode("utf-16"): "UTF-16",
        gzip.compress(json.dumps(simple()).encode())[:-20]: "damaged gzip file",
        gzip.compress(json.dumps(simple()).encode())[:9] + b"\xff" * 40: "damaged gzip file",
        b"[" * 200_000: "cannot be read",
        b'{"images": ' + b"9" * 10_000 + b"}": "cannot be read",
        b"[]": "got a top-level list",
        b'"text"': "got a top-level string",
        b"null": "got a top-level null",
        b"{}": "its keys are []",
        b'{"images": [], "notes": 3}': "its keys are ['images', 'notes']",
        b'{"images": {"a": 1}, "annotations": []}': "the type of 'images' is object",
        b'{"images": [], "annotations": []}': "no usable images",
    }
    for content, expected in contents.items():
        path.write_bytes(content)
        message = error_of(path)
        assert expected in message and str(path) in message, message
        if expected != "no usable images":
            assert "damaged gzip" in message or "'images' and 'annotations'" in message, message


def test_json_larger_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b" " * 100_000 + json.dumps(simple()).encode()))
    assert len(read_captions(path).records) == 3
    monkeypatch.setattr(reading, "JSON_BYTES_LIMIT", 50_000)
    assert "more than 50,000 bytes" in error_of(path)


def test_wrong_options(tmp_path: Path, images_root: Path) -> None:
    path = write(tmp_path / "a.json", simple())
    assert "images_root: expected a folder" in error_of(path, images_root=tmp_path / "absent")
    assert "verify_images: expected" in error_of(path, images_root=images_root, verify_images="ful")
    for limit in (0, -3, 1.5, True):
        assert "limit: expected" in error_of(path, limit=limit)
    assert "max_refused_share: expected" in error_of(path, max_refused_share=1.1)
    assert "max_words: expected" in error_of(path, max_words=0)
    assert "3 missing" in error_of(path, images_root=tmp_path)


def vqa_value(count: int = 3, **more: Any) -> dict[str, Any]:
    return {
        **more,
        "questions": [
            {"question_id": 100 + index, "image_id": index, "question": f"What is no.{index}?"}
            for index in range(count)
        ],
    }


def vqa_answers(count: int = 3) -> dict[str, Any]:
    return {
        "annotations": [
            {
                "question_id": 100 + index,
                "image_id": index,
                "answers": [{"answer": f"Answer {turn}", "answer_id": turn + 1} for turn in range(10)],
            }
            for index in reversed(range(count))
        ]
    }


def test_vqa_questions_and_annotations(tmp_path: Path) -> None:
    questions = write(tmp_path / "q.json", vqa_value())
    annotations = write(tmp_path / "a.json", vqa_answers())
    result = read_questions(questions, annotations)
    answers = [f"Answer {turn}" for turn in range(10)]
    assert result.records == [
        QuestionRecord(100 + index, index, None, f"what is no{index}?", answers) for index in range(3)
    ]
    assert result.name == "q"
    assert read_questions(questions, preprocess=False).records[1] == QuestionRecord(101, 1, None, "What is no.1?", [])


@pytest.mark.parametrize(
    ("more", "image_name", "file_name"),
    [
        ({"data_subtype": "val2014"}, None, "COCO_val2014_{:012d}.jpg"),
        ({"data_subtype": "test-dev2015"}, None, "COCO_test2015_{:012d}.jpg"),
        ({"data_subtype": "val2014"}, "{image_id}.png", "{}.png"),
        ({}, "n{image_id:04d}.png", "n{:04d}.png"),
    ],
)
def test_vqa_image_names(tmp_path: Path, more: dict, image_name: str | None, file_name: str) -> None:
    path = write(tmp_path / "q.json", vqa_value(**more))
    root = tmp_path / "images"
    root.mkdir()
    for index in (0, 2):
        Image.new("RGB", (4, 4)).save(root / file_name.format(index))
    result = read_questions(path, images_root=root, image_name=image_name)
    assert [record.path for record in result.records] == [root / file_name.format(index) for index in (0, 2)]
    assert result.refused.summary() == "1 of 3 questions refused: 1 missing"


def test_vqa_images_without_a_name(tmp_path: Path, images_root: Path) -> None:
    path = write(tmp_path / "q.json", vqa_value())
    with pytest.raises(DataError, match="image_name: question 100 names no image file"):
        read_questions(path, images_root=images_root)
    for pattern in ("{image}.png", "{0}.png", "{image_id", "{image_id:q}.png"):
        with pytest.raises(DataError, match=r"image_name: .* cannot be filled in for image_id 0"):
            read_questions(path, images_root=images_root, image_name=pattern)


def test_flat_question_lists(tmp_path: Path, images_root: Path) -> None:
    common = {"image_id": 3, "question": "what?"}
    value = [
        {"question_id": 1, "image": "3.png", "answer": "dog", "answers": ["dog", "hound"], **common},
        {"question_id": 2, "image": "3.png", "answer": "dog", **common},
        {"question_id": "x", "file_name": "3.png", "answer": ["dog", ""], **common},
        {"question_id": 4, "image": "3.png", **common},
    ]
    result = read_questions(write(tmp_path / "flat.json", value), images_root=images_root)
    assert [record.answers for record in result.records] == [["dog", "hound"], ["dog"], ["dog", ""], []]
    assert {record.path for record in result.records} == {images_root / "3.png"}


def test_refused_questions_by_name(tmp_path: Path, images_root: Path) -> None:
    good = {"image_id": 1, "image": "1.png", "question": "what?", "answer": "dog"}
    bad: list[tuple[Any, str]] = [
        ({**good, "question": None}, "question_not_a_string"),
        ({**good, "question": ":;"}, "question_empty"),
        ({**good, "question": "\ud800"}, "question_lone_surrogate"),
        ({**good, "answer": 7}, "answers_not_a_list"),
        ({**good, "answer": None}, "without_annotation"),
        ({**good, "answers": ["yes", 7]}, "answer_not_a_string"),
        ({**good, "answers": [{"text": "yes"}]}, "answer_not_a_string"),
        ({**good, "answer": "\udfff"}, "answer_lone_surrogate"),
        ({**good, "image": "absent.png"}, "missing"),
        ({**good, "image": "../1.png"}, "file_name_outside_images_root"),
        ({**good, "image_id": None}, "malformed_entry"),
    ]
    value: list[Any] = [{"question_id": 0, **good}, "text", {"question_id": 0, **good}, good]
    value += [{"question_id": index + 1, **entry} for index, (entry, _) in enumerate(bad)]
    result = read_questions(write(tmp_path / "a.json", value), images_root=images_root, max_refused_share=1)
    assert [record.question_id for record in result.records] == [0]
    expected: dict[str, int] = {"malformed_entry": 2, "duplicate_question_id": 1}
    for _, reason in bad:
        expected[reason] = expected.get(reason, 0) + 1
    assert reasons(result.refused, "questions") == expected
    with pytest.raises(DataError, match=r"93\.3% of the questions refused"):
        read_questions(tmp_path / "a.json", images_root=images_root)
    assert len(read_questions(tmp_path / "a.json", limit=1).records) == 1


def test_annotations_that_do_not_fit_their_questions(tmp_path: Path) -> None:
    answers = vqa_answers(2)
    answers["annotations"] += [
        {"question_id": 999, "answers": []},
        {"question_id": 100, "answers": [{"answer": "second"}]},
        {"question_id": 102},
        "text",
    ]
    path = write(tmp_path / "q.json", vqa_value())
    result = read_questions(path, write(tmp_path / "a.json", answers))
    assert [record.question_id for record in result.records] == [100, 101]
    assert result.records[0].answers[0] == "Answer 0"
    assert reasons(result.refused, "questions") == {"without_annotation": 1}
    assert reasons(result.refused, "annotations") == {
        "annotation_without_question": 1,
        "duplicate_question_id": 1,
        "malformed_entry": 2,
    }


def test_unusable_question_files(tmp_path: Path) -> None:
    path = write(tmp_path / "q.json", vqa_value())
    with pytest.raises(
        DataError, match=r"expected an object with the list 'annotations'.*its keys are \['questions'\]"
    ):
        read_questions(path, path)
    with pytest.raises(DataError, match=r"absent\.json: no such file"):
        read_questions(path, tmp_path / "absent.json")
    with pytest.raises(DataError, match="no usable questions"):
        read_questions(write(tmp_path / "e.json", []))
    with pytest.raises(DataError, match="the type of 'questions' is string"):
        read_questions(write(tmp_path / "e.json", {"questions": "what?"}))


@needs_data
def test_flickr8k_is_read_whole() -> None:
    annotations = DATA / "flickr8k" / "annotations" / "captions_val.json"
    val = read_captions(annotations, DATA / "flickr8k" / "images")
    assert isinstance(val, CaptionSet)
    assert (len(val.records), val.caption_count, val.refused.refused("images")) == (1000, 5000, 0)
    raw = json.loads(annotations.read_text(encoding="utf-8"))
    assert [record.image_id for record in val.records] == [image["id"] for image in raw["images"]]


@needs_data
@pytest.mark.slow
def test_coco_captions_are_read_whole() -> None:
    coco = read_captions(DATA / "coco_val2014_captions.json.gz")
    assert (len(coco.records), coco.caption_count) == (40_504, 202_654)


@needs_data
def test_daquar_and_okvqa_are_read_whole() -> None:
    test = read_questions(
        DATA / "daquar" / "annotations" / "questions_test.json", images_root=DATA / "daquar" / "images"
    )
    assert len(test.records) == 890 and all(record.answers for record in test.records)
    okvqa = DATA / "metric_fixtures" / "okvqa_official_vqaeval"
    official = read_questions(okvqa / "questions.json", okvqa / "annotations.json")
    assert len(official.records) == 5046
    assert {len(record.answers) for record in official.records} == {10}
