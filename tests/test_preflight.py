"""What is said before anything is loaded, what a table of savings holds, and how Ctrl-C ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.table import Table

from vpgtrans.engine import prepare
from vpgtrans.engine.planning.command import short_hours
from vpgtrans.engine.recipe import load_recipe
from vpgtrans.engine.resume import Progress
from vpgtrans.engine.runlog import RunLog
from vpgtrans.engine.runtime import start, stop
from vpgtrans.engine.savings import savings
from vpgtrans.engine.train import main

TRAIN = Path(__file__).resolve().parents[1] / "engine" / "train.py"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["kernels.frozen_linear=kernel"], ["kernels.frozen_linear", "on the CPU"]),
        (["step.cuda_graphs=true"], ["step.cuda_graphs", "CUDA GPU"]),
        (["data.loader=ffcv"], ["data.train.0", "packed set"]),
        (["step.compile=2"], ["step.compile"]),
        (["step.graphs=true"], ["step.graphs: unknown key; did you mean 'cuda_graphs'?"]),
    ],
)
def test_what_this_machine_cannot_do_is_said_before_anything_is_loaded(
    settings, words, tiny_recipe, tmp_path, capsys, monkeypatch
):
    """No model is opened, no folder made; a dry run, which may be for another machine, says it and goes on."""
    monkeypatch.setattr(prepare, "load_tower", lambda vision: pytest.fail("a model was loaded"))
    assert main([str(tiny_recipe), *settings]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()
    if "unknown" not in message and "compile" not in settings[0]:
        assert main([str(tiny_recipe), *settings, "--dry-run"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "This machine could not run it" in shown and all(word in shown for word in words)


def test_a_row_that_holds_no_caption_is_refused_before_training(tiny_recipe, capsys):
    """Of the training set too, whose longest caption may come up an hour into the run; both numbers are in the message."""
    assert main([str(tiny_recipe), "data.row_tokens=14"]) == 2
    message = capsys.readouterr().err
    assert "data.row_tokens: expected at least" in message and "4 visual tokens" in message and "got 14" in message
    assert "data.max_text_tokens" in message


def test_attributes_of_photographs_are_refused_before_training(tiny_recipe, tiny_world, tmp_path, capsys):
    world = tiny_world / "world"
    told = json.loads((world / "captions_val.json").read_text())
    for entry in told["annotations"]:
        entry["caption"] = "a dog on a beach"
    (tmp_path / "photographs.json").write_text(json.dumps(told))
    assert main([str(tiny_recipe), f"data.val.captions={tmp_path / 'photographs.json'}"]) == 2
    message = capsys.readouterr().err
    assert "evaluation.attributes" in message and "a dog on a beach" in message
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_savings_table_names_each_saving_and_tells_what_is_exact(tiny_recipe, tmp_path):
    def rows(*settings: str):
        recipe = load_recipe(tiny_recipe, list(settings))
        runtime = start("cpu", "fp32", 1, 0)
        log = RunLog(tmp_path / "log", enabled=False)
        this = prepare.prepare(recipe, runtime, log, Progress())
        stop()
        return {s.name: s for s in savings(recipe, this.model, [])}

    trained = rows()
    for name in (
        "one image, one encoding", "shared visual prefix", "no padding", "only supervised positions reach the head", "vision cache", "prompt cache",
        "nothing stored for frozen weights", "one token mean over the update", "no wait for the device",
    ):  # fmt: skip
        assert name in trained, name
    one = trained["one image, one encoding"]
    assert one.on and not one.exact and "one view and one dropout mask" in one.why
    plain = rows(
        "data.transform=eval", "stages.1.trains=projector", "data.captions_per_image=1", "loss_mean=micro_batch"
    )
    assert not plain["one image, one encoding"].on and plain["one image, one encoding"].exact
    assert not plain["shared visual prefix"].on and not plain["one token mean over the update"].on


def test_a_shared_prefix_is_not_exact_where_the_language_model_drops(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe, ["stages.0.frozen_dropout=true"])
    this = prepare.prepare(recipe, start("cpu", "fp32", 1, 0), RunLog(tmp_path / "log", enabled=False), Progress())
    stop()
    for dropout in (0.1, 0.0):
        for name in ("dropout", "attention_dropout"):
            setattr(this.model.llm.model.config, name, dropout)
        found = {s.name: s for s in savings(recipe, this.model, [])}["shared visual prefix"]
        assert found.on and found.exact == (dropout == 0) and ("dropout mask" in found.why) == (dropout > 0)


def test_the_screen_shows_brackets_as_they_are(tmp_path, capfd):
    """`pip install 'vpgtrans[triton]'` is no markup: not in a line, a warning or a table."""
    log = RunLog(tmp_path / "log")
    text = "install 'vpgtrans[triton]', see [/tmp]"
    log.say(text)
    log.warn("some_name", text)
    table = Table("why", title=text)
    table.add_row(text)
    log.say(table)
    log.close()
    assert capfd.readouterr().err.count(text) == 4


def test_ctrl_c_ends_with_one_line_that_names_the_checkpoint(tiny_recipe, tmp_path):
    process = subprocess.Popen(
        [sys.executable, TRAIN, tiny_recipe, "stages.1.pairs=200000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell starts what it runs in the background deaf to Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in message, message[-2000:]
    last = [line for line in message.splitlines() if line.startswith("interrupted")]
    assert len(last) == 1 and "checkpoints/step-" in last[0]


@pytest.mark.parametrize(
    ("hours", "text"), [(0, "0.00"), (12.345, "12.35"), (0.05, "3.0 min"), (0.005, "18.0 s"), (0.0001, "0.4 s")]
)
def test_small_bills_have_digits(hours, text):
    assert short_hours(hours) == text
