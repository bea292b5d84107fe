"""The commands as a user gives them: converter alone, torchrun both ways, and what a mistake says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from vpgtrans.engine.cli import main
from vpgtrans.engine.demo import _is_done, _jobs, _read_plan
from vpgtrans.engine.recipe import RecipeError
from vpgtrans.engine.report import load_run
from vpgtrans.engine.train import main as train

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = Path(sys.executable).with_name("torchrun")
SHORT = ["stages.0.pairs=11", "stages.1.pairs=11", "evaluation.generate_images=2"]


def test_convert_alone(tiny_recipe, tiny_world, tmp_path, capfd):
    assert main(["convert", str(tiny_recipe), "--out", str(tmp_path / "converted")]) == 0
    merged = load_file(tmp_path / "converted" / "projector.safetensors")
    report = json.loads((tmp_path / "converted" / "converter.json").read_text())
    assert merged["weight"].shape == (32, 16) and merged["bias"].shape == (32,)
    assert report["method"] == "ridge" and report["shared_tokens"] > 30
    assert "nearest neighbour right" in capfd.readouterr().err


def test_convert_without_a_source_is_a_recipe_error(tiny_recipe, capsys):
    settings = ["source.vlm=null", "initialise.vpg=vpg", "initialise.projector=random"]
    assert main(["convert", str(tiny_recipe), *settings]) == 2
    assert "source.vlm" in capsys.readouterr().err


def test_a_report_of_a_real_run(tiny_recipe, tmp_path):
    """What the trainer writes is what the report reads."""
    assert main(["train", str(tiny_recipe), *SHORT]) == 0
    found = load_run(tmp_path / "run")
    assert found.arm == "vpgtrans"
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "vpgtrans" in page.lower() and "data:image/jpeg;base64" in page


@pytest.mark.parametrize("way", [["engine/train.py"], ["-m", "vpgtrans.engine.train"]], ids=["script", "module"])
def test_torchrun_from_another_folder(way, tiny_recipe, tmp_path):
    target = [str(ROOT / way[0])] if way[0].endswith(".py") else way
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [TORCHRUN, "--nproc-per-node", "1", *target, tiny_recipe]
    done = subprocess.run(
        [*command, *SHORT], cwd=tmp_path, capture_output=True, text=True, timeout=200, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["pairs"] == 22


def test_torchrun_ends_with_2_for_a_recipe_error(tiny_recipe, tmp_path):
    command = [TORCHRUN, ROOT / "engine" / "train.py", tiny_recipe, "stages.0.learnin_rate=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2 and "learning_rate" in done.stderr and "Traceback" not in done.stderr


def test_the_demo_plan_only_repeats_what_changed(tmp_path):
    plan = _read_plan(ROOT / "recipes" / "demo" / "plan.yaml")
    first = _jobs(plan, ROOT / "recipes" / "demo", tmp_path, 1)
    assert (
        list(first)[:2] == ["world", "vision"]
        and {"tfs", "vpgtrans", "vpg_inherit", "vpgtrans_no_converter"} <= first.keys()
    )
    plan["parts"]["world"]["scenes"]["val"] = 7
    changed = _jobs(plan, ROOT / "recipes" / "demo", tmp_path, 1)
    assert all(first[n].key != changed[n].key for n in ("world", "vision", "lm_source", "vpg", "source"))
    for job in first.values():
        assert all(list(first).index(n) < list(first).index(job.name) for n in job.needs if n != "lm_target")
    seeds = _jobs(plan, ROOT / "recipes" / "demo", tmp_path, 2)
    assert "tfs-0" in seeds and "tfs-1" in seeds and "seed=1" in seeds["tfs-1"].command
    job = first["world"]
    job.folder = tmp_path / "made"
    job.folder.mkdir()
    assert not _is_done(job)
    (job.folder / ".made-from").write_text(job.key)
    assert _is_done(job)


def test_a_missing_plan_is_a_recipe_error(tmp_path):
    with pytest.raises(RecipeError, match=r"recipes/demo/plan\.yaml"):
        _read_plan(tmp_path / "none.yaml")


def test_the_world_and_usage(tmp_path, capsys):
    assert main(["scenes", str(tmp_path / "w"), "--train=2", "--source=1", "--val=1", "--text=2"]) == 0
    assert "2 train" in capsys.readouterr().out
    assert main([]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--dryrun", "r.yaml"], "unrecognized arguments: --dryrun; did you mean --dry-run?"),
        (["caption", "m", "i.jpg", "--num-beans=3"], "did you mean --num-beams?"),
        (["--nonsense"], "unrecognized arguments: --nonsense\n"),
    ],
)
def test_an_unknown_option_is_told_by_its_command(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and message in err
    assert err.startswith(
        f"usage: vpgtrans {arguments[0]} " if arguments[0] != "--nonsense" else "usage: vpgtrans [-h]"
    )


def test_train_takes_recipes_and_its_own_options(capsys):
    assert train(["--dryrun", str(ROOT / "recipes" / "demo.yaml")]) == 2
    assert "unrecognized arguments: --dryrun" in capsys.readouterr().err
    plan = ROOT / "recipes" / "demo" / "plan.yaml"
    assert main(["train", str(plan)]) == 2
    assert capsys.readouterr().err == (
        f"recipe error: {plan}: expected a recipe, got a plan of parts and arms; use `vpgtrans demo --plan {plan}`\n"
    )
