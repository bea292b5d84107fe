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

import contextlib
import hashlib
import json
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


class CheckpointError(ValueError):
    """A checkpoint that is damaged or does not fit; the message names the files or tensors."""


class SaveError(RuntimeError):
    """A checkpoint that could not be written; those before it are whole."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold, copied to host memory, so that training can go on while it is written."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # file name -> its tensors
    state: str


def take_snapshot(
    step: int, model: dict[str, Tensor], optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Snapshot:
    """Copy tensors, optimiser and generator states to the host; waits for the device once."""
    files = {
        "model.safetensors": model,
        "optimizer.safetensors": _flat_optimizer(optimizer),
        "rng.safetensors": _rng_states(),
    }
    copied = {file: {k: _to_host(v) for k, v in tensors.items()} for file, tensors in files.items()}
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return Snapshot(step, copied, json.dumps(state, indent=1))


def save_checkpoint(
    root: Path, step: int, model: dict[str, Tensor], optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write `root/step-N` atomically and drop all but the newest `keep`; returns the folder.  Raises SaveError."""
    return write_snapshot(root, take_snapshot(step, model, optimizer, state), keep)


def write_snapshot(root: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write a snapshot as `root/step-N`, whole or not at all, and drop all but the newest `keep`.

    Raises SaveError (a full disk, say); what was there before stays.  Old ones that cannot be removed are left for the next save.
    """
    target = root / f"step-{snapshot.step:08d}"
    temporary = root / f".step-{snapshot.step:08d}.{os.getpid()}.tmp"
    replaced = root / f".step-{snapshot.step:08d}.replaced"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tensors in snapshot.tensors.items():
            save_file(tensors, temporary / name)
        (temporary / "state.json").write_text(snapshot.state)
        manifest = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in (*temporary.iterdir(), temporary):
            fsync(path)
        if target.exists():  # never without one of the two: a kill may come between these lines
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        temporary.rename(target)
        fsync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(_not_written(target, snapshot, error)) from error
    with contextlib.suppress(OSError):
        _remove_old(root, snapshot.step, keep)
    return target


def _not_written(target: Path, snapshot: Snapshot, error: Exception) -> str:
    needed = sum(t.nbytes for tensors in snapshot.tensors.values() for t in tensors.values())
    existing = next((p for p in target.parents if p.is_dir()), Path("/"))
    free = shutil.disk_usage(existing).free
    whole = sorted(p.name for p in target.parent.glob("step-[0-9]*"))
    return (
        f"{target}: the checkpoint could not be written ({error}); it takes {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free; "
        f"whole ones there: {', '.join(whole) or 'none'}; make room or choose another output.folder, then start again"
    )


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time, while training goes on; in line where `background` is false.

    What goes wrong in the thread is raised as SaveError by the next `check`, `save` or `finish`, whichever comes first.
    """

    def __init__(self, root: Path, keep: int, background: bool = True):
        self.root, self.keep, self.background = root, keep, background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, step: int, model: dict[str, Tensor], optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Copy everything to the host, then write it in the background; waits for the save before it, if that still runs."""
        self.finish()
        snapshot = take_snapshot(step, model, optimizer, state)
        if not self.background:
            write_snapshot(self.root, snapshot, self.keep)
            return
        # No daemon: an interpreter that exits waits for it.
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what the last save ran into; does not wait for it."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Wait until the last save is on the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write_snapshot(self.root, snapshot, self.keep)
        except BaseException as error:
            self._error = error


def latest_checkpoint(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that was passed over; None where there is none at all.

    Raises CheckpointError when there are checkpoints and every one is damaged: a run must not begin anew over them unasked.
    """
    passed_over = []
    for folder in sorted((*root.glob("step-[0-9]*"), *root.glob(".step-[0-9]*.replaced")), key=_age, reverse=True):
        problem = verify(folder)
        if problem is None:
            return folder, passed_over
        passed_over.append(f"{folder}: {problem}")
    if passed_over:
        raise CheckpointError(
            "every checkpoint is damaged:\n  "
            + "\n  ".join(passed_over)
            + f"\nPut a whole copy back, or delete {root} to start from the beginning"
        )
    return None, passed_over


def _age(folder: Path) -> tuple[int, bool]:
    """Sorts by step; of two of one step, the one that was set aside comes first."""
    step = folder.name.removeprefix(".").removeprefix("step-").partition(".")[0]
    return int(step) if step.isdigit() else -1, not folder.name.startswith(".")


def verify(folder: Path) -> str | None:
    """None when every file is there, whole and this checkpoint's own; otherwise what is wrong."""
    try:
        text = (folder / "manifest.json").read_text()
        manifest = json.loads(text)
    except (OSError, ValueError) as error:
        return f"manifest.json cannot be read ({error})"
    try:
        if text != json.dumps(manifest, indent=1):
            return "manifest.json is not as it was written"
        if missing := [name for name in FILES if name not in manifest]:
            return f"manifest.json does not name {', '.join(missing)}"
        for name, expected in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name}: expected {expected['bytes']} bytes, found {path.stat().st_size}"
            if file_sha256(path) != expected["sha256"]:
                return f"{name}: checksum differs"
        step = json.loads((folder / "state.json").read_text()).get("step")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read ({type(error).__name__}: {error})"
    if step is not None and step != _age(folder)[0]:
        return f"state.json is of step {step}: files of another checkpoint"
    return None


def load_checkpoint(folder: Path, model: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copy a checkpoint into the live tensors, optimiser and generators; returns `state.json`.

    Raises CheckpointError, before anything is changed, when the checkpoint does not verify, or a tensor is missing, unexpected or of another
    shape.
    """
    if problem := verify(folder):
        raise CheckpointError(f"{folder}: {problem}")
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
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


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


def _to_host(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory; page-locked and not waited for where it comes from a GPU."""
    tensor = tensor.detach()
    if tensor.device.type != "cuda":
        return tensor.clone(memory_format=torch.contiguous_format)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _remove_old(root: Path, step: int, keep: int) -> None:
    """Keep the newest `keep` up to `step`; those beyond it were passed over as damaged when the run resumed."""
    folders = sorted(root.glob("step-[0-9]*"), key=_age, reverse=True)
    kept = [folder for folder in folders if _age(folder)[0] <= step][:keep]
    for folder in folders:
        if folder not in kept:
            remove_folder(folder)
    for leftover in (*root.glob(".step-*.tmp"), *root.glob(".step-[0-9]*.replaced"), *root.glob(".*.removed")):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a kill on the way leaves none of its name half empty."""
    hidden = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def fsync(path: Path) -> None:
    """Bring a file, or a folder's names, to the disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
