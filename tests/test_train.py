"""The whole engine on a tiny world: what a run leaves, what it prints, and that a killed one ends bit-identical."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vpgtrans.engine.checkpoint import file_sha256
from vpgtrans.engine.loop import run
from vpgtrans.engine.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "engine" / "train.py"


def events(folder: Path, kind: str) -> list[dict]:
    return [e for e in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if e["event"] == kind]


def test_a_run_leaves_what_it_promises(tiny_recipe, tmp_path, capfd):
    recipe = load_recipe(tiny_recipe)
    summary = run(recipe)
    folder = tmp_path / "run"
    for name in (
        "recipe.yaml",
        "log.jsonl",
        "summary.json",
        "captions.json",
        "answers.json",
        "samples.json",
        "model/model.safetensors",
    ):
        assert (folder / name).is_file(), name
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["pairs"] == 66 + 154 and summary["updates"] == 6 + 14
    assert {"best_val_loss", "final_val_loss", "cider", "attributes_right", "vqa_accuracy"} <= summary.keys()
    # what the scores were measured with
    assert (
        summary["prompt"] == ""
        and summary["question_prompt"] == "question: {} answer:"
        and summary["transform"]["image_size"] == 32
    )
    assert summary["generation"]["num_beams"] == 2 and summary["versions"]["transformers"]
    assert summary["checkpoint"]["sha256"] == {"model.safetensors": file_sha256(folder / "model" / "model.safetensors")}
    assert [e["pairs"] for e in events(folder, "eval")] == [0, 33, 66, 110, 154, 198, 220]
    assert summary["best_val_loss"] == pytest.approx(
        min(e["val_loss"] for e in events(folder, "eval") if e["stage"] == "direct"), abs=1e-6
    )
    assert events(folder, "eval")[-1]["val_loss"] < events(folder, "eval")[0]["val_loss"]
    assert load_recipe(folder / "recipe.yaml") == recipe
    shown = capfd.readouterr().err
    for words in (
        "word converter (ridge)",
        "stage 1 of 2, warm_up",
        "stage 2 of 2, direct",
        "frozen",
        "trainable in all",
        "savings",
    ):
        assert words in shown
    assert len(json.loads((folder / "captions.json").read_text())) == 4


def test_stage_1_trains_the_projector_alone(tiny_recipe, tiny_world, tmp_path):
    run(
        load_recipe(
            tiny_recipe,
            ["stages=[{name: warm_up, trains: projector, learning_rate: 1e-2, pairs: 22, batch_pairs: 11}]"],
        )
    )
    before = load_file(tiny_world / "source" / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(after[k], v) for k, v in before.items() if k.startswith("vpg."))
    assert after["projector.weight"].shape == (32, 16)
    assert events(tmp_path / "run", "stage")[0]["trainable_parameters"] == 16 * 32 + 32


ARMS = {
    "tfs": ["initialise.vpg=vpg", "initialise.projector=random", "source.vlm=null"],
    "vpg_inherit": ["initialise.projector=random"],
    "projector_only": ["stages.1.trains=projector"],
    "no_converter": ["initialise.projector=random"],
    "sgd": ["converter.method=sgd_cosine", "converter.sgd_steps=20", "converter.match_prompt_norm=true"],
}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_recipe_choice(arm, tiny_recipe, tmp_path):
    short = ["stages.0.pairs=11", "stages.1.pairs=11", "evaluation.generate_images=0"]
    summary = run(load_recipe(tiny_recipe, [f"arm={arm}", *short, *ARMS[arm]]))
    assert summary["arm"] == arm and summary["pairs"] == 22
    assert bool(events(tmp_path / "run", "converter")) == (arm in ("projector_only", "sgd"))


def test_a_finished_run_is_a_source(tiny_recipe, tiny_world, tmp_path):
    short = ["stages.0.pairs=11", "stages.1.pairs=11", "evaluation.generate_images=0"]
    run(load_recipe(tiny_recipe, short))
    again = [
        *short,
        f"source.vlm={tmp_path / 'run'}",
        f"target.llm={tiny_world / 'lm_source'}",
        f"output.folder={tmp_path / 'back'}",
    ]
    assert run(load_recipe(tiny_recipe, again))["pairs"] == 22


def test_a_folder_of_another_recipe_is_refused(tiny_recipe, capsys):
    from vpgtrans.engine.train import main

    short = ["stages.0.pairs=11", "stages.1.pairs=11", "evaluation.generate_images=0"]
    assert main([str(tiny_recipe), *short]) == 0
    assert main([str(tiny_recipe), *short, "output.log_every_updates=5", "threads=null"]) == 0
    assert main([str(tiny_recipe), *short, "stages.1.learning_rate=0.5"]) == 2
    assert "another recipe: stages.1.learning_rate: was 0.001, now 0.5. Give" in capsys.readouterr().err


def test_bfloat16_follows_float32(tiny_recipe, tmp_path):
    """Compute in bfloat16 over float32 master weights: nearly the same curve, and the trained tensors stay float32."""
    short = ["stages.0.pairs=22", "stages.1.pairs=22", "evaluation.generate_images=2"]
    plain = run(load_recipe(tiny_recipe, short))
    half = run(load_recipe(tiny_recipe, [*short, "precision=bf16", f"output.folder={tmp_path / 'half'}"]))
    assert half["final_val_loss"] == pytest.approx(plain["final_val_loss"], rel=0.02)
    assert half["final_val_loss"] != plain["final_val_loss"]
    tensors = load_file(tmp_path / "half" / "model" / "model.safetensors")
    assert all(t.dtype == torch.float32 for t in tensors.values())


def test_the_vision_cache_changes_nothing(tiny_recipe, tmp_path):
    short = ["stages.0.pairs=22", "stages.1.pairs=22", "evaluation.generate_images=0", "data.transform=eval"]
    live = run(load_recipe(tiny_recipe, short))
    cached = run(load_recipe(tiny_recipe, [*short, "data.vision_cache=true", f"output.folder={tmp_path / 'cached'}"]))
    assert cached["final_val_loss"] == pytest.approx(live["final_val_loss"], rel=1e-5)
    assert len(list((tmp_path / "cache").glob("vision-*"))) == 2


def test_updates_that_are_not_finite_stop_the_run(tiny_recipe, tiny_world, tmp_path):
    broken = tmp_path / "broken"
    tensors = load_file(tiny_world / "source" / "model" / "model.safetensors")
    tensors["projector.bias"][0] = float("nan")
    broken.mkdir()
    save_file(tensors, broken / "model.safetensors")
    (broken / "vl_config.json").write_text((tiny_world / "source" / "model" / "vl_config.json").read_text())
    settings = [
        f"source.vlm={broken}",
        "initialise.projector=vlm",
        f"target.llm={tiny_world / 'lm_source'}",
        "output.max_skipped_updates=4",
    ]
    done = subprocess.run(
        [sys.executable, TRAIN, tiny_recipe, *settings], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "4 updates in a row were not finite" in done.stderr and "update_skipped" in done.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["source.vlm={tower}"], ["config.json", "blip-2"]),
        (["initialise.projector=vlm"], ["width 32", "to 24"]),
        (["target.llm={tower}"], ["llm", "tower"]),
        (["vision.path={vpg}"], ["config.json"]),
        (["data.row_tokens=10"], ["data.row_tokens", "got 10"]),
    ],
)
def test_what_does_not_fit_is_said_before_training(settings, words, tiny_recipe, tiny_world, capsys):
    from vpgtrans.engine.train import main

    filled = [s.format(tower=tiny_world / "tower", vpg=tiny_world / "vpg") for s in settings]
    assert main([str(tiny_recipe), *filled]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_tensors_that_do_not_fit_are_named(tiny_recipe, tiny_world, tmp_path, capsys):
    from vpgtrans.engine.train import main

    wrong = tmp_path / "wrong"
    wrong.mkdir()
    tensors = load_file(tiny_world / "source" / "model" / "model.safetensors")
    tensors["vpg.ln_vision.weight"] = torch.ones(17)
    del tensors["vpg.query_tokens"]
    save_file(tensors, wrong / "model.safetensors")
    (wrong / "vl_config.json").write_text((tiny_world / "source" / "model" / "vl_config.json").read_text())
    assert main([str(tiny_recipe), f"source.vlm={wrong}"]) == 2
    message = capsys.readouterr().err
    assert "query_tokens: missing" in message and "ln_vision.weight: expected (16,), found (17,)" in message


def test_bad_images_and_captions_are_refused_by_name_and_the_run_goes_on(tiny_recipe, tiny_world, tmp_path):
    """Truncated, empty, CMYK, grayscale and missing files, and captions that are empty or no strings, in one training set."""
    world = tmp_path / "world"
    shutil.copytree(tiny_world / "world", world)
    files = sorted((world / "images").glob("*.jpg"))[:24]
    files[0].write_bytes(files[0].read_bytes()[:400])
    files[1].write_bytes(b"")
    Image.open(files[2]).convert("CMYK").save(files[2])
    Image.open(files[3]).convert("L").save(files[3])
    files[4].unlink()
    told = json.loads((world / "captions_train.json").read_text())
    told["annotations"][30]["caption"] = "  ... "
    told["annotations"][31]["caption"] = None
    (world / "captions_train.json").write_text(json.dumps(told))
    data = f"data.train=[{{name: bad, captions: {world / 'captions_train.json'}, images: {world / 'images'}}}]"
    assert run(load_recipe(tiny_recipe, [data, "evaluation.generate_images=0"]))["pairs"] == 220
    report = json.loads((tmp_path / "run" / "refused-bad.json").read_text())
    assert report["counts"]["images"] == {"truncated": 1, "empty": 1, "missing": 1}
    assert sum(report["counts"]["captions"].values()) == 2
    assert any(files[0].name in json.dumps(entry) for entry in report["named"])


def start(recipe: Path, folder: Path, *settings: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, TRAIN, recipe, f"output.folder={folder}", *settings],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_killed_at_random_steps_it_ends_bit_identical(tiny_recipe, tmp_path):
    """SIGKILL in either stage, twice, at times drawn from a fixed seed; the final weights equal an uninterrupted run's bit by bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    longer = "stages.1.pairs=308"  # 34 updates: none is over before its kill comes
    assert start(tiny_recipe, whole, longer).wait(timeout=120) == 0
    generator = torch.Generator().manual_seed(5)
    kills = []
    for low, high in ((3, 6), (8, 18)):
        step = int(torch.randint(low, high, (1,), generator=generator))
        process = start(tiny_recipe, killed, longer)
        kill_at(process, killed, step)
        kills.append(_last_step(killed))
    process = start(tiny_recipe, killed, longer)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 0 and "resumed at update" in message
    assert all(0 < k < 34 for k in kills)
    for name in ("model", "last"):
        expected, got = (load_file(folder / name / "model.safetensors") for folder in (whole, killed))
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[k], got[k]) for k in expected)
    numbers = [[(e["step"], e["pairs"], e["val_loss"]) for e in events(folder, "eval")] for folder in (whole, killed)]
    assert numbers[0] == numbers[1]


def kill_at(process: subprocess.Popen, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while _last_step(folder) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.wait()


def _last_step(folder: Path) -> int:
    path = folder / "log.jsonl"
    steps = [0]
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.endswith("}"):
            steps.append(json.loads(line).get("step", 0))
    return max(steps)


def test_a_skipped_update_between_two_logs_is_counted(tiny_recipe, tmp_path, monkeypatch):
    """One bad update among good ones: skipped, counted once and warned of, though the update before the log was fine."""
    from vpgtrans.engine import loop

    real, calls = loop._accumulate, []

    def one_bad(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(loop, "_accumulate", one_bad)
    summary = run(load_recipe(tiny_recipe, ["evaluation.generate_images=0", "output.log_every_updates=6"]))
    assert summary["skipped_updates"] == 1 and summary["pairs"] == 220
    assert [e["value"] for e in events(tmp_path / "run", "warning") if e["name"] == "update_skipped"] == [1.0]


@pytest.mark.parametrize("mean", ["global", "micro_batch"])
def test_mean_of_the_loss(mean, tiny_recipe, tmp_path):
    """The first logged loss against sums over its micro-batches, which differ in size."""
    from vpgtrans.engine.prepare import prepare
    from vpgtrans.engine.recipe import load_recipe
    from vpgtrans.engine.resume import Progress
    from vpgtrans.engine.runlog import RunLog
    from vpgtrans.engine.runtime import start, stop
    from vpgtrans.engine.stage_data import update_order
    from vpgtrans.engine.train import main

    settings = [
        "stages.0.pairs=11",
        "stages.1.pairs=11",
        "data.transform=eval",
        "evaluation.generate_images=0",
        f"loss_mean={mean}",
    ]
    assert main([str(tiny_recipe), *settings, "output.log_every_updates=1"]) == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = next(e["loss"] for e in events if e["event"] == "train")

    recipe = load_recipe(tiny_recipe, settings)
    runtime = start(recipe.device, recipe.precision, recipe.threads, recipe.seed)
    log = RunLog(tmp_path / "other", enabled=False, tensorboard=False)
    this = prepare(recipe, runtime, log, Progress())
    this.model.eval()
    groups = update_order(this, recipe.stages[0]).next_update()
    batches = this.model.pack(groups, this.data, recipe.data)
    with torch.no_grad():
        sums = [this.model.loss_sum(this.features(b.groups), b).item() for b in batches]
    stop()
    counts = [b.target_count for b in batches]
    assert len(counts) > 1 and len(set(counts)) > 1
    expected = {
        "global": sum(sums) / sum(counts),
        "micro_batch": sum(s / c for s, c in zip(sums, counts, strict=True)) / len(sums),
    }
    assert expected["global"] != pytest.approx(expected["micro_batch"], rel=1e-4)
    assert logged == pytest.approx(expected[mean], rel=1e-5)


def test_an_encoder_decoder_trains_with_the_same_loop(tiny_recipe, tiny_world, tmp_path):
    """Flan-T5's kind as the target: converter, both stages, captions and answers; stopped half way, it resumes to the same end."""
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    from vpgtrans.engine.train import main

    tokenizer = AutoTokenizer.from_pretrained(tiny_world / "lm_target")
    torch.manual_seed(4)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=40, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    settings = [
        f"target.llm={tmp_path / 't5'}",
        "stages.1.pairs=66",
        "stages.0.learning_rate=2e-2",
        "stages.1.learning_rate=1e-2",
    ]
    assert main([str(tiny_recipe), *settings, f"output.folder={tmp_path / 'whole'}"]) == 0
    logged = [
        e for e in map(json.loads, (tmp_path / "whole" / "log.jsonl").read_text().splitlines()) if e["event"] == "train"
    ]
    assert logged[-1]["loss"] < logged[0]["loss"]
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert {"cider", "vqa_accuracy"} <= summary.keys()
    process = start(tiny_recipe, tmp_path / "resumed", *settings)
    kill_at(process, tmp_path / "resumed", 4)
    assert main([str(tiny_recipe), *settings, f"output.folder={tmp_path / 'resumed'}"]) == 0
    ends = [load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "resumed")]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_the_loss_of_the_first_validation_images(tiny_recipe, tmp_path):
    """`evaluation.loss_images` gives the loss that a validation set cut to as many images has, and still captions all of them."""
    from vpgtrans.engine.train import main

    short = ["stages.0.pairs=11", "stages.1.pairs=11", "data.transform=eval"]
    for name, setting in (
        ("few", "evaluation.loss_images=2"),
        ("cut", "data.val.limit=2"),
        ("all", "evaluation.samples=1"),
    ):
        assert main([str(tiny_recipe), *short, setting, f"output.folder={tmp_path / name}"]) == 0
    losses = {name: [e["val_loss"] for e in events(tmp_path / name, "eval")] for name in ("few", "cut", "all")}
    assert losses["few"] == losses["cut"] != losses["all"]
    assert [len(json.loads((tmp_path / n / "captions.json").read_text())) for n in ("few", "cut", "all")] == [4, 2, 4]


def test_captions_are_scored_as_often_as_asked(tiny_recipe, tmp_path):
    """At the first evaluation after each multiple, wherever the evaluations fall."""
    from vpgtrans.engine.train import main

    settings = ["evaluation.generate_every_pairs=50", "evaluation.generate_images=2"]
    assert main([str(tiny_recipe), *settings]) == 0
    scored = [e["pairs"] for e in events(tmp_path / "run", "eval") if "cider" in e]
    assert [e["pairs"] for e in events(tmp_path / "run", "eval")] == [0, 33, 66, 110, 154, 198, 220]
    assert scored == [0, 66, 110, 154, 220]
