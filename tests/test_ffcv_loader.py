"""`data.loader: ffcv`: what it refuses before anything is loaded, and, where FFCV is installed, its images and a training run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vpgtrans.engine.cli import main
from vpgtrans.engine.data.coco import read_pack
from vpgtrans.engine.data.ffcv_loader import FFCVFeatures, ffcv_unsupported_reason
from vpgtrans.engine.data.images import read_image
from vpgtrans.engine.data.packing import CaptionData, Group
from vpgtrans.engine.loop import run
from vpgtrans.engine.models.vision import load_tower
from vpgtrans.engine.recipe import RecipeError, Vision, load_recipe
from vpgtrans.engine.runtime import start
from vpgtrans.engine.train import main as train


@pytest.fixture
def needs_ffcv() -> None:
    if reason := ffcv_unsupported_reason():
        pytest.skip(f"FFCV cannot be imported: {reason}")


@pytest.fixture
def packed(tiny_world, tmp_path) -> Path:
    """The tiny world's training images, packed into two shards."""
    world = tiny_world / "world"
    command = ["pack", str(world / "captions_train.json"), str(tmp_path / "packed"), "--images", str(world / "images")]
    assert main([*command, "--shard-images", "12"]) == 0
    return tmp_path / "packed"


def with_packed(folder: Path) -> str:
    return f"data.train=[{{name: scenes, captions: {folder}}}]"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.decode=fast"], "data: decode: expected 'exact', because loader is 'ffcv'"),
        (["data.bad_images=skip"], "bad_images: expected 'fail', because loader is 'ffcv'"),
        (["data.vision_cache=true", "data.transform=eval"], "vision_cache: expected False, because loader is 'ffcv'"),
        (["data.train.0.format=coco"], r"train\.0\.format: expected pack, because loader is 'ffcv', got 'coco'"),
    ],
)
def test_what_ffcv_has_not_is_a_recipe_error(settings, words, tiny_recipe):
    with pytest.raises(RecipeError, match=words):
        load_recipe(tiny_recipe, ["data.loader=ffcv", *settings])


def test_sets_that_are_not_packed_are_named(tiny_recipe, capsys):
    assert train([str(tiny_recipe), "data.loader=ffcv"]) == 2
    message = capsys.readouterr().err
    assert "data.train.0: expected the folder of a packed set" in message and "captions_train.json" in message
    assert "vpgtrans pack" in message


def test_a_missing_ffcv_says_what_to_install(tiny_recipe, packed, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    assert train([str(tiny_recipe), "data.loader=ffcv", with_packed(packed)]) == 2
    message = capsys.readouterr().err
    for words in ("recipe error: data.loader", "libturbojpeg0-dev libopencv-dev pkg-config g++", "vpgtrans[ffcv]"):
        assert words in message


@pytest.mark.usefixtures("needs_ffcv")
def test_images_come_in_the_order_asked_for(tiny_world, packed):
    """Of two shards, more at once than FFCV decodes, one twice; squashed whole, cropped anew each time, and both mixed."""
    found = read_pack(packed)
    assert len({r.path.shard for r in found.records}) == 2
    data = CaptionData("scenes", found.records, [[[1]]] * 24)
    tower = load_tower(Vision(kind="eva_vit", path=tiny_world / "tower", image_size=32))
    tower.image_size = 24
    runtime, threads = start("cpu", "fp32", 1, 0), torch.get_num_threads()
    groups = [Group(int(i), 0, (0,)) for i in [*np.random.default_rng(0).permutation(24), 3]]
    features = FFCVFeatures(data, tower, "train", 0, runtime, fixed=frozenset(range(0, 24, 2)))
    first, second = features.prepare(groups), features.prepare(groups)
    whole = [
        np.asarray(read_image(r.path).resize((24, 24), Image.Resampling.BOX)).transpose(2, 0, 1) for r in found.records
    ]
    apart = np.abs(first.numpy()[:, None].astype(int) - np.stack(whole)[None]).mean((2, 3, 4))  # [groups, images]
    own = apart[range(25), [g.image for g in groups]]
    for place, group in enumerate(groups):
        is_whole = group.image % 2 == 0
        assert torch.equal(first[place], second[place]) == is_whole
        assert not is_whole or (apart[place].argmin() == group.image and own[place] < 4)
    cropped = [place for place, group in enumerate(groups) if group.image % 2]
    assert own[cropped].mean() < 0.7 * apart[cropped].mean()
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("needs_ffcv")
def test_a_run_with_ffcv(tiny_recipe, packed, capfd):
    settings = ["data.loader=ffcv", with_packed(packed), "evaluation.generate_images=0"]
    summary = run(load_recipe(tiny_recipe, settings))
    shown = " ".join(capfd.readouterr().err.split())
    for words in ("resized by area, not bicubic", "cannot be seeded", "a resumed run has the same order"):
        assert words in shown
    assert summary["pairs"] == 220 and summary["best_val_loss"] < 5.2
