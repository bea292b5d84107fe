"""SPICE and METEOR: what stands in the way is said, and a Java program that fails gives no number."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from vpgtrans.engine.scoring import java_metrics
from vpgtrans.engine.scoring.files import ScoreError
from vpgtrans.engine.scoring.java_metrics import java_metric_unsupported_reason, java_score


@pytest.fixture
def package_folder(tmp_path, monkeypatch) -> Path:
    """An installed pycocoevalcap without a file in it, and a Java that runs."""
    folder = tmp_path / "pycocoevalcap"
    for name in ("meteor", "spice/lib"):
        (folder / name).mkdir(parents=True)
    monkeypatch.setattr(java_metrics, "_scorer_folder", lambda metric: folder / metric)
    monkeypatch.setattr(java_metrics, "_java_version", lambda: "17.0.1")
    return folder


def test_java_metrics_say_what_is_missing(package_folder, monkeypatch) -> None:
    assert "pip install --force-reinstall" in java_metric_unsupported_reason("meteor")
    (package_folder / "meteor" / "meteor-1.5.jar").touch()
    assert java_metric_unsupported_reason("meteor") is None
    (package_folder / "spice" / "spice-1.0.jar").touch()
    reason = java_metric_unsupported_reason("spice")
    assert "stanford-corenlp-3.6.0.jar, lib/stanford-corenlp-3.6.0-models.jar" in reason
    assert "where there is a network: python -c" in reason
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (package_folder / "spice" / "lib" / name).touch()
    assert java_metric_unsupported_reason("spice") is None
    monkeypatch.setattr(java_metrics, "_java_version", lambda: None)
    assert "no working Java" in java_metric_unsupported_reason("meteor")
    monkeypatch.setattr(java_metrics, "_scorer_folder", lambda metric: None)
    assert java_metric_unsupported_reason("spice").endswith("run: pip install pycocoevalcap")
    with pytest.raises(ValueError, match="expected one of spice, meteor, got 'wmd'"):
        java_metric_unsupported_reason("wmd")


@pytest.mark.parametrize(
    ("java", "version"), [(None, None), ("exit 1", None), ('echo openjdk version \\"21.0.2\\" >&2', "21.0.2")]
)
def test_a_java_counts_only_if_it_runs(tmp_path, monkeypatch, java: str | None, version: str | None) -> None:
    if java is not None:
        program = tmp_path / "java"
        program.write_text(f"#!/bin/sh\n{java}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert java_metrics._java_version() == version


@pytest.mark.parametrize("result", [float("nan"), BrokenPipeError("gone")])
def test_a_java_program_that_fails_gives_an_error_and_no_number(monkeypatch, result: Any) -> None:
    class Scorer:
        def compute_score(
            self, references: dict[int, list[str]], candidates: dict[int, list[str]]
        ) -> tuple[float, None]:
            # one line a caption: what would break METEOR's protocol is gone
            assert (references, candidates) == ({1: ["a b"]}, {1: ["a c"]})
            if isinstance(result, Exception):
                raise result
            return result, None

    monkeypatch.setattr(java_metrics, "java_metric_unsupported_reason", lambda metric: None)
    monkeypatch.setattr(java_metrics, "_scorer", lambda metric: Scorer())
    with pytest.raises(
        ScoreError, match=r"--metrics meteor: .*(failed \(BrokenPipeError: gone\)|gave nan).*leave meteor out"
    ):
        java_score("meteor", {1: ["a\nb"]}, {1: "a|||c"})


def test_what_java_prints_stays_out_of_stdout(capfd, monkeypatch) -> None:
    class Scorer:
        def compute_score(self, references: Any, candidates: Any) -> tuple[float, None]:
            subprocess.run(["echo", "parsing"], check=True)
            return 0.25, None

    monkeypatch.setattr(java_metrics, "java_metric_unsupported_reason", lambda metric: None)
    monkeypatch.setattr(java_metrics, "_scorer", lambda metric: Scorer())
    assert java_score("spice", {1: ["a"]}, {1: "a"}) == 0.25
    assert capfd.readouterr() == ("", "parsing\n")
