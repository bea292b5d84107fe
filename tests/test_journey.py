"""docs/journey.py, as a reader would run it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "journey.py"


def test_journey(tmp_path):
    """LAVIS .pth in, a folder that transformers captions with out; `vpgtrans caption` and transformers agree."""
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    steps = re.findall(r"^\$ vpgtrans (\w+)", done.stdout, re.M)
    assert steps == ["scenes", "convert", "train", "eval", "export", "caption"]
    ours, theirs = re.findall(r"scene_\d+\.jpg: (.*)$", done.stdout, re.M)
    assert ours == theirs and ours
