"""Recipes: every mistake is found before anything heavy is imported, with the key, what was expected and the nearest valid one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vpgtrans.engine.cli import main
from vpgtrans.engine.recipe import KINDS, RecipeError, load_recipe, save_recipe
from vpgtrans.engine.recipe.keys import keys_of

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "recipes" / "demo.yaml"


@pytest.fixture
def recipe(tmp_path) -> Path:
    """The demo recipe with inputs that exist."""
    values = yaml.safe_load(DEMO.read_text())
    for name in ("captions.json", "llm", "tower", "vlm", "vpg", "images", "questions.json", "answers.json"):
        (tmp_path / name).touch()
    values["source"] = {"vlm": "vlm", "vpg": "vpg"}
    values["target"]["llm"] = "./llm"
    values["vision"]["path"] = "tower"
    for entry in (*values["data"]["train"], values["data"]["val"]):
        entry.update(captions="captions.json", images="images")
    values["evaluation"].update(questions="questions.json", answers="answers.json")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_paths_are_relative_to_the_file(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    loaded = load_recipe(recipe)
    assert loaded.source.vlm == tmp_path / "vlm"
    assert loaded.target.llm == str(tmp_path / "llm")


def test_override_paths_are_relative_to_the_working_directory(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(recipe, ["output.folder=here"]).output.folder == Path("here")


def test_saved_recipe_reads_back_the_same(recipe, tmp_path):
    loaded = load_recipe(recipe, ["stages.0.learning_rate=1e-3"])
    save_recipe(loaded, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == loaded
    assert loaded.stages[0].learning_rate == 1e-3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.0.learnin_rate=1", ["stages.0.learnin_rate", "learning_rate"]),
        ("data.captions_per_imag=2", ["data.captions_per_imag", "captions_per_image"]),
        ("evaluation.generate.num_beam=2", ["num_beam", "num_beams"]),
        ("sead=1", ["sead", "seed"]),
        ("stages.0.learning_rate=fast", ["stages.0.learning_rate", "fast"]),
        ("stages.0.learning_rate=-1", ["stages.0.learning_rate", "greater than 0"]),
        ("stages.0.trains=everything", ["stages.0.trains", "projector"]),
        ("data.row_tokens=0", ["data.row_tokens"]),
        ("stages.7.pairs=1", ["stages.7", "one of 2 items, counted from 0"]),
        ("vision.path=/does/not/exist", ["vision.path", "/does/not/exist"]),
        ("stages.0.epochs=1", ["stages.0", "exactly one"]),
        ("source.vlm=null", ["source.vlm"]),
        ("data.transform=train", ["data.vision_cache", "data.transform", "data.views"]),
        ("stages.0.data=[other]", ["stages.0.data", "other"]),
        ("kind=lmm", ["kind", "transfer"]),
        ("seed", ["section.key=value"]),
        ("target.llm.name=x", ["target.llm"]),
    ],
)
def test_a_mistake_is_named(recipe, override, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [override])
    for word in words:
        assert word in str(caught.value)


def test_missing_inputs_name_the_command_that_makes_them(recipe):
    (recipe.parent / "tower").unlink()
    with pytest.raises(RecipeError, match="make demo"):
        load_recipe(recipe)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "", "\x00"])
def test_malformed_files(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "r.yaml")


def test_missing_file_proposes_the_nearest(recipe):
    with pytest.raises(RecipeError, match=r"did you mean .*recipe\.yaml"):
        load_recipe(recipe.parent / "recipes.yaml")


def test_unset_environment_variable_is_named(recipe, monkeypatch):
    monkeypatch.delenv("NO_SUCH_DATA", raising=False)
    with pytest.raises(RecipeError, match="NO_SUCH_DATA"):
        load_recipe(recipe, ["vision.path=${NO_SUCH_DATA}/tower"])


@pytest.mark.parametrize(
    "path", sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if not p.name.startswith("plan")), ids=lambda p: p.stem
)
def test_every_shipped_recipe_is_valid(path, monkeypatch):
    monkeypatch.setenv("VPGTRANS_DATA", "/data")
    assert load_recipe(path, check_files=False).name


@pytest.mark.parametrize(
    "module", [["engine/train.py"], ["-m", "vpgtrans.engine.train"], ["-m", "vpgtrans.engine.cli", "train"]]
)
def test_exit_code_2_before_anything_large_is_imported(recipe, module):
    """Within 5 s on any machine: importing torch or transformers takes most of that."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *module, str(recipe), "stages.0.learnin_rate=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "did you mean 'learning_rate'" in done.stderr
    assert "Traceback" not in done.stderr
    imported = {line.split("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "yaml" in imported and not imported & {"torch", "transformers", "triton"}


def test_a_relative_model_of_an_override_is_where_the_user_stands(tmp_path, monkeypatch):
    """Also in the saved recipe, which is read from anywhere."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(DEMO, ["target.llm=./models/llama", "source.llm=../opt"], check_files=False)
    assert recipe.target.llm == str(tmp_path / "models" / "llama") and recipe.source.llm == str(tmp_path.parent / "opt")
    assert load_recipe(DEMO, ["target.llm=org/llama"], check_files=False).target.llm == "org/llama"


def test_another_target_does_not_keep_the_sizes_of_the_first(tmp_path):
    """`target.config` describes the language model of the recipe that it stands in, for dry runs; an override or a child names another."""
    qwen = ROOT / "recipes" / "vl_qwen3.yaml"
    settings = {"check_files": False, "keep_unset_variables": True}
    assert load_recipe(qwen, **settings).target.config["model_type"] == "qwen3"
    assert load_recipe(qwen, ["target.llm=org/llama-13b"], **settings).target.config is None
    given = ["target.llm=org/llama-13b", "target.config={model_type: llama}"]
    assert load_recipe(qwen, given, **settings).target.config == {"model_type": "llama"}
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {qwen}\ntarget: {{llm: org/llama-13b}}\n")
    assert load_recipe(child, **settings).target.config is None


@pytest.mark.parametrize("kind", ["transfer", "lm", "vision", "vpg"])
def test_every_key_is_listed_with_what_a_recipe_takes(kind, capsys):
    found = {key.name: key for key in keys_of(KINDS[kind])}
    assert len(found) > 15 and all(
        key.values and "typing" not in key.values and "<" not in key.values for key in found.values()
    )
    assert main(["keys", "--kind", kind, "output"]) == 0
    assert "output.folder" in capsys.readouterr().out


def test_keys_of_a_transfer():
    found = {key.name: key for key in keys_of(KINDS["transfer"], "stages")}
    assert found["stages.N.learning_rate"].default is None and found["stages.N.optimizer.eps"].default == "1e-08"
    assert found["stages.N.trains"].values == "projector | vpg_and_projector"
    with pytest.raises(RecipeError, match=r"keys: expected the beginning of one, such as name, .*got 'stage_s'"):
        keys_of(KINDS["transfer"], "stage_s")
