"""The vision cache: exact, keyed by what it was made from, and rebuilt when it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vpgtrans.engine.data.coco import read_captions
from vpgtrans.engine.data.features import CachedFeatures, LiveFeatures, open_features
from vpgtrans.engine.data.packing import CaptionData, Group
from vpgtrans.engine.models.vision import MobileNetV2, PixelNorm, VisionTower, load_tower
from vpgtrans.engine.recipe import Vision
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
    return sorted((tmp_path / "cache").glob("*.bin"))


def test_cache_is_exact(opened, tmp_path):
    live, cached = opened(cached=False), opened()
    assert isinstance(live, LiveFeatures) and isinstance(cached, CachedFeatures)
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


def test_fast_decoding_is_another_cache(opened, tmp_path):
    opened()
    fast = opened(decode="fast")
    assert len(caches(tmp_path)) == 2
    # The scenes are no larger than the tower's input: nothing is scaled.
    assert torch.equal(fast(GROUPS), opened()(GROUPS))


def test_a_truncated_cache_is_rebuilt_and_said(opened, tmp_path, capfd):
    expected = opened()(GROUPS)
    (path,) = caches(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    assert torch.equal(opened()(GROUPS), expected)
    assert "stale_cache" in capfd.readouterr().err


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
