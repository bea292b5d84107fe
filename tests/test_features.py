"""The vision cache: exact, keyed by what it was made from, filled ahead or as it is read, and refused when it is damaged."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vpgtrans.engine.data.beton_member import BetonMember
from vpgtrans.engine.data.coco import read_captions
from vpgtrans.engine.data.feature_cache import StoredFeatures, open_features, prompt_identity, vision_identity
from vpgtrans.engine.data.feature_table import Layout
from vpgtrans.engine.data.features import LiveFeatures
from vpgtrans.engine.data.packing import CaptionData, Group
from vpgtrans.engine.data.reading import DataError
from vpgtrans.engine.models.vision import MobileNetV2, PixelNorm, VisionTower, load_tower
from vpgtrans.engine.models.vpg import VPG
from vpgtrans.engine.recipe import QFormerConfig, Vision
from vpgtrans.engine.runlog import RunLog
from vpgtrans.engine.runtime import start


@pytest.fixture
def opened(tiny_world, tmp_path):
    """open(transform=..., views=..., tower=...) -> the features of the tiny world's training images, cached in tmp_path/cache."""
    found = read_captions(tiny_world / "world" / "captions_train.json", tiny_world / "world" / "images")
    data = CaptionData("scenes", found.records, [[[1]]] * len(found.records))
    plain = load_tower(Vision(kind="eva_vit", path=tiny_world / "tower", image_size=32))
    runtime = start("cpu", "fp32", 1, 0)
    log = RunLog(tmp_path, name="t.jsonl")

    def open_(tower=plain, cached: bool = True, **settings):
        settings = {"transform": "eval", "seed": 0, **settings}
        return open_features(
            data, tower, runtime=runtime, log=log, cache_root=tmp_path / "cache" if cached else None, **settings
        )

    yield open_
    log.close()


GROUPS = [Group(3, 0, (0,)), Group(1, 2, (0,)), Group(3, 5, (0,))]


def caches(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("vision-*"))


def test_cache_is_exact(opened, tmp_path):
    live, cached = opened(cached=False), opened()
    assert isinstance(live, LiveFeatures) and isinstance(cached, StoredFeatures)
    assert torch.allclose(cached(GROUPS), live(GROUPS), atol=1e-6)
    assert torch.equal(opened()(GROUPS), cached(GROUPS)) and len(caches(tmp_path)) == 1


def test_stored_views_are_the_epochs_views(opened):
    live, cached = opened(cached=False, transform="train"), opened(transform="train", views=3)
    assert torch.allclose(cached(GROUPS[:2]), live(GROUPS[:2]), atol=1e-6)
    assert torch.equal(cached([Group(3, 5, ())]), cached([Group(3, 2, ())]))
    assert not torch.allclose(cached([Group(3, 0, ())]), cached([Group(3, 1, ())]))


def test_another_tower_seed_or_transform_is_another_cache(opened, tmp_path, tiny_world):
    opened()
    other = load_tower(Vision(kind="eva_vit", path=tiny_world / "tower", image_size=32))
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    opened(tower=other)
    opened(transform="train", views=1)
    opened(transform="train", views=1, seed=1)
    assert len(caches(tmp_path)) == 4
    opened(seed=1)  # the eval transform does not depend on the seed
    assert len(caches(tmp_path)) == 4


def test_a_changed_image_or_config_is_another_cache(opened, tmp_path, tiny_world):
    """Of the same bytes a file, and of the same weights: a tower of other heads, epsilon or activation."""
    opened()
    image = sorted((tiny_world / "world" / "images").iterdir())[0]
    changed = image.stat()
    os.utime(image, (changed.st_atime, changed.st_mtime + 5))
    opened()
    assert len(caches(tmp_path)) == 2
    os.utime(image, ns=(changed.st_atime_ns, changed.st_mtime_ns))
    opened()
    assert len(caches(tmp_path)) == 2
    tower = load_tower(Vision(kind="eva_vit", path=tiny_world / "tower", image_size=32))
    tower.module.model.config.hidden_act = "relu"
    opened(tower=tower)
    assert len(caches(tmp_path)) == 3


def test_a_vpg_of_other_heads_is_another_cache(opened):
    live = opened(cached=False)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "num_query_tokens": 2}
    keys = set()
    for heads, dropout in ((2, 0.1), (4, 0.1), (4, 0.0)):
        torch.manual_seed(0)
        vpg = VPG(QFormerConfig(**sizes, num_attention_heads=heads, dropout=dropout), live.tower.width)
        keys.add(prompt_identity(vision_identity(live, 1), vpg).key)
    assert len(keys) == 2  # which is in eval mode: its dropout does not count


def test_a_packed_image_has_the_time_of_its_pack(tmp_path):
    shard = tmp_path / "a.beton"
    shard.write_bytes(b"1234")
    os.utime(shard, (7, 12345.5))
    assert int(BetonMember(shard, 0, 0, 3).stat().st_mtime) == 12345


def test_fast_decoding_is_another_cache(opened, tmp_path):
    opened()
    fast = opened(decode="fast")
    assert len(caches(tmp_path)) == 2
    # The scenes are no larger than the tower's input: nothing is scaled.
    assert torch.equal(fast(GROUPS), opened()(GROUPS))


def test_a_truncated_or_foreign_cache_is_refused(opened, tmp_path):
    opened()
    (folder,) = caches(tmp_path)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    about = json.loads(whole[folder / "about.json"])
    spoiled = [
        ("shard-00000.bin", lambda b: b[:-10], r"shard-00000.bin: expected 7,\d+ bytes, found 7,\d+: truncated"),
        ("rows.crc", lambda b: b[:-8], "rows.crc: expected 192 bytes, found 184"),
        ("rows.crc", lambda b: bytes(8) + b[8:], "1 rows have no checksum, although"),
        ("about.json", lambda b: json.dumps({**about, "key": "0"}).encode(), "key: expected .*, found '0': a foreign"),
        ("about.json", lambda b: json.dumps({**about, "format": "x-9"}).encode(), "format: expected .*, found 'x-9'"),
        ("about.json", lambda b: b[:40], "expected what a cache was made of"),
    ]
    for name, spoil, message in spoiled:
        (folder / name).write_bytes(spoil(whole[folder / name]))
        with pytest.raises(DataError, match=message) as raised:
            opened()
        assert "vpgtrans cache RECIPE --rebuild" in str(raised.value) and str(folder) in str(raised.value)
        (folder / name).write_bytes(whole[folder / name])
    opened()
    (folder / "shard-00000.bin").unlink()
    with pytest.raises(DataError, match="found 0: truncated"):
        opened()


def test_a_damaged_row_is_refused_when_complete_and_computed_again_when_not(opened, tmp_path, capfd):
    expected = opened()(GROUPS)
    (folder,) = caches(tmp_path)
    raw = bytearray((folder / "shard-00000.bin").read_bytes())
    row = len(raw) // 24
    raw[3 * row + 5] ^= 1  # of image 3
    (folder / "shard-00000.bin").write_bytes(raw)
    cached = opened()
    assert torch.equal(cached(GROUPS[1:2]), expected[1:2])
    with pytest.raises(DataError, match=r"shard-00000.bin: row 3 fails its checksum; build the cache again"):
        cached(GROUPS)
    (folder / "complete.json").unlink()
    filling = opened(fill="first_epoch")
    assert not (folder / "complete.json").exists() and filling.table.missing() == 1
    assert torch.allclose(filling(GROUPS), expected, atol=1e-6)
    assert torch.equal(opened()(GROUPS), filling(GROUPS)) and (folder / "complete.json").exists()


def test_filled_in_the_first_epoch(opened, tmp_path, capfd):
    live, filling = opened(cached=False), opened(fill="first_epoch")
    assert filling.table.missing() == 24
    first = filling(GROUPS)
    assert torch.equal(first, live(GROUPS)) and filling.table.missing() == 22
    assert torch.equal(filling(GROUPS), first) and filling.table.read([0]) is None
    # Filled up by the next one that wants all of it; what is there stays.
    whole = opened()
    assert "22 of 24 rows to compute" in capfd.readouterr().err
    assert whole.table.is_complete and torch.equal(whole(GROUPS), first)


def test_complete_only_where_every_rank_saw_every_row(opened):
    """Another run may store the last row after rank 1 has looked, which then has not verified its share."""
    stored = opened(fill="first_epoch")
    stored([Group(i, 0, ()) for i in range(stored.table.layout.images)])
    alone = stored.runtime

    class Ranks:
        rank, world_size, is_main = 0, 2, True

        def gather(self, value):
            return [value, False]

        def wait(self):
            pass

    stored.runtime = Ranks()
    stored.settle()
    assert not stored.table.is_complete and not stored.table.missing()
    stored.runtime = alone
    stored.settle()
    assert stored.table.is_complete


def test_an_interrupted_filling_goes_on(opened, tmp_path, monkeypatch):
    expected = opened(transform="train", views=3)
    shutil.rmtree(caches(tmp_path)[0])
    monkeypatch.setattr("vpgtrans.engine.data.feature_cache.BUILD_BATCH", 5)
    real, calls = LiveFeatures.finish, []

    def stopped(self, prepared):
        calls.append(len(prepared))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, prepared)

    monkeypatch.setattr(LiveFeatures, "finish", stopped)
    with pytest.raises(KeyboardInterrupt):
        opened(transform="train", views=3)
    resumed = opened(transform="train", views=3)
    assert sum(calls) == 3 * 24 + calls[3]
    groups = [Group(i, epoch, ()) for epoch in range(3) for i in range(24)]
    assert torch.allclose(resumed(groups), expected(groups), atol=1e-6)


def test_fp8_is_near_and_halves_what_is_stored(opened, tmp_path):
    exact, stored = opened()(GROUPS), opened(precision="fp8")
    assert len(caches(tmp_path)) == 2
    error = (stored(GROUPS) - exact).abs() / exact.abs().amax(-1, keepdim=True)
    # e4m3 has 3 bits of mantissa: half a step is 1/16 of a value.
    assert 0 < error.max() < 1 / 16
    layout = Layout(1, 10, 257, 1408, torch.bfloat16)
    assert layout.row_bytes == 2 * 257 * 1408
    assert replace(layout, precision="fp8").row_bytes == pytest.approx(257 * (1408 + 4), abs=64)


def test_an_old_cache_file_is_passed_over(opened, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "vision-scenes-0123456789abcdef.bin").write_bytes(b"old")
    assert opened()(GROUPS).shape[0] == 3


def test_a_convolutional_tower_in_channels_last_can_be_cached(opened):
    module = MobileNetV2().to(memory_format=torch.channels_last)
    tower = VisionTower(module, 1280, 1, 32, PixelNorm((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), "random")
    assert opened(tower=tower)(GROUPS).shape == (3, 1, 1280)


def test_a_set_keeps_the_eval_transform_among_augmented_ones(opened):
    """Images that are `fixed` look as with the eval transform in every epoch, live and cached; the others are drawn anew."""
    plain = opened(cached=False)
    for settings in ({"cached": False}, {"views": 2}):
        mixed = opened(transform="train", fixed=[range(0, 1), range(2, 3)], **settings)
        for epoch in (0, 1):
            groups = [Group(i, epoch, ()) for i in range(3)]
            same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(mixed(groups), plain(groups), strict=True)]
            assert same == [True, False, True]
