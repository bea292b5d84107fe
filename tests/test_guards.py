"""What ends a run and what is left then: notices, lost ranks, a full disk, bad numbers, crashes; on one process and on two gloo ranks."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vpgtrans.engine import checkpoint, loop, startup
from vpgtrans.engine.evaluation import Validator
from vpgtrans.engine.guards import RunStopped
from vpgtrans.engine.heartbeat import Heartbeat, standing
from vpgtrans.engine.loop import run
from vpgtrans.engine.recipe import load_recipe
from vpgtrans.engine.spikes import SpikeFinder
from vpgtrans.engine.startup import FolderLock, StartError, read_world
from vpgtrans.engine.train import main

WORKER = Path(__file__).with_name("rank_worker.py")
QUICK = ["evaluation.generate_images=0"]


def events(folder: Path, kind: str, file: str = "log.jsonl") -> list[dict]:
    return [e for e in map(json.loads, (folder / file).read_text().splitlines()) if e["event"] == kind]


def assert_same_end(one: Path, other: Path) -> None:
    """Final weights bit for bit, and every logged loss and evaluation."""
    for name in ("model", "last"):
        expected, got = (load_file(folder / name / "model.safetensors") for folder in (one, other))
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[k], got[k]) for k in expected), name
    for kind, keys in (("train", ("step", "loss", "grad_norm")), ("eval", ("step", "stage", "val_loss"))):
        logged = [[[e[k] for k in keys] for e in events(folder, kind)] for folder in (one, other)]
        assert logged[0] == logged[1], kind


def on_call(number: int, owner: object, name: str, monkeypatch, act) -> None:
    """Call `act` before the `number`-th call of a function."""
    real, calls = getattr(owner, name), []

    def wrapped(*arguments):
        calls.append(1)
        if len(calls) == number:
            act()
        return real(*arguments)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    ("owner", "name", "call", "sent", "saved"),
    [
        (loop, "_accumulate", 9, signal.SIGTERM, 9),  # inside update 9, which is finished
        (loop, "_accumulate", 10, signal.SIGTERM, 10),  # inside an update that an evaluation follows
        (Validator, "loss", 4, signal.SIGUSR1, 10),  # inside the evaluation after update 10, which is broken off
        (Validator, "loss", 7, signal.SIGTERM, 20),  # the evaluation that ends the last stage
        (loop, "prepare", 1, signal.SIGTERM, None),
    ],
)
def test_a_notice_saves_and_the_run_goes_on_to_the_same_end(
    owner, name, call, sent, saved, tiny_recipe, tmp_path, monkeypatch, capsys
):
    whole, broken = tmp_path / "whole", tmp_path / "run"
    assert main([str(tiny_recipe), *QUICK, f"output.folder={whole}"]) == 0
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        on_call(call, owner, name, patch, lambda: os.kill(os.getpid(), sent))
        assert main([str(tiny_recipe), *QUICK]) == 75
    assert signal.getsignal(signal.SIGTERM) == before
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"stopped on {signal.Signals(sent).name}") and "the same command goes on" in message
    found, _ = checkpoint.latest_checkpoint(broken / "checkpoints")
    assert (found and int(found.name[-8:])) == saved
    assert not (broken / "summary.json").exists()
    assert main([str(tiny_recipe), *QUICK]) == 0
    assert_same_end(whole, broken)


def test_an_evaluation_that_was_broken_off_is_done_once(tiny_recipe, tmp_path, monkeypatch):
    """Its checkpoint has it as due; those of the resumed run do not."""
    whole, broken = tmp_path / "whole", tmp_path / "run"
    assert main([str(tiny_recipe), *QUICK, f"output.folder={whole}"]) == 0
    for owner, name, call in ((Validator, "loss", 4), (loop, "_accumulate", 2)):
        with monkeypatch.context() as patch:
            on_call(call, owner, name, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert main([str(tiny_recipe), *QUICK]) == 75
    assert checkpoint.latest_checkpoint(broken / "checkpoints")[0].name == "step-00000012"
    assert main([str(tiny_recipe), *QUICK]) == 0
    assert_same_end(whole, broken)


def test_a_notice_that_comes_twice_is_followed_once(tiny_recipe, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)

    on_call(3, Validator, "loss", monkeypatch, twice)
    assert main([str(tiny_recipe), *QUICK]) == 75
    assert checkpoint.latest_checkpoint(tmp_path / "run" / "checkpoints")[0].name == "step-00000006"


def test_several_bad_updates_leave_a_report_of_the_last_ones(tiny_recipe, tmp_path, monkeypatch):
    real, calls = loop._accumulate, []

    def bad_from_4(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) >= 4 else 1.0)

    monkeypatch.setattr(loop, "_accumulate", bad_from_4)
    with pytest.raises(RunStopped, match=r"in a row were not finite.*stopped\.json"):
        run(load_recipe(tiny_recipe, [*QUICK, "output.max_skipped_updates=5", "stages.0.pairs=165"]))
    report = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert [u["update"] for u in report["updates"]] == list(range(1, 9))
    assert [u["loss"] == "nan" for u in report["updates"]] == [False] * 3 + [True] * 5
    assert all(sum(len(image["captions"]) for image in u["images"]) == 11 for u in report["updates"])
    assert all(Path(image["file"]).is_file() for u in report["updates"] for image in u["images"])
    assert "rank" in report and "torch" in report


def test_bad_updates_in_a_row_are_counted_across_a_resumption(tiny_recipe, tmp_path, monkeypatch):
    real, calls = loop._accumulate, []

    def bad_from_4(*arguments):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(*arguments) * (float("nan") if len(calls) >= 4 else 1.0)

    monkeypatch.setattr(loop, "_accumulate", bad_from_4)
    settings = [*QUICK, "output.max_skipped_updates=10", "stages.0.pairs=165", "output.log_every_updates=1"]
    assert main([str(tiny_recipe), *settings]) == 75
    with pytest.raises(RunStopped, match="10 updates in a row were not finite, the last at update 13;"):
        run(load_recipe(tiny_recipe, settings))


def test_a_spike_is_one_warning_with_its_images(tiny_recipe, tmp_path, monkeypatch):
    real, calls = loop._accumulate, []

    def high(*arguments):
        calls.append(1)
        return real(*arguments) * (50.0 if len(calls) in (24, 25) else 1.0)

    monkeypatch.setattr(loop, "_accumulate", high)
    run(load_recipe(tiny_recipe, [*QUICK, "stages.1.pairs=264"]))
    spikes = [e for e in events(tmp_path / "run", "warning") if e["name"] == "loss_spike"]
    assert [e["step"] for e in spikes] == [24]
    assert spikes[0]["loss"] > 20 * spikes[0]["median"] and spikes[0]["images"] == len(spikes[0]["files"]) > 2
    assert all(Path(file).is_file() for file in spikes[0]["files"])


def test_spikes_stand_out_of_noise_and_a_new_level_becomes_normal():
    generator = torch.Generator().manual_seed(0)
    noise = (3.0 + 0.1 * torch.randn(2000, generator=generator)).tolist()
    finder = SpikeFinder(8.0)
    assert not any(finder.add(x) for x in noise)
    assert finder.add(5.0)[0] == pytest.approx(3.0, abs=0.05)
    assert not finder.add(float("nan")) and not finder.add(5.0)  # the same spike
    assert not finder.add(3.0) and finder.add(5.0)  # the next one
    for _ in range(200):
        finder.add(5.0)
    assert not finder.add(5.1) and finder.add(9.0)
    early = SpikeFinder(8.0)
    assert not any(early.add(x) for x in [9.0, 1.0, 50.0, *[1.0] * 10])


def test_a_disk_that_is_full_stops_the_run_and_keeps_the_last_checkpoint(tiny_recipe, tmp_path, monkeypatch, capsys):
    def save_file(tensors, path):
        if "step-00000006" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    real = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    assert main([str(tiny_recipe), *QUICK]) == 1
    message = capsys.readouterr().err
    assert "step-00000006: the checkpoint could not be written" in message and "No space left" in message
    root = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["step-00000002", "step-00000004"]
    assert checkpoint.latest_checkpoint(root) == (root / "step-00000004", [])
    assert not {"checkpoint", "heartbeat"} & {t.name for t in threading.enumerate()}


def test_a_log_that_cannot_be_written_is_one_message(tiny_recipe, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "log.jsonl")

    monkeypatch.setattr(loop, "_log_train", full)
    assert main([str(tiny_recipe), *QUICK]) == 1
    assert "stopped: log.jsonl: could not be written (No space left on device)" in capsys.readouterr().err


def test_a_vanished_image_is_named(tiny_recipe, tiny_world, tmp_path, capsys):
    import shutil

    world = tmp_path / "world"
    shutil.copytree(tiny_world / "world", world)
    data = f"data.train=[{{name: gone, captions: {world / 'captions_train.json'}, images: {world / 'images'}}}]"
    assert main([str(tiny_recipe), *QUICK, data, "stages.1.pairs=22"]) == 0
    for path in (world / "images").glob("*.jpg"):
        path.unlink()
    again = f"output.folder={tmp_path / 'again'}"
    assert main([str(tiny_recipe), *QUICK, data, again, "data.verify_images=none"]) == 2
    message = capsys.readouterr().err
    assert "image error: " in message and str(world / "images") in message


def test_what_crashes_leaves_one_place_to_look(tiny_recipe, tmp_path, monkeypatch):
    on_call(3, loop, "_accumulate", monkeypatch, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        run(load_recipe(tiny_recipe, QUICK))
    path = tmp_path / "run" / "crash.txt"
    assert str(path) in caught.value.__notes__[0]
    text = path.read_text()
    for words in ("rank 0: update, update 3", "torch: ", "ZeroDivisionError", "_accumulate", "where each rank stood"):
        assert words in text
    assert json.loads((tmp_path / "run" / "ranks" / "rank-00000.json").read_text())["phase"] == "ended"


def test_a_second_run_in_the_same_folder_is_refused(tiny_recipe, tmp_path, capsys):
    folder = tmp_path / "run"
    first, second = FolderLock(folder), FolderLock(folder)
    assert first.take() is None
    assert f"pid {os.getpid()} on {socket.gethostname()}" in second.take()
    assert main([str(tiny_recipe), *QUICK]) == 2
    message = capsys.readouterr().err
    assert message.startswith("output.folder:") and f"pid {os.getpid()}" in message and len(message.splitlines()) == 1
    assert sorted(p.name for p in folder.iterdir()) == [".lock"]
    first.release()
    assert second.take() is None
    second.release()


def test_a_killed_run_holds_no_lock(tmp_path):
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, tmp_path / ".lock"], stdout=subprocess.PIPE)
    holder.stdout.readline()
    lock = FolderLock(tmp_path)
    assert "belongs to a run that goes on;" in lock.take()  # it left no name
    holder.kill()
    holder.wait()
    assert lock.take() is None
    lock.release()


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tiny_recipe, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(tiny_recipe), f"output.folder={tmp_path / 'file' / 'run'}"]) == 2
    assert capsys.readouterr().err.startswith("output.folder: expected a folder that can be written, got")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"WORLD_SIZE": "2"}, ["RANK, MASTER_ADDR, MASTER_PORT beside WORLD_SIZE=2", "torchrun"]),
        ({"RANK": "1"}, ["WORLD_SIZE", "beside RANK=1"]),
        ({"WORLD_SIZE": "two"}, ["whole number in WORLD_SIZE", "'two'"]),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ["RANK=2, WORLD_SIZE=2"]),
    ],
)
def test_an_incomplete_environment_is_refused(given, words, tiny_recipe, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert read_world() == (1, 0, 0)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StartError):
        read_world()
    assert main([str(tiny_recipe)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("environment: expected") and all(word in message for word in words)


def test_one_process_under_torchrun_needs_no_address(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert read_world() == (1, 0, 0)


def test_the_same_run_twice_is_the_same_bit_for_bit(tiny_recipe, tmp_path):
    folders = [tmp_path / name for name in ("one", "two", "without")]
    for folder, on in zip(folders, ("true", "true", "false"), strict=True):
        run(load_recipe(tiny_recipe, [*QUICK, f"output.folder={folder}", f"guards.deterministic={on}"]))
        assert not torch.are_deterministic_algorithms_enabled()
    assert_same_end(folders[0], folders[1])
    assert_same_end(folders[0], folders[2])  # on the CPU with one thread


def test_background_saves_change_nothing(tiny_recipe, tmp_path):
    for name, on in (("behind", "true"), ("in_line", "false")):
        run(load_recipe(tiny_recipe, [*QUICK, f"output.folder={tmp_path / name}", f"guards.background_saves={on}"]))
    assert_same_end(tmp_path / "behind", tmp_path / "in_line")
    for path in (tmp_path / "behind" / "checkpoints").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "in_line" / path.relative_to(tmp_path / "behind")).read_bytes()


def test_weights_and_biases_get_the_numbers_or_are_asked_for(tiny_recipe, tmp_path, monkeypatch, capsys):
    """A stand-in for the package, whose service cannot be reached from a test."""
    settings = [str(tiny_recipe), *QUICK, "stages.1.pairs=22", "output.wandb=transfer"]
    monkeypatch.setattr("vpgtrans.engine.runlog.importlib.util.find_spec", lambda name: None)
    assert main(settings) == 2
    assert "install vpgtrans[wandb]" in capsys.readouterr().err
    got: dict = {"log": []}
    stand_in = types.ModuleType("wandb")
    session = types.SimpleNamespace(
        log=lambda numbers, step: got["log"].append((step, numbers)), finish=lambda: got.update(finished=True)
    )
    stand_in.init = lambda **settings: got.update(settings) or session
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr("vpgtrans.engine.runlog.importlib.util.find_spec", lambda name: stand_in)
    assert main(settings) == 0
    assert got["project"] == "transfer" and got["resume"] == "allow" and got["finished"]
    logged = [(e["step"], e["loss"]) for e in events(tmp_path / "run", "train")]
    assert logged == [(step, n["train/loss"]) for step, n in got["log"] if "train/loss" in n]


def test_a_heartbeat_says_where_a_rank_is_and_when_it_fell_silent(tmp_path):
    called = []
    beat = Heartbeat(tmp_path, 1, 0.05, stall_s=0.3, on_stall=lambda: called.append(1))
    beat.at("update", 7)
    deadline = time.monotonic() + 10
    while not called and time.monotonic() < deadline:
        time.sleep(0.05)
    assert called == [1]
    beat.stop("ended")
    line = standing(tmp_path)[0]
    assert line.startswith("rank 1 (") and "ended, update 7" in line and "NO HEARTBEAT" not in line
    told = json.loads(beat.path.read_text())
    beat.path.write_text(json.dumps({**told, "phase": "update", "beat": told["beat"] - 60, "where": "a.py:1 f"}))
    line = standing(tmp_path)[0]
    assert "in a.py:1 f" in line and "NO HEARTBEAT for 6" in line


@pytest.fixture(scope="module")
def server():
    """Processes forked from one that has already imported the engine; a fork of this one would inherit its threads' locks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vpgtrans.engine.loop", "vpgtrans.engine.train"])
    return context


@pytest.fixture
def start_ranks(server, tmp_path):
    """start_ranks(n, settings, ...) -> processes with `.log`; what still runs at the end is killed."""
    started = []

    def start(
        count: int, common: list[str], own: dict[int, list[str]] | None = None, fault: dict[int, str] | None = None
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        processes = []
        for rank in range(count):
            log = tmp_path / f"{len(started)}-rank-{rank}.txt"
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            given = {
                "ENVIRONMENT": environment if count > 1 else {}, "LOG": str(log), "ARGUMENTS": [*common, *(own or {}).get(rank, [])],
                "FAULT": (fault or {}).get(rank),
            }  # fmt: skip
            process = server.Process(target=runpy.run_path, args=(str(WORKER), given, "worker"))
            process.start()
            process.log = log
            processes.append(process)
            started.append(process)
        return processes

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


def ends(processes, timeout: float = 240) -> list[int]:
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


def wait_for_update(folder: Path, step: int, processes) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        path = folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if any(line.endswith("}") and json.loads(line).get("step", 0) >= step for line in lines):
            return
        assert all(p.is_alive() for p in processes), [p.log.read_text()[-2000:] for p in processes]
        time.sleep(0.005)
    raise AssertionError(f"no update {step}")


def test_ranks_started_differently_stop_with_one_message(tiny_recipe, start_ranks, tmp_path):
    ranks = start_ranks(2, [str(tiny_recipe)], {1: ["seed=4", "stages.0.pairs=55"]})
    assert ends(ranks) == [2, 2]
    said = ranks[0].log.read_text().splitlines()[-1]
    assert said.startswith("rank 1 (") and "recipe: seed; recipe: stages" in said and "the same recipe" in said
    assert "recipe:" not in ranks[1].log.read_text()
    assert not (tmp_path / "run").exists()


def test_code_and_its_version_are_compared(monkeypatch, tiny_recipe):
    recipe = load_recipe(tiny_recipe)
    store = torch.distributed.HashStore()
    here = startup.facts(recipe)
    assert here == startup.facts(recipe) and len(here["code"]) == 16
    store.set("start/1", json.dumps({"at": "elsewhere, pid 1", "facts": {**here, "code": "0" * 16}}))
    with pytest.raises(StartError, match=r"rank 1 .elsewhere, pid 1. was started differently .*: code;"):
        startup.compare_ranks(store, 0, 2, here, 1.0)
    with pytest.raises(StartError, match=r"rank 2 of 3 did not start within 0\.2 s"):
        store = torch.distributed.HashStore()
        store.set("start/1", json.dumps({"at": "elsewhere, pid 1", "facts": here}))
        startup.compare_ranks(store, 0, 3, here, 0.2)


def test_a_notice_to_one_rank_stops_all_at_one_update_and_the_end_is_the_same(tiny_recipe, start_ranks, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = [str(tiny_recipe), *QUICK, "stages.1.pairs=308"]  # 34 updates
    assert ends(start_ranks(2, [*settings, f"output.folder={whole}"])) == [0, 0]
    again = [*settings, f"output.folder={broken}"]
    ranks = start_ranks(2, again)
    wait_for_update(broken, 8, ranks)
    os.kill(ranks[1].pid, signal.SIGUSR1)
    assert ends(ranks) == [75, 75]
    assert "stopped on" in ranks[0].log.read_text() and "stopped" not in ranks[1].log.read_text()
    found, _ = checkpoint.latest_checkpoint(broken / "checkpoints")
    assert 8 <= int(found.name[-8:]) < 34
    assert ends(start_ranks(2, again)) == [0, 0]
    assert_same_end(whole, broken)
    own = events(broken, "train", "ranks/rank-00001.jsonl")
    assert [e["loss"] for e in own] == [e["loss"] for e in events(broken, "train")]


def test_a_bad_number_on_one_rank_skips_the_update_on_all(tiny_recipe, start_ranks, tmp_path):
    ranks = start_ranks(2, [str(tiny_recipe), *QUICK, "stages.1.pairs=33"], fault={1: "nan-at-3"})
    assert ends(ranks) == [0, 0], [r.log.read_text()[-2000:] for r in ranks]
    folder = tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text())["skipped_updates"] == 1
    of_ranks = [events(folder, "warning", file) for file in ("log.jsonl", "ranks/rank-00001.jsonl")]
    skipped = [[(e["step"], e["value"]) for e in warnings if e["name"] == "update_skipped"] for warnings in of_ranks]
    assert skipped[0] == skipped[1] and len(skipped[0]) == 1
    assert [e["loss"] for e in events(folder, "train")] == [
        e["loss"] for e in events(folder, "train", "ranks/rank-00001.jsonl")
    ]


STAGE_ENDS_ONLY = "output.checkpoint_every_pairs=null"


@pytest.mark.parametrize(
    ("settings", "fault", "message"),
    [
        ((), "full-disk", "step-00000004: the checkpoint could not be written"),
        (("guards.background_saves=false",), "full-disk", "step-00000004: the checkpoint could not be written"),
        ((STAGE_ENDS_ONLY,), "full-disk", "step-00000006: the checkpoint could not be written"),
        ((STAGE_ENDS_ONLY, "stages.0.pairs=6600"), "full-disk", "the checkpoint could not be written"),
        ((STAGE_ENDS_ONLY,), "full-disk-at-best", "run: could not be written (Error while serializing: I/O error"),
    ],
    ids=["background", "foreground", "end of a stage", "on notice", "best model"],
)
def test_a_disk_that_is_full_stops_all_ranks_together(settings, fault, message, tiny_recipe, start_ranks, tmp_path):
    """One message, of rank 0, and nobody waits for it in vain."""
    folder = tmp_path / "run"
    ranks = start_ranks(2, [str(tiny_recipe), *QUICK, *settings], fault={0: fault})
    if len(settings) == 2:
        wait_for_update(folder, 8, ranks)
        os.kill(ranks[1].pid, signal.SIGUSR1)
    assert ends(ranks) == [1, 1], [r.log.read_text()[-2000:] for r in ranks]
    said, other = (r.log.read_text() for r in ranks)
    assert "stopped: " in said and message in said
    assert not any(text in said + other for text in ("lost the others", "Traceback")) and "stopped" not in other
    assert not (folder / "crash.txt").exists() and {e["stage"] for e in events(folder, "stage")} == {"warm_up"}
    found = checkpoint.latest_checkpoint(folder / "checkpoints")[0]
    assert found is None if STAGE_ENDS_ONLY in settings else found.name == "step-00000002"


def test_a_kill_after_a_notice_in_an_evaluation_finds_it_saved(tiny_recipe, start_ranks, tmp_path):
    """Also where the moments are spread over the ranks."""
    settings = [str(tiny_recipe), *QUICK, "distribution.optimizer=sharded", "output.checkpoint_every_pairs=null"]
    ranks = start_ranks(2, settings, fault={0: "killed-in-eval-4"})
    ranks[0].join(120)
    found, _ = checkpoint.latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert ranks[0].exitcode == 9 and found.name == "step-00000010"
    assert json.loads((found / "state.json").read_text())["evaluation_due"]
    assert load_file(found / "optimizer.safetensors").keys() >= {"0.exp_avg", "1.exp_avg", "40.exp_avg"}


def test_ranks_begin_with_the_same_weights(tiny_recipe, start_ranks, tmp_path):
    short = [str(tiny_recipe), *QUICK, "stages.0.pairs=22", "stages.1.pairs=22"]
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder, fault in zip(folders, ({}, {1: "other-projector"}), strict=True):
        assert ends(start_ranks(2, [*short, f"output.folder={folder}"], fault=fault)) == [0, 0]
    assert_same_end(*folders)


def test_ranks_end_a_stage_together_whatever_their_captions_score(tiny_recipe, start_ranks):
    patient = [
        "evaluation.select=cider",
        "evaluation.generate_every_pairs=11",
        "stages.0.patience=2",
        "stages.0.eval_every_pairs=11",
    ]
    ranks = start_ranks(
        2, [str(tiny_recipe), *patient, "stages.1.pairs=11", "guards.timeout_s=20"], fault={1: "other-captions"}
    )
    assert ends(ranks, 120) == [0, 0], [r.log.read_text()[-2000:] for r in ranks]


def test_a_rank_that_stands_still_is_named(tiny_recipe, start_ranks, tmp_path):
    folder = tmp_path / "run"
    ranks = start_ranks(
        2,
        [
            str(tiny_recipe),
            *QUICK,
            "guards.timeout_s=6",
            "guards.heartbeat_s=0.5",
            "stages.0.pairs=6600",
            "stages.0.eval_every_pairs=null",
        ],
    )  # updates and nothing else: whenever the one stops, the other is in an update too
    wait_for_update(folder, 4, ranks)
    beat = folder / "ranks" / "rank-00001.json"
    while '"phase": "update"' not in beat.read_text() and ranks[1].is_alive():
        time.sleep(0.01)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    ranks[0].join(60)
    assert ranks[0].exitcode == 1
    text = ranks[0].log.read_text()
    silent = next(line for line in text.splitlines() if "NO HEARTBEAT" in line)
    assert f"rank 1 ({socket.gethostname()}, pid {ranks[1].pid}): update, update" in silent
    assert "rank 0 has lost the others in update, update" in text and "Traceback" not in text
    assert "in a" not in silent and ".py:" in silent  # the lines of the loop that it was in
    assert "rank 0: update, update" in (folder / "crash.txt").read_text()
    assert checkpoint.latest_checkpoint(folder / "checkpoints")[0] is not None


def test_resumed_on_another_number_of_ranks_the_curve_goes_on(tiny_recipe, start_ranks, tmp_path):
    """Without dropout, which draws differently on every rank: one process's losses and weights to float32's rounding, 2 ranks then 1."""
    stage = "stages=[{name: warm_up, trains: projector, learning_rate: 1e-3, pairs: 330, batch_pairs: 11, eval_every_pairs: 66}]"
    settings = [str(tiny_recipe), *QUICK, stage]
    run(load_recipe(tiny_recipe, [*QUICK, stage, f"output.folder={tmp_path / 'one'}"]))
    folder = tmp_path / "elastic"
    ranks = start_ranks(2, [*settings, f"output.folder={folder}"])
    wait_for_update(folder, 10, ranks)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGTERM)
    assert ends(ranks) == [75, 75]
    stopped = int(checkpoint.latest_checkpoint(folder / "checkpoints")[0].name[-8:])
    assert 10 <= stopped < 30
    run(load_recipe(tiny_recipe, [*QUICK, stage, f"output.folder={folder}"]))
    for kind, key in (("train", "loss"), ("eval", "val_loss")):
        curves = [[(e["step"], e[key]) for e in events(tmp_path / name, kind)] for name in ("one", "elastic")]
        assert [s for s, _ in curves[0]] == [s for s, _ in curves[1]]
        assert [x for _, x in curves[1]] == pytest.approx([x for _, x in curves[0]], rel=1e-5)


@pytest.mark.slow
def test_torchrun_starts_all_ranks_again_after_one_was_killed(tiny_recipe, tmp_path):
    """`--max-restarts`: the run goes on from its newest checkpoint and ends as the undisturbed one."""
    train = Path(loop.__file__).with_name("train.py")
    command = [
        *(str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "--max-restarts", "1", str(train)),
        *(str(tiny_recipe), *QUICK, "stages.1.pairs=330"),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert subprocess.run([*command, f"output.folder={whole}"], capture_output=True, check=False).returncode == 0
    with (tmp_path / "said.txt").open("w") as said:
        launcher = subprocess.Popen([*command, f"output.folder={killed}"], stdout=said, stderr=said)
        while not (killed / "checkpoints" / "step-00000010").is_dir() and launcher.poll() is None:
            time.sleep(0.01)
        os.kill(json.loads((killed / "ranks" / "rank-00001.json").read_text())["pid"], signal.SIGKILL)
        assert launcher.wait(timeout=300) == 0, (tmp_path / "said.txt").read_text()[-3000:]
    assert "resumed at update" in (tmp_path / "said.txt").read_text()
    assert_same_end(whole, killed)
