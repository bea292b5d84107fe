"""`make demo`: the whole transfer and its baselines, as the commands that a user would give, side by side.

A plan names parts and arms (recipes/demo/plan.yaml).  Each is one `vpgtrans` command in a process of its own, started when what it needs is
there, and forked from one process that has torch and transformers imported already (some 6 s of CPU time a job saved).  Parts are kept
with a hash of their recipe and of what they were made from, so a second run only repeats what changed, and a killed one goes on where it was.
The arms are always run anew; the report compares them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import yaml
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from .checkpoint import write_json
from .recipe import Recipe, RecipeError, TransferRecipe, load_recipe
from .report import print_table, write_report
from .runlog import PLAIN_LINE_SECONDS, console, duration

IMPORTED_ONCE = ["vpgtrans.engine.loop", "vpgtrans.engine.pretrain.lm", "transformers.models.llama.modeling_llama"]


@dataclass
class Job:
    """One `vpgtrans` command; `folder` is what it makes, `needs` the jobs before it, `kept` whether its result is reused when nothing changed."""

    name: str
    command: list[str]
    folder: Path
    needs: list[str]
    kept: bool
    total: int
    unit: str
    key: str = ""
    process: BaseProcess | None = field(default=None, repr=False)
    started: float = 0.0
    seconds: float = 0.0


def main(options: argparse.Namespace) -> int:
    """Run what is missing, then report; exit code 0, 1 when a job failed (its log is named)."""
    began = time.perf_counter()
    plan = _read_plan(Path(options.plan))
    jobs = _jobs(plan, Path(options.plan).parent, Path(options.out), options.seeds)
    workers = options.jobs or min(4, os.cpu_count() or 1)
    logs = Path(options.out) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    reused = [job.name for job in jobs.values() if _is_done(job)]
    if reused:
        console.print(f"reused: {', '.join(reused)}")
    failed = _run_all(jobs, set(reused), workers, logs)
    if failed:
        console.print(Text.assemble(("failed:", "red"), f" {failed}; the end of {logs / (failed + '.log')}:"))
        console.print((logs / f"{failed}.log").read_text()[-3000:])
        return 1
    runs = [job.folder for job in jobs.values() if not job.kept]
    report = write_report(
        runs, Path(options.out) / "report.html", reference=plan.get("reference"), title=plan.get("title", "VPGTrans")
    )
    arms = report["summary"]
    seconds = {"total": time.perf_counter() - began, **{job.name: job.seconds for job in jobs.values()}}
    best = {name: arms.get("vpgtrans", {}).get(name) for name in ("speedup_pairs", "speedup_seconds")}
    write_json(
        Path(options.out) / "summary.json",
        {**best, "headline": report["headline"], "arms": arms, "wall_seconds": seconds},
    )
    print_table(arms)
    console.print(report["headline"])
    console.print(
        f"{duration(time.perf_counter() - began)} in all; wrote {options.out}/summary.json and {options.out}/report.html"
    )
    return 0


def _read_plan(path: Path) -> dict:
    try:
        plan = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"plan: expected a plan such as recipes/demo/plan.yaml, got {path}: {error}") from None
    if not isinstance(plan, dict) or not isinstance(plan.get("arms"), dict):
        raise RecipeError(f"plan: expected parts and arms in {path}, got {type(plan).__name__}")
    return plan


def _jobs(plan: dict, folder: Path, out: Path, seeds: int) -> dict[str, Job]:
    """All jobs of a plan; `folder` is where its paths start."""
    jobs: dict[str, Job] = {}
    for name, part in plan.get("parts", {}).items():
        if "scenes" in part:
            target = Path(os.path.normpath(folder.absolute() / part["folder"]))
            command = ["scenes", str(target), *(f"--{k}={v}" for k, v in part["scenes"].items())]
            jobs[name] = Job(name, command, target, [], True, 1, "", _hash(json.dumps(part["scenes"], sort_keys=True)))
            continue
        needs = part.get("needs", [])
        file = folder / (part.get("pretrain") or part["train"])
        recipe = load_recipe(file, check_files=False)
        command = [*(["pretrain", recipe.kind] if "pretrain" in part else ["train"]), str(file)]
        key = _hash(recipe.model_dump_json(), *(jobs[n].key for n in needs))
        jobs[name] = Job(name, command, recipe.output.folder, needs, True, *_length(recipe), key)
    for seed in range(seeds):
        for arm, part in plan["arms"].items():
            file = folder / part["train"]
            recipe = load_recipe(file, check_files=False)
            name = f"{arm}-{seed}" if seeds > 1 else arm
            overrides = [f"seed={seed}", f"name={name}", f"output.folder={(out / name).absolute()}"]
            jobs[name] = Job(
                name,
                ["train", str(file), *overrides],
                out / name,
                part.get("needs", []),
                False,
                *_length(recipe),
            )
    return jobs


def _length(recipe: Recipe) -> tuple[int, str]:
    """How long a job is and in what it counts."""
    if isinstance(recipe, TransferRecipe):
        return sum(stage.pairs or 0 for stage in recipe.stages), "pairs"
    return recipe.schedule.steps, "steps"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _is_done(job: Job) -> bool:
    stamp = job.folder / ".made-from"
    return job.kept and stamp.is_file() and stamp.read_text() == job.key


def _run_all(jobs: dict[str, Job], done: set[str], workers: int, logs: Path) -> str | None:
    """Run jobs as their needs are met, `workers` at a time; the name of the first that fails, or None."""
    waiting = [job for job in jobs.values() if job.name not in done]
    running: list[Job] = []
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.update(OMP_NUM_THREADS=str(threads), PYTHONUNBUFFERED="1")  # for the jobs; read when they import torch
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED_ONCE)
    forkserver.ensure_running()
    board = _Board()
    with board:
        try:
            while waiting or running:
                for job in [j for j in waiting if len(running) < workers and all(n in done for n in j.needs)][
                    : workers - len(running)
                ]:
                    _start(job, threads, logs)
                    waiting.remove(job)
                    running.append(job)
                time.sleep(0.2)
                for job in list(running):
                    board.update(job)
                    code = job.process.exitcode if job.process else None
                    if code is None:
                        continue
                    running.remove(job)
                    if code != 0:
                        return job.name
                    if job.kept:
                        (job.folder / ".made-from").write_text(job.key)
                    done.add(job.name)
                    job.seconds = time.monotonic() - job.started
                    board.finish(job)
        finally:
            for job in running:
                if job.process and job.process.is_alive():
                    job.process.terminate()
                    job.process.join()
    return None


def _start(job: Job, threads: int, logs: Path) -> None:
    """Start a job; leftovers of an interrupted one are kept only when it was the same job, which then resumes."""
    making = job.folder / ".making"
    if job.folder.exists() and not (job.kept and making.is_file() and making.read_text() == job.key):
        shutil.rmtree(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    making.write_text(job.key)
    renders = "scenes" in job.command  # without torch: it need not wait for the process that imports
    command = job.command if renders else [*job.command, f"threads={threads}"]
    context = multiprocessing.get_context("spawn" if renders else "forkserver")
    job.process = context.Process(target=_run_job, args=(command, logs / f"{job.name}.log"), name=job.name)
    job.process.start()
    job.started = time.monotonic()


def _run_job(command: list[str], log: Path) -> None:
    """In the job's process: one `vpgtrans` command, what it prints into `log`; exits with its code."""
    from .cli import main as vpgtrans

    with log.open("wb") as file, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(vpgtrans(command))


class _Board:
    """Progress of all running jobs: a bar each on a terminal, otherwise a line each every ten seconds."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description:22}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("{task.fields[text]}"),
        )
        self.bars = (
            Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
            if console.is_terminal
            else None
        )
        self.tasks: dict[str, TaskID] = {}
        self.last_line = 0.0

    def __enter__(self) -> _Board:
        if self.bars:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars:
            self.bars.stop()

    def update(self, job: Job) -> None:
        event = _last_train_event(job.folder / "log.jsonl")
        done = event.get("pairs" if job.unit == "pairs" else "step", 0)
        text = f"loss {event['loss']:.3f}" if "loss" in event else "starting"
        if "pairs_per_s" in event:
            text += f"  {event['pairs_per_s']:.0f} pairs/s"
        if self.bars:
            if job.name not in self.tasks:
                self.tasks[job.name] = self.bars.add_task(job.name, total=job.total, text="")
            self.bars.update(self.tasks[job.name], completed=done, text=text)
        elif time.monotonic() - self.last_line > PLAIN_LINE_SECONDS:
            self.last_line = time.monotonic()
            elapsed = time.monotonic() - job.started
            to_go = f"  ETA {duration(elapsed * (job.total - done) / done)}" if done else ""
            console.print(f"{job.name}: {done:,} of {job.total:,} {job.unit}  {text}{to_go}")

    def finish(self, job: Job) -> None:
        if self.bars and job.name in self.tasks:
            self.bars.update(self.tasks[job.name], completed=job.total, text="done")
        else:
            console.print(f"{job.name}: done in {duration(time.monotonic() - job.started)}")


def _last_train_event(path: Path) -> dict:
    with contextlib.suppress(OSError, ValueError, IndexError):
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").splitlines()
        for line in reversed(lines):
            event = json.loads(line)
            if event["event"] == "train":
                event.setdefault(
                    "loss", sum(v for k, v in event.items() if k in ("contrastive", "matching", "captioning"))
                )
                return event
    return {}
