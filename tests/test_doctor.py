"""What doctor reports: it can be read as JSON, misses no operation, and says why something is not live."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from vpgtrans.engine import doctor, kernel_choice
from vpgtrans.kernels import row_packing

KERNELS = Path(__file__).resolve().parents[1] / "kernels"


def test_json_output_holds_versions_and_the_compiled_module(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["required"]["torch"] == importlib.metadata.version("torch")
    assert None not in found["required"].values()
    assert found["compiled"]["present"] and "pack_rows" in found["compiled"]["functions"]
    assert found["operations"]["row_packing"] == {"live": "cpp", "reason": None}


def test_every_operation_of_kernels_is_listed() -> None:
    """An operation is a module that can say why its fast implementation does not run."""
    reason = re.compile(r"^def \w+_unsupported_reason", re.MULTILINE)
    operations = {path.stem for path in KERNELS.glob("*.py") if reason.search(path.read_text())} - {"triton_support"}
    assert operations == set(doctor.OPERATIONS) and len(operations) >= 2


def test_says_why_an_operation_runs_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_packing.compiled, "C", None)
    row = doctor.collect()["operations"]["row_packing"]
    assert row["live"] == "reference" and "_C is not importable" in row["reason"]


def test_says_what_a_run_would_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `auto`: FP8 works on the CPU but is not used there, and what runs here but was not measured is torch's."""
    rows = doctor.collect()["operations"]
    if not torch.cuda.is_available():
        assert rows["frozen_linear"] == {"live": "reference", "reason": kernel_choice.fp8_reason(torch.device("cpu"))}
    monkeypatch.setitem(doctor.OPERATIONS, "adamw_step", ("triton", lambda: None))
    monkeypatch.setattr(doctor, "MEASURED", frozenset())
    row = doctor.collect()["operations"]["adamw_step"]
    assert row["live"] == "reference" and "not measured on a GPU yet" in row["reason"]
    monkeypatch.setattr(doctor, "MEASURED", frozenset({"adamw_step"}))
    assert doctor.collect()["operations"]["adamw_step"] == {"live": "triton", "reason": None}


def test_lists_what_a_recipe_can_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setitem(doctor.BACK_ENDS, "attention: other", lambda: "not installed (pip install 'vpgtrans[other]')")
    rows = doctor.collect()["back_ends"]
    assert {"attention: flex", "attention: flash", "attention: xformers", "optimizer.implementation: apex"} < set(rows)
    assert all(row["can_run"] == (row["reason"] is None) for row in rows.values())
    if not torch.cuda.is_available():
        assert rows["attention: flex"]["reason"] == "FlexAttention has no backward on the CPU"
    doctor.main()
    shown = capsys.readouterr().out
    assert "attention: flash" in shown and "pip install 'vpgtrans[other]'" in shown


def test_tells_a_foreign_or_broken_package_from_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("apex", "ffcv"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "apex.py").write_text("")  # a package of that name that is not NVIDIA's
    (tmp_path / "ffcv.py").write_text("raise OSError('libturbojpeg.so.0: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(doctor.OPTIONAL, "absent", "surely_absent.sub")
    optional = doctor.collect()["optional"]
    assert "not NVIDIA's apex" in optional["apex"]["reason"]
    assert optional["ffcv"]["reason"] == "OSError: libturbojpeg.so.0: cannot open"
    assert optional["absent"] == {"version": None, "importable": False, "reason": "not installed"}
    doctor.main()
    assert "surely_absent" not in (text := capsys.readouterr().out) and "not installed" in text
