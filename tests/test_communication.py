"""The model of communication: bytes of ring collectives, what is hidden, what crosses between nodes, and what real processes send."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from vpgtrans.engine.dry_run import make_plan
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
from vpgtrans.engine.planning.layout import frozen_blocks
from vpgtrans.engine.recipe import load_recipe
from vpgtrans.engine.tiny_world import TOWER as TOWER_SIZES
from vpgtrans.engine.tiny_world import tiny_llama, tiny_recipe, write_tower

FROZEN = Frozen(tower_bytes=2e9, tower_blocks=40, llm_bytes=13e9, llm_blocks=32)


@pytest.fixture(scope="module")
def h200():
    return find_device("h200", torch.bfloat16, 0.7)


def costs(micro_batches: float = 16.0, trainable: int = 108_000_000, tensor_sizes: tuple[int, ...] = ()):
    part = SimpleNamespace(flops=3.0, backward_flops=2.0)
    halves = SimpleNamespace(flops=2.0, backward_flops=1.0)
    workload = SimpleNamespace(micro_batches=micro_batches)
    return SimpleNamespace(
        workload=workload,
        trainable=trainable,
        tensor_sizes=tensor_sizes,
        update={VPG_: part, BLOCKS: halves, TOWER: halves},
    )


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


def write_even_recipe(world: Path, folder: Path) -> Path:
    """A recipe in whose model every tensor that trains is a multiple of 64 elements long, so that nothing is padded, and every block divides."""
    tokenizer = AutoTokenizer.from_pretrained(world / "lm_target")
    tiny_llama(tokenizer, 64).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    vit = write_tower(folder / "vit", {**TOWER_SIZES, "hidden_size": 64, "num_hidden_layers": 2})
    values = tiny_recipe(world, folder / "run")
    values["data"] |= {"row_tokens": 64, "rows_per_micro_batch": 1}
    values |= {
        "target": {"llm": str(folder / "llm")}, "vision": {"kind": "eva_vit", "path": str(vit), "image_size": 32}, "source": {},
        "initialise": {"vpg": "random", "projector": "random"},
        "qformer": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "num_query_tokens": 4},
        "evaluation": {"loss_images": 2, "generate_images": 0},
        "stages": [{"name": "direct", "trains": "vpg_and_projector", "learning_rate": 1e-3, "pairs": 33, "batch_pairs": 11}],
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


LAYOUTS = {
    "replicated": ("replicated", "replicated", "auto"),
    "sharded": ("sharded", "sharded", "auto"),
    "fp8": ("sharded", "replicated", "kernel"),
}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_real_processes_send_what_the_formulas_say(ranks, tiny_world, tmp_path, h200):
    """Payloads of three updates on gloo, to the byte: one sum, a gather for each block and pass of a micro-batch, one of new weights.

    The loss and the count of targets ride along in the sum, 8 bytes.
    """
    path, jobs = write_even_recipe(tiny_world, tmp_path), []
    for name, (frozen, optimizer, linears) in LAYOUTS.items():
        settings = [
            f"distribution.frozen={frozen}",
            f"distribution.optimizer={optimizer}",
            f"kernels.frozen_linear={linears}",
        ]
        # Enough for some ranks to have two micro-batches.
        sizes = [f"stages.0.batch_pairs={11 * ranks // 2}", f"stages.0.pairs={33 * ranks // 2}"]
        arguments = [str(path), f"output.folder={tmp_path / name}", *settings, *sizes]
        jobs.append({"ranks": ranks, "arguments": arguments, "payloads": str(tmp_path / f"{name}.jsonl"), "fp8": True})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("run_ranks.py")), str(tmp_path / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    plans = {
        linears: make_plan(load_recipe(path, [f"kernels.frozen_linear={linears}", "device=cuda", "precision=fp32"]))
        for linears in ("auto", "kernel")
    }
    stage, blocks = plans["auto"].stages[0].costs, {linears: frozen_blocks(plan) for linears, plan in plans.items()}
    assert all(found.llm_blocks == 2 and found.tower_blocks == 2 for found in blocks.values())
    assert (
        blocks["kernel"].llm_bytes < 0.35 * blocks["auto"].llm_bytes
    )  # a byte and a little for four: the CPU computes in float32
    for name, (frozen, optimizer, linears) in LAYOUTS.items():
        updates = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(updates) == 3 and max(u["micro_batches"] for u in updates) > 1
        for sent in updates:
            workload = dataclasses.replace(stage.workload, micro_batches=float(ranks * sent["micro_batches"]))
            seconds = dict.fromkeys(stage.update, 1.0)
            wanted = traffic(
                dataclasses.replace(stage, workload=workload), seconds, blocks[linears], h200, ranks,
                "world" if frozen == "sharded" else "replicated", optimizer=optimizer,
            )  # fmt: skip
            gathers = sent.get("all_gather", 0) + sent.get("weights", 0)
            assert all_reduce_bytes(sent["all_reduce"] - 8, ranks) == pytest.approx(wanted.reduced_bytes, rel=1e-12)
            assert all_gather_bytes(gathers, ranks) == pytest.approx(wanted.gathered_bytes, rel=1e-12)
            assert (sent.get("all_gather", 0) > 0) == (frozen == "sharded")
            assert (sent.get("weights", 0) > 0) == (optimizer == "sharded")
            assert sent.keys() <= {"all_reduce", "all_gather", "weights", "micro_batches"}


def test_sharded_moments_gather_as_often_the_largest_share_as_there_are_ranks(h200):
    """Tensors of 6, 5, 4 and 3 times 64 elements on 2 ranks: 9 and 9; on 3: 6, 5 and 7, so that 21 are sent for 18.  Nothing hides it."""
    sizes = tuple(64 * n for n in (6, 5, 4, 3))
    for gpus, part in ((2, 9), (3, 7)):
        found, plain = (
            traffic(costs(trainable=sum(sizes), tensor_sizes=sizes), SECONDS, FROZEN, h200, gpus, "replicated", optimizer=of)
            for of in ("sharded", "replicated")
        )  # fmt: skip
        assert found.gathered_bytes == pytest.approx((gpus - 1) / gpus * 4 * 64 * part * gpus)
        assert found.reduced_bytes == plain.reduced_bytes
        assert found.exposed_s - plain.exposed_s == pytest.approx(found.gathered_bytes / 450e9)


def test_ranks_share_micro_batches_in_whole_ones(h200):
    """5 micro-batches on 2 GPUs: 3 each, the last of them less than full, and each gathers every block."""
    found = traffic(costs(micro_batches=5), SECONDS, FROZEN, h200, 2, "node")
    assert found.gathered_bytes == pytest.approx(3 / 2 * (2e9 + 2 * 13e9))
