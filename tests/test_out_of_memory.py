"""Real allocations that fail: a run under a limit of its address space, and what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from vpgtrans.engine.out_of_memory import available_bytes, shortage

# What importing takes of the address space is not the run's: the limit starts from there.
CHILD = """
import resource, sys
import vpgtrans.engine.loop, vpgtrans.engine.out_of_memory
from vpgtrans.engine.train import main
room = int(sys.argv[1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""
ROOM = 1200 * 2**20
HUGE = [
    "data.row_tokens=2048", "data.rows_per_micro_batch=64", "data.transform=eval", "evaluation.generate_images=0", "evaluation.loss_images=1",
    "stages=[{name: warm_up, trains: projector, learning_rate: 1e-3, pairs: 6000, batch_pairs: 6000}]",
]  # fmt: skip


def trained(recipe, *settings: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", CHILD, str(ROOM), str(recipe), *HUGE, *settings]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # each arena of malloc reserves 64 MiB of the address space
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_a_run_without_memory_says_which_switch_to_turn_and_that_switch_is_enough(tiny_recipe, tmp_path):
    done = trained(tiny_recipe)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    message = done.stderr[done.stderr.index("stopped: out of CPU memory") :]
    assert re.search(r"[\d.]+ [GM]iB asked for, [\d.]+ [GM]iB were free", message)
    told = re.search(r"data\.rows_per_micro_batch=(\d+) in place of 64 is the most that fits for sure", message)
    assert told and 1 <= int(told[1]) < 47, message  # the update has 47 rows
    assert "precision=bf16" in message
    again = trained(tiny_recipe, f"data.rows_per_micro_batch={told[1]}", f"output.folder={tmp_path / 'fits'}")
    assert again.returncode == 0, again.stderr[-2000:]


def test_what_failed_is_read_from_the_allocator():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    found = shortage(caught.value)
    assert found.device == "CPU" and found.asked_bytes == 2**60
    assert found.free_bytes == pytest.approx(available_bytes(torch.device("cpu")), rel=0.5)
    with pytest.raises(MemoryError) as caught:
        import numpy as np

        np.empty(1 << 60, np.uint8)
    assert shortage(caught.value).asked_bytes == 2**60
    text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.25 GiB of which 1.25 GiB is free. Process"
    found = shortage(torch.OutOfMemoryError(text))
    assert (found.device, found.asked_bytes, found.free_bytes) == ("GPU", 2.5 * 2**30, 1.25 * 2**30)


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert shortage(caught.value) is None
