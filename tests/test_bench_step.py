"""benches/bench_step.py at its smallest: the peers compute the same, the table and its file are whole, and a peer that differs stops it."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHES = Path(__file__).resolve().parents[1] / "benches"


@pytest.fixture(scope="module")
def bench():
    """The module bench_step, which finds its neighbours as it does when it is run."""
    sys.path.insert(0, str(BENCHES))
    try:
        yield importlib.import_module("bench_step")
    finally:
        sys.path.remove(str(BENCHES))


@pytest.fixture
def peers(bench):
    settings = bench.Settings("tiny", "cpu", torch.float32, 1)
    return settings, bench.make_peers([*bench.PEERS, "engine"], settings, one_process=True)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("captions", [1, 5])
def test_all_compute_the_same(bench, peers, stage, captions):
    """In micro-batches of different sizes; stage 2 has gradients of the VPG, stage 1 of the projector alone; steps leave the weights alone."""
    settings, by_name = peers
    wanted = None
    for name, peer in by_name.items():
        for setting in bench.candidates(name, settings, False, {"transformers": {"rows": 5}}):
            peer.load(stage, captions, **setting)
            peer.step()
            for source in peer.sources[: 3 if stage == 1 else 2]:
                found = peer.check(source)
                wanted = wanted or found
                assert set(found) == set(wanted) and len(found) == (4 if stage == 1 else 7)
                assert abs(found["loss"] / math.log(200) - 1) < 0.1  # random weights know nothing of the 200 words
                bench.compare(found, wanted, name, settings)


def test_the_table_and_its_file(bench, tmp_path, capsys):
    out = tmp_path / "step.json"
    options = [
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--threads",
        "1",
        "--quick",
        "--one-process",
        "--out",
        str(out),
    ]
    assert bench.main(options) == 0
    found = json.loads(out.read_text())
    assert found["bench"] == "step" and {"date", "device", "torch", "transformers", "liger-kernel"} <= set(found)
    [result] = found["results"]
    rows = {(r["stage"], r["captions"], r["peer"], r["source"]): r for r in result["rows"]}
    peers = [(stage, n, peer, "live") for stage in (1, 2) for n in (1, 5) for peer in bench.PEERS]
    sources = {1: ("live", "vision cache", "prompt cache"), 2: ("live", "vision cache")}
    engine = [(stage, n, "engine", source) for stage in (1, 2) for n in (1, 5) for source in sources[stage]]
    formed = [(stage, 5, "engine, formed", source) for stage in (1, 2) for source in sources[stage]]
    assert set(rows) == {*peers, *engine, *formed}
    for key, row in rows.items():
        assert row["step_s"] > 0 and row["cpu_s"] > 0 and 0 <= row["padding"] < 1 and row["pairs"] == 10
        assert row["share_of_floor"] == pytest.approx(row["floor_s"] / row["step_s"])
        plain = rows[key[0], key[1], "transformers", "live"]
        assert row["times_transformers"] == pytest.approx(plain["step_s"] / row["step_s"])
    cached = rows[1, 5, "engine", "prompt cache"]
    both = 3 * rows[1, 5, "transformers", "live"]["step_s"] / (cached["build_s"] + 3 * cached["step_s"])
    assert cached["times_transformers_with_building"]["3"] == pytest.approx(both)
    # What need not be computed is not: images shared, then their encodings stored, then their soft prompts.
    flops = [rows[1, 5, "engine", source]["tflop"] for source in sources[1]]
    assert rows[1, 1, "engine", "live"]["tflop"] > flops[0] > flops[1] > flops[2]
    shown = capsys.readouterr().out
    assert "engine, prompt cache" in shown and "x (a)" in shown and "10 epochs" in shown


def test_a_tampered_weight_is_refused(bench, peers):
    """One of the Q-Former's, which the loss of random weights hardly feels."""
    settings, by_name = peers
    with torch.no_grad():
        by_name["engine"].model.vpg.qformer.encoder.layer[2].crossattention.attention.value.weight[0] += 0.5
    stepped = []
    by_name["engine"].step = lambda source: stepped.append(source)
    with pytest.raises(
        bench.PeersDiffer, match=r"engine, 5 captions an image, live: .* expected .* transformers' plain loop"
    ):
        bench.Bench(settings, by_name, [1, 5], 1, quick=True).run()
    assert not stepped


def test_caption_lengths_are_those_of_coco(bench):
    lengths = sys.modules["step_peers"].caption_lengths(20_000, seed=1)
    tensor = torch.tensor(lengths).double()
    assert abs(tensor.mean() - 13.1) < 0.1 and abs(tensor.std() - 2.6) < 0.1 and 9 <= min(lengths) <= max(lengths) <= 32
    assert lengths == sys.modules["step_peers"].caption_lengths(20_000, seed=1)


def test_hours_of_the_scaled_up_run(bench):
    """36 pairs a second from live images, whatever the stage: 13,799,500 pairs; twice that rate for one caption an image in stage 2."""
    rows = [
        {"peer": "engine", "stage": s, "captions": n, "source": source, "pairs_per_s": 1000.0 if source != "live" else 36.0}
        for s in (1, 2) for n in (1, 5, 8) for source in ("live", "vision cache")
    ]  # fmt: skip
    assert bench.project_hours(rows)["engine"] == pytest.approx(13_799_500 / 36 / 3600, rel=1e-4)
    rows[6 + 0]["pairs_per_s"] = 72.0
    faster = (13_799_500 - 8_660_736 / 2) / 36 / 3600
    assert bench.project_hours(rows)["engine"] == pytest.approx(faster, rel=1e-4)
    assert bench.project_hours([r for r in rows if r["captions"] != 8]) == {}
