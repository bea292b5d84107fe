"""Checkpoints appear whole or not at all, hold what was given, and a damaged one is named and passed over."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from vpgtrans.engine import checkpoint
from vpgtrans.engine.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    SaveError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    trainable_tensors,
    verify,
)
from vpgtrans.engine.optim import build_adamw, clip_, learning_rate
from vpgtrans.engine.recipe import Optimizer


def trained(seed: int = 0):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5))
    optimizer = build_adamw(module.named_parameters(), Optimizer())
    for _ in range(3):
        module(torch.randn(2, 4)).pow(2).sum().backward()
        optimizer.step()
    return module, optimizer


def test_round_trip_restores_tensors_moments_and_generators(tmp_path):
    module, optimizer = trained()
    save_checkpoint(tmp_path, 7, trainable_tensors(module), optimizer, {"step": 7}, keep=2)
    expected_random = torch.rand(3)
    other, other_optimizer = trained(seed=1)
    found, passed_over = latest_checkpoint(tmp_path)
    state = load_checkpoint(found, trainable_tensors(other), other_optimizer)
    assert state == {"step": 7} and not passed_over
    assert torch.equal(torch.rand(3), expected_random)
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            assert torch.equal(value, other_optimizer.state[b][name])


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, file, damage):
    module, optimizer = trained()
    for step in (1, 2):
        save_checkpoint(tmp_path, step, trainable_tensors(module), optimizer, {"step": step}, keep=5)
    path = tmp_path / "step-00000002" / file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
    found, passed_over = latest_checkpoint(tmp_path)
    assert found == tmp_path / "step-00000001"
    assert len(passed_over) == 1 and "step-00000002" in passed_over[0]


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def corrupt(root: Path, draw: random.Random) -> str:
    """One random fault in `root/step-00000002`; returns what it was."""
    folder, other = root / "step-00000002", root / "step-00000001"
    path = folder / draw.choice([*checkpoint.FILES, "manifest.json"])
    data = bytearray(path.read_bytes())
    kind = draw.choice(["bit", "byte", "block", "truncate", "grow", "empty", "missing", "swap", "copy", "mix"])
    if kind == "bit":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
    elif kind == "block":
        at = draw.randrange(len(data))
        data[at : at + 64] = bytes(b ^ 0x5A for b in data[at : at + 64])
    elif kind == "truncate":
        del data[draw.randrange(len(data)) :]
    elif kind == "grow":
        data += bytes(draw.randrange(1, 64))
    elif kind == "empty":
        data.clear()
    if kind == "missing":
        path.unlink()
    elif kind == "swap":  # with another file of the same checkpoint
        name = draw.choice([n for n in (*checkpoint.FILES, "manifest.json") if n != path.name])
        path.write_bytes((folder / name).read_bytes())
        (folder / name).write_bytes(data)
    elif kind == "copy":  # the same file of another checkpoint
        path.write_bytes((other / path.name).read_bytes())
    elif kind == "mix":  # every file of another checkpoint
        for name in (*checkpoint.FILES, "manifest.json"):
            shutil.copyfile(other / name, folder / name)
    else:
        path.write_bytes(data)
    return f"{kind} {path.name}"


def test_no_random_corruption_is_loaded(tmp_path):
    """250 faults drawn from a fixed seed: the damaged checkpoint is always named, and the one before it found."""
    module, optimizer = trained()
    for step in (1, 2):
        module(torch.randn(2, 4)).pow(2).sum().backward()
        optimizer.step()
        save_checkpoint(tmp_path, step, trainable_tensors(module), optimizer, {"step": step, "pairs": 7 * step}, keep=5)
    whole = {p: p.read_bytes() for p in (tmp_path / "step-00000002").iterdir()}
    draw, kinds = random.Random(11), set()
    for _ in range(250):
        fault = corrupt(tmp_path, draw)
        if all(p.is_file() and p.read_bytes() == data for p, data in whole.items()):
            continue  # the first byte of two files agreed, say: nothing was damaged
        kinds.add(fault)
        found, passed_over = latest_checkpoint(tmp_path)
        assert found == tmp_path / "step-00000001", fault
        assert len(passed_over) == 1 and "step-00000002" in passed_over[0], fault
        with pytest.raises(CheckpointError, match="step-00000002"):
            load_checkpoint(tmp_path / "step-00000002", trainable_tensors(module), optimizer)
        for path, data in whole.items():
            path.write_bytes(data)
    assert len(kinds) > 40
    assert latest_checkpoint(tmp_path) == (tmp_path / "step-00000002", [])


def test_a_run_does_not_begin_anew_over_damaged_checkpoints(tmp_path):
    module, optimizer = trained()
    assert latest_checkpoint(tmp_path) == (None, [])
    for step in (1, 2):
        save_checkpoint(tmp_path, step, trainable_tensors(module), optimizer, {"step": step}, keep=5)
        (tmp_path / f"step-{step:08d}" / "rng.safetensors").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint is damaged") as caught:
        latest_checkpoint(tmp_path)
    for words in ("step-00000001: rng.safetensors is missing", "step-00000002: rng.safetensors is missing", "delete"):
        assert words in str(caught.value)


def test_a_checkpoint_replaced_by_one_of_the_same_step_is_found_where_a_kill_came_between(tmp_path):
    module, optimizer = trained()
    save_checkpoint(tmp_path, 3, trainable_tensors(module), optimizer, {"step": 3}, keep=1)
    aside = tmp_path / ".step-00000003.replaced"
    (tmp_path / "step-00000003").rename(aside)
    assert latest_checkpoint(tmp_path) == (aside, [])
    save_checkpoint(tmp_path, 3, trainable_tensors(module), optimizer, {"step": 3, "again": True}, keep=1)
    save_checkpoint(tmp_path, 3, trainable_tensors(module), optimizer, {"step": 3, "again": True}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_damaged_newer_ones_do_not_push_out_what_is_written_after_resuming(tmp_path):
    module, optimizer = trained()
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, trainable_tensors(module), optimizer, {"step": step}, keep=3)
    for step in (20, 30):
        (tmp_path / f"step-{step:08d}" / "state.json").write_text("{")
    assert latest_checkpoint(tmp_path)[0] == tmp_path / "step-00000010"
    save_checkpoint(tmp_path, 15, trainable_tensors(module), optimizer, {"step": 15}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000015"]


def test_a_background_save_equals_a_direct_one_though_training_goes_on(tmp_path, monkeypatch):
    """The thread is held until the tensors have changed; a second save waits for the first."""
    module, optimizer = trained()
    save_checkpoint(tmp_path / "direct", 1, trainable_tensors(module), optimizer, {"step": 1}, keep=3)
    go, real, running = threading.Event(), checkpoint.write_snapshot, []

    def held(*arguments):
        running.append(1)
        assert len(running) == 1 and go.wait(30)
        result = real(*arguments)
        running.pop()
        return result

    monkeypatch.setattr(checkpoint, "write_snapshot", held)
    writer = CheckpointWriter(tmp_path / "background", keep=3)
    writer.save(1, trainable_tensors(module), optimizer, {"step": 1})
    assert not (tmp_path / "background").exists()
    module(torch.randn(2, 4)).pow(2).sum().backward()
    optimizer.step()
    torch.rand(5)
    threading.Timer(0.2, go.set).start()
    writer.save(2, trainable_tensors(module), optimizer, {"step": 2})
    first = contents(tmp_path / "background" / "step-00000001")
    assert first == contents(tmp_path / "direct" / "step-00000001")
    writer.finish()
    second = contents(tmp_path / "background" / "step-00000002")
    assert second.keys() == first.keys() and second["optimizer.safetensors"] != first["optimizer.safetensors"]
    assert not any(t.name == "checkpoint" for t in threading.enumerate())


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from vpgtrans.engine.checkpoint import CheckpointWriter, SaveError
module = torch.nn.Linear(64, 64)
optimizer = torch.optim.AdamW(module.parameters())
writer = CheckpointWriter(Path(sys.argv[1]), keep=1)
writer.save(1, dict(module.named_parameters()), optimizer, {"step": 1})
writer.finish()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # as on a full disk, writing fails in the middle of a file
writer.save(2, dict(module.named_parameters()), optimizer, {"step": 2})
try:
    writer.finish()
except SaveError as error:
    print(error)
writer.check()  # said once
"""


def test_a_full_disk_is_an_error_of_the_next_call_and_leaves_the_last_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for words in ("step-00000002: the checkpoint could not be written", "MiB are free", "there: step-00000001"):
        assert words in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert latest_checkpoint(tmp_path) == (tmp_path / "step-00000001", [])


def test_errors_of_the_thread_are_raised_by_the_next_check(tmp_path):
    module, optimizer = trained()
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(tmp_path / "file" / "checkpoints", keep=1)
    writer.save(1, trainable_tensors(module), optimizer, {"step": 1})
    writer._thread.join()
    with pytest.raises(SaveError, match="could not be written"):
        writer.check()
    writer.finish()


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path):
    module, optimizer = trained()
    (tmp_path / ".step-00000001.99.tmp").mkdir()
    for step in range(5):
        save_checkpoint(tmp_path, step, trainable_tensors(module), optimizer, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert all(verify(p) is None for p in tmp_path.iterdir())


def test_what_does_not_fit_changes_nothing(tmp_path):
    module, optimizer = trained()
    save_checkpoint(tmp_path, 1, trainable_tensors(module), optimizer, {}, keep=1)
    other = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6))
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(CheckpointError, match=r"0\.weight: expected \(6, 4\), found \(5, 4\)"):
        load_checkpoint(
            tmp_path / "step-00000001", trainable_tensors(other), build_adamw(other.named_parameters(), Optimizer())
        )
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_decay_groups_follow_the_reference():
    module = torch.nn.ModuleDict({"dense": torch.nn.Linear(3, 3), "norm": torch.nn.LayerNorm(3)})
    module.query_tokens = torch.nn.Parameter(torch.zeros(1, 4, 3))
    decayed, plain = build_adamw(module.named_parameters(), Optimizer(weight_decay=0.05)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert {p.shape for p in decayed["params"]} == {(3, 3), (1, 4, 3)}
    assert all(p.ndim == 1 for p in plain["params"])


def test_a_flagged_update_changes_nothing():
    """`found_inf` skips the fused update on the device: weights, moments and step count stay as they were."""
    module, optimizer = trained()
    before = [p.clone() for p in module.parameters()]
    steps = [optimizer.state[p]["step"].clone() for p in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), None
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert all(torch.equal(s, optimizer.state[p]["step"]) for s, p in zip(steps, module.parameters(), strict=True))


def test_schedule():
    common = {"schedule": "cosine", "minimum": 1e-5, "warmup": 100, "warmup_start": 1e-6}
    assert learning_rate(0, 1000, 1e-4, **common) == pytest.approx(1e-6)
    assert learning_rate(50, 1000, 1e-4, **common) == pytest.approx(5.05e-5)
    assert learning_rate(100, 1000, 1e-4, **common) == pytest.approx(1e-4)
    assert learning_rate(550, 1000, 1e-4, **common) == pytest.approx(5.5e-5)
    assert learning_rate(1000, 1000, 1e-4, **common) == pytest.approx(1e-5)
    assert learning_rate(999, 1000, 5e-4) == 5e-4


def test_clip_returns_the_norm_before():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_([parameter], 1.0).item() == pytest.approx(5.0)
    assert parameter.grad.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_none_half_empty(tmp_path, monkeypatch):
    module, optimizer = trained()
    save_checkpoint(tmp_path, 1, trainable_tensors(module), optimizer, {"step": 1}, keep=1)

    def stopped_half_way(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            (folder / "state.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", stopped_half_way)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, trainable_tensors(module), optimizer, {"step": 2}, keep=1)
    monkeypatch.undo()
    assert [verify(f) for f in sorted(tmp_path.glob("step-*"))] == [None]
    save_checkpoint(tmp_path, 3, trainable_tensors(module), optimizer, {"step": 3}, keep=1)
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000003"]
