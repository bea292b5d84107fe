"""A storm of SIGKILLs over one training run: it must always resume, and end with the bits of a run that nobody disturbed.

    python benches/fault_storm.py [--kills 60] [--ranks 2] [--seed 0] [--out FILE]

A transfer in the tiny world (engine/tiny_world.py) on gloo ranks under torchrun is killed again and again: one rank, all processes, or the
launcher alone; during start-up, the build of the vision cache, an update, the writing of a checkpoint, an evaluation, the final scoring;
`vpgtrans pack` likewise.  After every kill each file under a final name is read and must be whole.  Where a run reaches its end before the kills
are used up, it is compared with the undisturbed one and the next begins.  Exit code 1 on any difference, on a half-written file, or where a
life makes no progress.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from vpgtrans.engine.checkpoint import verify
from vpgtrans.engine.tiny_world import tiny_recipe, write_tiny_world

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("start-up", "cache build", "update", "update", "checkpoint", "checkpoint", "evaluation", "final scoring")
VICTIMS = ("one rank", "all", "all", "launcher")
POLL_S = 0.001
HEARTBEAT_S = 0.05
LIFE_S = 300.0  # longer than any life may take
COMPARED = ("last/model.safetensors", "model/model.safetensors", "captions.json", "answers.json")


@dataclass
class Storm:
    """What happened so far."""

    kills: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    resumed: int = 0
    finished: int = 0
    files_checked: int = 0
    bytes_compared: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.kills.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, metavar="N", help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes of a run; default: %(default)s")
    parser.add_argument("--updates", type=int, default=160, metavar="N", help="of a run; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the times and victims; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work there, and leave everything")
    options = parser.parse_args()
    work = options.keep or Path(tempfile.mkdtemp(prefix="fault_storm-"))
    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        storm = run_storm(work, options.kills, options.ranks, options.updates, random.Random(options.seed))
    finally:
        if options.keep is None:
            shutil.rmtree(work, ignore_errors=True)
    result = {
        "bench": "fault_storm", "date": datetime.now(UTC).isoformat(timespec="seconds"), "ranks": options.ranks, "seed": options.seed,
        "seconds": round(time.monotonic() - began), "kills": dict(sorted(storm.kills.items())), "kills_in_all": storm.total,
        "launches": storm.restarts, "resumed_from_a_checkpoint": storm.resumed, "runs_finished_and_compared": storm.finished,
        "files_checked_after_kills": storm.files_checked, "bytes_compared": storm.bytes_compared, "faults": storm.faults,
    }  # fmt: skip
    for name, value in result.items():
        print(f"{name.replace('_', ' ')}: {value}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if storm.faults else 0


def run_storm(work: Path, kills: int, ranks: int, updates: int, chance: random.Random) -> Storm:
    """Kill until `kills` are used up and the last run has come to its end."""
    storm = Storm()
    world = write_tiny_world(work / "tiny", train=48)
    _storm_of_packing(work, world, max(1, kills // 12), chance, storm)
    whole = work / "whole"
    _write_recipe(world, whole, updates)
    if (code := _launch(whole, ranks).wait(LIFE_S)) != 0:
        raise RuntimeError(f"the undisturbed run ended with {code}: {_end_of_output(whole)}")
    number = 0
    while storm.total < kills and not storm.faults:
        folder = work / f"killed-{number}"
        _write_recipe(world, folder, updates)
        _storm_of_a_run(folder, whole, kills, ranks, chance, storm)
        number += 1
    return storm


def _write_recipe(world: Path, folder: Path, updates: int) -> None:
    values = tiny_recipe(world, folder / "run")
    pairs = 11 * updates
    values["data"] |= {"transform": "eval", "vision_cache": True}
    for stage, share in zip(values["stages"], (0.25, 0.75), strict=True):
        stage |= {"pairs": int(share * pairs), "eval_every_pairs": pairs // 8}
    values["output"] |= {"cache": str(folder / "cache"), "checkpoint_every_pairs": 55, "keep_checkpoints": 2}
    values["guards"] = {"heartbeat_s": HEARTBEAT_S}
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))


def _launch(folder: Path, ranks: int, max_restarts: int = 0) -> subprocess.Popen[bytes]:
    """torchrun on one node, in a session of its own; all output is added to `folder/output.txt`."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--max-restarts",
        str(max_restarts),
    ]
    if ranks > 1:
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [*launcher, str(ROOT / "engine" / "train.py"), str(folder / "recipe.yaml")],
            stdout=output, stderr=output, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def _storm_of_a_run(folder: Path, whole: Path, kills: int, ranks: int, chance: random.Random, storm: Storm) -> None:
    """Launch, kill, look, launch again, until the run ends."""
    while not storm.faults:
        phase, victim = chance.choice(PHASES), chance.choice(VICTIMS)
        if storm.total >= kills:
            phase = ""
        recovers = victim == "one rank" and chance.random() < 0.5  # the launcher starts the ranks again by itself
        marks = _resumptions(folder)
        if phase == "cache build":
            shutil.rmtree(folder / "cache", ignore_errors=True)
        process = _launch(folder, ranks, max_restarts=1 if recovers else 0)
        storm.restarts += 1
        try:
            struck = bool(phase) and _wait_for(_trigger(phase, folder, chance), process)
            if struck:
                _strike(process, victim, ranks, chance)
                storm.kills[f"{victim}, {phase}"] += 1
            code = process.wait(LIFE_S)
        except subprocess.TimeoutExpired:
            storm.faults.append(
                f"{folder.name}: {phase or 'undisturbed'}, {victim}: a life of more than {LIFE_S:.0f} s"
            )
            code = -1
        finally:
            _kill_all(process)
        storm.resumed += _resumptions(folder) - marks
        _look(folder, storm)
        if code == 0:
            storm.finished += 1
            _compare(whole, folder, storm)
            return
        if not struck and not storm.faults:
            storm.faults.append(f"{folder.name}: exit code {code} without a kill: {_end_of_output(folder)}")


def _resumptions(folder: Path) -> int:
    path = folder / "output.txt"
    return path.read_text(errors="replace").count("resumed at update") if path.exists() else 0


def _trigger(phase: str, folder: Path, chance: random.Random) -> Callable[[], bool]:
    """True from the moment to strike at."""
    run = folder / "run"
    if phase == "start-up":
        at = time.monotonic() + chance.uniform(0.0, 12.0)
        return lambda: time.monotonic() >= at
    if phase == "update":
        step, later = _last_step(run), chance.randint(2, 40)
        return lambda: _last_step(run) >= step + later
    conditions: dict[str, Callable[[], bool]] = {
        "cache build": lambda: any((folder / "cache").glob("**/*")),
        "checkpoint": lambda: any((run / "checkpoints").glob(".step-*")),
        "evaluation": lambda: "evaluation" in _phases(run),
        "final scoring": lambda: "final evaluation" in _phases(run),
    }
    delay, since = chance.uniform(0.0, 0.05), [0.0]

    def due() -> bool:
        if not since[0] and conditions[phase]():
            since[0] = time.monotonic()
        return bool(since[0]) and time.monotonic() - since[0] >= delay

    return due


def _phases(run: Path) -> str:
    """Where the ranks say that they are, in their heartbeats."""
    texts = []
    for path in (run / "ranks").glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            beat = json.loads(path.read_text())
            if time.time() - beat["beat"] < 4 * HEARTBEAT_S:  # of this life
                texts.append(beat["phase"])
    return " ".join(texts)


def _last_step(run: Path) -> int:
    """The last update in the log, read from its end."""
    try:
        with (run / "log.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            if step := json.loads(line).get("step"):
                return int(step)
        except ValueError:
            continue
    return 0


def _wait_for(is_due: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """False where the process ends first."""
    deadline = time.monotonic() + LIFE_S
    while process.poll() is None and time.monotonic() < deadline:
        if is_due():
            return True
        time.sleep(POLL_S)
    return False


def _strike(process: subprocess.Popen[bytes], victim: str, ranks: int, chance: random.Random) -> None:
    below = descendants(process.pid)
    if victim == "launcher":
        chosen = [process.pid]
    elif victim == "one rank" and below:
        chosen = [chance.choice(below)]
    else:
        chosen = [process.pid, *below]
    for pid in chosen:
        _kill(pid)
    if (
        victim == "launcher"
    ):  # ranks without a launcher must end by themselves; the lock keeps the next run out until then
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and any(_is_alive(pid) for pid in below):
            time.sleep(0.01)
        if left := [pid for pid in below if _is_alive(pid)]:
            for pid in left:
                _kill(pid)


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    for pid in [*descendants(process.pid), process.pid]:
        _kill(pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """Children, their children and so on, from /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found, unseen = [], [pid]
    while unseen:
        below = children.get(unseen.pop(), [])
        found += below
        unseen += below
    return found


def _look(folder: Path, storm: Storm) -> None:
    """Every file under a final name is whole: JSON parses, tensors open, every checkpoint verifies, a log breaks off in its last line only."""
    for path in sorted((folder / "run").glob("**/*")):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        storm.files_checked += 1
        if problem := _problem(path):
            storm.faults.append(f"{path.relative_to(folder.parent)}: {problem}")
    for checkpoint in (folder / "run" / "checkpoints").glob("step-*"):
        if problem := verify(checkpoint):
            storm.faults.append(f"{checkpoint.relative_to(folder.parent)}: {problem}")


def _problem(path: Path) -> str | None:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".yaml":
            yaml.safe_load(path.read_text())
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines()[:-1]:
                json.loads(line)
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118, no mapping
                    file.get_tensor(name)
    except Exception as error:
        return f"half-written: {type(error).__name__}: {error}"
    return None


def _compare(whole: Path, folder: Path, storm: Storm) -> None:
    """The end of a disturbed run against the undisturbed one's: weights and captions byte by byte, every logged loss and score exactly."""
    for name in COMPARED:
        expected, got = (f / "run" / name for f in (whole, folder))
        if not got.is_file() or expected.read_bytes() != got.read_bytes():
            storm.faults.append(f"{folder.name}/{name}: differs from the undisturbed run's")
        storm.bytes_compared += expected.stat().st_size
    for kind, keys in (("train", ("loss", "learning_rate", "grad_norm")), ("eval", ("val_loss",))):
        expected, got = (_numbers(f / "run", kind, keys) for f in (whole, folder))
        if expected != got:
            first = next((e for e, g in zip(expected, got, strict=False) if e != g), "their number")
            storm.faults.append(f"{folder.name}: {kind} events differ from the undisturbed run's, first {first}")
        storm.bytes_compared += 8 * len(keys) * len(expected)


def _numbers(run: Path, kind: str, keys: tuple[str, ...]) -> list[tuple[Any, ...]]:
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(e["step"], *(e[k] for k in keys)) for e in events if e["event"] == kind]


def _storm_of_packing(work: Path, world: Path, kills: int, chance: random.Random, storm: Storm) -> None:
    """`vpgtrans pack` killed at random moments; the packed set must be what it is undisturbed."""
    command = [sys.executable, "-m", "vpgtrans.engine.cli", "pack", str(world / "world" / "captions_train.json")]
    images = ["--images", str(world / "world" / "images")]
    began = time.monotonic()
    subprocess.run(
        [*command, str(work / "packed"), *images], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    takes = time.monotonic() - began
    for _ in range(kills):
        process = subprocess.Popen(
            [*command, str(work / "packed-killed"), *images], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(chance.uniform(0.3, 1.0) * takes)
        _kill(process.pid)
        process.wait()
        storm.kills["all, packing"] += 1
    subprocess.run(
        [*command, str(work / "packed-killed"), *images],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    expected, got = (_contents(work / name) for name in ("packed", "packed-killed"))
    if expected != got:
        storm.faults.append("packed-killed: differs from the undisturbed packed set")
    storm.bytes_compared += sum(len(v) for v in expected.values())


def _contents(folder: Path) -> dict[str, bytes]:
    """Finished files; reports of a run (times) are not data."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.glob("**/*")) if p.is_file() and p.suffix == ".beton" and not p.name.startswith(".")
    }  # fmt: skip


def _end_of_output(folder: Path) -> str:
    path = folder / "output.txt"
    return path.read_text(errors="replace")[-1500:] if path.exists() else "no output"


if __name__ == "__main__":
    sys.exit(main())
