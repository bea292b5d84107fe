"""SPICE and METEOR by their authors' Java programs, through pycocoevalcap where both are installed.

METEOR 1.5 (Denkowski and Lavie 2014) comes with pycocoevalcap. SPICE (Anderson et al. 2016) needs Stanford CoreNLP 3.6.0
besides, about 0.5 GB, which pycocoevalcap downloads when `Spice` is first made; that is left to the user, and a score
never starts a download.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import Id, ScoreError
from .record import library_versions

JAVA_METRICS = ("spice", "meteor")
_SPICE_JARS = ("lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar")
_SPICE_DOWNLOAD = 'python -c "from pycocoevalcap.spice.spice import Spice; Spice()"'
_JAVA_SECONDS = 30
_BREAKS_LINE_PROTOCOL = re.compile(r"[\r\n]+|\|\|\|")  # METEOR reads one line a caption, split at |||


def java_metric_unsupported_reason(metric: str) -> str | None:
    """Why `metric` ('spice' or 'meteor') cannot run here, with the remedy; None where it can.

    Raises ValueError for another name.
    """
    if metric not in JAVA_METRICS:
        raise ValueError(f"metric: expected one of {', '.join(JAVA_METRICS)}, got {metric!r}")
    folder = _scorer_folder(metric)
    if folder is None:
        return "the package pycocoevalcap is not installed; run: pip install pycocoevalcap"
    if _java_version() is None:
        return (
            "no working Java (java -version); install a Java runtime (SPICE is written for Java 8) and put it on PATH"
        )
    jar = folder / ("meteor-1.5.jar" if metric == "meteor" else "spice-1.0.jar")
    if not jar.is_file():
        return f"pycocoevalcap is incomplete: {jar} is missing; run: pip install --force-reinstall pycocoevalcap"
    missing = [name for name in _SPICE_JARS if not (folder / name).is_file()] if metric == "spice" else []
    if missing:
        return (
            f"SPICE's parser is not there ({', '.join(missing)} under {folder}); it is downloaded once, about 0.5 GB, "
            f"where there is a network: {_SPICE_DOWNLOAD}"
        )
    return None


def java_score(metric: str, references: Mapping[Id, Sequence[str]], candidates: Mapping[Id, str]) -> float:
    """SPICE or METEOR of a set, 0 to 1, as the official tool gives it.

    references, candidates: image id -> token strings (tokens joined by spaces); the same ids in both.

    Raises ScoreError when the metric cannot run here, its program fails, or what it gives is no number.
    """
    reason = java_metric_unsupported_reason(metric)
    if reason is not None:
        raise ScoreError(f"--metrics {metric}: cannot run: {reason}; or leave {metric} out")
    listed = {image: [_one_line(text) for text in references[image]] for image in candidates}
    try:
        with _stdout_on_stderr():
            score = float(_scorer(metric).compute_score(listed, {i: [_one_line(t)] for i, t in candidates.items()})[0])
    except Exception as error:  # a Java program that dies shows as a broken pipe, a bad exit status or an empty line
        hint = (
            "; SPICE is known to fail on Java 16 and later: put Java 8 or 11 first on PATH" if metric == "spice" else ""
        )
        raise ScoreError(
            f"--metrics {metric}: pycocoevalcap's Java program failed ({type(error).__name__}: {error}) on Java "
            f"{_java_version()}{hint}; or leave {metric} out"
        ) from error
    if not math.isfinite(score):
        raise ScoreError(f"--metrics {metric}: the Java program gave {score}, no score; leave {metric} out")
    return score


def java_setting() -> str:
    """Versions for the record of a score: of pycocoevalcap and of Java."""
    return f"pycocoevalcap {library_versions(('pycocoevalcap',))['pycocoevalcap']}, Java {_java_version()}"


def _scorer(metric: str) -> Any:
    if metric == "meteor":
        from pycocoevalcap.meteor.meteor import Meteor

        return Meteor()
    from pycocoevalcap.spice.spice import Spice

    return Spice()


def _scorer_folder(metric: str) -> Path | None:
    spec = importlib.util.find_spec("pycocoevalcap")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) / metric if places else None


def _java_version() -> str | None:
    """What `java -version` says first, such as '17.0.15'; None where no Java runs (macOS has a stub of that name)."""
    java = shutil.which("java")
    if java is None:
        return None
    try:
        told = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=_JAVA_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    version = re.search(r'version "([^"]+)"', told.stderr + told.stdout)
    return version.group(1) if version else "unknown"


def _one_line(text: str) -> str:
    return _BREAKS_LINE_PROTOCOL.sub(" ", text)


@contextlib.contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """What a Java program prints must not land in the JSON on stdout."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
