"""Every named warning is given when its number says so, once, and not otherwise."""

from __future__ import annotations

import json

import pytest

from vpgtrans.engine.diagnostics import Watch
from vpgtrans.engine.runlog import RunLog
from vpgtrans.engine.transfer.converter import ConverterReport


@pytest.fixture
def watch(tmp_path):
    log = RunLog(tmp_path)
    yield Watch(log)
    log.close()


def given(watch: Watch) -> list[str]:
    lines = (watch.log.folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["name"] for line in lines]


def report(cosine: float) -> ConverterReport:
    return ConverterReport("ridge", 100, 10, cosine, 0.9, 0.5, 1.0, 0.1)


def test_divergence_of_the_warm_up(watch):
    for loss in (3.0, 3.2, 2.5):
        watch.train_loss(0, loss, 1, 5e-4)
    assert given(watch) == []
    for _ in range(3):
        watch.train_loss(0, 3.4, 9, 5e-4)
    assert given(watch) == ["stage_1_diverges"]


def test_a_later_stage_may_be_above_the_first_loss_without_that_warning(watch):
    watch.train_loss(0, 3.0, 1, 5e-4)
    watch.train_loss(1, 9.0, 2, 1e-4)
    assert given(watch) == []


def test_regression_in_stage_2(watch):
    for loss in (3.0, 2.0):
        watch.validation_loss(0, loss, 1)
    watch.validation_loss(1, 2.05, 2)
    assert given(watch) == []
    watch.validation_loss(1, 2.1, 3)
    watch.validation_loss(1, 2.2, 4)
    assert given(watch) == ["stage_2_regression"]


@pytest.mark.parametrize(("distinct", "names"), [(0.05, ["captions_collapse"]), (0.1, []), (0.9, [])])
def test_collapsed_captions(watch, distinct, names):
    watch.captions(distinct, 100, 1)
    assert given(watch) == names


def test_one_caption_for_a_few_images(watch):
    watch.captions(1.0, 1, 1)
    assert given(watch) == []
    watch.captions(1 / 8, 8, 1)
    assert given(watch) == ["captions_collapse"]


@pytest.mark.parametrize(
    ("cosine", "before", "after", "names"),
    [
        (0.8, 1.0, 1.2, []),
        (0.1, 1.0, 1.0, ["weak_converter"]),
        (0.8, 10.0, 1.0, ["prompts_outside_words"]),
        (0.8, 1.0, 6.0, ["prompts_outside_words"]),
    ],
)
def test_converter(watch, cosine, before, after, names):
    watch.converter(report(cosine), before, after)
    assert given(watch) == names


def test_a_new_log_after_a_kill_drops_what_was_not_saved(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.event("train", step=step)
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "tra')
    log = RunLog(tmp_path, resume_at=2)
    log.event("train", step=3, again=True)
    log.close()
    told = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["step"], e.get("again")) for e in told] == [(1, None), (2, None), (3, True)]
