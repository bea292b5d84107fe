"""What every Triton operation needs to know: is Triton there, is it interpreted, which architecture, and how to say what runs instead.

Kernels live in `X_triton.py` beside their operation `X.py` and are imported only once `triton_unsupported_reason` says that they can run.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch

logger = logging.getLogger(__name__)

MIN_CAPABILITY = (8, 0)  # what the launch settings are chosen and compiled for: sm_80 and sm_90a


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU: TRITON_INTERPRET=1 when the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_unsupported_reason(device: torch.device) -> str | None:
    """Why no Triton kernel can run on tensors of `device`; None where one can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'vpgtrans[triton]')"
    if device.type == "cpu":
        return None if is_interpreted() else "the tensors are on the CPU"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the tensors are on {device.type}; the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}: the kernels need 8.0 or newer"
    return None


def architecture(device: torch.device) -> int:
    """90 for Hopper and newer, 80 otherwise: what launch settings are chosen by. The interpreter takes Hopper's."""
    if device.type != "cuda":
        return 90
    return 90 if torch.cuda.get_device_capability(device) >= (9, 0) else 80


@functools.cache
def log_fallback_once(operation: str, reason: str) -> None:
    logger.warning("%s runs its torch reference: %s", operation, reason)
