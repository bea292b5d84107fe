"""Checkpoints appear whole or not at all, hold what was given, and a damaged one is named and passed over."""

from __future__ import annotations

import pytest
import torch

from vpgtrans.engine.checkpoint import (
    CheckpointError,
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
