"""Summed gradients against plain ones, by real collectives in a group of one process; more processes are in test_distribution.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vpgtrans.engine.distributed.reduction import ALIGNMENT, GradientReduction
from vpgtrans.engine.distributed.seeding import seed_update
from vpgtrans.engine.distributed.sharded_adamw import ShardedAdamW
from vpgtrans.engine.runtime import Runtime
from vpgtrans.kernels.adamw_step import adamw_step

ALONE = Runtime(torch.device("cpu"), torch.float32, 0, 1)


@pytest.fixture(autouse=True)
def group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))


def inputs(count: int = 3) -> list[torch.Tensor]:
    return list(torch.randn(count, 7, 5, generator=torch.Generator().manual_seed(1)))


def plain_gradients(of: list[torch.Tensor]) -> list[torch.Tensor]:
    model = network()
    for x in of:
        model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


def update(model: nn.Module, reduction: GradientReduction, of: list[torch.Tensor], extra: torch.Tensor) -> torch.Tensor:
    reduction.begin()
    for at, x in enumerate(of):
        if at == len(of) - 1:
            reduction.last(extra)
        model(x).square().sum().backward()
    return reduction.finish()


@pytest.mark.parametrize("bucket_bytes", [1, 200, 2**20])
def test_gradients_are_those_of_plain_backward_passes(bucket_bytes):
    """Over two updates; each starts at a multiple of 256 bytes in its bucket."""
    model = network()
    reduction = GradientReduction(list(model.parameters()), ALONE, bucket_bytes=bucket_bytes)
    assert reduction.bucket_count == {1: 8, 200: 4, 2**20: 1}[bucket_bytes]
    for of in (inputs(), inputs(1)):
        extra = update(model, reduction, of, torch.tensor([2.5, 7.0]))
        assert extra.tolist() == [2.5, 7.0]
        for parameter, wanted in zip(model.parameters(), plain_gradients(of), strict=True):
            assert torch.equal(parameter.grad, wanted)
            assert parameter.grad.storage_offset() % ALIGNMENT == 0
        model.zero_grad(set_to_none=True)


def test_buckets_leave_in_the_last_backward_pass_before_it_ends(monkeypatch):
    """From the last layer to the first, each when it is full, the first while earlier layers still have no gradient; none before."""
    model, seen = network(), []
    reduction = GradientReduction(list(model.parameters()), ALONE, bucket_bytes=200)
    real = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *a, **k: (seen.append("sent"), real(*a, **k))[1])
    for number, layer in enumerate(model):
        layer.register_full_backward_hook(lambda *_, n=number: seen.append(n))
    update(model, reduction, [x.requires_grad_() for x in inputs(2)], torch.zeros(2))
    assert seen[: seen.index("sent")].count(0) == 1  # the first pass, of which nothing was sent
    last_pass = seen[seen.index(0) + 1 :]
    assert last_pass.count("sent") == 4
    assert last_pass.index("sent") < last_pass.index(1) < last_pass.index(0)


def test_a_parameter_without_a_gradient_has_none_afterwards():
    """As on one process, so that AdamW passes it over; one that gets its first gradient later is an error, for its state would begin late."""
    model = network()
    reduction = GradientReduction([*model.parameters(), extra := nn.Parameter(torch.ones(3))], ALONE, bucket_bytes=200)
    update(model, reduction, inputs(), torch.zeros(2))
    assert extra.grad is None and all(p.grad is not None for p in model.parameters())
    reduction.begin()
    reduction.last(torch.zeros(2))
    extra.sum().backward()
    with pytest.raises(RuntimeError, match=r"shapes \(3,\): expected no gradient"):
        reduction.finish()


def test_what_one_update_does_not_reach_counts_as_zero():
    model = network()
    reduction = GradientReduction(list(model.parameters()), ALONE, bucket_bytes=200)
    update(model, reduction, inputs(), torch.zeros(2))
    reduction.begin()
    reduction.last(torch.zeros(2))
    model[3](inputs()[0]).sum().backward()
    reduction.finish()
    assert model[3].weight.grad.any() and not model[0].weight.grad.any()


def test_a_closed_reduction_leaves_gradients_alone():
    model = network()
    reduction = GradientReduction(list(model.parameters()), ALONE)
    reduction.close()
    reduction.last(torch.zeros(2))
    model(inputs()[0]).sum().backward()
    assert reduction._sent == 0 and not reduction._reached


def test_parameters_of_two_dtypes_are_refused():
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))]
    with pytest.raises(ValueError, match=r"parameters: expected some of one dtype, got .*float32.*float64"):
        GradientReduction(parameters, ALONE)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.99), eps=1e-6, fused=True)


def step(model: nn.Module, optimizer: torch.optim.AdamW, x: torch.Tensor, loss: float = 1.0):
    optimizer.zero_grad(set_to_none=True)
    model(x).square().sum().backward()
    return adamw_step(optimizer, 0.5, torch.tensor(loss), impl="reference")


def test_sharded_adamw_is_adamw():
    """Bit for bit: norm, skipped update, parameters, and the state that checkpoints take, which a plain one loads and the other way round."""
    plain, sharded = network(), network()
    ours, theirs = adamw(plain), ShardedAdamW(adamw(sharded), ALONE)
    for at, x in enumerate(inputs(4)):
        loss = float("nan") if at == 2 else 1.0
        wanted, got = step(plain, ours, x, loss), step(sharded, theirs, x, loss)
        assert torch.equal(wanted.norm, got.norm) and wanted.skipped.item() == got.skipped.item() == (at == 2)
    with pytest.raises(RuntimeError, match="expected `consolidate` on all ranks"):
        theirs.state_dict()
    theirs.consolidate()
    wanted, got = ours.state_dict(), theirs.state_dict()
    assert wanted["param_groups"] == got["param_groups"]
    for index, entry in wanted["state"].items():
        assert all(torch.equal(value, got["state"][index][name]) for name, value in entry.items())
    fresh = ShardedAdamW(adamw(sharded), ALONE)
    fresh.load_state_dict(wanted)
    ours.load_state_dict(got)
    step(plain, ours, inputs()[0])
    step(sharded, fresh, inputs()[0])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), sharded.parameters(), strict=True))


def test_ranks_draw_their_own_numbers_and_one_process_draws_on():
    def drawn(update: int, rank: int, world_size: int = 2) -> float:
        seed_update(7, update, Runtime(torch.device("cpu"), torch.float32, rank, world_size))
        return torch.rand(()).item()

    numbers = [drawn(update, rank) for update in (0, 1) for rank in (0, 1)]
    assert len(set(numbers)) == 4 and drawn(1, 1) == numbers[3]
    torch.manual_seed(5)
    wanted = torch.rand(2)[1].item()
    torch.manual_seed(5)
    torch.rand(())
    assert drawn(0, 0, world_size=1) == pytest.approx(wanted)
