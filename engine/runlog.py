"""What a run leaves to read: `log.jsonl`, TensorBoard files, and a progress bar (or a plain line a while where there is no terminal)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

# No markup: `pip install 'vpgtrans[triton]'` would lose its extra.
console = Console(stderr=True, highlight=False, markup=False)
PLAIN_LINE_SECONDS = 10.0


class RunLog:
    """Append events to `folder/log.jsonl`; mirror numbers to TensorBoard and W&B; show progress.

    Ranks other than 0 show nothing; they append events to `rank_log`, where they have one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        enabled: bool = True,
        tensorboard: bool = False,
        resume_at: int | None = None,
        name: str = "log.jsonl",
        rank_log: Path | None = None,
        wandb: str | None = None,
        writes: bool = True,
    ):
        """wandb: name of a Weights & Biases project.

        writes: false for the screen alone, so that the folder may be read-only.
        resume_at: drop events beyond this update, which a killed run wrote after its last checkpoint; None starts a new log.
        """
        self.folder = folder
        self.enabled = enabled
        self._writer = None
        self._progress: Progress | None = None
        self._last_line = 0.0
        self._file = self._wandb = None
        if not enabled:
            if rank_log is not None:
                rank_log.parent.mkdir(parents=True, exist_ok=True)
                kept = _events_up_to(rank_log, resume_at) if resume_at is not None else []
                _replace(rank_log, "".join(json.dumps(e) + "\n" for e in kept))
                self._file = rank_log.open("a", buffering=1)
            return
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        kept = _events_up_to(path, resume_at) if resume_at is not None else []
        _replace(path, "".join(json.dumps(e) + "\n" for e in kept))
        self._file = path.open("a", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at)
        if wandb:
            self._wandb = _open_wandb(wandb, folder)

    def event(self, event: str, **fields: Any) -> None:
        """Write one event; numbers also go to TensorBoard at `step`."""
        if self._file is None:
            return
        self._file.write(json.dumps({"event": event, **fields}) + "\n")
        if (self._writer is not None or self._wandb is not None) and "step" in fields:
            numbers = {
                f"{event}/{name}": value
                for name, value in fields.items()
                if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
            }
            if self._writer is not None:
                for name, value in numbers.items():
                    self._writer.add_scalar(name, value, fields["step"])
            if self._wandb is not None:
                self._wandb.log(numbers, step=fields["step"])

    def warn(self, name: str, message: str, **fields: Any) -> None:
        """A named warning, on the screen and in the log."""
        if self.enabled:
            console.print(Text.assemble((f"warning {name}:", "yellow"), f" {message}"))
        self.event("warning", name=name, message=message, **fields)

    def say(self, message: Any) -> None:
        """Print a line or a rich table on rank 0."""
        if self.enabled:
            console.print(message)

    def progress(self, label: str, done: float, total: float, text: str) -> None:
        """Show how far a long job is: a bar on a terminal, otherwise one line every ten seconds."""
        if not self.enabled:
            return
        if console.is_terminal:
            if self._progress is None:
                self._progress = Progress(
                    TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
                    TextColumn("{task.fields[text]}", markup=False),
                    TimeRemainingColumn(), console=console, transient=True,
                )  # fmt: skip
                self._progress.start()
                self._task = self._progress.add_task(label, total=total, text=text)
            self._progress.update(self._task, description=label, completed=done, total=total, text=text)
        elif time.monotonic() - self._last_line > PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            console.print(f"{label} {100 * done / max(total, 1):3.0f}%  {text}")

    def end_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        self.end_progress()
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def wandb_unsupported_reason() -> str | None:
    """Why nothing can be sent to Weights & Biases; None where its package is."""
    if importlib.util.find_spec("wandb") is None:
        return "output.wandb: expected the package wandb, found none; install vpgtrans[wandb], or set output.wandb=null"
    return None


def _open_wandb(project: str, folder: Path) -> Any:
    """A run of this folder; a resumed one goes on in the same."""
    import wandb

    key = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=folder.name, dir=str(folder), id=key, resume="allow")


def _replace(path: Path, text: str) -> None:
    """A kill leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _events_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            break  # the line that the kill cut off; nothing follows it
        if event.get("step", 0) <= step and event.get("event") != "end":
            kept.append(event)
    return kept


def duration(seconds: float) -> str:
    """3723 -> '1:02:03'."""
    minutes, second = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"
