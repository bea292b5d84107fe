"""Runs of a recipe in real processes with gloo: `python run_ranks.py JOBS.json`.

JOBS is a list of {"ranks", "local_ranks", "double", "arguments"}; arguments are those of `engine/train.py`.  Everything is imported once and ranks
are forked.  Exits with 1 after the first job of which a rank did not exit with 0.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from vpgtrans.engine import loop
from vpgtrans.engine.train import main


def in_double_precision() -> None:
    """From here on runs compute in float64 and keep their master weights in it."""
    start, build_model = loop.start, loop.build_model

    def build_in_double(*arguments, **settings):
        model, origins = build_model(*arguments, **settings)
        if origins.source_projector is not None:
            origins.source_projector.double()
        return model.double(), origins

    loop.start = lambda *arguments: replace(start(*arguments), compute_dtype=torch.float64)
    loop.build_model = build_in_double


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
    return main(job["arguments"])


def run_job(job: dict) -> list[int]:
    """The exit codes of its ranks."""
    port, children = free_port(), []
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
        if any(codes):
            sys.exit(f"job {at}, {job}: exit codes {codes}")
