"""How ranks find together, and what they leave: names of starts, folders, checkpoints, heartbeats, files that are whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from vpgtrans.engine import guards, loop, outcome, resume, runlog, runtime, startup
from vpgtrans.engine.checkpoint import CheckpointError
from vpgtrans.engine.data.images import ImageRefused
from vpgtrans.engine.notice import Notice
from vpgtrans.engine.recipe import load_recipe, save_recipe, told
from vpgtrans.engine.startup import StartError, meet
from vpgtrans.engine.train import main


def meeting(store: dist.Store, ranks: list[int], world_size: int, timeout_s: float = 20.0) -> dict[int, str]:
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda r=r: found.update({r: meet(store, r, world_size, timeout_s)})) for r in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_meet_again_in_a_store_that_is_full_of_those_before():
    store = dist.HashStore()
    names = [meeting(store, [2, 1, 0], 3) for _ in range(3)]
    assert [len(set(of_start.values())) for of_start in names] == [1, 1, 1]
    assert len({of_start[0] for of_start in names}) == 3
    assert len(set(meeting(store, [1, 0], 2).values())) == 1  # a smaller world
    meeting(store, [0], 2, 0.3)  # rank 1 is gone, and what it said before counts for nothing
    with pytest.raises(startup.RankMissing, match="rank 1 of 2 did not start within"):
        startup.compare_ranks(dist.PrefixStore("new", store), 0, 2, {}, 0.1)


def test_restarts_that_machines_count_differently_do_not_keep_ranks_apart(monkeypatch):
    """torchrun counts a restart on the machine whose process died, not on those that only start again with it."""
    seen = []
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, store, **__: seen.append(store))
    for at in range(2):  # the second time over what the first has left
        errors: list[BaseException] = []

        def join(rank: int, errors=errors) -> None:
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(rank))
            try:
                runtime._join("gloo", rank, 2, 20.0, {"code": "a"})
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors and len(seen) == 2 * (at + 1)
        seen[-1].set(f"met-{at}", "1")
        assert seen[-2].check([f"met-{at}"])
    assert not seen[0].check(["met-1"])


def test_a_launcher_may_be_process_1(monkeypatch):
    """As in a container; only a rank that its launcher has left to an init is told to end."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setattr(startup.os, "getppid", lambda: 1)
    monkeypatch.setattr(startup.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(prctl=lambda *_: 0))
    sent = []
    monkeypatch.setattr(startup.os, "kill", lambda *given: sent.append(given))
    real = Path.read_bytes
    for command, expected in ((b"/usr/bin/python3.11\0/usr/bin/torchrun\0", 0), (b"/sbin/init\0splash\0", 1)):
        told = lambda path, command=command: command if str(path) == "/proc/1/cmdline" else real(path)  # noqa: E731
        monkeypatch.setattr(Path, "read_bytes", told)
        sent.clear()
        startup.end_with_the_launcher()
        assert len(sent) == (expected if sys.platform.startswith("linux") else 0)


def test_a_failed_rank_does_not_wait_for_the_others_nccl(monkeypatch):
    called = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: called.append("destroy"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: called.append("abort"))
    for backend, failed in (("nccl", True), ("nccl", False), ("gloo", True)):
        monkeypatch.setattr(dist, "get_backend", lambda backend=backend: backend)
        runtime.stop(failed)
    assert called == ["abort", "destroy", "destroy"]


class OneOfTwo(SimpleNamespace):
    """A rank whose other one answers `others`."""

    world_size = 2

    def gather(self, value):
        other = self.others.pop(0)
        return [value, other] if self.is_main else [other, value]


def test_ranks_that_find_different_checkpoints_stop(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"none on rank 0, step-00000004 on rank 1; see whether all ranks"
    ) as found:
        resume.common_checkpoint(tmp_path, OneOfTwo(is_main=True, others=[(None, "step-00000004")]))
    assert not found.value.quiet
    with pytest.raises(CheckpointError, match="damaged") as found:
        resume.common_checkpoint(tmp_path, OneOfTwo(is_main=False, others=[("every one is damaged", "none")]))
    assert found.value.quiet
    assert resume.common_checkpoint(tmp_path, OneOfTwo(is_main=True, others=[(None, "none")])) == (None, [])


def test_progress_of_another_version_is_named(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"step": 3, "tokens_seen": 5}))
    with pytest.raises(CheckpointError, match=r"state\.json holds tokens_seen, which this version"):
        resume.read_progress(tmp_path)


def test_what_differs_from_the_recipe_of_a_resumed_run():
    before = {"seed": 0, "stages": [{"rate": 1.0}], "vision": {"config": {"heads": 2}, "blocks": None}}
    now = {
        "seed": 0,
        "stages": [{"rate": 2.0}],
        "vision": {"config": {"heads": 2, "eps": 1e-6}, "blocks": None, "new": 1},
    }
    found = list(resume._differences(before, now, ""))
    assert found == [
        "stages.0.rate: was 1.0, now 2.0",
        'vision.config: was {"heads": 2}, now {"heads": 2, "eps": 1e-06}',
    ]
    assert not list(resume._differences(before, before, ""))


def test_mistakes_are_told_in_one_way():
    with pytest.raises(ValueError) as found:
        json.loads("{")
    assert told(found.value).startswith("JSONDecodeError: ")
    assert told(CheckpointError("torn")) == "checkpoint error: torn"
    assert told(ImageRefused("missing", "no such file")).startswith("image error: ")


@pytest.mark.parametrize(
    ("gpus", "listed", "processes"), [(None, "", "1"), (None, "GPU 0: x\nGPU 1: x", "2"), ("3", "GPU 0: x", "3")]
)
def test_launch_file_counts_the_processes(gpus, listed, processes, tmp_path):
    for name, text in (("nvidia-smi", f"printf '{listed}'"), ("torchrun", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **({"GPUS": gpus} if gpus else {})}
    for script, more in (("one_node.sh", {}), ("several_nodes.sh", {"NODES": "2", "HEAD": "localhost"})):
        command = ["sh", str(Path(__file__).parents[1] / "recipes" / "launch" / script), "recipe.yaml"]
        said = subprocess.run(
            command, env=environment | more, capture_output=True, text=True, check=True
        ).stdout.split()
        assert said[said.index("--nproc-per-node") + 1] == processes and said[-1] == "recipe.yaml"


def test_ranks_of_two_folders_stop(tmp_path, monkeypatch, tiny_recipe):
    monkeypatch.setattr(guards, "SEEN_WITHIN_S", 0.0)
    folder = tmp_path / "run"
    recipe = load_recipe(tiny_recipe)
    assert recipe.output.folder == folder
    other = OneOfTwo(is_main=False, others=[None, "another lock", None])
    with pytest.raises(
        StartError, match=r"rank 1: output.folder: expected one folder for all ranks, but .*run on "
    ) as found:
        guards.Guard(recipe, other, Notice())
    assert found.value.quiet
    lock = startup.FolderLock(folder)
    assert lock.take() is None
    assert guards._not_shared(folder, lock.owner) is None
    lock.release()


def test_heartbeats_of_a_larger_world_are_not_missed(tmp_path, tiny_recipe):
    ranks = tmp_path / "run" / "ranks"
    ranks.mkdir(parents=True)
    for rank in (0, 3):
        (ranks / f"rank-{rank:05d}.json").write_text(json.dumps({"rank": rank, "phase": "update"}))
    guard = guards.Guard(load_recipe(tiny_recipe), runtime.Runtime(torch.device("cpu"), torch.float32, 0, 1), Notice())
    try:
        assert [path.name for path in ranks.glob("rank-*.json")] == ["rank-00000.json"]
    finally:
        guard.close()


def half_written(monkeypatch) -> None:
    """From here on a kill comes in the middle of what is written."""
    real = Path.write_text

    def write_text(path, text, *more, **settings):
        real(path, text[: len(text) // 2], *more, **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", write_text)


@pytest.mark.parametrize("name", ["log.jsonl", "recipe.yaml"])
def test_a_kill_while_a_run_is_resumed_leaves_whole_files(name, tmp_path, monkeypatch, tiny_recipe):
    path, lines = tmp_path / name, "".join(json.dumps({"event": "train", "step": n}) + "\n" for n in range(9))
    path.write_text(lines)
    recipe = load_recipe(tiny_recipe)
    half_written(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        if name == "log.jsonl":
            runlog.RunLog(tmp_path, resume_at=5)
        else:
            save_recipe(recipe, path)
    assert path.read_text() == lines


def test_the_log_of_another_rank_begins_at_the_checkpoint_too(tmp_path):
    path = tmp_path / "ranks" / "rank-00001.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"event": "train", "step": n}) + "\n" for n in range(5)) + '{"event": "tr')
    log = runlog.RunLog(tmp_path, enabled=False, resume_at=3, rank_log=path)
    log.event("train", step=4)
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]


def test_a_kill_while_the_model_is_copied_leaves_no_half_of_it(tmp_path, monkeypatch, tiny_recipe):
    def copytree(source, target):
        Path(target).mkdir()
        (Path(target) / "model.safetensors").write_bytes((Path(source) / "model.safetensors").read_bytes()[:100])
        raise KeyboardInterrupt

    recipe = load_recipe(tiny_recipe, ["stages.0.pairs=11", "stages.1.pairs=11", "evaluation.generate_images=0"])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", copytree)
        with pytest.raises(KeyboardInterrupt):
            loop.run(recipe)
    assert not (tmp_path / "run" / "model").exists()
    loop.run(recipe)
    best, model = (tmp_path / "run" / name / "model.safetensors" for name in ("best", "model"))
    assert best.read_bytes() == model.read_bytes()


def test_a_damaged_record_of_a_packed_set_is_reported():
    class Records(list):
        def __getitem__(self, at):
            raise ImageRefused("unreadable", "shard-00000.beton: sample 7", "checksum")

    warned = []
    this = SimpleNamespace(
        runtime=SimpleNamespace(gather=lambda value: [value]), data=SimpleNamespace(records=Records()),
        features=SimpleNamespace(unusable={7: "why"}), progress=SimpleNamespace(bad_images={}, step=3),
        log=SimpleNamespace(warn=lambda *_, **fields: warned.append(fields)),
    )  # fmt: skip
    outcome.report_bad_images(this)
    assert warned == [{"step": 3, "file": "shard-00000.beton: sample 7"}]


@pytest.mark.parametrize(("kind", "code"), [(startup.RankMissing, 1), (StartError, 2)])
def test_a_missing_rank_is_no_mistake_of_the_caller(kind, code, tiny_recipe, monkeypatch, capsys):
    def run(recipe):
        raise kind("rank 1 is not as it should be")

    monkeypatch.setattr(loop, "run", run)
    assert main([str(tiny_recipe)]) == code
    assert capsys.readouterr().err == "rank 1 is not as it should be\n"
