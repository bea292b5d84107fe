"""A short storm of kills, by the bench that runs the long one; what it looks for is found where it is there."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "benches" / "fault_storm.py"


@pytest.fixture(scope="module")
def fault_storm():
    spec = importlib.util.spec_from_file_location("fault_storm", BENCH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fault_storm"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fault_storm"]


def test_a_short_storm(fault_storm, tmp_path):
    """One process, killed while packing and twice while it trains, ends with the bits of an undisturbed one."""
    storm = fault_storm.run_storm(tmp_path, kills=3, ranks=1, updates=24, chance=random.Random(1))
    assert storm.faults == []
    assert storm.total >= 3 and storm.finished >= 1 and storm.bytes_compared > 0 and storm.files_checked > 0


def test_half_written_files_and_other_numbers_are_found(fault_storm, tmp_path):
    for name in ("whole", "killed"):
        for file in fault_storm.COMPARED:
            path = tmp_path / name / "run" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        (tmp_path / name / "run" / "log.jsonl").write_text(
            json.dumps({"event": "train", "step": 1, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 2.0}) + "\n"
        )
    storm = fault_storm.Storm()
    fault_storm._compare(tmp_path / "whole", tmp_path / "killed", storm)
    assert storm.faults == []
    log = tmp_path / "killed" / "run" / "log.jsonl"
    log.write_text(log.read_text().replace("1.0", "1.0000000000000002"))
    (tmp_path / "killed" / "run" / "last" / "model.safetensors").write_text("{ }")
    fault_storm._compare(tmp_path / "whole", tmp_path / "killed", storm)
    assert len(storm.faults) == 2 and "last/model.safetensors" in storm.faults[0] and "train events" in storm.faults[1]
    (tmp_path / "killed" / "run" / "summary.json").write_text('{"pairs": 1')
    found = fault_storm.Storm()
    fault_storm._look(tmp_path / "killed", found)
    assert any("summary.json: half-written" in fault for fault in found.faults)
