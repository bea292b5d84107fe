"""The model of communication: bytes of ring collectives, what is hidden, and what crosses between nodes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vpgtrans.engine.planning.communication import (
    BUCKET_BYTES,
    GPUS_A_NODE,
    NETWORK_BYTES_S,
    Frozen,
    all_gather_bytes,
    all_reduce_bytes,
    scaling,
    traffic,
)
from vpgtrans.engine.planning.costs import BLOCKS, TOWER, VPG_
from vpgtrans.engine.planning.devices import find_device

FROZEN = Frozen(tower_bytes=2e9, tower_blocks=40, llm_bytes=13e9, llm_blocks=32)


@pytest.fixture(scope="module")
def h200():
    return find_device("h200", torch.bfloat16, 0.7)


def costs(micro_batches: float = 16.0, trainable: int = 108_000_000):
    part = SimpleNamespace(flops=3.0, backward_flops=2.0)
    halves = SimpleNamespace(flops=2.0, backward_flops=1.0)
    workload = SimpleNamespace(micro_batches=micro_batches)
    return SimpleNamespace(workload=workload, trainable=trainable, update={VPG_: part, BLOCKS: halves, TOWER: halves})


SECONDS = {TOWER: 1.6, VPG_: 0.16, BLOCKS: 3.2}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ring_collectives_by_stepping_through_them(ranks):
    """Each rank's bytes, counted over the steps of a ring: a reduce-scatter and an all-gather of a chunk at a time."""
    chunk = 120 / ranks
    gathered = sum(chunk for _ in range(ranks - 1))
    assert all_gather_bytes(120, ranks) == pytest.approx(gathered)
    assert all_reduce_bytes(120, ranks) == pytest.approx(2 * gathered)


def test_one_gpu_tells_nobody_anything(h200):
    found = traffic(costs(), SECONDS, FROZEN, h200, 1, "replicated")
    assert (found.gathered_bytes, found.reduced_bytes, found.exposed_s, found.hidden_share) == (0, 0, 0, 1.0)


def test_a_sharded_update_gathers_tower_once_and_language_model_twice_a_micro_batch(h200):
    found = traffic(costs(micro_batches=16), SECONDS, FROZEN, h200, 8, "node")
    assert found.gathered_bytes == pytest.approx(2 * 7 / 8 * (2e9 + 2 * 13e9))
    assert found.reduced_bytes == pytest.approx(2 * 7 / 8 * 4 * 108e6)


def test_sharding_inside_nodes_keeps_gathers_off_the_network(h200):
    inside = traffic(costs(micro_batches=64), SECONDS, FROZEN, h200, 64, "node")
    over_all = traffic(costs(micro_batches=64), SECONDS, FROZEN, h200, 64, "world", network_bytes_s=1e9)
    assert inside.gather_s == pytest.approx(inside.gathered_bytes / 450e9)
    assert over_all.gather_s == pytest.approx(7 / 8 * (2e9 + 2 * 13e9) / (GPUS_A_NODE * 1e9))


def test_what_computing_does_not_hide(h200):
    """Where a pass computes longer than it gathers only its first block shows; where it computes in no time, all of it."""
    busy = traffic(costs(), SECONDS, FROZEN, h200, 8, "node")
    idle = traffic(costs(), dict.fromkeys(SECONDS, 1e-9), FROZEN, h200, 8, "node")
    firsts = 2 * 7 / 8 / 450e9 * (2e9 / 40 + 2 * 13e9 / 32)
    last_bucket = BUCKET_BYTES / (4 * 108e6) * busy.reduce_s
    assert busy.exposed_s == pytest.approx(firsts + last_bucket)
    assert idle.exposed_s == pytest.approx(idle.gather_s + idle.reduce_s, rel=1e-4)
    assert busy.hidden_share > 0.9 and idle.hidden_share == pytest.approx(0.0, abs=1e-4)


def test_rows_of_the_plan(h200):
    rows = scaling(costs(), SECONDS, 5.0, FROZEN, h200)
    assert [(r["gpus"], r["layout"]) for r in rows if r["gpus"] <= 16] == [
        (8, "replicated"), (8, "node"), (16, "replicated"), (16, "node"), (16, "world"),
    ]  # fmt: skip
    assert all(
        r["computing_s"] == 5.0 / r["gpus"] and r["added_share"] == r["exposed_s"] / r["computing_s"] for r in rows
    )
    assert NETWORK_BYTES_S == 400e9 / 8
