"""Where each rank stands: a small file a rank, written by a thread every few seconds, read when a collective has timed out.

    output.folder/ranks/rank-00001.json     rank, host, pid, phase, update, since, beat, where

The thread writes which lines of this package the main thread is in, which costs the main thread nothing; a process that was stopped, swapped
out or killed writes nothing, and its last beat grows old.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

PACKAGE = str(Path(__file__).resolve().parents[1])


class Heartbeat:
    """Writes this rank's file until `stop`.  Where the update stands still for `stall_s`, `on_stall` is called, once an update."""

    def __init__(
        self, folder: Path, rank: int, every_s: float, stall_s: float | None = None, on_stall: Callable[[], None] = lambda: None
    ):  # fmt: skip
        self.path = folder / f"rank-{rank:05d}.json"
        self.phase, self.update, self.since = "start", 0, time.time()
        self._rank, self._every_s, self._stall_s, self._on_stall = rank, every_s, stall_s, on_stall
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._stalled_at = -1
        folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def at(self, phase: str, update: int) -> None:
        self.phase, self.update, self.since = phase, update, time.time()

    def stop(self, phase: str) -> None:
        self._ended.set()
        self._thread.join()
        self.at(phase, self.update)
        self._write()

    def _beat(self) -> None:
        while not self._ended.wait(self._every_s):
            self._write()
            stalled = self._stall_s is not None and time.time() - self.since > self._stall_s
            if stalled and self.phase == "update" and self._stalled_at != self.update:
                self._stalled_at = self.update
                self._on_stall()

    def _write(self) -> None:
        now = {
            "rank": self._rank, "host": socket.gethostname(), "pid": os.getpid(), "phase": self.phase, "update": self.update,
            "since": self.since, "beat": time.time(), "every_s": self._every_s, "where": self._where(),
        }  # fmt: skip
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            temporary.write_text(json.dumps(now))
            temporary.replace(self.path)
        except OSError:
            pass  # a full disk is reported by what has to be saved

    def _where(self) -> str:
        """The innermost lines of this package that the main thread is in, innermost first."""
        frame = sys._current_frames().get(self._main)
        stack = traceback.extract_stack(frame) if frame else []
        ours = [f for f in stack if f.filename.startswith(PACKAGE)]
        return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(ours[-4:]))


def standing(folder: Path) -> list[str]:
    """A line for each rank: what it did last, since when, and how old its heartbeat is where that is too old."""
    lines, now = [], time.time()
    for path in sorted(folder.glob("rank-*.json")):
        try:
            beat = json.loads(path.read_text())
            silent = now - beat["beat"]
            line = (
                f"rank {beat['rank']} ({beat['host']}, pid {beat['pid']}): {beat['phase']}, update {beat['update']:,}, "
                f"for {beat['beat'] - beat['since']:.1f} s, in {beat['where'] or 'no line of this package'}"
            )
            # Half a second for a busy machine.
            if silent > 2 * beat["every_s"] + 0.5 and beat["phase"] != "ended":
                line += f"; NO HEARTBEAT for {silent:.1f} s: stopped, swapped out or gone"
        except (OSError, ValueError, KeyError):
            line = f"{path.name} cannot be read"
        lines.append(line)
    return lines
