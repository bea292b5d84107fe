"""Runs of a recipe in real processes with gloo: `python run_ranks.py JOBS.json`.

JOBS is a list of {"ranks", "arguments"}, arguments being those of `engine/train.py`, and on request "local_ranks" (of a node), "double" (float64),
"fp8" (let models on the CPU be quantised), "count" (a file for the collectives of each update), "payloads" (one for the bytes handed to them),
"copy" ([folder, other] first), "forget" ([folder, step]: then checkpoints past the step are removed) and "code" (expected of every rank, 0 if not
given).  Everything is imported once and ranks are forked.  Exits with 1 after the first job with other exit codes.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

os.environ.pop(
    "TRITON_INTERPRET", None
)  # these runs are of torch's operations; kernels under the interpreter would take minutes

import torch
import torch.distributed as dist

from vpgtrans.engine import guards, kernel_choice, loop, prepare
from vpgtrans.engine.train import main


def in_double_precision() -> None:
    """From here on runs compute in float64 and keep their master weights in it."""
    start, build_model = guards.start, prepare.build_model

    def build_in_double(*arguments, **settings):
        model, origins = build_model(*arguments, **settings)
        if origins.source_projector is not None:
            origins.source_projector.double()
        return model.double(), origins

    guards.start = lambda *a, **k: replace(start(*a, **k), compute_dtype=torch.float64)
    prepare.build_model = build_in_double


def count_collectives(path: Path) -> None:
    """Write, at the end of each update, how often it called each collective and how many micro-batches this rank had."""
    counts: Counter[str] = Counter()

    def counted(name: str, function):
        def call(*arguments, **settings):
            counts[name] += 1
            return function(*arguments, **settings)

        return call

    for name in ("all_reduce", "broadcast"):
        setattr(dist, name, counted(name, getattr(dist, name)))
    for kind, other in (("all_gather", "into_tensor"), ("reduce_scatter", "tensor")):  # what 2.13 calls single
        name = f"{kind}_single" if hasattr(dist, f"{kind}_single") else f"{kind}_{other}"
        setattr(dist, name, counted(kind, getattr(dist, name)))
    accumulate = loop._accumulate

    def accumulate_and_write(this, update, *rest):
        counts.clear()
        loss = accumulate(this, update, *rest)
        with path.open("a") as file:
            file.write(json.dumps({**counts, "micro_batches": update.own_batches}) + "\n")
        return loss

    loop._accumulate = accumulate_and_write


def write_payloads(path: Path) -> None:
    """Write, after each optimiser step, the bytes of the tensors that this rank handed to collectives since the update began."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benches"))
    from payloads import count_payloads

    sends, micro_batches = count_payloads(), []
    accumulate, take_step = loop._accumulate, loop.take_step

    def accumulate_from_nothing(this, update, *rest):
        sends.clear()
        micro_batches[:] = [update.own_batches]
        return accumulate(this, update, *rest)

    def step_and_write(*arguments):
        result = take_step(*arguments)
        with path.open("a") as file:
            file.write(json.dumps({**sends, "micro_batches": micro_batches[0]}) + "\n")
        return result

    loop._accumulate, loop.take_step = accumulate_from_nothing, step_and_write


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_rank(job: dict, rank: int, port: int) -> int:
    local = job.get("local_ranks", job["ranks"])
    names = {"WORLD_SIZE": job["ranks"], "RANK": rank, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
    os.environ.update({k: str(v) for k, v in names.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if job.get("double"):
        in_double_precision()
    if job.get("fp8"):
        kernel_choice.fp8_reason = lambda device: None
    if job.get("count") and rank == 0:
        count_collectives(Path(job["count"]))
    if job.get("payloads") and rank == 0:
        write_payloads(Path(job["payloads"]))
    return main(job["arguments"])


def run_job(job: dict) -> list[int]:
    """The exit codes of its ranks."""
    port, children = free_port(), []
    if "copy" in job:
        shutil.copytree(*job["copy"])
    if "forget" in job:
        folder, step = job["forget"]
        for checkpoint in Path(folder, "checkpoints").glob("step-*"):
            if int(checkpoint.name.removeprefix("step-")) > step:
                shutil.rmtree(checkpoint)
    for rank in range(job["ranks"]):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = run_rank(job, rank, port)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    for at, job in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        codes = run_job(job)
        if any(code != job.get("code", 0) for code in codes):
            sys.exit(f"job {at}, {job}: exit codes {codes}")
