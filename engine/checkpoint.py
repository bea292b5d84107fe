"""Checkpoints: folders that appear whole or not at all, hold only what trains, and are verified when read.

    checkpoints/step-00000120/
        model.safetensors       trainable tensors, float32
        optimizer.safetensors   AdamW moments and steps
        rng.safetensors         generator states
        state.json              step, pairs, stage, data position, best score, ...
        manifest.json           size and SHA-256 of each file above

No pickle anywhere, so a checkpoint from a stranger can run nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint that is damaged or does not fit; the message names the files or tensors."""


def save_checkpoint(
    root: Path, step: int, model: dict[str, Tensor], optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write `root/step-N` atomically and drop all but the newest `keep`; returns the folder."""
    target = root / f"step-{step:08d}"
    temporary = root / f".step-{step:08d}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in model.items()}, temporary / "model.safetensors")
    save_file(_flat_optimizer(optimizer), temporary / "optimizer.safetensors")
    save_file(_rng_states(), temporary / "rng.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    manifest = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(temporary.iterdir())}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in temporary.iterdir():
        fsync(path)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    fsync(root)
    _remove_old(root, keep)
    return target


def latest_checkpoint(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that was passed over."""
    passed_over = []
    for folder in sorted(root.glob("step-*"), reverse=True):
        problem = verify(folder)
        if problem is None:
            return folder, passed_over
        passed_over.append(f"{folder}: {problem}")
    return None, passed_over


def verify(folder: Path) -> str | None:
    """None when every file of the manifest is whole; otherwise what is wrong."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        return f"manifest.json cannot be read ({error})"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name}: expected {expected['bytes']} bytes, found {path.stat().st_size}"
        if file_sha256(path) != expected["sha256"]:
            return f"{name}: checksum differs"
    return None


def load_checkpoint(folder: Path, model: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copy a checkpoint into the live tensors, optimiser and generators; returns `state.json`.

    Raises CheckpointError, before anything is changed, when a tensor is missing, unexpected or of another shape.
    """
    stored = load_tensors(folder / "model.safetensors")
    check_fit(stored, model, str(folder))
    for name, tensor in model.items():
        tensor.data.copy_(stored[name])
    _load_optimizer(optimizer, load_tensors(folder / "optimizer.safetensors"), folder)
    _restore_rng(load_tensors(folder / "rng.safetensors"))
    return json.loads((folder / "state.json").read_text())


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file on the CPU; CheckpointError when it is missing, truncated or no safetensors file."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: expected a safetensors file: {error}; copy it again or choose another checkpoint"
        ) from error


def check_fit(stored: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """Raise CheckpointError naming every tensor that is missing, unexpected or of another shape."""
    problems = [f"{k}: missing" for k in sorted(expected.keys() - stored.keys())]
    problems += [f"{k}: unexpected" for k in sorted(stored.keys() - expected.keys())]
    problems += [
        f"{k}: expected {tuple(expected[k].shape)}, found {tuple(stored[k].shape)}"
        for k in sorted(expected.keys() & stored.keys())
        if expected[k].shape != stored[k].shape
    ]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CheckpointError(f"{where}: does not fit this model:\n  {shown}")


def trainable_tensors(module: nn.Module) -> dict[str, nn.Parameter]:
    """name -> parameter for everything that requires a gradient."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def readable(*paths: Path) -> None:
    """The usual permissions: safetensors leaves its files to their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in paths:
        path.chmod(0o666 & ~mask)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under its final name only when whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(path)


def _flat_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, entry in state.items()
        for name, value in entry.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor], folder: Path) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    count = sum(len(g["params"]) for g in groups)
    if state and len(state) != count:
        raise CheckpointError(
            f"{folder}/optimizer.safetensors: expected moments of {count} parameters, found {len(state)}"
        )
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _rng_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_rng(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _remove_old(root: Path, keep: int) -> None:
    for folder in sorted(root.glob("step-*"), reverse=True)[keep:]:
        shutil.rmtree(folder, ignore_errors=True)
    for leftover in root.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def fsync(path: Path) -> None:
    """Bring a file, or a folder's names, to the disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
