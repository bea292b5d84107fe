"""Images that turn out to be unusable in training: the run stops with their name, or goes on as if their captions were not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vpgtrans.engine.data.coco import DataError, read_captions
from vpgtrans.engine.data.feature_cache import open_features
from vpgtrans.engine.data.features import LiveFeatures
from vpgtrans.engine.data.images import ImageRefused
from vpgtrans.engine.data.packing import CaptionData, Group, pack_update
from vpgtrans.engine.data.pair_batches import pack_pairs
from vpgtrans.engine.loop import run
from vpgtrans.engine.models.vision import load_tower
from vpgtrans.engine.recipe import Vision, load_recipe
from vpgtrans.engine.runlog import RunLog
from vpgtrans.engine.runtime import start

# Images of one to three captions whose targets tell where they come from: caption k of image i is [1, 100 i + k, ...].
DATA = CaptionData(
    "x", [None] * 6, [[[1, 100 * i + k, 7, 8, 9][: 3 + (i + k) % 3] for k in range(1 + i % 3)] for i in range(6)]
)
GROUPS = [Group(i, 0, tuple(range(1 + i % 3))) for i in (4, 0, 5, 2, 1, 3)]


def packed(kind: str):
    if kind == "rows":
        return pack_update(GROUPS, DATA, 2, 12, 3, 0)
    return pack_pairs(
        GROUPS, DATA, 2, token_budget=60, starts_word=np.ones(1000, bool), start=0, eos=3, pad=0, split_seed=None
    )


@pytest.mark.parametrize("kind", ["rows", "pairs"])
@pytest.mark.parametrize("bad", [{5}, {0, 4}, {2, 3, 5}])
def test_a_batch_loses_the_targets_of_an_image_and_no_others(kind, bad):
    end = [3] if kind == "pairs" else []  # an encoder-decoder's captions end with </s>
    batches, seen = packed(kind), 0
    for batch in batches:
        left = batch.without(bad)
        alone = batch.without({g.image for g in batch.groups} - bad)
        assert left.target_count + alone.target_count == batch.target_count and len(left.predict) == len(left.labels)
        assert sorted([*left.labels.tolist(), *alone.labels.tolist()]) == sorted(batch.labels.tolist())
        firsts = [label for label in left.labels.tolist() if label >= 100]
        assert all(label // 100 not in bad for label in firsts) and left.groups == batch.groups
        kept = {(position, label) for position, label in zip(left.predict.tolist(), left.labels.tolist(), strict=True)}
        assert kept <= set(zip(batch.predict.tolist(), batch.labels.tolist(), strict=True))
        seen += left.target_count
    assert len(batches) > 1
    assert seen == sum(len(DATA.ids[g.image][c]) + len(end) for g in GROUPS if g.image not in bad for c in g.captions)


def test_a_batch_of_unusable_images_alone_has_no_loss_and_no_gradient(make_llm):
    llm = make_llm("llama")
    data = CaptionData("x", [None] * 2, [[[1, 5, 6]], [[1, 7, 8, 9]]])
    (batch,) = pack_update([Group(0, 0, (0,)), Group(1, 0, (0,))], data, 2, 32, 1, 0)
    prompts = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    parts = [llm.loss_sum(prompts, batch.without(bad)) for bad in ((), {0}, {1}, {0, 1})]
    assert parts[0].item() == pytest.approx(parts[1].item() + parts[2].item(), rel=1e-5) and parts[3].item() == 0
    parts[3].backward()
    assert not prompts.grad.any()
    parts[1].backward()
    assert not prompts.grad[0].any() and prompts.grad[1].any()


@pytest.fixture
def world(tiny_world, tmp_path) -> Path:
    """A copy of the tiny world whose images may be damaged."""
    shutil.copytree(tiny_world / "world", tmp_path / "world")
    return tmp_path / "world"


def training_images(world: Path) -> list[Path]:
    return [
        world / "images" / i["file_name"] for i in json.loads((world / "captions_train.json").read_text())["images"]
    ]


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


@pytest.fixture
def opened(tiny_world, world, tmp_path):
    """open(bad_images=..., cached=...) -> features of the world's training images."""
    found = read_captions(world / "captions_train.json", world / "images")
    data = CaptionData("scenes", found.records, [[[1]]] * len(found.records))
    tower = load_tower(Vision(kind="eva_vit", path=tiny_world / "tower", image_size=32))
    log = RunLog(tmp_path, name="t.jsonl")

    def open_(bad_images: str = "skip", cached: bool = False):
        return open_features(
            data, tower, transform="eval", seed=0, runtime=start("cpu", "fp32", 1, 0), log=log,
            cache_root=tmp_path / "cache" if cached else None, bad_images=bad_images,
        )  # fmt: skip

    yield open_
    log.close()


def test_an_unusable_image_is_listed_and_its_neighbours_are_as_ever(opened, world):
    groups = [Group(i, 0, (0,)) for i in range(4)]
    before = opened()(groups)
    damage(training_images(world)[2])
    live = opened()
    after = live(groups)
    assert list(live.unusable) == [2] and training_images(world)[2].name in live.unusable[2]
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]]) and not torch.equal(after[2], before[2])
    with pytest.raises(ImageRefused, match=training_images(world)[2].name):
        opened("fail")(groups)


def test_a_cache_remembers_what_it_lacks(opened, world):
    for n in (1, 5):
        damage(training_images(world)[n])
    assert sorted(opened(cached=True).unusable) == sorted(opened(cached=True).unusable) == [1, 5]
    with pytest.raises(DataError, match="lacks 2 images"):
        opened("fail", cached=True)


def test_a_lost_disk_is_not_taken_for_bad_images(opened, world):
    live = opened()
    assert isinstance(live, LiveFeatures)
    for path in training_images(world)[:9]:
        path.unlink()
    with pytest.raises(DataError, match=r"found 9, the last: .*missing"):
        live([Group(i, 0, (0,)) for i in range(24)])


def altered(tiny_recipe: Path, world: Path, captions: str = "captions_train.json", **data) -> Path:
    values = yaml.safe_load(tiny_recipe.read_text())
    entry = {"name": "scenes", "captions": str(world / captions), "images": str(world / "images")}
    values["data"].update(train=[entry], verify_images="none", **data)
    tiny_recipe.write_text(yaml.safe_dump(values))
    return tiny_recipe


def warnings(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [e for e in lines if e["event"] == "warning" and e["name"] == "bad_image"]


def test_a_run_stops_or_goes_on(tiny_recipe, world, tmp_path, monkeypatch):
    """Two images damaged after the check: named once each, the run ends, and a run stopped half way ends bit for bit the same."""
    for n in (3, 8):
        damage(training_images(world)[n])
    altered(tiny_recipe, world)
    small = ["evaluation.generate_images=0"]
    with pytest.raises(ImageRefused, match="truncated"):
        run(load_recipe(tiny_recipe, small))
    skipping = [*small, "data.bad_images=skip"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    summary = run(load_recipe(tiny_recipe, [*skipping, f"output.folder={whole}"]))
    assert summary["bad_images"] == 2 and summary["pairs"] == 220 and summary["skipped_updates"] == 0
    assert sorted(w["file"] for w in warnings(whole)) == sorted(str(training_images(world)[n]) for n in (3, 8))

    from vpgtrans.engine import loop

    real, calls = loop._accumulate, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(loop, "_accumulate", stopped)
    recipe = load_recipe(tiny_recipe, [*skipping, f"output.folder={resumed}"])
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    again = run(recipe)
    assert again["bad_images"] == 2 and len(warnings(resumed)) == 2
    expected, got = (load_file(f / "last" / "model.safetensors") for f in (whole, resumed))
    assert all(torch.equal(expected[k], got[k]) for k in expected)


def test_an_update_is_the_mean_over_the_other_targets(tiny_recipe, world, tmp_path):
    """One update of all pairs: with an image damaged it ends where a data set without that image ends."""
    told = json.loads((world / "captions_train.json").read_text())
    bad = told["images"][4]["id"]
    fewer = {
        "images": [i for i in told["images"] if i["id"] != bad],
        "annotations": [a for a in told["annotations"] if a["image_id"] != bad],
    }
    (world / "fewer.json").write_text(json.dumps(fewer))
    damage(training_images(world)[4])
    values = yaml.safe_load(tiny_recipe.read_text())
    values["converter"] = {"match_prompt_norm": False}  # which looks at the first images, here others in the second set
    ends = []
    for captions in ("captions_train.json", "fewer.json"):
        pairs = len((told if captions == "captions_train.json" else fewer)["annotations"])
        values["stages"] = [
            {"name": "one", "trains": "projector", "learning_rate": 1e-3, "pairs": pairs, "batch_pairs": pairs}
        ]
        values["output"].update(folder=str(tmp_path / captions), log_every_updates=1)
        tiny_recipe.write_text(yaml.safe_dump(values))
        altered(tiny_recipe, world, captions, transform="eval", bad_images="skip", captions_per_image="all")
        run(load_recipe(tiny_recipe, ["evaluation.generate_images=0"]))
        log = map(json.loads, (tmp_path / captions / "log.jsonl").read_text().splitlines())
        ends.append(next((e["loss"], e["grad_norm"]) for e in log if e["event"] == "train"))
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
