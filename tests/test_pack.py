"""vpgtrans pack: what is stored, what is refused, resuming, a full disk, and training from the packed set."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vpgtrans.engine.cli import main
from vpgtrans.engine.data import pack as pack_module
from vpgtrans.engine.data.beton import BetonReader
from vpgtrans.engine.data.coco import read_captions, read_image_data, read_pack
from vpgtrans.engine.data.images import ImageRefused, load_pixels, read_header, read_image
from vpgtrans.engine.data.pack import PackSettings, pack
from vpgtrans.engine.data.packed import is_pack
from vpgtrans.engine.data.reading import DataError
from vpgtrans.engine.loop import run
from vpgtrans.engine.recipe import ImageData, RecipeError, load_recipe


def encoded(image: Image.Image, format: str = "JPEG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def picture(width: int = 40, height: int = 24, shift: int = 0) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([rows * 6 + shift, columns * 5, rows + columns], -1).clip(0, 255).astype(np.uint8))


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), exif=exif)


def source(folder: Path, files: dict[str, bytes | None]) -> Path:
    """A caption file of images named by their file, two captions each; None: the file is not there."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, (name, content) in enumerate(files.items()):
        if content is not None:
            (folder / "images" / name).write_bytes(content)
        images.append({"id": number, "file_name": name})
        annotations += [{"id": 2 * number + k, "image_id": number, "caption": f"A {name}: {k}!"} for k in range(2)]
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def packed(tmp_path: Path, files: dict[str, bytes | None], out: str = "out", **settings: Any) -> dict[str, Any]:
    options = {
        k: settings.pop(k)
        for k in list(settings)
        if k in ("jobs", "limit", "max_refused_share", "questions", "answers")
    }
    return pack(
        source(tmp_path, files), tmp_path / out, PackSettings(**settings), images=tmp_path / "images", **options
    )


def stored(tmp_path: Path, out: str = "out") -> list[dict[str, Any]]:
    reader = BetonReader(tmp_path / out / "captions-00000.beton")
    return [reader.read(i) for i in range(len(reader))]


def test_jpegs_pass_untouched_and_the_rest_is_converted(tmp_path):
    cmyk, palette = picture().convert("CMYK"), picture().convert("P")
    files = {
        "baseline.jpg": encoded(picture(), quality=80), "progressive.jpg": encoded(picture(), progressive=True),
        "rotated.jpg": rotated(), "grey.jpg": encoded(picture().convert("L")), "cmyk.jpg": encoded(cmyk),
        "colour.png": encoded(picture(), "PNG"), "palette.png": encoded(palette, "PNG"), "named.jpg": encoded(picture(), "PNG"),
    }  # fmt: skip
    index = packed(tmp_path, files)
    samples = stored(tmp_path)
    assert index["samples"] == len(samples) == 8 and index["captions"] == 16
    assert [bytes(s["image"]) == content for s, content in zip(samples, files.values(), strict=True)] == [True] * 2 + [
        False
    ] * 6
    for sample, name in zip(samples, files, strict=True):
        upright, kept = read_image(tmp_path / "images" / name), read_image(bytes(sample["image"]))
        assert kept.size == upright.size and sample["captions"]["captions"] == [f"A {name}: 0!", f"A {name}: 1!"]
        assert np.abs(np.asarray(kept, int) - np.asarray(upright, int)).mean() < 3
    assert read_image(bytes(samples[2]["image"])).size == (24, 40)


def test_raw_stores_the_pixels(tmp_path):
    files = {"a.jpg": encoded(picture()), "b.jpg": rotated()}
    packed(tmp_path, files, raw=True)
    found = read_pack(tmp_path / "out", verify_images="full")
    for sample, record in zip(stored(tmp_path), found.records, strict=True):
        upright = read_image(tmp_path / "images" / list(files)[record.image_id])
        assert np.array_equal(sample["image"], upright)
        assert np.array_equal(read_image(record.path), upright) and read_header(record.path) == upright.size
    with pytest.raises(ImageRefused, match="the limit is 100"):
        read_image(found.records[0].path, max_pixels=100)


@pytest.mark.parametrize(
    "settings, sizes",
    [
        ({"max_side": 20}, [(20, 12), (10, 10)]),
        ({"shorter_side": 12}, [(20, 12), (10, 10)]),
        ({"max_side": 40}, [(40, 24), (10, 10)]),
    ],
)
def test_resizing_only_shrinks(settings, sizes, tmp_path):
    files = {"a.jpg": encoded(picture()), "b.jpg": encoded(picture(10, 10))}
    packed(tmp_path, files, **settings)
    samples = stored(tmp_path)
    assert [read_image(bytes(s["image"])).size for s in samples] == sizes
    assert bytes(samples[1]["image"]) == files["b.jpg"]  # small enough: untouched


def test_the_packed_set_reads_as_its_source(tmp_path):
    files = {f"{i}.jpg": encoded(picture(shift=i)) for i in range(7)}
    packed(tmp_path, files, shard_images=3, jobs=2)
    loose, found = read_captions(tmp_path / "captions.json", tmp_path / "images"), read_pack(tmp_path / "out")
    assert [(r.image_id, r.captions) for r in found.records] == [(r.image_id, r.captions) for r in loose.records]
    assert found.name == "captions" and found.records[0].captions == ["a 0 jpg 0", "a 0 jpg 1"]
    assert all(
        load_pixels(a.path, 16).equal(load_pixels(b.path, 16))
        for a, b in zip(found.records, loose.records, strict=True)
    )
    assert [r.path.shard.name for r in found.records[2:4]] == ["captions-00000.beton", "captions-00001.beton"]
    assert [r.image_id for r in read_pack(tmp_path / "out" / "index.json", limit=4).records] == [0, 1, 2, 3]
    assert read_pack(tmp_path / "out", preprocess=False).records[0].captions == ["A 0.jpg: 0!", "A 0.jpg: 1!"]
    member = found.records[1].path
    assert member.stat().st_size == member.size == len(files["1.jpg"]) and member.resolve().shard.is_absolute()


def test_any_number_of_jobs_writes_the_same(tmp_path):
    files = {f"{i}.jpg": encoded(picture(shift=i)) if i % 3 else rotated() for i in range(12)}
    for jobs in (1, 5):
        packed(tmp_path, files, f"out{jobs}", shard_images=8, jobs=jobs)
    names = ("captions-00000.beton", "captions-00001.beton", "index.json")
    assert all((tmp_path / "out1" / n).read_bytes() == (tmp_path / "out5" / n).read_bytes() for n in names)


def test_every_refused_image_is_named(tmp_path):
    whole = encoded(picture())
    large = b"P" + encoded(Image.new("1", (20_000, 20_000)), "PNG")[1:]
    files = {
        "good.jpg": whole, "missing.jpg": None, "cut.jpg": whole[: len(whole) // 2], "text.jpg": b"no image", "empty.jpg": b"",
        "large.png": b"\x89" + large[1:], "good2.jpg": encoded(picture(shift=9)),
    }  # fmt: skip
    path = source(tmp_path, files)
    value = json.loads(path.read_text())
    value["images"] += [{"id": 0, "file_name": "good2.jpg"}, {"id": 77, "file_name": "good.jpg"}]
    path.write_text(json.dumps(value))
    index = pack(path, tmp_path / "out", images=tmp_path / "images", max_refused_share=0.9)
    assert index["samples"] == 2
    assert index["refused"]["counts"]["images"] == {
        "duplicate_image_id": 1, "without_captions": 1, "missing": 1, "truncated": 1, "not_an_image": 1, "empty": 1, "too_many_pixels": 1,
    }  # fmt: skip
    report = json.loads((tmp_path / "out" / "refused.json").read_text())
    named = {r["reason"]: r["where"] for r in report["named"]}
    assert (
        named["truncated"] == f"{tmp_path / 'images' / 'cut.jpg'}, image_id 2" and "id 77" in named["without_captions"]
    )
    with pytest.raises(DataError, match=r"allows 50\.0%"):
        pack(path, tmp_path / "half", images=tmp_path / "images")
    assert (tmp_path / "half" / "refused.json").is_file() and not (tmp_path / "half" / "index.json").exists()


def test_an_image_larger_than_a_page_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    index = packed(
        tmp_path,
        {"a.png": encoded(Image.fromarray(noise), "PNG"), "b.jpg": encoded(picture())},
        raw=True,
        page_bytes=2 << 20,
    )
    assert index["samples"] == 1 and index["refused"]["counts"]["images"] == {"larger_than_a_page": 1}


def test_a_stopped_run_is_taken_up(tmp_path, monkeypatch, capfd):
    files = {f"{i}.jpg": encoded(picture(shift=i)) for i in range(9)}
    packed(tmp_path, files, "whole", shard_images=3)
    path, out, settings, real = (
        tmp_path / "captions.json",
        tmp_path / "out",
        PackSettings(shard_images=3),
        pack_module.prepare_image,
    )

    def stop(path: Path, settings: PackSettings) -> bytes | np.ndarray:
        if path.name == "4.jpg":
            raise KeyboardInterrupt
        return real(path, settings)

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "prepare_image", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(path, out, settings, images=tmp_path / "images", jobs=1)
    assert sorted(p.name for p in out.iterdir()) == ["captions-00000.beton", "captions-00000.json", "pack.jsonl"]
    (out / ".captions-00001.beton.123.tmp").write_bytes(b"left by a kill")
    kept = (out / "captions-00000.beton").stat()
    capfd.readouterr()
    pack(path, out, settings, images=tmp_path / "images")
    assert "kept 1 of 3 shards" in capfd.readouterr().err
    assert (out / "captions-00000.beton").stat().st_ino == kept.st_ino and not list(out.glob(".*"))
    for name in ("captions-00000.beton", "captions-00001.beton", "captions-00002.beton", "index.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path):
    """SIGKILL after the first, the third and the fifth finished shard; no file under a final name is ever cut."""
    files = {f"{i}.png": encoded(picture(400, 300, i), "PNG") for i in range(32)}
    packed(tmp_path, files, "whole", shard_images=4)
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "vpgtrans.engine.cli", "pack", str(tmp_path / "captions.json"), str(out), "--images", str(tmp_path / "images"),
        "--shard-images", "4", "--jobs", "1",
    ]  # fmt: skip
    for finished in (1, 3, 5):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(out.glob("*.beton"))) < finished:
                time.sleep(0.001)
            process.kill()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
        for path in out.glob("*.beton"):
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert not list(out.glob(".*"))
    names = sorted(p.name for p in (tmp_path / "whole").glob("*.beton"))
    assert len(names) == 8
    for name in (*names, "index.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_only_what_changed_is_packed_again(tmp_path):
    files = {f"{i}.jpg": encoded(picture(shift=i)) for i in range(6)}
    packed(tmp_path, files, shard_images=2)
    shards = [tmp_path / "out" / f"captions-0000{k}.beton" for k in range(3)]
    before = [s.stat().st_ino for s in shards]

    def redone() -> list[bool]:
        nonlocal before
        pack(tmp_path / "captions.json", tmp_path / "out", PackSettings(shard_images=2), images=tmp_path / "images")
        before, old = [s.stat().st_ino for s in shards], before
        return [a != b for a, b in zip(before, old, strict=True)]

    assert redone() == [False, False, False]
    (tmp_path / "images" / "3.jpg").write_bytes(encoded(picture(30, 30)))
    assert redone() == [False, True, False]
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    shards[2].with_suffix(".json").touch()
    assert redone()[:2] == [False, False] and len(BetonReader(shards[2])) == 2
    (tmp_path / "out" / "captions-00000.json").write_text("{")
    assert redone()[1:] == [False, False] and len(read_pack(tmp_path / "out", verify_images="full").records) == 6


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch, capsys):
    path = source(tmp_path, {f"{i}.jpg": encoded(picture(shift=i)) for i in range(4)})
    real_open, writes = open, []

    class FullDisk:
        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, content: bytes) -> int:
            writes.append(len(content))
            if len(writes) == 12:  # in the second shard
                raise OSError(28, "No space left on device")
            return self._file.write(content)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    monkeypatch.setattr("vpgtrans.engine.data.beton_writer.open", lambda *a: FullDisk(real_open(*a)), raising=False)
    command = ["pack", str(path), str(tmp_path / "out"), "--images", str(tmp_path / "images"), "--shard-images", "2"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and "free some space and run the same command again" in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "captions-00000.beton",
        "captions-00000.json",
        "pack.jsonl",
    ]
    monkeypatch.undo()
    assert main(command) == 0
    assert len(read_pack(tmp_path / "out", verify_images="full").records) == 4
    assert f"{tmp_path / 'out' / 'index.json'}" in capsys.readouterr().out


def test_questions_go_with_their_image(tmp_path):
    files = {"a.jpg": encoded(picture()), "b.jpg": encoded(picture())}
    (tmp_path / "q.json").write_text(
        json.dumps({"questions": [{"question_id": 5, "image_id": 1, "question": "What?"}, {"question_id": 6, "image_id": 9, "question": "Who?"}]})
    )  # fmt: skip
    (tmp_path / "a.json").write_text(
        json.dumps({"annotations": [{"question_id": q, "answers": [{"answer": "it"}]} for q in (5, 6)]})
    )
    index = packed(tmp_path, files, questions=tmp_path / "q.json", answers=tmp_path / "a.json")
    about = [s["captions"] for s in stored(tmp_path)]
    assert "questions" not in about[0] and about[1]["questions"] == [
        {"question_id": 5, "question": "What?", "answers": ["it"]}
    ]
    assert index["refused"]["counts"]["questions"] == {"question_without_image": 1}


def test_tars_are_packed(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for key in ("01", "02"):
            for name, content in ((f"{key}.jpg", encoded(picture(shift=int(key)))), (f"{key}.txt", b"Some Words.")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    index = pack(tmp_path / "t.tar", tmp_path / "out")
    assert index["name"] == "t" and index["sources"][0]["file"].endswith("t.tar")
    found = read_pack(tmp_path / "out", verify_images="full")
    assert [(r.image_id, r.captions) for r in found.records] == [("t/01", ["some words"]), ("t/02", ["some words"])]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--max-side", "0"], "max-side: expected 1 or more, got 0"),
        (["--shard-images", "0"], "shard-images: expected 1 or more"),
        (["--page-mib", "3"], "page-mib: expected a power of two"),
        (["--jobs", "0"], "jobs: expected 1 or more"),
        (["--name", "a/b"], "name: expected letters"),
        (["--answers", "a.json"], "questions: expected the file that the answers belong to"),
        (["--images", "nowhere"], "images_root: expected a folder"),
    ],
)
def test_mistakes_in_the_command(options, words, tmp_path, capsys):
    path = source(tmp_path, {"a.jpg": encoded(picture())})
    assert main(["pack", str(path), str(tmp_path / "out"), "--images", str(tmp_path / "images"), *options]) == 2
    assert words in capsys.readouterr().err


def test_a_damaged_set_says_so(tmp_path):
    files = {f"{i}.jpg": encoded(picture(shift=i)) for i in range(4)}
    packed(tmp_path, files)
    out = tmp_path / "out"
    shard, index = out / "captions-00000.beton", out / "index.json"
    content, listed = shard.read_bytes(), index.read_text()
    row = 24 + 2 * 1041 + 29
    shard.write_bytes(content[: row + 5] + b"\xff" * 8 + content[row + 13 :])  # the pointer of sample 1
    found = read_pack(out)
    assert [r.image_id for r in found.records] == [0, 2, 3] and found.refused.counts == {"images": {"damaged": 1}}
    shard.write_bytes(content[:-24])
    with pytest.raises(DataError, match="run vpgtrans pack again"):
        read_pack(out)
    shard.unlink()
    with pytest.raises(DataError, match=r"No such file.*run vpgtrans pack again"):
        read_pack(out)
    for text, words in (
        ("{}", "expected the index of a packed set"),
        (listed.replace('"version": 1', '"version": 9'), "version 9"),
        (listed.replace('"samples"', '"x"'), "damaged at"),
        (listed.replace("captions-00000.beton", "../captions-00000.beton"), "expected shards beside the index"),
    ):
        index.write_text(text)
        with pytest.raises(DataError, match=words):
            read_pack(out)


def test_a_recipe_names_a_packed_set(tmp_path):
    packed(tmp_path, {f"{i}.jpg": encoded(picture()) for i in range(3)})
    out = tmp_path / "out"
    for settings in ({"format": "pack"}, {}):
        found = read_image_data(ImageData(captions=out, skip=1, limit=1, **settings), "header")
        assert [r.image_id for r in found.records] == [1] and found.name == "train"
    assert read_image_data(ImageData(captions=out / "index.json", format="pack"), "none").records[2].image_id == 2
    assert is_pack(out) and not is_pack(tmp_path) and not is_pack(tmp_path / "captions.json")
    with pytest.raises(DataError, match="expected neither"):
        read_image_data(ImageData(captions=out, images=tmp_path, format="pack"), "header")


def test_training_from_the_packed_set_is_the_same(tiny_recipe, tiny_world, tmp_path):
    world = tiny_world / "world"
    for part in ("train", "val"):
        command = [
            "pack",
            str(world / f"captions_{part}.json"),
            str(tmp_path / part),
            "--images",
            str(world / "images"),
        ]
        assert main([*command, "--shard-images", "10"]) == 0
    short = ["stages.0.pairs=22", "stages.1.pairs=44", "evaluation.generate_images=0"]
    sets = [
        f"data.train=[{{name: scenes, captions: {tmp_path / 'train'}, format: pack}}]",
        f"data.val={{captions: {tmp_path / 'val'}, format: pack}}",
    ]
    run(load_recipe(tiny_recipe, short))
    run(load_recipe(tiny_recipe, [*short, *sets, f"output.folder={tmp_path / 'packed_run'}"]))

    def losses(folder: Path) -> list[tuple]:
        events = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        return [
            (e["event"], e["step"], e.get("loss"), e.get("val_loss")) for e in events if "loss" in e or "val_loss" in e
        ]

    assert len(losses(tmp_path / "run")) > 4 and losses(tmp_path / "packed_run") == losses(tmp_path / "run")


def test_a_packed_set_that_is_not_there_is_a_recipe_error(tiny_recipe, tmp_path):
    with pytest.raises(RecipeError, match="expected an existing file or folder"):
        load_recipe(tiny_recipe, [f"data.val={{captions: {tmp_path / 'nowhere'}, format: pack}}"])
