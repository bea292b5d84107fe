"""Data sets in their real file formats: exact records, and every kind of damage refused by name."""

from __future__ import annotations

import io
import json
import typing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vpgtrans.engine.data import coco, formats, prompts
from vpgtrans.engine.data.coco import DataError, ImageRecord, QuestionRecord, read_captions, read_questions
from vpgtrans.engine.recipe import ImageData


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def jpeg(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def place(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg())
    return root


def read(captions: Path | str, images: Path | None = None, **settings: Any) -> coco.CaptionSet:
    return coco.read_image_data(ImageData(captions=captions, images=images, **settings), "full")


def counts(found: coco.CaptionSet | coco.QuestionSet, unit: str) -> dict[str, int]:
    return dict(found.refused.counts.get(unit, {}))


# Karpathy


def test_lavis_list_of_karpathy_train_joins_captions_of_an_image(tmp_path: Path) -> None:
    name = "val2014/COCO_val2014_000000522418.jpg"
    value = [
        {"caption": "A woman wearing a net (cutting a cake).", "image": name, "image_id": "coco_522418"},
        {"caption": "A dog!", "image": "train2014/COCO_train2014_000000000009.jpg", "image_id": "coco_9"},
        {"caption": "A woman cuts a cake. ", "image": name, "image_id": "coco_522418"},
    ]
    root = place(tmp_path / "images", name, "train2014/COCO_train2014_000000000009.jpg")
    found = read(write(tmp_path / "coco_karpathy_train.json", value), root, name="coco")
    assert found.name == "coco"
    assert found.records == [
        ImageRecord("coco_522418", root / name, ["a woman wearing a net cutting a cake", "a woman cuts a cake"]),
        ImageRecord("coco_9", root / "train2014/COCO_train2014_000000000009.jpg", ["a dog"]),
    ]
    assert found.refused.summary() == "0 of 2 images refused; 0 of 3 captions refused"


def test_lavis_list_of_karpathy_val_has_lists_of_captions(tmp_path: Path) -> None:
    names = [f"val2014/COCO_val2014_{number:012d}.jpg" for number in (184613, 42)]
    value = [{"image": name, "caption": [f"One {i}.", "two"]} for i, name in enumerate(names)]
    root = place(tmp_path / "images", *names)
    path = write(tmp_path / "coco_karpathy_val.json", value)
    expected = [
        ImageRecord(184613, root / names[0], ["one 0", "two"]),
        ImageRecord(42, root / names[1], ["one 1", "two"]),
    ]
    assert read(path, root).records == expected
    assert read(path, root, format="karpathy", skip=1, limit=1).records == expected[1:]
    assert read(path, root, limit=1).records == expected[:1]


def karpathy() -> dict[str, Any]:
    def image(number: int, split: str, **more: Any) -> dict[str, Any]:
        sentences = [{"raw": f"Raw {number}.", "tokens": ["no"], "imgid": 0, "sentid": number}]
        return {
            "filepath": "val2014",
            "filename": f"{number}.jpg",
            "cocoid": number,
            "split": split,
            "sentences": sentences,
            **more,
        }

    return {"dataset": "coco", "images": [image(1, "test"), image(2, "restval"), image(3, "train"), image(4, "val")]}


def test_karpathys_own_file_by_split(tmp_path: Path) -> None:
    root = place(tmp_path / "images", *(f"val2014/{number}.jpg" for number in range(1, 5)))
    path = write(tmp_path / "dataset_coco.json", karpathy())
    for split, numbers in {"train": [2, 3], "val": [4], "test": [1]}.items():
        found = read(path, root, split=split)
        assert found.records == [ImageRecord(n, root / f"val2014/{n}.jpg", [f"raw {n}"]) for n in numbers]
        assert found.refused.examined == {"images": len(numbers), "captions": len(numbers)}
    with pytest.raises(
        DataError, match=r"split: expected one of train, val, test, because .*holds \['restval', 'test'.*got nothing"
    ):
        read(path, root)


def test_flickr_in_karpathys_form_has_neither_cocoid_nor_folder(tmp_path: Path) -> None:
    value = {
        "images": [{"filename": "a.jpg", "imgid": 7, "split": "train", "sentences": [{"raw": "A b", "sentid": 1}]}]
    }
    root = place(tmp_path / "images", "a.jpg")
    path = write(tmp_path / "dataset_flickr8k.json", value)
    assert read(path, root, split="train").records == [ImageRecord(7, root / "a.jpg", ["a b"])]
    with pytest.raises(DataError, match="has no images of the split 'val', it holds \\['train'\\]"):
        read(path, root, split="val")


def test_karpathy_damage_is_counted(tmp_path: Path) -> None:
    value = karpathy()
    images = value["images"]
    images += [
        dict(images[2]),
        {**images[2], "cocoid": 5, "filename": "gone.jpg"},
        {**images[2], "cocoid": 6, "sentences": None},
    ]
    images += [{**images[2], "cocoid": None}, "no object"]
    images += [{**images[2], "cocoid": 8, "sentences": ["no object", {"raw": 5}, {"raw": "Good"}]}]
    root = place(tmp_path / "images", "val2014/2.jpg", "val2014/3.jpg")
    found = read_captions(write(tmp_path / "a.json", value), root, format="auto", split="train", max_refused_share=1.0)
    assert [(r.image_id, r.captions) for r in found.records] == [(2, ["raw 2"]), (3, ["raw 3"]), (8, ["good"])]
    assert counts(found, "images") == {
        "duplicate_image_id": 1,
        "missing": 1,
        "without_captions": 1,
        "malformed_entry": 2,
    }
    assert counts(found, "captions") == {"malformed_entry": 3, "caption_not_a_string": 1}


def test_a_split_is_refused_where_the_file_has_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [{"image": "a.jpg", "caption": "a"}])
    with pytest.raises(DataError, match=r"split: expected none for .*a.json"):
        read(path, place(tmp_path / "images", "a.jpg"), split="val")


# Visual Genome


def test_region_descriptions_find_either_folder(tmp_path: Path) -> None:
    def region(number: int, image: int, phrase: str) -> dict[str, Any]:
        return {"region_id": number, "width": 4, "height": 4, "image_id": image, "phrase": phrase, "y": 0, "x": 0}

    value = [
        {"id": 1, "regions": [region(10, 1, "The clock is green."), region(11, 1, "shade is along the street ")]},
        {"id": 2, "regions": [region(20, 2, "a man")]},
        {"id": 3, "regions": [region(30, 3, "lost")]},
        {"id": 2, "regions": [region(21, 2, "twice")]},
        {"id": 4, "regions": []},
        {"id": 5},
    ]
    root = place(tmp_path, "VG_100K/1.jpg", "VG_100K_2/2.jpg")
    path = write(tmp_path / "region_descriptions.json", value)
    found = read_captions(path, root, format="auto", max_refused_share=1.0)
    assert found.records == [
        ImageRecord(1, root / "VG_100K/1.jpg", ["the clock is green", "shade is along the street"]),
        ImageRecord(2, root / "VG_100K_2/2.jpg", ["a man"]),
    ]
    assert counts(found, "images") == {
        "missing": 1,
        "duplicate_image_id": 1,
        "without_captions": 1,
        "malformed_entry": 1,
    }
    assert found.refused.examined["captions"] == 4


def test_lavis_vg_caption(tmp_path: Path) -> None:
    value = [
        {"image": "VG_100K/61512.jpg", "caption": "White wall; a lamp", "dataset": "vg"},
        {"image": "VG_100K/61512.jpg", "caption": "a lamp", "dataset": "vg"},
    ]
    root = place(tmp_path, "VG_100K/61512.jpg")
    path = write(tmp_path / "vg_caption.json", value)
    expected = [ImageRecord("VG_100K/61512", root / "VG_100K/61512.jpg", ["white wall a lamp", "a lamp"])]
    assert read(path, root).records == expected
    assert read(path, root, format="visual_genome").records == expected
    assert formats.recognise(value, "x") == "visual_genome"


def test_damaged_list_entries(tmp_path: Path) -> None:
    value = [
        {"image": "a.jpg", "caption": "good", "image_id": 1},
        {"image": "b.jpg", "caption": "stolen id", "image_id": 1},
        {"image": "b.jpg", "caption": "stolen id again", "image_id": 1},
        {"image": "../c.jpg", "caption": "outside"},
        {"image": "d.jpg", "caption": "missing"},
        {"caption": "no image"},
        {"image": 5, "caption": "a number"},
        {"image": "e.jpg", "caption": "..."},
        {"image": "f.jpg"},
        {"image": "g.jpg", "caption": ["fine", 7]},
        "no object",
    ]
    root = place(tmp_path / "images", "a.jpg", "b.jpg", "e.jpg", "f.jpg", "g.jpg")
    (tmp_path / "c.jpg").write_bytes(jpeg())
    found = read_captions(write(tmp_path / "a.json", value), root, format="auto", max_refused_share=1.0)
    assert found.records == [ImageRecord(1, root / "a.jpg", ["good"]), ImageRecord("g", root / "g.jpg", ["fine"])]
    assert counts(found, "images") == {
        "duplicate_image_id": 1,
        "file_name_outside_images_root": 1,
        "missing": 1,
        "file_name_missing": 1,
        "file_name_not_a_string": 1,
        "without_captions": 2,
        "malformed_entry": 1,
    }
    assert counts(found, "captions") == {"caption_empty": 1, "caption_not_a_string": 2}
    assert any("entry 7" in refusal.where for refusal in found.refused.named if refusal.reason == "caption_empty")


# SBU


def test_sbu_list_and_original(tmp_path: Path) -> None:
    listed = [
        {"image": "0.jpg", "caption": "Red car.", "url": "http://static.flickr.com/1/0_a.jpg"},
        {"image": "4385058960_b0f291553e.jpg", "caption": "a chair", "url": "http://static.flickr.com/2/x.jpg"},
    ]
    root = place(tmp_path / "images", "0.jpg", "4385058960_b0f291553e.jpg")
    path = write(tmp_path / "sbu.json", listed)
    assert formats.recognise(listed, "x") == "sbu"
    assert read(path, root).records == [
        ImageRecord("0", root / "0.jpg", ["red car"]),
        ImageRecord("4385058960_b0f291553e", root / "4385058960_b0f291553e.jpg", ["a chair"]),
    ]
    original = {
        "image_urls": [
            "http://static.flickr.com/2723/other_name.jpg",
            "http://static.flickr.com/2723/4385058960_b0f291553e.jpg?x=1",
            "http://static.flickr.com/gone.jpg",
        ],
        "captions": ["Red car.", "a chair", "gone"],
        "user_ids": ["1", "2", "3"],
    }
    found = read(write(tmp_path / "sbu-captions-all.json", original), root)
    assert found.records == [
        ImageRecord(0, root / "0.jpg", ["red car"]),
        ImageRecord(1, root / "4385058960_b0f291553e.jpg", ["a chair"]),
    ]
    assert counts(found, "images") == {"missing": 1}
    assert "2.jpg" in found.refused.named[0].detail
    del original["captions"][0]
    with pytest.raises(DataError, match="expected as many captions as image_urls, got 2 and 3"):
        read(write(tmp_path / "sbu-captions-all.json", original), root)


# NoCaps and MiniGPT-4


def test_nocaps_keeps_domains(tmp_path: Path) -> None:
    url = "https://s3.amazonaws.com/nocaps/val/"
    value = {
        "info": {},
        "images": [
            {
                "id": 0,
                "open_images_id": "0013ea",
                "file_name": "0013ea.jpg",
                "coco_url": url + "0013ea.jpg",
                "domain": "in-domain",
            },
            {"id": 1, "open_images_id": "00a1", "coco_url": url + "00a1.jpg", "domain": "near-domain"},
            {"id": 2, "open_images_id": "00b2", "domain": "out-domain"},
        ],
        "annotations": [{"id": i, "image_id": i % 3, "caption": f"Caption {i}."} for i in range(6)],
    }
    root = place(tmp_path / "val", "0013ea.jpg", "00a1.jpg", "00b2.jpg")
    path = write(tmp_path / "nocaps_val_4500_captions.json", value)
    expected = [
        ImageRecord(0, root / "0013ea.jpg", ["caption 0", "caption 3"], "in-domain"),
        ImageRecord(1, root / "00a1.jpg", ["caption 1", "caption 4"], "near-domain"),
        ImageRecord(2, root / "00b2.jpg", ["caption 2", "caption 5"], "out-domain"),
    ]
    assert formats.recognise(value, "x") == "nocaps"
    assert read(path, root).records == read(path, root, format="nocaps").records == expected
    assert read(path, root, skip=2).records == expected[2:]


def test_minigpt4_alignment_folder_keeps_its_text(tmp_path: Path) -> None:
    long_answer = "The image shows a hut, (by a lake). " + "It is sunny. " * 30
    annotations = [
        {"image_id": "2", "caption": long_answer},
        {"image_id": "9", "caption": "Gone."},
        {"image_id": "../4", "caption": "x"},
    ]
    folder = tmp_path / "cc_sbu_align"
    place(folder / "image", "2.jpg")
    place(folder, "4.jpg")
    path = write(
        folder / "filter_cap.json",
        {"annotations": [*annotations, {"image_id": "2", "caption": "Also."}, {"caption": "?"}]},
    )
    expected = [ImageRecord("2", folder / "image" / "2.jpg", [long_answer, "Also."])]
    found = read_captions(path, folder / "image", format="auto", max_refused_share=1.0)
    assert found.records == expected
    assert counts(found, "images") == {"missing": 1, "file_name_outside_images_root": 1}
    assert counts(found, "captions") == {"malformed_entry": 1}
    write(path, {"annotations": annotations[:1]})
    alone = [ImageRecord("2", folder / "image" / "2.jpg", [long_answer])]
    assert read(folder).records == read(path).records == read(path, format="minigpt4").records == alone
    assert (
        read_captions(path, format="minigpt4", preprocess=True)
        .records[0]
        .captions[0]
        .startswith("the image shows a hut, by a")
    )


# Recognition


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ({"data": [], "version": 1}, r"an object with the keys \['data', 'version'\]"),
        ([{"file": "a.jpg", "text": "a"}], r"a list whose first object has the keys \['file', 'text'\]"),
        ([], "a list without objects"),
        ("text", "a string"),
        ({"images": [{"id": 1}]}, r"an object with the keys \['images'\]"),
    ],
)
def test_unknown_shapes_are_named(tmp_path: Path, value: Any, seen: str) -> None:
    with pytest.raises(
        DataError, match=f"a.json: fits no known format of captions: it holds {seen}; expected one of: coco: "
    ):
        read(write(tmp_path / "a.json", value), tmp_path)


@pytest.mark.parametrize("format", ["coco", "karpathy", "visual_genome", "sbu", "nocaps", "minigpt4"])
def test_a_named_format_that_does_not_fit(tmp_path: Path, format: str) -> None:
    path = write(tmp_path / "a.json", {"neither": []})
    with pytest.raises(DataError, match=r"expected .*(neither|split)"):
        read(path, tmp_path, format=format)
    regions = write(tmp_path / "b.json", [{"id": 1, "regions": []}])
    if format != "visual_genome":
        with pytest.raises(DataError, match=r"b.json: expected .*got a (top-level )?list"):
            read(regions, tmp_path, format=format)


def test_plain_coco_is_recognised_and_folders_explained(tmp_path: Path) -> None:
    value = {"images": [{"id": 3, "file_name": "a.jpg"}], "annotations": [{"image_id": 3, "caption": "A b."}]}
    root = place(tmp_path / "images", "a.jpg")
    path = write(tmp_path / "captions.json", value)
    assert read(path, root).records == [ImageRecord(3, root / "a.jpg", ["a b"])]
    with pytest.raises(
        DataError, match=r"expected filter_cap.json or .tar files, got a folder with \['captions.json', 'images'\]"
    ):
        read(tmp_path)
    with pytest.raises(
        ValueError, match=r"images: expected the folder of images that .*captions.json names, got nothing"
    ):
        ImageData(captions=path)


def test_recipe_and_reader_know_the_same_formats() -> None:
    assert typing.get_args(ImageData.model_fields["format"].annotation) == (*formats.CAPTION_FORMATS, "pack")
    with pytest.raises(ValueError, match="format"):
        ImageData(captions="a.json", images=".", format="voc")
    with pytest.raises(DataError, match="format: expected one of auto, coco"):
        formats.caption_source("a.json", "voc")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"format: expected one of coco, .* for a.json, got 'laion_coco'"):
        formats.as_coco({}, "laion_coco", "a.json")


# Questions


def test_vqa_and_okvqa_official_files(tmp_path: Path) -> None:
    questions = {
        "data_subtype": "val2014",
        "questions": [
            {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
            {"image_id": 262148, "question": "What (sport)?", "question_id": 262148001},
            {"image_id": 262148, "question": "Nobody answered?", "question_id": 262148002},
            {"image_id": 1, "question": "Lost?", "question_id": 10},
        ],
    }
    answers = [
        {"answer": "down", "raw_answer": "Down", "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)
    ]
    annotations = {
        "annotations": [{"question_id": q, "image_id": 262148, "answers": answers} for q in (262148000, 262148001, 10)]
    }
    root = place(tmp_path / "val2014", "COCO_val2014_000000262148.jpg")
    found = read_questions(write(tmp_path / "q.json", questions), write(tmp_path / "a.json", annotations), root)
    image = root / "COCO_val2014_000000262148.jpg"
    assert found.records == [
        QuestionRecord(262148000, 262148, image, "where is he looking?", ["down"] * 10),
        QuestionRecord(262148001, 262148, image, "what sport?", ["down"] * 10),
    ]
    assert counts(found, "questions") == {"without_annotation": 1, "missing": 1}


def test_lavis_vqa_eval_list(tmp_path: Path) -> None:
    name = "val2014/COCO_val2014_000000262148.jpg"
    entry = {
        "question_id": 262148000,
        "question": "Where?",
        "answer": ["down", "down", "table"],
        "image": name,
        "dataset": "vqa",
    }
    value = [
        entry,
        {**entry, "question": "twice"},
        {**entry, "question_id": 2, "image": "val2014/COCO_val2014_000000000002.jpg"},
    ]
    root = place(tmp_path / "images", name)
    found = read_questions(write(tmp_path / "vqa_val_eval.json", value), None, root, max_refused_share=1.0)
    assert found.records == [QuestionRecord(262148000, 262148, root / name, "where?", ["down", "down", "table"])]
    assert counts(found, "questions") == {"duplicate_question_id": 1, "missing": 1}


def test_gqa_testdev(tmp_path: Path) -> None:
    value = {
        "201307251": {
            "imageId": "n161313",
            "question": "Is it overcast?",
            "answer": "no",
            "fullAnswer": "No.",
            "isBalanced": True,
        },
        "201640614": {"imageId": "n235859", "question": "Who is wearing the dress?", "answer": "woman"},
        "3": {"imageId": "n161313", "question": "Unanswered?"},
        "4": {"question": "no image", "answer": "no"},
        "5": "no object",
    }
    root = place(tmp_path / "images", "n161313.jpg", "n235859.jpg")
    path = write(tmp_path / "testdev_balanced_questions.json", value)
    found = read_questions(path, None, root)
    assert found.records == [
        QuestionRecord("201307251", "n161313", root / "n161313.jpg", "is it overcast?", ["no"]),
        QuestionRecord("201640614", "n235859", root / "n235859.jpg", "who is wearing the dress?", ["woman"]),
        QuestionRecord("3", "n161313", root / "n161313.jpg", "unanswered?", []),
    ]
    assert counts(found, "questions") == {"malformed_entry": 2}
    assert len(read_questions(path, limit=1).records) == 1
    with pytest.raises(DataError, match=r"GQA's object of questions.*its keys are \['other'\]"):
        read_questions(write(tmp_path / "x.json", {"other": {}}))


# Prompts


def test_prompts_of_the_reference() -> None:
    assert prompts.vqa_prompt("what {colour}?", encoder_decoder=False) == "Question: what {colour}? Answer:"
    assert prompts.vqa_prompt("who?", encoder_decoder=True) == "Question: who? Short answer:"
    assert prompts.CAPTION_PROMPT == ""
    with pytest.raises(TypeError, match="question: expected a string, got list"):
        prompts.vqa_prompt(["who?"], False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="question: expected some text"):
        prompts.vqa_prompt(" ", False)
