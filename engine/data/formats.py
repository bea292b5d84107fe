"""Caption files of the field's data sets, brought into COCO's form (`images`, `annotations`) for `read_captions`.

| format | file |
| --- | --- |
| coco | {images: [{id, file_name}], annotations: [{image_id, caption}]} |
| karpathy | Karpathy's dataset_coco.json (also Flickr8k, Flickr30k) with its splits; or LAVIS's list |
| visual_genome | region_descriptions.json; or LAVIS's list |
| sbu | sbu-captions-all.json; or LAVIS's list |
| nocaps | COCO's form, with `domain` and `open_images_id` an image |
| minigpt4 | filter_cap.json beside the folder `image` (MiniGPT-4's alignment set) |
| laion_coco | WebDataset tars, see `webdataset` |

LAVIS's list holds {image, caption} with one caption or a list of captions an entry, for whichever data set. Entries are
not judged here but passed on, so that the reader refuses and counts them; captions of an image whose id another image
has already taken are left out with it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from .reading import DataError, is_id, kind
from .webdataset import is_pattern

CaptionFormat = Literal["auto", "coco", "karpathy", "visual_genome", "sbu", "laion_coco", "nocaps", "minigpt4"]
CAPTION_FORMATS: tuple[str, ...] = get_args(CaptionFormat)
SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}  # restval trains, as usual since Karpathy
MINIGPT4_FILE = "filter_cap.json"

_COCO_NAME = re.compile(r"COCO_[A-Za-z0-9]+_0*(\d+)")
_SHAPES = {
    "coco": "an object with the lists 'images' and 'annotations'",
    "nocaps": "an object with the lists 'images' and 'annotations'",
    "karpathy": "an object with 'images' that have 'sentences' and 'split', or a list of {image, caption}",
    "visual_genome": "a list of {id, regions: [{phrase}]}, or a list of {image, caption}",
    "sbu": "an object with the lists 'image_urls' and 'captions', or a list of {image, caption}",
    "minigpt4": "an object with 'annotations' [{image_id, caption}] and no 'images'",
}


@dataclass
class CocoForm:
    """`images` [{id, file_name, domain?}] and `annotations` [{id, image_id, caption}], as `read_captions` takes them."""

    images: list[Any] = field(default_factory=list)
    annotations: list[Any] = field(default_factory=list)
    _taken: set[Any] = field(default_factory=set)

    def add_image(self, image_id: Any, file_name: Any, **more: Any) -> bool:
        """Whether the image's captions are wanted: not where another image has this id."""
        self.images.append({"id": image_id, "file_name": file_name, **more})
        if not is_id(image_id):
            return True
        is_new = image_id not in self._taken
        self._taken.add(image_id)
        return is_new


def caption_source(path: str | os.PathLike[str], format: CaptionFormat) -> tuple[str, bool]:
    """(the JSON file, False), or (tar, folder or pattern, True) for WebDataset tars.

    A folder is MiniGPT-4's where it holds `filter_cap.json`, and WebDataset's where it holds tars.

    Raises:
        DataError: the format is not known, or a folder fits none.
    """
    name = os.fspath(path)
    if format not in CAPTION_FORMATS:
        raise DataError(f"format: expected one of {', '.join(CAPTION_FORMATS)}, got {format!r}")
    if format == "laion_coco":
        return name, True
    if os.path.isdir(name):
        inside = sorted(os.listdir(name))
        if MINIGPT4_FILE in inside and format in ("auto", "minigpt4"):
            return os.path.join(name, MINIGPT4_FILE), False
        if format == "auto" and any(entry.endswith(".tar") for entry in inside):
            return name, True
        wanted = f"{MINIGPT4_FILE} or .tar files" if format == "auto" else f"a file of captions for format {format!r}"
        raise DataError(f"{name}: expected {wanted}, got a folder with {inside[:8]}; name the file itself")
    tars = name.endswith((".tar", ".tar.gz", ".tgz")) or (is_pattern(name) and not os.path.exists(name))
    return name, format == "auto" and tars


def recognise(value: Any, source: str) -> str:
    """The format of a parsed caption file, by its shape; raises DataError that says what the file holds instead."""
    if isinstance(value, list):
        first = next((entry for entry in value if isinstance(entry, dict)), {})
        if "regions" in first:
            return "visual_genome"
        if "image" in first and "caption" in first:
            return "sbu" if "url" in first else "visual_genome" if first.get("dataset") == "vg" else "karpathy"
        seen = f"a list whose first object has the keys {sorted(first)[:8]}" if first else "a list without objects"
    elif isinstance(value, dict):
        if isinstance(value.get("images"), list):
            first = next((entry for entry in value["images"] if isinstance(entry, dict)), {})
            if "sentences" in first:
                return "karpathy"
            if "annotations" in value:
                return "nocaps" if "domain" in first or "open_images_id" in first else "coco"
        elif "image_urls" in value and "captions" in value:
            return "sbu"
        elif isinstance(value.get("annotations"), list):
            return "minigpt4"
        seen = f"an object with the keys {sorted(value)[:8]}"
    else:
        seen = f"a {kind(value)}"
    expected = "; ".join(f"{name}: {shape}" for name, shape in _SHAPES.items() if name != "nocaps")
    raise DataError(f"{source}: fits no known format of captions: it holds {seen}; expected one of: {expected}")


def as_coco(value: Any, format: str, source: str, images_root: str | None = None, split: str | None = None) -> CocoForm:
    """A parsed caption file of a known `format` in COCO's form.

    Args:
        value: the parsed JSON.
        format: from `recognise`, or named by the user.
        source: the file's name, for messages.
        images_root: where a format allows several names for an image, the first that exists below it is taken.
        split: 'train', 'val' or 'test' of Karpathy's own file, which holds all three; None for every other.

    Raises:
        DataError: the file has another shape, or the split is missing, unknown or out of place.
    """
    if format not in _SHAPES:
        raise DataError(f"format: expected one of {', '.join(_SHAPES)} for {source}, got {format!r}")
    has_splits = isinstance(value, dict) and format == "karpathy"
    if split is not None and not has_splits:
        raise DataError(f"split: expected none for {source}, which holds a single split, got {split!r}; leave it out")
    if format in ("coco", "nocaps") and _has_lists(value, "images", "annotations"):
        return CocoForm(
            value["images"] if format == "coco" else [_nocaps_image(image, images_root) for image in value["images"]],
            value["annotations"],
        )
    if has_splits and _has_lists(value, "images"):
        return _karpathy(value["images"], source, split)
    if format == "minigpt4" and _has_lists(value, "annotations"):
        return _minigpt4(value["annotations"])
    if format == "sbu" and _has_lists(value, "image_urls", "captions"):
        return _sbu(value["image_urls"], value["captions"], source, images_root)
    if isinstance(value, list):
        first = next((entry for entry in value if isinstance(entry, dict)), {})
        if format == "visual_genome" and "regions" in first:
            return _visual_genome(value, images_root)
        if format in ("karpathy", "visual_genome", "sbu") and "regions" not in first:
            return _listed(value)
    keys = f" with the keys {sorted(value)[:8]}" if isinstance(value, dict) else ""
    raise DataError(
        f"{source}: expected format {format!r}, {_SHAPES[format]}; got a {kind(value)}{keys}; correct the recipe's "
        "`format`, or leave it at 'auto'"
    )


def _has_lists(value: Any, *keys: str) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), list) for key in keys)


def image_id_of(file_name: Any) -> Any:
    """The id of an image that is known by its file alone: COCO's number, else its path without the suffix.

    `val2014/COCO_val2014_000000522418.jpg` -> 522418, `VG_100K/61512.jpg` -> 'VG_100K/61512'; None for what is no name.
    """
    if not isinstance(file_name, str) or not file_name:
        return None
    stem = os.path.splitext(file_name)[0]
    number = _COCO_NAME.fullmatch(os.path.basename(stem))
    return int(number[1]) if number else stem


def _first_present(names: Iterable[Any], images_root: str | None) -> Any:
    """Of several possible names the first that is a file below `images_root`, else the first of all."""
    possible = [name for name in names if isinstance(name, str) and name and "\0" not in name]
    if images_root is not None and len(possible) > 1:
        return next((name for name in possible if os.path.isfile(os.path.join(images_root, name))), possible[0])
    return possible[0] if possible else None


def _last_of_url(url: Any) -> str | None:
    if not isinstance(url, str):
        return None
    try:
        return urlsplit(url).path.rpartition("/")[2] or None
    except ValueError:  # "http://[": not a URL
        return None


def _nocaps_image(image: Any, images_root: str | None) -> Any:
    if not isinstance(image, dict):
        return image
    from_id = f"{image['open_images_id']}.jpg" if isinstance(image.get("open_images_id"), str) else None
    names = [image.get("file_name"), _last_of_url(image.get("coco_url")), from_id]
    return {**image, "file_name": _first_present(names, images_root)}


def _karpathy(images: list[Any], source: str, split: str | None) -> CocoForm:
    present = sorted({str(image.get("split")) for image in images if isinstance(image, dict)})
    if split not in SPLITS:
        got = "nothing" if split is None else repr(split)
        raise DataError(f"split: expected one of {', '.join(SPLITS)}, because {source} holds {present}; got {got}")
    result = CocoForm()
    for image in images:
        if not isinstance(image, dict):
            result.images.append(image)
            continue
        if image.get("split") not in SPLITS[split]:
            continue
        image_id = image.get("cocoid", image.get("imgid"))
        folder, file_name = image.get("filepath"), image.get("filename")
        if isinstance(folder, str) and isinstance(file_name, str):
            file_name = f"{folder}/{file_name}" if folder else file_name
        if not result.add_image(image_id, file_name):
            continue
        sentences = image.get("sentences")
        for sentence in sentences if isinstance(sentences, list) else [sentences]:
            result.annotations.append(
                {"id": sentence.get("sentid"), "image_id": image_id, "caption": sentence.get("raw")}
                if isinstance(sentence, dict)
                else sentence
            )
    if not result.images:
        raise DataError(f"split: {source} has no images of the split {split!r}, it holds {present}")
    return result


def _listed(entries: list[Any]) -> CocoForm:
    """LAVIS's list; entries with the same `image` are captions of one image, whose id is the first entry's."""
    result = CocoForm()
    id_of: dict[str, Any] = {}  # None where another image has the id
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            result.images.append(entry)
            continue
        image = entry.get("image")
        if not isinstance(image, str) or image not in id_of:
            named = [entry.get("image_id"), entry.get("img_id"), image_id_of(image), f"entry {index}"]
            image_id = next(one for one in named if is_id(one))
            domain = {"domain": entry["domain"]} if "domain" in entry else {}
            wanted = result.add_image(image_id, image, **domain)
            if isinstance(image, str):
                id_of[image] = image_id if wanted else None
        else:
            image_id, wanted = id_of[image], id_of[image] is not None
        if wanted:
            captions = entry.get("caption")
            for caption in captions if isinstance(captions, list) else [captions]:
                result.annotations.append({"id": f"entry {index}", "image_id": image_id, "caption": caption})
    return result


def _visual_genome(entries: list[Any], images_root: str | None) -> CocoForm:
    result = CocoForm()
    for entry in entries:
        regions = entry.get("regions") if isinstance(entry, dict) else None
        if not isinstance(regions, list):
            result.images.append(entry if not isinstance(entry, dict) else {"id": None})
            continue
        image_id = entry.get("id", entry.get("image_id"))
        if image_id is None and regions and isinstance(regions[0], dict):
            image_id = regions[0].get("image_id")
        names = [f"{folder}{image_id}.jpg" for folder in ("VG_100K/", "VG_100K_2/", "")]
        if not result.add_image(image_id, _first_present(names, images_root)):
            continue
        for region in regions:
            result.annotations.append(
                {"id": region.get("region_id"), "image_id": image_id, "caption": region.get("phrase")}
                if isinstance(region, dict)
                else region
            )
    return result


def _sbu(urls: list[Any], captions: list[Any], source: str, images_root: str | None) -> CocoForm:
    if len(urls) != len(captions):
        raise DataError(
            f"{source}: expected as many captions as image_urls, got {len(captions):,} and {len(urls):,}; download it again"
        )
    result = CocoForm()
    for index, (url, caption) in enumerate(zip(urls, captions, strict=True)):
        result.add_image(index, _first_present([f"{index}.jpg", _last_of_url(url)], images_root))
        result.annotations.append({"id": index, "image_id": index, "caption": caption})
    return result


def _minigpt4(annotations: list[Any]) -> CocoForm:
    result = CocoForm(annotations=annotations)
    for image_id in dict.fromkeys(
        a["image_id"] for a in annotations if isinstance(a, dict) and is_id(a.get("image_id"))
    ):
        result.add_image(image_id, f"{image_id}.jpg")
    return result


def default_images(source: str, format: str) -> Path:
    """The folder of images where the recipe names none: MiniGPT-4's `image` beside its file; DataError for the rest."""
    path = Path(source)
    if format == "minigpt4" or (format == "auto" and path.name == MINIGPT4_FILE):
        return path.parent / "image"
    raise DataError(f"images: expected the folder of images that {source} names, got nothing; only tars hold their own")


def as_vqa(value: Any) -> Any:
    """A parsed file of questions as `read_questions` takes it: GQA's object becomes a list, absent image ids are filled in.

    GQA (testdev_balanced_questions.json): {question id: {imageId, question, answer}}. LAVIS's lists (vqa_val_eval.json)
    name an image's file but not its id; the id is then `image_id_of` that file. Anything else passes unchanged.
    """
    if isinstance(value, dict) and "questions" not in value:
        first = next(iter(value.values()), None)
        if isinstance(first, dict) and "imageId" in first:
            return [_gqa_question(question_id, entry) for question_id, entry in value.items()]
    if isinstance(value, list):
        return [
            {**entry, "image_id": image_id_of(entry["image"])}
            if isinstance(entry, dict) and "image" in entry and "image_id" not in entry
            else entry
            for entry in value
        ]
    return value


def _gqa_question(question_id: str, entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    image_id = entry.get("imageId")
    question = {"question_id": question_id, "image_id": image_id, "question": entry.get("question")}
    if "answer" in entry:  # the challenge's questions have none
        question["answer"] = entry["answer"]
    return {**question, "image": f"{image_id}.jpg"}
