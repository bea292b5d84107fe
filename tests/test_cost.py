"""The live cost of a run: laps that add up, FLOPs that equal those of the real step, and fields that say what they should."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vpgtrans.engine import cost, prepare
from vpgtrans.engine.cost import (
    EVALUATION,
    PARTS,
    WAITING,
    CostMeter,
    Work,
    WorkRates,
    first_batch,
    measured_peak,
    token_counts,
    work_rates,
)
from vpgtrans.engine.data.features import Computed
from vpgtrans.engine.loop import run
from vpgtrans.engine.recipe import load_recipe
from vpgtrans.engine.resume import Progress
from vpgtrans.engine.runlog import RunLog
from vpgtrans.engine.runtime import Runtime, start, stop

CPU = Runtime(torch.device("cpu"), torch.float32, 0, 1)
SHORT = ["stages.0.pairs=22", "stages.1.pairs=33", "evaluation.generate_images=2", "output.log_every_updates=1"]


def events(folder: Path, kind: str) -> list[dict]:
    return [e for e in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if e["event"] == kind]


def test_laps_add_up_to_the_time_that_passed():
    before = time.perf_counter()
    meter = CostMeter(CPU, {"backward": 5.0})
    begun = time.perf_counter()
    for part in ("vision tower", "backward", "vision tower"):
        time.sleep(0.01)
        meter.lap(part)
        ended = time.perf_counter()
    laps = sum(meter.seconds.values()) - 5.0
    assert 0.03 <= laps <= ended - before and meter.seconds["vision tower"] >= 0.02
    assert 5.01 <= meter.seconds["backward"] <= 5.0 + ended - begun - 0.02
    shares = meter.breakdown()
    assert list(shares) == ["vision tower", "backward"] and sum(e["share"] for e in shares.values()) == pytest.approx(1)


def test_a_lap_costs_next_to_nothing():
    """Some readings of the clock: an update has a handful of laps and takes milliseconds at least."""
    meter = CostMeter(CPU)

    def shortest(run: Callable[[], object]) -> float:
        seconds = []
        for _ in range(5):
            before = time.thread_time()
            for _ in range(2_000):
                run()
            seconds.append(time.thread_time() - before)
        return min(seconds)

    assert shortest(lambda: meter.lap("backward")) < 50 * shortest(time.perf_counter)


def test_what_is_to_come_is_weighed_by_its_flops():
    """2 s for 10 of 30 pairs; the next stage's pairs cost three times as much, the one after as much."""
    meter = CostMeter(CPU)
    meter.rates = {name: WorkRates(0, 0, 1, 0, pair=pair) for name, pair in (("a", 1.0), ("b", 3.0), ("c", 1.0))}
    meter.stage_pairs = {"a": 30, "b": 100, "c": 7}
    meter.begin_stage("a", 0, 100.0)
    assert meter.seconds_to_go(10, 102.0) == pytest.approx(0.2 * (20 + 300 + 7))
    meter.begin_stage("b", 40, 200.0)
    assert meter.seconds_to_go(50, 203.0) == pytest.approx(0.3 * (50 + 7 / 3))
    meter.peak_flops_s = 100.0
    meter.seconds["backward"] = 2.0
    meter.seconds[WAITING] = 0.5
    meter._since_log = Work(images=0, tokens=50, used=40, targets=0)
    live = meter.live(50, 203.0)
    assert live["tokens_per_s"] == 16 and live["computed_tokens_per_s"] == 20 and live["waiting_share"] == 0.2
    assert live["flop_utilisation"] == pytest.approx(50 / 2.5 / 100)
    meter.seconds["backward"] += 1.0  # the next log tells of the time since the last alone
    assert meter.live(60, 204.0)["tokens_per_s"] == 0 and meter.live(60, 204.0)["waiting_share"] == 0


def test_with_stored_prompts_only_what_is_computed_counts():
    """Two images an update; the first update fills the store, the second reads it: the next stage's estimate does not depend on which."""
    rates = WorkRates(encoding=100.0, image=30.0, token=1.0, target=0.0, projector=4.0, pair=70.0)
    meter = CostMeter(CPU)
    meter.rates, meter.stage_pairs, meter.peak_flops_s = {"a": rates, "b": rates}, {"a": 40, "b": 10}, 1e9
    meter.begin_stage("a", 0, 0.0, prompts_are_stored=True)
    meter._since_log = Work(images=2, encodings=2, prompts=2, tokens=20)
    filling = 2 * (100 + 30) + 20
    assert meter._since_log.flops(meter.rates["a"]) == filling
    meter.live(4, 4.0 * filling)  # 4 s a FLOP
    assert meter.seconds_to_go(4, 4.0 * filling) == pytest.approx(36 * filling + 4 * 10 * 70)
    meter._since_log = Work(images=2, tokens=20)
    reading = 2 * 4 + 20
    assert meter._since_log.flops(meter.rates["a"]) == reading
    both = filling + reading
    meter.live(8, 4.0 * both)
    assert meter.seconds_to_go(8, 4.0 * both) == pytest.approx(4 * both / 8 * 32 + 4 * 10 * 70)
    meter._since_log = Work(images=5)  # the stage ends before its next log
    meter.begin_stage("b", 0, 9.0)
    assert meter.live(1, 10.0)["flop_utilisation"] == 0


def test_a_run_counts_what_caches_leave_to_compute(tiny_recipe, monkeypatch):
    """Two epochs of 24 images: the tower and the VPG run once for each."""
    counted: dict[str, list[Work]] = {}
    live = CostMeter.live

    def noting(self, *given):
        counted.setdefault(self._stage_began[0], []).append(self._since_log)
        return live(self, *given)

    monkeypatch.setattr(CostMeter, "live", noting)
    run(load_recipe(tiny_recipe, [*SHORT, "data.transform=eval", "data.captions_per_image=all", "stages.0.pairs=240"]))
    total = {
        name: [sum(getattr(w, k) for w in works) for k in ("images", "encodings", "prompts")]
        for name, works in counted.items()
    }
    images, encodings, prompts = total["warm_up"]
    assert images >= 48 and encodings == prompts and 24 <= encodings < 0.7 * images
    images, encodings, prompts = total.popitem()[1]
    assert images == encodings > 0 == prompts


def test_the_peak_is_of_numbers_as_a_model_has_them(monkeypatch):
    """On a GPU a product of equal numbers is faster."""
    seen = []
    monkeypatch.setattr(cost, "_product_seconds", lambda a: seen.append(a) or 1.0)
    monkeypatch.setattr(cost, "PEAK_SECONDS_CPU", 0.0)
    state = torch.get_rng_state()
    assert measured_peak(torch.device("cpu"), torch.bfloat16) == 2 * 1024**3
    assert seen[0].dtype == torch.bfloat16 and 0.9 < seen[0].float().std() < 1.1
    assert torch.equal(state, torch.get_rng_state())


def test_the_peak_is_that_of_a_large_product():
    a = torch.ones(1024, 1024)
    peak = measured_peak(torch.device("cpu"), torch.float32)
    best = min(_timed(lambda: a @ a) for _ in range(5))
    assert 0.2 < peak * best / (2 * 1024**3) < 5


def _timed(run) -> float:
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


@pytest.mark.parametrize("trains", ["projector", "vpg_and_projector"])
def test_flops_equal_those_of_the_step_itself(trains, tiny_recipe, tmp_path):
    """torch's own counter over the real micro-batches, attention by its plain formulation, which alone that counter knows on the CPU."""
    recipe = load_recipe(tiny_recipe, [f"stages.0.trains={trains}", "data.transform=eval"])
    runtime = start("cpu", "fp32", 1, 0)
    this = prepare.prepare(recipe, runtime, RunLog(tmp_path / "log", enabled=False), Progress())
    this.model.freeze_for(trains, False)
    state = torch.get_rng_state()
    rates = work_rates(this.model, this.features.tower, recipe.stages[0], this.data, recipe.data)
    assert torch.equal(state, torch.get_rng_state()) and rates == this.meter.rates["warm_up"]
    batch = first_batch(this.model, this.data, recipe.data)
    work = Work()
    work.add(batch, this.model.queries, Computed(encodings=len(batch.groups)))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as count:
        this.model.loss_sum(this.features(batch.groups), batch).backward()
    stop()
    assert work.flops(rates) == pytest.approx(count.get_total_flops(), rel=1e-9)
    assert rates.encoding > 0 and rates.pair == pytest.approx(count.get_total_flops() / batch.pair_count)


def test_tokens_are_counted_by_what_they_hold(make_llm):
    from vpgtrans.engine.data.packing import CaptionData, Group, pack_update

    data = CaptionData("test", [None] * 2, [[[1, 5, 6, 3], [1, 5, 3]], [[1, 3]]], leads={1: (7, 8)})
    groups = [Group(0, 0, (0, 1)), Group(1, 0, (0,))]
    (batch,) = pack_update(groups, data, 4, 12, 4, 0, fixed_shape=True)
    assert token_counts(batch, 4) == ((4 + 4 + 3) + (2 + 4 + 2), 24)


def test_a_run_shows_and_keeps_its_cost(tiny_recipe, tmp_path, capfd):
    summary = run(load_recipe(tiny_recipe, SHORT))
    trained = events(tmp_path / "run", "train")
    for event in trained:
        assert event["tokens_per_s"] > 0 and event["computed_tokens_per_s"] >= event["tokens_per_s"]
        assert 0 <= event["waiting_share"] <= 1 and 0 < event["flop_utilisation"] < 1.5
    to_go = [e["gpu_hours_to_go"] for e in trained]
    assert to_go[-1] == 0 and all(hours > 0 for hours in to_go[:-1])
    assert events(tmp_path / "run", "peak")[0]["matmul_flops_s"] > 1e8
    cost = summary["cost"]
    assert set(cost) == set(PARTS) - {"gradient reduction"} and cost[EVALUATION]["seconds"] > 0
    assert sum(entry["share"] for entry in cost.values()) == pytest.approx(1)
    parts = (
        "waiting for data",
        "vision tower",
        "VPG and projector",
        "language model, forward",
        "backward",
        "optimiser",
    )
    assert sum(cost[part]["seconds"] for part in parts) == pytest.approx(summary["seconds"], rel=0.2, abs=0.05)
    shown = capfd.readouterr().err
    assert "where the time went" in shown and "language model, forward" in shown


def test_a_resumed_run_goes_on_counting(tiny_recipe, tmp_path):
    """Seconds by part of before the stop are in the checkpoint, hence in the summary."""
    settings = [*SHORT, "output.checkpoint_every_pairs=11"]
    run(load_recipe(tiny_recipe, settings))
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    kept = json.loads((newest / "state.json").read_text())["cost_seconds"]
    assert kept["backward"] > 0
    again = run(load_recipe(tiny_recipe, settings))
    assert again["cost"]["backward"]["seconds"] == pytest.approx(kept["backward"])
    assert again["cost"]["start-up"]["seconds"] > kept["start-up"]
