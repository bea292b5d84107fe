"""`vpgtrans cache`: what it would take and save, building, going on, checking and rebuilding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from vpgtrans.engine.cli import main
from vpgtrans.engine.data.features import LiveFeatures
from vpgtrans.engine.loop import run
from vpgtrans.engine.recipe import load_recipe

# Two epochs of the warm-up over 24 images with 5 captions.
SETTINGS = [
    "data.transform=eval", "data.vision_cache=true", "data.captions_per_image=all", "stages.0.pairs=240", "stages.1.pairs=22",
    "evaluation.generate_images=0", "output.checkpoint_every_pairs=null",
]  # fmt: skip


def folders(tmp_path: Path, name: str = "*") -> list[Path]:
    return sorted(p.parent for p in (tmp_path / "cache").glob(f"{name}/about.json") if p.parent.name[:6] != "tokens")


def shown(capfd) -> str:
    return " ".join(capfd.readouterr().err.split())


def test_a_run_finds_what_the_command_has_built(tiny_recipe, tmp_path, capfd, monkeypatch):
    assert main(["cache", str(tiny_recipe), *SETTINGS, "--dry-run"]) == 0
    said = shown(capfd)
    assert not folders(tmp_path) and "0 of 24" in said and "GiB free" in said and "TFLOP" in said
    assert main(["cache", str(tiny_recipe), *SETTINGS]) == 0
    names = [p.name.split("-")[0] for p in folders(tmp_path)]
    assert names == ["prompt", "vision", "vision"]
    assert all((p / "complete.json").exists() for p in folders(tmp_path))
    about = json.loads((folders(tmp_path, "vision-scenes*")[0] / "about.json").read_text())
    assert about["made_of"]["transform"] == "eval" and about["notes"]["images"] == 24
    monkeypatch.setattr(LiveFeatures, "finish", lambda *_: pytest.fail("the tower ran although its outputs were there"))
    run(load_recipe(tiny_recipe, SETTINGS))
    assert len(folders(tmp_path)) == 3 and "24 of 24 rows" in shown(capfd)
    built = load_file(tmp_path / "run" / "last" / "model.safetensors")
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "run")
    run(load_recipe(tiny_recipe, SETTINGS))
    itself = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert all(((built[k] - itself[k]).abs() < 1e-4).all() for k in built)


def test_caches_of_other_settings_are_named(tiny_recipe, tmp_path, capfd):
    command = ["cache", str(tiny_recipe), *SETTINGS]
    assert main(command) == 0
    old = folders(tmp_path)
    assert len(old) == 3 and "notreadbythisrecipe" not in shown(capfd).replace(" ", "")
    assert main([*command, "data.cache_precision=fp8", "--dry-run"]) == 0
    said = shown(capfd).replace(" ", "")
    assert "notreadbythisrecipe" in said and all(folder.name in said for folder in old)
    assert "madeofotherprecision" in said and "madeofotherfeatures.precision,precision" in said
    run(load_recipe(tiny_recipe, [*SETTINGS, "data.cache_precision=fp8"]))
    assert "cache:nottheonein" in shown(capfd).replace(" ", "") and len(folders(tmp_path)) == 6
    for text in ("{", "[]"):
        (old[0] / "about.json").write_text(text)
        assert main([*command, "data.cache_precision=fp8", "--dry-run"]) == 0
        assert "about.json,whichcannotberead" in shown(capfd).replace(" ", "")


def test_a_place_that_cannot_be_written_is_one_message(tiny_recipe, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    place = [*SETTINGS, f"output.cache={tmp_path / 'file' / 'cache'}"]
    assert main(["cache", str(tiny_recipe), *place]) == 2
    assert "recipe error: output.cache: expected a folder that can be written" in shown(capfd)
    assert main(["train", str(tiny_recipe), *place]) == 2
    said = shown(capfd)
    assert "expected a folder that can be written" in said and "Traceback" not in said


def test_looking_writes_nothing(tiny_recipe, tmp_path):
    assert main(["cache", str(tiny_recipe), *SETTINGS]) == 0
    (tmp_path / "cache" / "cache.jsonl").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    for look in ("--check", "--dry-run"):
        assert main(["cache", str(tiny_recipe), *SETTINGS, look]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def test_a_stopped_build_goes_on(tiny_recipe, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("vpgtrans.engine.data.feature_cache.BUILD_BATCH", 5)
    real, calls = LiveFeatures.finish, []

    def stopped(self, prepared):
        calls.append(len(prepared))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, prepared)

    monkeypatch.setattr(LiveFeatures, "finish", stopped)
    command = ["cache", str(tiny_recipe), *SETTINGS]
    with pytest.raises(KeyboardInterrupt):
        main(command)
    capfd.readouterr()
    assert main(command) == 0
    said = shown(capfd)
    assert "14 of 24 rows to compute" in said and sum(calls) == 24 + 6 + calls[2]
    assert main([*command, "--check"]) == 0
    assert "24 of 24 rows, 0 fail" in shown(capfd)


def test_damage_is_found_and_rebuilt(tiny_recipe, tmp_path, capfd):
    command = ["cache", str(tiny_recipe), *SETTINGS]
    assert main(command) == 0
    (folder,) = folders(tmp_path, "prompt-*")
    shard = folder / "shard-00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[-70] ^= 1
    shard.write_bytes(raw)
    capfd.readouterr()
    assert main([*command, "--check"]) == 2
    assert f"{folder}: 1 rows fail their checksums, the first row 23; build again with --rebuild" in shown(capfd)
    shard.write_bytes(raw[:-8])
    assert main([*command, "--check"]) == 2
    assert "truncated" in shown(capfd)
    assert main([*command, "--rebuild"]) == 0 and main([*command, "--check"]) == 0


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (["data.vision_cache=false", "data.prompt_cache=false"], 2, "data.vision_cache, data.prompt_cache: expected a cache to build"),
        (["data.vision_cache=false", "data.transform=train"], 2, "no stage can keep prompts: warm_up: data.transform 'train'"),
        (["stages.0.pairs=60"], 0, "prompt cache: not built, because it would spare 0%"),
        (["stages.0.pairs=60", "data.prompt_cache=true"], 0, "prompt"),
    ],
)  # fmt: skip
def test_what_is_built_and_what_is_not(tiny_recipe, tmp_path, capfd, settings, code, message):
    assert main(["cache", str(tiny_recipe), *SETTINGS, *settings, "--dry-run"]) == code
    assert message in shown(capfd) and not folders(tmp_path)


def test_a_disk_that_is_too_small_is_told_first(tiny_recipe, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("vpgtrans.engine.data.feature_cache.disk_free_bytes", lambda _: 1000)
    assert main(["cache", str(tiny_recipe), *SETTINGS]) == 2
    said = shown(capfd)
    assert "free for the vision cache" in said and "output.cache" in said and "fp8" in said and not folders(tmp_path)
