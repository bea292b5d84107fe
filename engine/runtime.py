"""The process: device, precision, rank and threads.  Every reduction over ranks goes through it."""

from __future__ import annotations

import contextlib
import os
import random
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .startup import RankMissing, StartError, compare_ranks, meet, read_world


@dataclass(frozen=True)
class Runtime:
    """Where and how this process computes.  `compute_dtype` is the dtype of the forward pass; master weights are float32."""

    device: torch.device
    compute_dtype: torch.dtype
    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """bfloat16 compute over float32 master weights on a GPU; nothing where they are one dtype."""
        if self.compute_dtype in (torch.float32, torch.float64):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def sum_(self, value: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place; itself on one process."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    @torch.no_grad()
    def broadcast_(self, value: Tensor) -> None:
        """Give a tensor rank 0's values on all ranks, in place."""
        if self.world_size > 1:
            whole = value.contiguous()
            dist.broadcast(whole, 0)
            value.copy_(whole)

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every rank, in the order of the ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def describe(self) -> str:
        name = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"cpu, {torch.get_num_threads()} thread(s)"
        )
        return f"{name} x {self.world_size}, {str(self.compute_dtype).removeprefix('torch.')}"


def device_kind(device: str) -> str:
    """What `device` of a recipe means on this machine: auto is a GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def start(
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    timeout_s: float = 600.0,
    same_on_all_ranks: dict[str, str] | None = None,
) -> Runtime:
    """Set up threads, seeds and, under torchrun, the process group.

    timeout_s: of a collective, and of waiting for the other ranks at the start.  same_on_all_ranks: what every rank must have been started with.
    Raises StartError when a GPU is asked for and there is none, the environment of ranks is incomplete, or ranks were started differently.
    """
    world_size, rank, local_rank = read_world()
    if threads:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise StartError("device: expected a CUDA GPU, found none; set device=cpu or device=auto")
    kind = device_kind(device)
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise StartError(
            f"environment: expected LOCAL_RANK below the {torch.cuda.device_count()} GPUs of this machine, got {local_rank}; start as many "
            "processes as there are GPUs"
        )
    if kind == "cuda" and world_size > 1 and "LOCAL_RANK" not in os.environ:
        raise StartError(
            "environment: expected LOCAL_RANK, by which ranks of one machine choose their GPUs, found none; start with torchrun, which sets it"
        )
    target = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(target)
    if world_size > 1 and not dist.is_initialized():
        _join("nccl" if kind == "cuda" else "gloo", rank, world_size, timeout_s, same_on_all_ranks or {})
    dtype = {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "auto": torch.bfloat16 if kind == "cuda" else torch.float32,
    }[precision]
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return Runtime(target, dtype, rank, world_size)


def _join(backend: str, rank: int, world_size: int, timeout_s: float, same: dict[str, str]) -> None:
    """Meet the other ranks, compare what they were started with, and make the process group."""
    timeout = timedelta(seconds=timeout_s)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        since = time.monotonic()
        start = meet(dist.PrefixStore("vpgtrans", store), rank, world_size, timeout_s)
        own = dist.PrefixStore(start, store)
        same = {**same, "environment: WORLD_SIZE": str(world_size)}
        compare_ranks(dist.PrefixStore("vpgtrans", own), rank, world_size, same, timeout_s, since)
        group_store = dist.PrefixStore("default_pg", own)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=world_size, timeout=timeout)
    except StartError:
        raise
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankMissing(
            f"rank {rank}: expected to meet {world_size} ranks at {where} within {timeout_s:g} s: {str(error).splitlines()[0]}"
        ) from error


def stop(failed: bool = False) -> None:
    """Leave the process group, if there is one.  failed: other ranks may be anywhere."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    if failed and dist.get_backend() == "nccl":
        # Destroying finishes what is under way, and so waits for ranks that wait for this one; its message would come after their time-out.
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()
