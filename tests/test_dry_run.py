"""Dry runs at full size: every shipped recipe plans on the meta device, and the numbers are the paper's or can be computed by hand."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from pathlib import Path
from unittest import mock

import pytest
import yaml

from vpgtrans.engine import dry_run as module
from vpgtrans.engine.cli import main
from vpgtrans.engine.dry_run import Plan, make_plan
from vpgtrans.engine.recipe import Vision, load_recipe
from vpgtrans.engine.train import main as train_main

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FULL_SIZE = [
    str(p.relative_to(RECIPES).with_suffix(""))
    for folder in (RECIPES, RECIPES / "table3")
    for p in sorted(folder.glob("*.yaml"))
    if not p.name.startswith(("demo", "flickr8k"))
]
PAIRS_OF_TABLE_3 = {
    "opt_125m_to_350m", "opt_125m_to_1.3b", "opt_350m_to_1.3b", "opt_125m_to_2.7b", "opt_350m_to_2.7b", "opt_1.3b_to_2.7b",
    "flant5_base_to_xl", "flant5_xl_to_opt_2.7b", "opt_2.7b_to_flant5_xl",
}  # fmt: skip

TOWERS: dict = {}


@pytest.fixture(autouse=True)
def nothing_is_here(monkeypatch, tmp_path):
    """No data folder and no network; a tower of given sizes is built once."""
    monkeypatch.delenv("VPGTRANS_DATA", raising=False)
    monkeypatch.chdir(tmp_path)

    def no_network(*_: object, **__: object):
        raise AssertionError("a dry run must not open a connection")

    monkeypatch.setattr("socket.socket.connect", no_network)
    build = module.build_tower_on_meta
    monkeypatch.setattr(module, "build_tower_on_meta", lambda vision: tower_of(build, vision))


def tower_of(build, vision: Vision):
    key = vision.model_dump_json()
    return TOWERS[key] if key in TOWERS else TOWERS.setdefault(key, build(vision))


@functools.cache
def dry_run_of(name: str, *overrides: str) -> tuple[str, Plan]:
    """What the command prints for a shipped recipe, and its plan; the command ends with 0."""
    plans: list[Plan] = []
    keep = mock.patch.object(module, "make_plan", lambda recipe: plans.append(make_plan(recipe)) or plans[-1])
    with contextlib.redirect_stdout(io.StringIO()) as shown, keep:
        assert main(["train", str(RECIPES / f"{name}.yaml"), "--dry-run", *overrides]) == 0
    return shown.getvalue(), plans[0]


def plan_of(name: str, *overrides: str) -> Plan:
    return dry_run_of(name, *overrides)[1]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_recipe_dry_runs_offline(name):
    folder = load_recipe(RECIPES / f"{name}.yaml", check_files=False, keep_unset_variables=True).output.folder
    existed = folder.exists()
    shown, plan = dry_run_of(name)
    for word in ("language model", "trainable parameters", "AdamW moments", "In all", "VPGTRANS_DATA"):
        assert word in shown
    assert folder.exists() == existed
    assert all(p.device.type == "meta" for part in (plan.tower, plan.model) for p in part.parameters())


def test_all_rows_of_table_3_are_there():
    names = {p.stem for p in (RECIPES / "table3").glob("*.yaml")}
    assert names >= PAIRS_OF_TABLE_3
    # each source that a row names is made by a recipe beside it
    for name in PAIRS_OF_TABLE_3:
        values = yaml.safe_load((RECIPES / "table3" / f"{name}.yaml").read_text())
        assert Path(values["source"]["vlm"]).name in names


def test_vl_llama_trains_what_the_paper_trains():
    shown, plan = dry_run_of("vl_llama")
    assert [item.trainable for item in plan.stages] == [3_149_824, 108_314_880]
    for number in (
        "3,149,824",
        "108,314,880",
        "985,949,440",
        "6,738,415,616",
        "8,333",
        "14,399,424",
        "1,427,000",
        "826",
    ):
        assert number in shown, number
    assert re.search(r"8,333 +│ +1,728 +│ +14,399,424", shown)
    assert "0.0005 constant, no" in shown and "0.0001 to 5e-05" in shown


def test_vl_llama_memory_by_hand():
    plan = plan_of("vl_llama")
    warm_up, direct = (item.memory for item in plan.stages)
    assert [item.updates for item in plan.stages] == [826, 8333]
    assert plan.stages[1].pairs == 8333 * 1728
    assert direct["frozen weights: language model, compute dtype"] == 2 * 6_738_415_616
    assert direct["frozen weights: vision tower, compute dtype"] == 2 * 985_949_440
    assert direct["frozen weights: VPG, float32"] == 0
    assert warm_up["frozen weights: VPG, float32"] == 4 * (108_314_880 - 3_149_824)
    for memory, trained in ((warm_up, 3_149_824), (direct, 108_314_880)):
        assert memory["what trains: master weights, float32"] == 4 * trained
        assert memory["gradients, float32"] == 4 * trained
        assert memory["AdamW moments, 2 x float32"] == 8 * trained
    assert 0 < warm_up[module.ACTIVATIONS_ITEM] < direct[module.ACTIVATIONS_ITEM]
    fp32 = plan_of("vl_llama", "precision=fp32")
    assert fp32.stages[0].memory["frozen weights: language model, compute dtype"] == 4 * 6_738_415_616


@pytest.mark.parametrize(
    ("name", "width", "parameters"),
    [
        ("flant5_xl_to_xxl", 4096, 11_135_332_352),
        ("table3/flant5_base_to_xl", 2048, 2_849_757_184),
        ("table3/tfs_flant5_base", 768, 247_577_856),
        ("table3/opt_125m_to_350m", 1024, 331_196_416),
        ("table3/opt_125m_to_1.3b", 2048, 1_315_758_080),
        ("opt_2.7b_to_6.7b", 4096, 6_658_473_984),
        ("vl_qwen3", 4096, 8_190_735_360),
    ],
)
def test_language_models_have_their_true_sizes(name, width, parameters):
    plan = plan_of(name)
    assert plan.model.projector.out_features == width
    assert plan.parts[-1].parameters == parameters
    assert plan.stages[0].trainable >= 769 * width


def test_batches_and_warm_up_of_the_exploration():
    opt, t5 = plan_of("table3/opt_125m_to_350m"), plan_of("table3/opt_2.7b_to_flant5_xl")
    assert {item.stage.batch_pairs for item in opt.stages} == {1728}
    assert {item.stage.batch_pairs for item in t5.stages} == {1152}
    direct = opt.stages[1].stage
    assert (direct.warmup_learning_rate, direct.learning_rate, direct.min_learning_rate) == (1e-6, 1e-4, 1e-5)
    assert opt.stages[1].pairs == 10 * opt.stages[0].pairs
    assert opt.tower.width == 1024 and len(opt.tower.module.model.encoder.layers) == 21


def test_vl_vicuna_has_three_stages():
    stages = plan_of("vl_vicuna").stages
    assert [item.stage.name for item in stages] == ["warm_up", "direct", "conversation"]
    assert [item.trainable for item in stages] == [3_149_824, 108_314_880, 108_314_880]
    assert (stages[2].updates, stages[2].pairs) == (160, 19_200)


def test_sizes_of_what_is_here_count(tiny_recipe, tmp_path, capsys):
    """Folders that exist tell their own sizes; epochs are counted in the caption files; nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    settings = ["stages.0.pairs=null", "stages.0.epochs=2", "target.config={model_type: llama, hidden_size: 4096}"]
    assert train_main([str(tiny_recipe), "--dry-run", *settings]) == 0
    shown = capsys.readouterr().out
    recipe = load_recipe(tiny_recipe, settings)
    plan = make_plan(recipe)
    assert plan.model.projector.weight.shape == (32, 16) and plan.model.queries == 4
    captions = yaml.safe_load(Path(recipe.data.train[0].captions).read_text())["annotations"]
    per_image = {a["image_id"]: 0 for a in captions}
    for annotation in captions:
        per_image[annotation["image_id"]] += 1
    epoch = sum(min(4, n) for n in per_image.values())
    assert plan.stages[0].pairs == 2 * epoch
    assert "hidden_size differ" in shown and "its own config counts" in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_flags_and_overrides_in_any_order(capsys):
    recipe = str(RECIPES / "vl_llama.yaml")
    for arguments in ([recipe, "--dry-run", "stages.1.pairs=3456"], ["--dry-run", recipe, "stages.1.pairs=3456"]):
        assert main(["train", *arguments]) == 0
        assert re.search(r" 2 │ +1,728 │ +3,456 │", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.0.learnin_rate=1", ["recipe error", "learning_rate"]),
        ("target.config.model_type=null", ["recipe error", "target: config", "model_type"]),
        (
            "target={llm: nobody/no-such-model}",
            ["model error: ", "target.config", "nobody/no-such-model", "not on this machine"],
        ),
        (
            "target={llm: nobody/no-such-model, config: {model_type: no_such_type}}",
            ["model error: ", "target.config", "no_such_type"],
        ),
        ("vision.path=./nowhere", None),
        ("vision={kind: eva_vit, path: /nowhere/vit}", ["model error: ", "vision"]),
        (
            "stages.0={name: warm_up, trains: projector, learning_rate: 1.0, epochs: 1, data: [sbu]}",
            ["recipe error", "stages.0"],
        ),
    ],
)
def test_mistakes_end_with_2(override, words, capsys):
    code = main(["train", str(RECIPES / "vl_llama.yaml"), "--dry-run", override])
    captured = capsys.readouterr()
    if words is None:  # a folder that is still to be made: the recipe's own sizes do
        assert code == 0
        return
    assert code == 2
    for word in words:
        assert word in captured.err
    assert "Traceback" not in captured.err


def test_a_demo_whose_parts_are_not_made_yet_says_how(capsys):
    """A local folder that is not there is no hub id."""
    arguments = ["train", str(RECIPES / "demo.yaml"), "--dry-run", "vision.path=/nowhere/vision"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "vision.path" in message and "make demo" in message and "Repo id" not in message


def test_epochs_that_cannot_be_counted_name_the_stage(capsys):
    path = RECIPES / "table3" / "opt_125m_to_350m.yaml"
    assert main(["train", str(path), "--dry-run", "stages.0.pairs=null", "stages.0.epochs=1"]) == 2
    message = capsys.readouterr().err
    assert "stages.0.epochs" in message and "'warm_up'" in message and "give pairs" in message


def test_without_the_flag_files_are_still_asked_for(capsys):
    assert main(["train", str(RECIPES / "vl_llama.yaml")]) == 2
    assert "VPGTRANS_DATA" in capsys.readouterr().err
