"""A run of many small updates, watched from outside: does its memory stay flat, and does it leave nothing behind?

    python benches/long_run.py [--updates 20000]

The tiny world of the tests, with checkpoints every 50 updates, evaluations every 500, live images and heartbeats.  Prints resident memory, file
handles, threads, child processes and shared memory over the run; ends with 1 where memory grows by more than 5 % from its second quarter to its
last, or anything else grows or is left.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path

import yaml

from vpgtrans.engine.tiny_world import tiny_recipe, write_tiny_world

BATCH_PAIRS = 11
GROWTH = 1.05


@dataclass(frozen=True)
class Sample:
    """What a process holds at one moment; `shared` counts mapped pieces of shared memory."""

    update: int
    rss_mib: float
    handles: int
    threads: int
    children: int
    shared: int


def sample(pid: int, beat: Path) -> Sample | None:
    """None where the process or its heartbeat is not there (any more)."""
    process = Path("/proc") / str(pid)
    try:
        told = json.loads(beat.read_text())
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        children = (process / "task" / str(pid) / "children").read_text().split()
        found = Sample(
            int(told["update"]), int(status["VmRSS"].split()[0]) / 1024, len(os.listdir(process / "fd")), int(status["Threads"]),
            len(children), (process / "maps").read_text().count("/dev/shm"),
        )  # fmt: skip
    except (OSError, ValueError, KeyError):
        return None
    return found if told["phase"] != "preparation" and found.update else None


def watch(updates: int, folder: Path) -> tuple[list[Sample], int, float]:
    """(samples, exit code, seconds) of a run in `folder`."""
    (folder / "world").mkdir()
    recipe = tiny_recipe(write_tiny_world(folder / "world"), folder / "run")
    stage = {
        **recipe["stages"][1],
        "pairs": updates * BATCH_PAIRS,
        "batch_pairs": BATCH_PAIRS,
        "eval_every_pairs": 500 * BATCH_PAIRS,
    }
    recipe |= {"stages": [stage], "guards": {"heartbeat_s": 0.25}}
    recipe["evaluation"] |= {"generate_images": 0}
    recipe["output"] |= {"checkpoint_every_pairs": 50 * BATCH_PAIRS, "log_every_updates": 10, "tensorboard": True}
    (folder / "long.yaml").write_text(yaml.safe_dump(recipe))
    started, samples = time.monotonic(), []
    with (folder / "said.txt").open("w") as said:
        command = [sys.executable, "-m", "vpgtrans.engine.train", str(folder / "long.yaml")]
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.25)
            if found := sample(process.pid, folder / "run" / "ranks" / "rank-00000.json"):
                samples.append(found)
    if process.returncode:
        print((folder / "said.txt").read_text()[-2000:])
    return samples, process.returncode, time.monotonic() - started


def judge(samples: list[Sample], updates: int) -> list[str]:
    """What grew; nothing where all is well."""
    early = [s for s in samples if updates / 4 <= s.update < updates / 2]
    late = [s for s in samples if s.update >= 3 * updates / 4]
    if len(early) < 3 or len(late) < 3:
        return [f"too few samples ({len(early)} and {len(late)}): more updates are needed"]
    problems = []
    for name, allowed in (("rss_mib", GROWTH), ("handles", 1.0), ("threads", 1.0), ("children", 1.0), ("shared", 1.0)):
        before, after = (statistics.median(getattr(s, name) for s in part) for part in (early, late))
        if after > before * allowed:
            problems.append(f"{name} grew from {before:g} to {after:g}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20000)
    updates = parser.parse_args().updates
    with tempfile.TemporaryDirectory() as folder:
        samples, code, seconds = watch(updates, Path(folder))
        beats = len(samples)
        print(f"{updates:,} updates in {seconds:.0f} s, {beats} samples, exit code {code}")
        print(f"{'update':>8}{'rss MiB':>10}{'handles':>9}{'threads':>9}{'children':>10}{'shm':>5}")
        for at in range(0, beats, max(1, beats // 12)):
            update, rss, *rest = astuple(samples[at])
            print(f"{update:8,}{rss:10.1f}" + "".join(f"{n:{w}}" for n, w in zip(rest, (9, 9, 10, 5), strict=True)))
    problems = judge(samples, updates) if code == 0 else ["the run failed"]
    print("\n".join(problems) or "flat: memory, file handles, threads, processes and shared memory")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
