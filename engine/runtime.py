"""The process: device, precision, rank and threads.  One process here; every reduction already goes through it."""

from __future__ import annotations

import contextlib
import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


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


def start(device: str = "auto", precision: str = "auto", threads: int | None = None, seed: int = 0) -> Runtime:
    """Set up threads, seeds and, under torchrun, the process group.

    Raises ValueError when a GPU is asked for and there is none.
    """
    if threads:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA GPU, found none; set device=cpu or device=auto")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    world_size, rank, local_rank = (
        int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    target = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(target)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    dtype = {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "auto": torch.bfloat16 if kind == "cuda" else torch.float32,
    }[precision]
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return Runtime(target, dtype, rank, world_size)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
