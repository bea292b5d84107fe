"""WebDataset tars: samples indexed in place, images read by their offset, damage and trickery refused by name."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from vpgtrans.engine.data.coco import CaptionSet, DataError, read_image_data
from vpgtrans.engine.data.images import ImageRefused, load_pixels, read_header, read_image
from vpgtrans.engine.data.tar_member import TarMember
from vpgtrans.engine.data.webdataset import expand_tars, read_tars
from vpgtrans.engine.recipe import ImageData, RecipeError, load_recipe, save_recipe


def jpeg(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def read(captions: Path | str, images: Path | None = None, **settings: Any) -> CaptionSet:
    return read_image_data(ImageData(captions=captions, images=images, **settings), "full")


def counts(found: CaptionSet, unit: str) -> dict[str, int]:
    return dict(found.refused.counts.get(unit, {}))


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **attributes: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in attributes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def write_tar(path: Path, keys: list[str], metadata: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key in keys:
            add(archive, f"{key}.jpg", jpeg(int(key[-2:]) * 4))
            about = metadata or {"caption": f"Alt {key}", "top_caption": f"Top {key}."}
            add(archive, f"{key}.json", json.dumps(about).encode())
            add(archive, f"{key}.txt", f"Alt {key}".encode())
    return path


def test_tar_images_are_read_in_place(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "laion" / "00000.tar", ["000000011", "000000012"])
    found = read(tar, name="laion")
    assert [(r.image_id, r.captions) for r in found.records] == [
        ("00000/000000011", ["top 000000011"]),
        ("00000/000000012", ["top 000000012"]),
    ]
    assert (
        found.refused.summary()
        == "0 of 2 images refused; 0 of 2 captions refused; 0 of 6 members refused; 0 of 1 tars refused"
    )
    for record, shade in zip(found.records, (44, 48), strict=True):
        member = record.path
        assert isinstance(member, TarMember) and tar.read_bytes()[member.offset :].startswith(jpeg(shade))
        assert member.name == f"{record.image_id[-9:]}.jpg" and member.stat().st_size == len(jpeg(shade))
        assert read_image(member).getpixel((0, 0)) == (shade, shade, shade)
        assert read_header(member) == (8, 6)
        assert load_pixels(member, 4).float().mean().item() == shade
    assert str(found.records[0].path.resolve()).endswith("laion/00000.tar/000000011.jpg")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["00000.tar", "laion"]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"top_caption": "top", "all_captions": ["A!", "b b", "c"], "all_similarities": [0.1, 0.3, 0.2]}, "b b"),
        ({"all_captions": ["a", "b", "c"], "all_similarities": [0.1, 0.3, 0.3]}, "b"),
        ({"all_captions": ["a"], "all_similarities": [-1]}, "a"),
        ({"caption": "Alt", "top_caption": "Top"}, "top"),
        ({"caption": "Alt", "all_captions": [], "all_similarities": []}, "alt"),
        ({"url": "only"}, "alt 07"),
    ],
)
def test_choice_of_the_caption(tmp_path: Path, metadata: dict[str, Any], expected: str) -> None:
    assert [r.captions for r in read(write_tar(tmp_path / "a.tar", ["07"], metadata)).records] == [[expected]]


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (b'{"all_captions": ["a", "b"], "all_similarities": [0.5]}', "similarities_malformed"),
        (b'{"all_captions": ["a", "b"], "all_similarities": [0.5, NaN]}', "similarities_malformed"),
        (b'{"all_captions": ["a"], "all_similarities": ["0.5"]}', "similarities_malformed"),
        (b'{"all_captions": "a", "all_similarities": [0.5]}', "similarities_malformed"),
        (b'{"top_caption": 7}', "caption_not_a_string"),
        (b'{"top_caption": "..."}', "caption_empty"),
        (b'{"top_caption"', "metadata_not_json"),
        (b"[]", "metadata_not_json"),
        (b"\xff\xfe", "metadata_not_json"),
    ],
)
def test_damaged_metadata_refuse_one_sample(tmp_path: Path, metadata: bytes, reason: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for key, content in (("0", metadata), ("1", b'{"caption": "fine"}')):
            add(archive, f"{key}.jpg", jpeg())
            add(archive, f"{key}.json", content)
    found = read(tmp_path / "a.tar")
    assert [(r.image_id, r.captions) for r in found.records] == [("a/1", ["fine"])]
    assert counts(found, "captions") == {reason: 1} and counts(found, "images") == {"without_captions": 1}


def test_samples_are_joined_by_key_wherever_members_lie(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "part", type=tarfile.DIRTYPE)
        add(archive, "./part/1.PNG", jpeg())
        add(archive, "part/2.txt", b"Two.\n")
        add(archive, "part/2.seg.png", b"a mask is no image of the pair")
        add(archive, "part/2.jpeg", jpeg())
        add(archive, "part/1.txt", b"One\nline")
        add(archive, "part/1.txt", b"again")
        add(archive, "part/3.jpg", jpeg())
        add(archive, "part/4.txt", b"four")
        add(archive, "part/5.jpg", b"not an image")
        add(archive, "part/5.txt", b"five")
        add(archive, "README", b"")
    samples, report = read_tars(tmp_path / "a.tar", max_refused_share=1.0)
    assert [(s.image_id, s.image.member, s.caption) for s in samples] == [
        ("a/part/1", "./part/1.PNG", "one line"),
        ("a/part/2", "part/2.jpeg", "two"),
    ]
    assert report.counts["images"] == {"without_captions": 1, "without_image": 1, "not_an_image": 1}
    assert report.counts["members"] == {"duplicate_name": 1}
    raw, _ = read_tars(tmp_path / "a.tar", max_words=None, max_refused_share=1.0)
    assert raw[1].caption == "Two.\n"


def test_members_that_climb_link_or_are_devices_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("../up", "/abs", "a/../../b", "..\\c"):
            add(archive, f"{name}.jpg", jpeg())
            add(archive, f"{name}.txt", b"caption")
        add(archive, "s.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "h.jpg", type=tarfile.LNKTYPE, linkname="ok.jpg")
        add(archive, "d.jpg", type=tarfile.CHRTYPE)
        add(archive, "f.jpg", type=tarfile.FIFOTYPE)
        add(archive, "ok.jpg", jpeg())
        add(archive, "ok.txt", b"fine")
    found = read(tmp_path / "a.tar")
    assert [(r.image_id, r.captions) for r in found.records] == [("a/ok", ["fine"])]
    assert counts(found, "members") == {"name_outside_the_tar": 8, "link": 2, "device_or_other_kind": 2}
    assert found.refused.examined["members"] == 14
    assert "'../up.jpg'" in found.refused.named[0].where and "a.tar" in found.refused.named[0].where
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_patterns_and_missing_shards(tmp_path: Path) -> None:
    for shard, keys in ((8, ["08"]), (9, ["09"]), (11, ["11"])):
        write_tar(tmp_path / "part" / f"{shard:05d}.tar", keys)
    pattern = f"{tmp_path}/part/{{00008..00011}}.tar"
    found = read(pattern)
    assert [r.image_id for r in found.records] == ["00008/08", "00009/09", "00011/11"]
    assert counts(found, "tars") == {"missing": 1}
    assert found.refused.named[0].where.endswith("part/00010.tar")
    assert [r.image_id for r in read(f"{tmp_path}/part/*.tar").records] == ["00008/08", "00009/09", "00011/11"]
    assert [r.image_id for r in read(tmp_path / "part").records] == ["00008/08", "00009/09", "00011/11"]
    assert [r.image_id for r in read(f"{tmp_path}/p?rt/0000[89].tar").records] == ["00008/08", "00009/09"]
    assert [r.image_id for r in read(f"{tmp_path}/part/000{{08,11}}.tar").records] == ["00008/08", "00011/11"]
    assert [r.image_id for r in read(pattern, skip=1, limit=1).records] == ["00009/09"]
    assert read(pattern, limit=1).refused.examined["tars"] == 1
    assert [str(tar) for tar in expand_tars("{a,b}/{9..10}.tar")] == ["a/9.tar", "a/10.tar", "b/9.tar", "b/10.tar"]


def test_ids_stay_distinct_over_folders(tmp_path: Path) -> None:
    for part in ("part-0", "part-1"):
        write_tar(tmp_path / part / "00000.tar", ["00"])
    found = read(f"{tmp_path}/part-{{0..1}}/00000.tar")
    assert [r.image_id for r in found.records] == ["part-0/00000/00", "part-1/00000/00"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..2.tar", "a brace without its partner"),
        ("{5..2}.tar", "expected a rising range"),
        ("{0..99999999}.tar", "at most 1,000,000"),
        ("{0..999}{0..9999}.tar", "more than 1,000,000 tars"),
        ("{abc}.tar", "neither a range"),
        ("nothing-*.tar", "no tar matches"),
    ],
)
def test_impossible_patterns(pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        expand_tars(pattern)


def test_a_cut_tar_keeps_what_came_before(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", ["01", "02", "03"]).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        starts = {member.name: (member.offset, member.offset_data) for member in archive}
    for cut, before in (
        (starts["02.jpg"][1] + 100, 1),  # inside an image
        (starts["02.json"][0] + 100, 1),  # inside a header
        (starts["02.json"][0], 1),  # between two members
        (starts["03.jpg"][0], 2),
        (starts["02.txt"][0], 2),  # the third caption is not needed
    ):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        samples, report = read_tars(tmp_path / "cut.tar", max_refused_share=1.0)
        assert [s.image_id for s in samples] == [f"cut/0{n + 1}" for n in range(before)], cut
        assert report.counts["tars"] == {"truncated": 1}
        assert report.named[0].where == str(tmp_path / "cut.tar")
        assert set(report.counts.get("images", {})) <= {"truncated"}
    (tmp_path / "cut.tar").write_bytes(whole[:200])
    with pytest.raises(DataError, match=r"no usable tars; .*1 truncated; the first: .*cut.tar"):
        read(tmp_path / "cut.tar")
    damaged = bytearray(whole)
    damaged[starts["02.jpg"][0] : starts["02.jpg"][0] + 512] = b"\xaa" * 512
    (tmp_path / "cut.tar").write_bytes(damaged)
    found = read(tmp_path / "cut.tar")
    assert [r.image_id for r in found.records] == ["cut/01"] and counts(found, "tars") == {"damaged": 1}


def test_other_files_instead_of_tars(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "empty.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        add(archive, "1.jpg", jpeg())
    for name, reason in (
        ("text.tar", "damaged"),
        ("empty.tar", "truncated"),
        ("a.tar.gz", "compressed"),
        ("gone.tar", "missing"),
    ):
        with pytest.raises(DataError, match=f"no usable tars; 1 of 1 tars refused: 1 {reason}; the first: .*{name}"):
            read(tmp_path / name)
    with pytest.raises(DataError, match="images, split: expected neither"):
        read(tmp_path / "text.tar", tmp_path)


@pytest.mark.parametrize("size_bytes", [-2048, -1])
def test_a_negative_size_ends_the_tar(tmp_path: Path, size_bytes: int) -> None:
    tar = write_tar(tmp_path / "a.tar", ["01", "02"])
    with tarfile.open(tar) as archive:
        offset = archive.getmember("02.json").offset
    content = bytearray(tar.read_bytes())
    header = content[offset : offset + 512]
    header[124:136] = b"\xff" * 10 + (size_bytes & 0xFFFF).to_bytes(2, "big")  # base 256, negative
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[offset : offset + 512] = header
    tar.write_bytes(content)
    found = read(tar)
    assert [r.image_id for r in found.records] == ["a/01"] and counts(found, "tars") == {"damaged": 1}


def test_a_tar_that_changes_after_it_was_read(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", ["01"])
    member = read(tar).records[0].path
    tar.write_bytes(tar.read_bytes()[: member.offset + 10])
    with pytest.raises(ImageRefused, match=r"a.tar/01.jpg: image refused \(truncated\): the tar holds 10 of its"):
        read_image(member)
    tar.unlink()
    with pytest.raises(ImageRefused, match=r"a.tar: image refused \(missing\)"):
        read_image(member)
    with pytest.raises(OSError):
        member.stat()


def test_a_pattern_in_a_recipe_file_starts_at_its_folder(tmp_path: Path, tiny_recipe: Path) -> None:
    write_tar(tmp_path / "laion" / "00000.tar", ["01"])
    values = yaml.safe_load(tiny_recipe.read_text())
    values["data"]["train"].append({"name": "laion", "captions": "laion/{00000..00001}.tar"})
    tiny_recipe.write_text(yaml.safe_dump(values))
    entry = load_recipe(tiny_recipe).data.train[1]
    assert entry.captions == str(tmp_path / "laion" / "{00000..00001}.tar") and entry.images is None
    assert [r.image_id for r in read_image_data(entry, "full").records] == ["00000/01"]
    values["data"]["train"][1] = {"name": "vg", "captions": "gone.json", "images": "."}
    tiny_recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match=r"data.train.1.captions: expected an existing file or folder"):
        load_recipe(tiny_recipe)
    values["data"]["train"][1] = {"name": "vg", "captions": 5, "images": "."}
    tiny_recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match=r"data.train.1.captions: expected a file, a folder or a pattern, got 5"):
        load_recipe(tiny_recipe)


def test_a_saved_recipe_names_the_same_tars(tmp_path: Path, tiny_recipe: Path) -> None:
    values = yaml.safe_load(tiny_recipe.read_text())
    values["data"]["train"] = [{"name": "laion", "captions": "laion/{00000..00001}.tar"}]
    tiny_recipe.write_text(yaml.safe_dump(values))
    (tmp_path / "run").mkdir()
    recipe = load_recipe(tiny_recipe)
    save_recipe(recipe, tmp_path / "run" / "recipe.yaml")
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data == recipe.data
