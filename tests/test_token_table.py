"""Token tables: the ids of lists, memory-mapped; made once, found again, and opened without reading the data."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpgtrans.engine.cli import main
from vpgtrans.engine.data import captioned, packed
from vpgtrans.engine.data.captioned import open_captioned
from vpgtrans.engine.data.coco import read_image_data
from vpgtrans.engine.data.conversation import INSTRUCTIONS, tokenize_entry
from vpgtrans.engine.data.images import ImageRefused
from vpgtrans.engine.data.packing import join
from vpgtrans.engine.data.reading import DataError, RefusalReport
from vpgtrans.engine.data.token_table import TableError, TableRow, TokenTable, write_table
from vpgtrans.engine.pretrain.tokenizer import train_word_level
from vpgtrans.engine.recipe import ImageData
from vpgtrans.engine.runlog import RunLog

TEXTS = [
    "###Human: ###Assistant: what is it? say more.",
    *INSTRUCTIONS,
    "a red blue green pink black white large circle above a star",
]
COLOURS = ["red", "blue", "green", "pink", "black", "white", "large"]


@pytest.fixture
def llm(make_llm):
    return make_llm("llama", tokenizer=train_word_level(TEXTS))


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Seven images with one to three captions each, one of them without a usable one, as COCO's file and as a packed set."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    annotations = []
    for i in range(7):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(tmp_path / "images" / f"{i}.jpg")
        for k in range(1 + i % 3):
            caption = f"a {COLOURS[i]} circle " + "above a star " * k if i != 4 else " "
            annotations.append({"id": 10 * i + k, "image_id": i, "caption": caption})
    value = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(7)], "annotations": annotations}
    (tmp_path / "captions.json").write_text(json.dumps(value))
    command = ["pack", str(tmp_path / "captions.json"), str(tmp_path / "packed"), "--images", str(tmp_path / "images")]
    assert main([*command, "--shard-images", "3"]) == 0
    for number, images in enumerate(((0, 1, 2), (3, 4, 5, 6))):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for i in images:
                tar.add(tmp_path / "images" / f"{i}.jpg", f"{i:03d}.jpg")
                text = annotations[[a["image_id"] for a in annotations].index(i)]["caption"].encode()
                member = tarfile.TarInfo(f"{i:03d}.txt")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text))
    return tmp_path


def entry(folder: Path, kind: str, **settings) -> ImageData:
    if kind == "pack":
        return ImageData(captions=folder / "packed", format="pack", **settings)
    if kind == "tars":
        return ImageData(captions=str(folder / "{0,1}.tar"), format="laion_coco", **settings)
    return ImageData(captions=folder / "captions.json", images=folder / "images", **settings)


def opened(folder: Path, kind: str, llm, name=None, **settings) -> TokenTable:
    log = RunLog(folder / "log", tensorboard=False)
    common = {"max_text_tokens": 32, "seed": 0, "verify_images": "full", "cache_root": folder / "cache", "log": log}
    try:
        return open_captioned(entry(folder, kind, **settings), llm, name=name, **common)
    finally:
        log.close()


@pytest.mark.parametrize("kind", ["coco", "pack", "tars"])
@pytest.mark.parametrize("settings", [{}, {"skip": 2, "limit": 3}, {"style": "conversation"}])
def test_a_table_holds_what_lists_hold(kind, settings, photographs, llm):
    listed = tokenize_entry(
        entry(photographs, kind, **settings), read_image_data(entry(photographs, kind, **settings), "full"), llm, 32, 0
    )
    for table in (opened(photographs, kind, llm, **settings), opened(photographs, kind, llm, **settings)):
        assert [[ids.tolist() for ids in image] for image in table.ids] == listed.ids
        assert [r.image_id for r in table.records] == [r.image_id for r in listed.records]
        assert [r.captions for r in table.records[:]] == [r.captions for r in listed.records]
        assert [str(r.path) for r in table.records] == [str(r.path) for r in listed.records]
        for i, image in enumerate(listed.ids):
            assert table.lead(i) == listed.lead(i) and table[i] == len(image)
            assert [table.question_tokens(i, k) for k in range(len(image))] == [
                listed.question_tokens(i, k) for k in range(len(image))
            ]
        assert table.pair_count == listed.pair_count
        for limit in (None, 1, 2, 9):
            for bounds in ((0, len(table)), (1, 3)):
                assert table.pairs(*bounds, limit) == listed.counts.pairs(*bounds, limit)
        assert ("without captions" in table.refused.summary()) == (kind != "pack")  # packing had refused it before
    joined = join([table, listed])
    assert joined.ids[len(table)] == listed.ids[0] and joined.ids[0][0].tolist() == listed.ids[0][0]


@pytest.mark.parametrize("kind", ["pack", "tars"])
def test_a_packed_set_is_read_once(kind, photographs, llm, monkeypatch):
    """The second opening reads neither samples nor captions, and tokenises nothing."""
    first = opened(photographs, kind, llm)
    monkeypatch.setattr(captioned, "iterate_packed", None)
    monkeypatch.setattr(captioned, "iterate_tars", None)
    monkeypatch.setattr(packed, "open_shard", None)
    monkeypatch.setattr(llm, "all_caption_ids", None)
    second = opened(photographs, kind, llm)
    assert second.folder == first.folder and second.refused.to_dict() == first.refused.to_dict()
    assert [[ids.tolist() for ids in image] for image in second.ids] == [
        [ids.tolist() for ids in image] for image in first.ids
    ]
    assert pickle.loads(pickle.dumps(second.ids[1]))[0].tolist() == first.ids[1][0].tolist()


def test_whatever_decides_the_ids_is_in_the_key(photographs, llm):
    folders = {
        opened(photographs, "pack", llm).folder, opened(photographs, "pack", llm, limit=2).folder,
        opened(photographs, "pack", llm, max_text_tokens=5).folder, opened(photographs, "pack", llm, style="conversation").folder,
        opened(photographs, "coco", llm).folder,
    }  # fmt: skip
    text = (photographs / "captions.json").read_text()
    (photographs / "captions.json").write_text(text.replace("circle", "star"))
    folders.add(opened(photographs, "coco", llm).folder)
    command = [
        "pack",
        str(photographs / "captions.json"),
        str(photographs / "packed"),
        "--images",
        str(photographs / "images"),
    ]
    assert main([*command, "--shard-images", "3"]) == 0
    folders.add(opened(photographs, "pack", llm).folder)
    assert len(folders) == 7


def test_a_damaged_table_is_made_again(photographs, llm):
    first = opened(photographs, "pack", llm)
    expected = [[ids.tolist() for ids in image] for image in first.ids]
    for name, content in (
        ("tokens.bin", b"xx"),
        ("table.json", b"{"),
        ("table.json", b'{"version": 0}'),
        ("captions_before.bin", None),
    ):
        path = first.folder / name
        path.write_bytes(content) if content is not None else path.unlink()
        with pytest.raises(TableError):
            TokenTable(first.folder, "x", None)
        again = opened(photographs, "pack", llm)
        assert [[ids.tolist() for ids in image] for image in again.ids] == expected
    assert "stale_tokens" in (photographs / "log" / "log.jsonl").read_text()


def test_a_failing_writer_leaves_nothing(tmp_path):
    def rows():
        yield TableRow([[1, 2]])
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_table(tmp_path / "tokens-x", rows(), RefusalReport("x"), vocabulary=10)
    assert list(tmp_path.iterdir()) == []


def test_a_sample_damaged_later_is_refused_by_name(photographs, llm):
    table = opened(photographs, "pack", llm)
    shard = next(iter(sorted((photographs / "packed").glob("*.beton"))))
    content = bytearray(shard.read_bytes())
    at = content.index(b'{"image_id": 1')
    content[at] = ord("[")
    shard.write_bytes(content)
    assert table.records[0].image_id == 0
    with pytest.raises(ImageRefused, match="sample 1"):
        table.records[1]
    shard.write_bytes(content[:-8])
    with pytest.raises(DataError, match="run vpgtrans pack again"):
        opened(photographs, "pack", llm)


def test_ids_are_as_narrow_as_the_vocabulary_allows(tmp_path):
    for vocabulary, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        folder = tmp_path / str(vocabulary)
        write_table(
            folder,
            [TableRow([[vocabulary - 1, 0], []]), TableRow([])],
            RefusalReport("x"),
            vocabulary=vocabulary,
        )
        table = TokenTable(folder, "x", None)
        assert table.ids[0][0].dtype == dtype and table.ids[0][0].tolist() == [vocabulary - 1, 0]
        assert len(table.ids[0][1]) == 0 and len(table.ids[1]) == 0 and len(table.ids[-1]) == 0
        for wrong in (2, -3):
            with pytest.raises(IndexError, match="image"):
                table.ids[wrong]
        with pytest.raises(IndexError, match="caption"):
            table.ids[1][0]


START = """
import resource, sys
from pathlib import Path
from vpgtrans.engine.data.packing import Subset, UpdateOrder
from vpgtrans.engine.data.token_table import TokenTable
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
table = TokenTable(Path(sys.argv[1]), "large", None)
pairs = UpdateOrder(table.counts, [Subset(0, len(table))], 64, 0, captions_per_image=1).epoch_pairs
order = UpdateOrder(table.counts, [Subset(0, len(table))], 64, 0)
groups = order.next_update()
ids = [table.ids[g.image][k].tolist() for g in groups for k in g.captions]
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(len(table), pairs, order.epoch_pairs, len(ids), set(map(len, ids)), grown)
"""


def test_ten_million_images_open_in_little_memory(tmp_path):
    """One caption of 13 ids each, the ids themselves a sparse file: the map, the order of the first epoch and the first update."""
    images = 10_000_000
    write_table(tmp_path / "table", [TableRow([[0] * 13])], RefusalReport("x"), vocabulary=100)
    about = json.loads((tmp_path / "table" / "table.json").read_text())
    about.update(images=images, captions=images, tokens=13 * images, images_with_captions={"1": images})
    (tmp_path / "table" / "table.json").write_text(json.dumps(about))
    np.arange(images + 1, dtype=np.int64).tofile(tmp_path / "table" / "captions_before.bin")
    (np.arange(images + 1, dtype=np.int64) * 13).tofile(tmp_path / "table" / "tokens_before.bin")
    with (tmp_path / "table" / "tokens.bin").open("wb") as file:
        file.truncate(2 * 13 * images)
    command = [sys.executable, "-c", START, tmp_path / "table"]
    result = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    *found, kib = result.split()
    assert found == ["10000000", "10000000", "10000000", "64", "{13}"] and int(kib) < 100 * 1024
