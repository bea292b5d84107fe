"""The prompt cache: a stage that trains the projector alone ends where it ends without, and the frozen parts run once an image."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vpgtrans.engine.data.feature_table import Layout
from vpgtrans.engine.data.packing import Subset
from vpgtrans.engine.data.reading import DataError
from vpgtrans.engine.loop import run
from vpgtrans.engine.models.vpg import VPG
from vpgtrans.engine.prompt_cache import spared_share
from vpgtrans.engine.recipe import RecipeError, load_recipe

# 24 images with 5 captions: two epochs of the warm-up, and a short second stage.
SMALL = [
    "data.transform=eval", "data.captions_per_image=all", "stages.0.pairs=240", "stages.1.pairs=22", "stages.0.batch_pairs=24",
    "stages.0.eval_every_pairs=null", "stages.1.eval_every_pairs=null", "evaluation.generate_images=0", "output.checkpoint_every_pairs=null",
]  # fmt: skip


def went(recipe: Path, out: Path, *settings: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The model at the end of a run, and what each logged update was."""
    run(load_recipe(recipe, [*SMALL, *settings, f"output.folder={out}", f"output.cache={out.parent / 'cache'}"]))
    events = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return load_file(out / "last" / "model.safetensors"), [e for e in events if e["event"] == "train"]


def prompts(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("prompt-*"))


def forwards(monkeypatch) -> list[int]:
    """Images of each forward pass of a VPG that does not train."""
    counts, real = [], VPG.forward

    def counting(self, features):
        if not self.query_tokens.requires_grad and not torch.is_grad_enabled():
            counts.append(len(features))
        return real(self, features)

    monkeypatch.setattr(VPG, "forward", counting)
    return counts


@pytest.mark.parametrize("vision", ["false", "true"])
def test_a_stage_ends_where_it_ends_without(tiny_recipe, tmp_path, vision):
    """Equal within rounding at every update: the Q-Former's batches differ, for an image is in the batch where it was first met."""
    settings = [f"data.vision_cache={vision}", "output.log_every_updates=1"]
    without, losses = went(tiny_recipe, tmp_path / "without", *settings, "data.prompt_cache=false")
    assert not prompts(tmp_path)
    with_, stored = went(tiny_recipe, tmp_path / "with", *settings)
    again, read = went(tiny_recipe, tmp_path / "again", *settings)
    (folder,) = prompts(tmp_path)
    assert (folder / "complete.json").exists()
    for one, other in ((losses, stored), (stored, read)):
        assert len(one) == len(other) == 12
        assert [e["loss"] for e in one] == pytest.approx([e["loss"] for e in other], rel=1e-5)
        assert [e["grad_norm"] for e in one] == pytest.approx([e["grad_norm"] for e in other], rel=1e-4)
    assert all(torch.allclose(without[k], with_[k], rtol=1e-4, atol=1e-5) for k in without)
    # The second run only reads what the first has stored: nothing is rounded anew.
    assert all(torch.equal(with_[k], again[k]) for k in with_)


def test_the_vpg_runs_once_an_image(tiny_recipe, tmp_path, monkeypatch):
    settings = ["stages.0.pairs=480", "stages.0.batch_pairs=120", "data.rows_per_micro_batch=64"]
    no_validation = "evaluation.loss_images=1"
    counts = forwards(monkeypatch)
    went(tiny_recipe, tmp_path / "run", *settings, no_validation)
    assert (
        counts.count(24) == 1 and sum(counts) - 24 <= 16 + 8
    )  # the converter's images; a validation image now and then


def test_views_and_mixed_transforms(tiny_recipe, tmp_path):
    """k stored views make k prompts an image; without a vision cache only sets with the eval transform have prompts."""
    views = ["data.transform=train", "data.vision_cache=true", "data.views=2", "data.prompt_cache=true"]
    without, _ = went(tiny_recipe, tmp_path / "without", *views[:3], "data.prompt_cache=false")
    with_, _ = went(tiny_recipe, tmp_path / "with", *views)
    assert all(torch.allclose(without[k], with_[k], rtol=1e-4, atol=1e-5) for k in without)
    (folder,) = prompts(tmp_path)
    assert json.loads((folder / "about.json").read_text())["layout"]["views"] == 2
    mixed = load_recipe(tiny_recipe, ["data.transform=train", "data.prompt_cache=true", "data.train.0.transform=eval"])
    assert mixed.prompt_cache_fault(mixed.stages[0]) is None


def test_a_run_killed_while_filling_ends_bit_for_bit_the_same(tiny_recipe, tmp_path, monkeypatch):
    whole, _ = went(tiny_recipe, tmp_path / "whole" / "run")
    from vpgtrans.engine import loop

    real, calls = loop._accumulate, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    saves = "output.checkpoint_every_pairs=24"

    monkeypatch.setattr(loop, "_accumulate", stopped)
    with pytest.raises(KeyboardInterrupt):
        went(tiny_recipe, tmp_path / "stopped" / "run", saves)
    (folder,) = prompts(tmp_path / "stopped")
    assert not (folder / "complete.json").exists() and any((folder / "rows.crc").read_bytes())
    resumed, _ = went(tiny_recipe, tmp_path / "stopped" / "run", saves)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole) and (folder / "complete.json").exists()


def test_two_runs_fill_both_caches_at_once(tiny_recipe, tmp_path, monkeypatch):
    cached = "data.vision_cache=true"
    alone, _ = went(tiny_recipe, tmp_path / "alone" / "run", cached, "seed=4")
    monkeypatch.setattr("vpgtrans.engine.data.feature_cache.BUILD_BATCH", 2)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        ends = [pool.apply_async(went, (tiny_recipe, tmp_path / f"run{s}", cached, f"seed={s}")) for s in (4, 5)]
        together = ends[0].get(120)[0]
        ends[1].get(120)
    assert len(list((tmp_path / "cache").glob("*/complete.json"))) == 3  # prompts, and features of both sets
    assert all(torch.allclose(alone[k], together[k], rtol=1e-4, atol=1e-5) for k in alone)


def test_another_vpg_is_another_cache(tiny_recipe, tiny_world, tmp_path):
    went(tiny_recipe, tmp_path / "one")
    went(tiny_recipe, tmp_path / "two", "initialise.vpg=vpg", "initialise.projector=random")
    assert len(prompts(tmp_path)) == 2


def test_damage_in_a_complete_cache_stops_the_run(tiny_recipe, tmp_path):
    went(tiny_recipe, tmp_path / "one")
    (folder,) = prompts(tmp_path)
    raw = bytearray((folder / "shard-00000.bin").read_bytes())
    raw[100] ^= 8
    (folder / "shard-00000.bin").write_bytes(raw)
    with pytest.raises(ValueError, match="row 0 fails its checksum; build the cache again with `vpgtrans cache"):
        went(tiny_recipe, tmp_path / "two")


def test_unusable_images_stay_out_of_the_loss(tiny_recipe, tiny_world, tmp_path):
    """With an image damaged and `skip`, prompts that are stored or read leave out the same captions as the tower does."""
    world = tmp_path / "world"
    shutil.copytree(tiny_world / "world", world)
    values = yaml.safe_load(tiny_recipe.read_text())
    entry = {"name": "scenes", "captions": str(world / "captions_train.json"), "images": str(world / "images")}
    values["data"].update(train=[entry], verify_images="none", bad_images="skip")
    tiny_recipe.write_text(yaml.safe_dump(values))
    image = world / "images" / json.loads((world / "captions_train.json").read_text())["images"][20]["file_name"]
    image.write_bytes(image.read_bytes()[:-300])
    without, _ = went(tiny_recipe, tmp_path / "without", "data.prompt_cache=false")
    for name in ("stores", "reads"):
        with_, _ = went(tiny_recipe, tmp_path / name)
        assert all(torch.allclose(without[k], with_[k], rtol=1e-4, atol=1e-5) for k in without)
    with pytest.raises(ValueError, match=r"data.bad_images: .*prompt-scenes.* lacks 1 images"):
        # By a run that never reads the image itself.
        went(tiny_recipe, tmp_path / "fails", "data.bad_images=fail")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["data.transform=train"], ["data.prompt_cache", "warm_up", "data.transform"]),
        (["stages.0.frozen_dropout=true"], ["data.prompt_cache", "warm_up", "frozen_dropout"]),
        (["stages.0.trains=vpg_and_projector"], ["data.prompt_cache", "trains: projector"]),
        (["data.cache_fill=first_epoch"], ["data.cache_fill", "data.vision_cache"]),
        (["data.cache_precision=fp4"], ["data.cache_precision", "fp8"]),
    ],
)
def test_what_cannot_be_kept_is_a_recipe_error(tiny_recipe, settings, named):
    with pytest.raises(RecipeError) as raised:
        load_recipe(tiny_recipe, ["data.transform=eval", "data.prompt_cache=true", *settings])
    assert all(name in str(raised.value) for name in named)


@pytest.mark.parametrize(
    ("free_rows", "settings", "said"),
    [
        (40, [], "more than 50% of the 0.0 GiB that its disk has free"),  # 24 rows would fit, and little else
        (20, ["data.prompt_cache=true"], "free for the prompt cache"),
        (20, ["data.vision_cache=true", "data.cache_fill=first_epoch"], "free for the vision cache"),
    ],
)
def test_a_disk_without_room(tiny_recipe, tmp_path, monkeypatch, capfd, free_rows, settings, said):
    """Auto leaves room for checkpoints; what is asked for by name is refused before a row is written."""
    row_bytes = Layout(1, 1, 4, 16, torch.float32).row_bytes
    for module in ("prompt_cache", "data.feature_cache"):
        monkeypatch.setattr(f"vpgtrans.engine.{module}.disk_free_bytes", lambda _: free_rows * row_bytes)
    if settings:
        with pytest.raises(DataError, match=said):
            went(tiny_recipe, tmp_path / "run", *settings)
    else:
        went(tiny_recipe, tmp_path / "run", "stages.1.pairs=11")
        assert said in " ".join(capfd.readouterr().err.split())
    assert not list((tmp_path / "cache").glob("*/rows.crc"))


def test_auto_writes_nothing_that_is_not_read_again(tiny_recipe, tmp_path, capfd):
    went(tiny_recipe, tmp_path / "short", "stages.0.pairs=110")
    assert "prompt cache: off in warm_up: it would spare 0% of the encodings" in " ".join(
        capfd.readouterr().err.split()
    )
    went(tiny_recipe, tmp_path / "dropout", "stages.0.frozen_dropout=true")
    went(tiny_recipe, tmp_path / "random", "data.transform=train")
    assert not prompts(tmp_path)


@pytest.mark.parametrize(
    ("passes", "views", "expected"), [(1.0, 1, 0.0), (2.0, 1, 0.5), (10.0, 1, 0.9), (2.0, 2, 0.0), (0.3, 1, 0.0)]
)
def test_spared_share(passes, views, expected):
    assert spared_share([(Subset(0, 10, 10), 50)], round(50 * passes), views) == pytest.approx(expected)


def test_spared_share_of_a_mixture():
    """Half of the pairs from 10 images, half from 1,000, one caption each: 100 pairs pass 5 times over the first set."""
    mixed = [(Subset(0, 10, 1.0), 10), (Subset(10, 1010, 1.0), 1000)]
    assert spared_share(mixed, 100, 1) == pytest.approx(40 / 100)


def test_fp8_prompts_change_the_loss_little(tiny_recipe, tmp_path):
    exact, _ = went(tiny_recipe, tmp_path / "exact")
    rounded, _ = went(tiny_recipe, tmp_path / "rounded", "data.cache_precision=fp8")
    assert len(prompts(tmp_path)) == 2
    difference = max((exact[k] - rounded[k]).abs().max().item() for k in exact)
    assert 0 < difference < 0.05
