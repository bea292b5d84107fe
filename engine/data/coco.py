"""Captions and questions in COCO's file formats, read into plain records.

Records come in the order in which their image (or question) first appears in the file. Files may be gzip'd, whatever
their name. What is refused is counted and named in the set's `refused`; a file that cannot be used is a `DataError`.

Formats: COCO captions (`images`, `annotations`) and what `formats` brings into that form; VQA (a questions file and an
annotations file, visualqa.org), OK-VQA's too; GQA; and a flat list of questions, each with its image's file name and its
answers (DAQUAR, LAVIS).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .beton_member import BetonMember
from .captions import preprocess_caption, preprocess_question
from .formats import CaptionFormat, as_coco, as_vqa, caption_source, default_images, recognise
from .images import PIXEL_LIMIT
from .packed import is_pack, read_packed
from .reading import (
    DataError,
    ImageFinder,
    Refusal,
    RefusalReport,
    VerifyImages,
    check_options,
    check_outcome,
    is_id,
    kind,
    list_under,
    read_json,
    stem,
    text_fault,
)
from .tar_member import TarMember
from .webdataset import read_tars

if TYPE_CHECKING:
    from ..recipe import ImageData

__all__ = [
    "CaptionSet",
    "DataError",
    "ImageRecord",
    "QuestionRecord",
    "QuestionSet",
    "Refusal",
    "RefusalReport",
    "read_captions",
    "read_pack",
    "read_questions",
]

ImageId = int | str


@dataclass(frozen=True)
class ImageRecord:
    """One image and its captions, in file order; `path` is None in a text-only set, `domain` is NoCaps's."""

    image_id: ImageId
    path: Path | TarMember | BetonMember | None
    captions: list[str]
    domain: str | None = None


@dataclass(frozen=True)
class CaptionSet:
    name: str
    records: list[ImageRecord]
    refused: RefusalReport

    @property
    def caption_count(self) -> int:
        return sum(len(record.captions) for record in self.records)


@dataclass(frozen=True)
class QuestionRecord:
    """One question; `answers` as annotated (ten in VQA), empty where the file gives none."""

    question_id: ImageId
    image_id: ImageId
    path: Path | None
    question: str
    answers: list[str]


@dataclass(frozen=True)
class QuestionSet:
    name: str
    records: list[QuestionRecord]
    refused: RefusalReport


def read_image_data(entry: ImageData, verify_images: VerifyImages, name: str | None = None) -> CaptionSet:
    """The captioned images that a recipe's `data` entry names; raises DataError as `read_captions`."""
    limit = None if entry.limit is None else entry.skip + entry.limit
    if entry.format == "pack" or (entry.format == "auto" and is_pack(entry.captions)):
        if entry.images is not None or entry.split is not None:
            raise DataError(f"images, split: expected neither, because {entry.captions} is a packed set of one split")
        found = read_pack(
            entry.captions, name=name or entry.name, verify_images=verify_images, limit=limit,
            preprocess=False if entry.style == "conversation" else None,
        )  # fmt: skip
        return _after_skip(found, entry)
    source, in_tars = caption_source(entry.captions, entry.format)
    if in_tars:
        if entry.images is not None or entry.split is not None:
            raise DataError(
                f"images, split: expected neither, because the tars of {source} hold both images and captions"
            )
        samples, report = read_tars(source, verify_images=verify_images, limit=limit)
        records = [ImageRecord(sample.image_id, sample.image, [sample.caption]) for sample in samples]
        found = CaptionSet(name or entry.name, records, report)
    else:
        found = read_captions(
            source, entry.images or default_images(source, entry.format), name=name or entry.name,
            verify_images=verify_images, limit=limit, format=entry.format, split=entry.split,
            preprocess=False if entry.style == "conversation" else None,
        )  # fmt: skip
    return _after_skip(found, entry)


def _after_skip(found: CaptionSet, entry: ImageData) -> CaptionSet:
    if entry.skip >= len(found.records):
        raise DataError(
            f"skip: expected less than the {len(found.records):,} images of {entry.captions}, got {entry.skip}"
        )
    return CaptionSet(found.name, found.records[entry.skip :], found.refused)


def read_pack(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    preprocess: bool | None = None,
    max_words: int = 50,
    verify_images: VerifyImages = "header",
    max_pixels: int = PIXEL_LIMIT,
    limit: int | None = None,
    max_refused_share: float = 0.5,
) -> CaptionSet:
    """The captioned images of a set that `vpgtrans pack` has written: a folder or its `index.json`.

    Records equal those that `read_captions` gives for the set's source, but that each `path` is a `BetonMember`.

    Args:
        path, name, preprocess, max_words, verify_images, max_pixels, limit, max_refused_share: as in `read_captions`.

    Raises:
        DataError: the index, a shard or an option cannot be used, no image is usable, or too many are refused.
    """
    packed, samples, report = read_packed(
        path, preprocess=preprocess, max_words=max_words, verify_images=verify_images, max_pixels=max_pixels,
        limit=limit, max_refused_share=max_refused_share,
    )  # fmt: skip
    records = [ImageRecord(sample.image_id, sample.path, sample.captions, sample.domain) for sample in samples]
    return CaptionSet(name or packed.name, records, report)


def read_captions(
    path: str | os.PathLike[str],
    images_root: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    preprocess: bool | None = None,
    max_words: int = 50,
    verify_images: VerifyImages = "header",
    max_pixels: int = PIXEL_LIMIT,
    limit: int | None = None,
    max_refused_share: float = 0.5,
    format: CaptionFormat = "coco",
    split: str | None = None,
) -> CaptionSet:
    """Read COCO-style captions: `images` [{id, file_name}], `annotations` [{image_id, caption}], or another `format`.

    Args:
        path: the JSON file, plain or gzip'd.
        images_root: folder that file names start at; None reads the text alone and checks no image.
        name: of the set; by default the file's stem.
        preprocess: clean each caption with `preprocess_caption` and `max_words`; otherwise keep it as it is. By default
            all are cleaned but MiniGPT-4's, whose long answers the authors' code keeps.
        verify_images: 'header' opens each file and reads its header, 'full' decodes it, 'none' only builds paths.
        max_pixels: see `read_image`.
        limit: stop after this many usable images.
        max_refused_share: more than this share of the images refused is an error (a wrong folder, say).
        format: of the file, see `formats`; 'auto' recognises it by its shape. Tars are for `read_image_data`.
        split: 'train', 'val' or 'test' of Karpathy's own file, which holds all three.

    Raises:
        DataError: the file or an option cannot be used, no image is usable, or too many are refused.
    """
    source = os.fspath(path)
    check_options(limit, max_refused_share)
    if max_words < 1:
        raise DataError(f"max_words: expected 1 or more, got {max_words!r}; 50 is the reference's value")
    finder = ImageFinder(images_root, verify_images, max_pixels)
    expected = "an object with the lists 'images' and 'annotations' (COCO captions)"
    value, is_utf8 = read_json(source, expected if format == "coco" else "captions of images")
    if format == "auto":
        format = recognise(value, source)
    if format == "coco":
        list_under(value, "images", source, expected)
        list_under(value, "annotations", source, expected)
    form = as_coco(value, format, source, finder.root, split)
    images, annotations = form.images, form.annotations
    if preprocess is None:
        preprocess = format != "minigpt4"
    report = RefusalReport(source)
    captions_of = _captions_by_image(images, annotations, report, is_utf8, max_words if preprocess else None)

    records: list[ImageRecord] = []
    seen: set[ImageId] = set()
    for index, image in enumerate(images):
        if limit is not None and len(records) == limit:
            break
        report.examined["images"] += 1
        image_id = image.get("id") if isinstance(image, dict) else None
        where = f"images[{index}], id {image_id!a}"
        if not isinstance(image, dict) or not is_id(image_id):
            fault: tuple[str, str] | None = ("malformed_entry", "expected an object with an integer or string 'id'")
        elif image_id in seen:
            fault = ("duplicate_image_id", "the first entry with this id is used")
        elif not captions_of[image_id]:
            fault = ("without_captions", "no usable annotation has this image_id")
        else:
            image_path, fault = finder.locate(image.get("file_name"), is_utf8)
            if fault is None:
                domain = image.get("domain") if isinstance(image.get("domain"), str) else None
                records.append(ImageRecord(image_id, image_path, captions_of[image_id], domain))
        if fault is not None:
            report.add("images", fault[0], where, fault[1])
        if is_id(image_id):
            seen.add(image_id)
    check_outcome(report, "images", len(records), max_refused_share)
    return CaptionSet(name or stem(source), records, report)


def _captions_by_image(
    images: list[Any], annotations: list[Any], report: RefusalReport, is_utf8: bool, max_words: int | None
) -> dict[ImageId, list[str]]:
    """Usable captions of every image id; `max_words` None keeps the text as it is."""
    captions_of: dict[ImageId, list[str]] = {
        image["id"]: [] for image in images if isinstance(image, dict) and is_id(image.get("id"))
    }
    report.examined["captions"] = len(annotations)
    for index, annotation in enumerate(annotations):
        if not isinstance(annotation, dict) or "caption" not in annotation or not is_id(annotation.get("image_id")):
            detail = "expected an object with 'image_id' and 'caption'"
            report.add("captions", "malformed_entry", f"annotations[{index}]", detail)
            continue
        image_id, caption = annotation["image_id"], annotation["caption"]
        reason = text_fault(caption, "caption", is_utf8)
        if reason is None:
            text = caption if max_words is None else preprocess_caption(caption, max_words)
            reason = None if text.strip() else "caption_empty"
        if reason is None and image_id not in captions_of:
            reason = "annotation_without_image"
        if reason is None:
            captions_of[image_id].append(text)
        else:
            where = f"annotations[{index}], id {annotation.get('id')!a}, image_id {image_id!a}"
            report.add("captions", reason, where, ascii(caption)[:200])
    return captions_of


def read_questions(
    path: str | os.PathLike[str],
    annotations_path: str | os.PathLike[str] | None = None,
    images_root: str | os.PathLike[str] | None = None,
    *,
    image_name: str | None = None,
    name: str | None = None,
    preprocess: bool = True,
    verify_images: VerifyImages = "header",
    max_pixels: int = PIXEL_LIMIT,
    limit: int | None = None,
    max_refused_share: float = 0.5,
) -> QuestionSet:
    """Read questions and their answers, in VQA's format, GQA's, or as a flat list.

    VQA: `path` holds {`questions`: [{question_id, image_id, question}]}, `annotations_path` holds {`annotations`:
    [{question_id, answers: [{answer}]}]}; without it every record has no answers. Flat: `path` holds a list of
    {question_id, image_id, image, question, answers or answer}, the image_id taken from `image` where it is absent
    (LAVIS). GQA: `path` holds {question_id: {imageId, question, answer}}. Answers are kept as annotated, empty ones too:
    VQA's accuracy counts all ten. A question's image is its `image` or `file_name`; where it has neither, the name is
    built from `image_name`, else from the file's `data_subtype` as COCO names its files.

    Args:
        path, images_root, name, verify_images, max_pixels, limit: as in `read_captions`; limit counts questions.
        image_name: file name of an image id, such as 'COCO_val2014_{image_id:012d}.jpg'.
        preprocess: clean each question with `preprocess_question`; otherwise keep it as it is.
        max_refused_share: more than this share of the questions refused is an error.

    Raises:
        DataError: a file or an option cannot be used, no question is usable, or too many are refused.
    """
    source = os.fspath(path)
    check_options(limit, max_refused_share)
    finder = ImageFinder(images_root, verify_images, max_pixels)
    expected = "an object with the list 'questions' (VQA), GQA's object of questions, or a list of questions"
    value, is_utf8 = read_json(source, expected)
    value = as_vqa(value)
    questions = value if isinstance(value, list) else list_under(value, "questions", source, expected)
    subtype = value.get("data_subtype") if isinstance(value, dict) else None
    report = RefusalReport(source)
    answers_of = None if annotations_path is None else _answers_by_question(annotations_path, questions, report)

    records: list[QuestionRecord] = []
    seen: set[ImageId] = set()
    for index, entry in enumerate(questions):
        if limit is not None and len(records) == limit:
            break
        report.examined["questions"] += 1
        question_id = entry.get("question_id") if isinstance(entry, dict) else None
        where = f"questions[{index}], question_id {question_id!a}"
        if not isinstance(entry, dict) or not is_id(question_id) or not is_id(entry.get("image_id")):
            report.add("questions", "malformed_entry", where, "expected 'question_id' and 'image_id'")
            continue
        if question_id in seen:
            report.add("questions", "duplicate_question_id", where, "the first entry with this id is used")
            continue
        seen.add(question_id)
        raw_answers, answers_are_utf8 = _raw_answers(entry, answers_of, is_utf8)
        text, answers, fault = _question_texts(
            entry.get("question"), raw_answers, preprocess, is_utf8, answers_are_utf8
        )
        image_path = None
        if fault is None:
            file_name = _image_file_name(entry, image_name, subtype) if finder.root is not None else None
            image_path, fault = finder.locate(file_name, is_utf8)
        if fault is None:
            records.append(QuestionRecord(question_id, entry["image_id"], image_path, text, answers))
        else:
            report.add("questions", fault[0], where, fault[1])
    check_outcome(report, "questions", len(records), max_refused_share)
    return QuestionSet(name or stem(source), records, report)


def _answers_by_question(
    annotations_path: str | os.PathLike[str], questions: list[Any], report: RefusalReport
) -> tuple[dict[ImageId, Any], bool]:
    """Annotated answers by question id, still unchecked, and whether their file was UTF-8 throughout."""
    source = os.fspath(annotations_path)
    expected = "an object with the list 'annotations' (VQA)"
    value, is_utf8 = read_json(source, expected)
    known = {entry["question_id"] for entry in questions if isinstance(entry, dict) and is_id(entry.get("question_id"))}
    answers_of: dict[ImageId, Any] = {}
    for index, annotation in enumerate(list_under(value, "annotations", source, expected)):
        report.examined["annotations"] += 1
        question_id = annotation.get("question_id") if isinstance(annotation, dict) else None
        where = f"annotations[{index}], question_id {question_id!a}"
        if not isinstance(annotation, dict) or not is_id(question_id) or "answers" not in annotation:
            report.add("annotations", "malformed_entry", where, "expected 'question_id' and 'answers'")
        elif question_id not in known:
            report.add("annotations", "annotation_without_question", where)
        elif question_id in answers_of:
            report.add("annotations", "duplicate_question_id", where, "the first annotation is used")
        else:
            answers_of[question_id] = annotation["answers"]
    return answers_of, is_utf8


def _raw_answers(
    entry: dict[str, Any], answers_of: tuple[dict[ImageId, Any], bool] | None, is_utf8: bool
) -> tuple[Any, bool]:
    """A question's answers as its file gives them (None: none annotated), and whether that file was UTF-8."""
    if answers_of is not None:
        return answers_of[0].get(entry["question_id"]), answers_of[1]
    return entry.get("answers", entry.get("answer", [])), is_utf8


def _question_texts(
    question: Any, raw_answers: Any, preprocess: bool, is_utf8: bool, answers_are_utf8: bool
) -> tuple[str, list[str], tuple[str, str] | None]:
    """(question, answers, None), or the fault (reason, detail) that refuses them."""
    reason = text_fault(question, "question", is_utf8)
    if reason is not None:
        return "", [], (reason, ascii(question)[:200])
    text = preprocess_question(question) if preprocess else question
    if not text.strip():
        return "", [], ("question_empty", ascii(question)[:200])
    if raw_answers is None:
        return "", [], ("without_annotation", "the annotations file has no answers for it")
    listed = [raw_answers] if isinstance(raw_answers, str) else raw_answers
    if not isinstance(listed, list):
        return "", [], ("answers_not_a_list", f"got a {kind(listed)}")
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in listed]
    for answer in answers:
        reason = text_fault(answer, "answer", answers_are_utf8)
        if reason is not None:
            return "", [], (reason, ascii(answer)[:200])
    return text, answers, None


def _image_file_name(entry: dict[str, Any], image_name: str | None, subtype: Any) -> Any:
    named = entry.get("image", entry.get("file_name"))
    if named is not None:
        return named
    image_id = entry["image_id"]
    if image_name is not None:
        try:
            return image_name.format(image_id=image_id)
        except (ValueError, LookupError, AttributeError) as error:
            raise DataError(
                f"image_name: {image_name!r} cannot be filled in for image_id {image_id!r} ({error}); "
                "expected a pattern like 'COCO_val2014_{image_id:012d}.jpg'"
            ) from error
    if isinstance(subtype, str) and isinstance(image_id, int):
        # test-dev2015 is a choice of questions; its images are those of test2015
        return f"COCO_{subtype.replace('test-dev', 'test')}_{image_id:012d}.jpg"
    raise DataError(
        f"image_name: question {entry['question_id']!r} names no image file and the file has no 'data_subtype'; "
        "give image_name (--image-name), a pattern like 'COCO_val2014_{image_id:012d}.jpg'"
    )
