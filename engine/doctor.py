"""`vpgtrans doctor`: what is installed, what was compiled, which implementation of each operation is live, and why."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..kernels import image_decode, row_packing
from ..kernels.triton_support import triton_unsupported_reason
from .kernel_choice import MEASURED, MEASURED_ON_CPU, fp8_reason
from .models.attention_back_ends import back_end_unsupported_reason
from .optim import apex_unsupported_reason
from .recipe import Kernels
from .runtime import device_kind

REQUIRED = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
    "pydantic",
    "sentencepiece",
    "tensorboard",
)

# Distribution -> the module whose import proves it. apex: `apex.normalization` is in NVIDIA's package only; the
# package index holds another project of that name.
OPTIONAL = {
    "flash-attn": "flash_attn",
    "xformers": "xformers.ops",
    "apex": "apex.normalization",
    "liger-kernel": "liger_kernel.transformers",
    "triton": "triton",
    "ffcv": "ffcv",
    "simplejpeg": "simplejpeg",
}


TRITON_OPERATIONS = (
    "adamw_step",
    "linear_cross_entropy",
    "prefix_attention",
    "projector_converter",
    "prompt_assembly",
    "qformer_attention",
)


def _gpu_or_cpu() -> torch.device:
    return torch.device(device_kind("auto"))


# Operation of kernels/ -> its fast implementation, and why that cannot run here (None where it can).
OPERATIONS = {
    "image_decode": ("cpp", image_decode.image_decode_unsupported_reason),
    "row_packing": ("cpp", row_packing.row_packing_unsupported_reason),
    "frozen_linear": ("fp8", lambda: fp8_reason(_gpu_or_cpu())),
    **{
        name: (
            "triton",
            lambda: triton_unsupported_reason(_gpu_or_cpu()),
        )
        for name in TRITON_OPERATIONS
    },
}

# What a recipe can name in place of torch's -> why that cannot run here (None where it can).
BACK_ENDS = {
    **{
        f"attention: {name}": (lambda name=name: back_end_unsupported_reason(name, _gpu_or_cpu()))
        for name in ("flex", "flash", "xformers")
    },
    "optimizer.implementation: apex": lambda: apex_unsupported_reason(_gpu_or_cpu()),
}

# Operation -> what is live where its fast implementation is not; the reference for those that are not listed.
FALLBACKS = {
    "image_decode": image_decode.live_decoder,
    "qformer_attention": lambda: (
        "torch; latents where they cost less"
        if _gpu_or_cpu().type == "cpu" and "qformer_attention" in MEASURED_ON_CPU
        else "reference"
    ),
}


def collect() -> dict[str, Any]:
    """Everything `vpgtrans doctor` shows, as plain data that `json.dumps` takes.

    Keys: `system`, `required` (distribution -> version, `None` where missing), `compiled` (`present`, `reason`, and
    where present compiler, versions and functions), `optional` (name -> `version`, `importable`, `reason`),
    `device`, `operations` (name -> `live` where the recipe says `auto`, `reason`), `back_ends` (recipe key and value -> `can_run`, `reason`).
    """
    return {
        "system": {
            "vpgtrans": _version("vpgtrans"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "required": {name: _version(name) for name in REQUIRED},
        "compiled": _compiled(),
        "optional": {name: _optional(name, module) for name, module in OPTIONAL.items()},
        "device": _device(),
        "operations": {
            name: {
                "live": FALLBACKS.get(name, lambda: "reference")() if (reason := _reason(name, unsupported)) else fast,
                "reason": reason,
            }
            for name, (fast, unsupported) in OPERATIONS.items()
        },
        "back_ends": {
            name: {"can_run": (reason := unsupported()) is None, "reason": reason}
            for name, unsupported in BACK_ENDS.items()
        },
    }


def _reason(operation: str, unsupported: Callable[[], str | None]) -> str | None:
    """Why a recipe that says `auto` (kernel_choice.py) does not use the fast implementation; None where it does."""
    reason = unsupported()
    if reason is None and operation in Kernels.model_fields and operation not in MEASURED:
        return f"not measured on a GPU yet; it can run: kernels.{operation}=kernel"
    return reason


def main(as_json: bool = False) -> None:
    """Prints `collect()`, as JSON or as tables."""
    found = collect()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = Console()
    device = found["device"]
    _print_table(console, "System", [*found["system"].items(), *found["required"].items(), *device.items()])
    compiled = [
        (key, ", ".join(value) if key == "functions" else value)
        for key, value in found["compiled"].items()
        if value is not None
    ]
    _print_table(console, "Compiled module vpgtrans.kernels._C", compiled)
    operations = [(name, row["live"], row["reason"] or "") for name, row in found["operations"].items()]
    _print_table(console, "Operations", operations, ("operation", "live", "why not the fast one"))
    back_ends = [
        (name, "yes" if row["can_run"] else "no", row["reason"] or "") for name, row in found["back_ends"].items()
    ]
    _print_table(console, "What a recipe can name", back_ends, ("key and value", "runs here", "why not"))
    optional = [
        (name, row["version"] or "-", "yes" if row["importable"] else "no", row["reason"] or "")
        for name, row in found["optional"].items()
    ]
    _print_table(console, "Optional packages", optional, ("package", "version", "importable", "why not"))


def _print_table(console: Console, title: str, rows: Any, columns: tuple[str, ...] = ()) -> None:
    table = Table(title=title, title_justify="left", show_header=bool(columns))
    for column in columns or ("", ""):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            *("missing" if cell is None else escape(str(cell)) for cell in row)
        )  # vpgtrans[triton] is no markup
    console.print(table)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiled() -> dict[str, Any]:
    try:
        module = importlib.import_module("..kernels._C", __package__)
    except ImportError as error:
        return {"present": False, "reason": str(error)}
    functions = sorted(name for name in vars(module) if not name.startswith("_"))
    return {"present": True, "reason": None, "file": module.__file__, **module.build_info(), "functions": functions}


def _optional(distribution: str, module: str) -> dict[str, Any]:
    """Whether `module` imports. Any exception counts: a package built for another torch fails in many ways."""
    reason = None
    try:
        # What a broken package prints belongs in the row that names it, not above the table.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            reason = "not installed"
        elif distribution == "apex":
            reason = f"not NVIDIA's apex, or one that does not load here ({reason})"
    return {"version": _version(distribution), "importable": reason is None, "reason": reason}


def _device() -> dict[str, Any]:
    device: dict[str, Any] = {"torch CUDA": torch.version.cuda, "torch threads": torch.get_num_threads()}
    if not torch.cuda.is_available():
        return {"device": "cpu", **device}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": f"{torch.cuda.device_count()} x {properties.name}",
        "compute capability": f"{properties.major}.{properties.minor}",
        "memory per device, GiB": round(properties.total_memory / 2**30, 1),
        **device,
    }
