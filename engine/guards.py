"""What keeps a run from losing work: its folder's lock, notices, heartbeats, background saves, and reports of what went wrong.

`guarded` goes around a run.  The loop calls `at` where it turns to something else, `record` and `after_update` once an update, and `inspect`
where it logs; none of them waits for the device but `inspect`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from .checkpoint import CheckpointWriter, SaveError, write_json
from .data.packing import Group
from .heartbeat import Heartbeat, standing
from .notice import Notice, StoppedOnNotice
from .recipe import TransferRecipe
from .runlog import RunLog, console, wandb_unsupported_reason
from .runtime import Runtime, start, stop
from .spikes import LastUpdates, files
from .startup import FolderLock, StartError, end_with_the_launcher, facts

NOTICED, FAILED = 1, 2
# In these a notice waits for the end of the update; everywhere else it is followed at once.
DEFERRING = ("update", "save")
NAMED_FILES = 64
SEEN_WITHIN_S = 60.0  # network file systems remember for as long that a file was not there
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class RunStopped(RuntimeError):
    """The run cannot go on; its last checkpoint is intact.  quiet: another rank says why."""

    quiet = False


@contextlib.contextmanager
def guarded(recipe: TransferRecipe) -> Iterator[tuple[Runtime, Guard]]:
    """Start the process, claim the output folder, and see to it that whatever ends the run leaves one message and one place to look.

    Raises StartError (before anything else), RunStopped for what a run cannot survive, StoppedOnNotice; others as they come, with a note that
    names `crash.txt`.
    """
    if recipe.output.wandb and (reason := wandb_unsupported_reason()):
        raise StartError(reason)
    notice = Notice()
    try:
        with deterministic_algorithms(recipe.guards.deterministic):
            runtime = start(
                recipe.device, recipe.precision, recipe.threads, recipe.seed, recipe.guards.timeout_s, facts(recipe)
            )
            notice.install()  # not before: a rank that waits for others to come hears nothing, and has nothing to save
            end_with_the_launcher()
            failed = True
            try:
                guard = Guard(recipe, runtime, notice)
                try:
                    yield runtime, guard
                    guard.writer.finish()
                    failed = False
                except BaseException as error:
                    guard.explain(error)
                    raise
                finally:
                    guard.close()
            finally:
                stop(failed)
    finally:
        notice.remove()


@contextlib.contextmanager
def deterministic_algorithms(on: bool) -> Iterator[None]:
    """The same run twice is the same bit for bit: only algorithms of torch, cuDNN and cuBLAS that promise it; others raise."""
    if not on:
        yield
        return
    # cuBLAS reads it when its first handle is made: two workspaces of 4 MiB and no stream-dependent choice.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    # Filling every new tensor costs a pass over it and changes no result of code that writes before it reads.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic = before[1]
        torch.utils.deterministic.fill_uninitialized_memory = fills


class Guard:
    """See the module.  `writer` writes the checkpoints."""

    def __init__(self, recipe: TransferRecipe, runtime: Runtime, notice: Notice):
        self.folder = recipe.output.folder
        self.runtime, self._settings, self._notice = runtime, recipe.guards, notice
        self._lock = FolderLock(self.folder)
        self._claim()
        self.writer = CheckpointWriter(
            self.folder / "checkpoints", recipe.output.keep_checkpoints, recipe.guards.background_saves
        )
        self._last = LastUpdates(recipe.guards.spike_deviations)
        self._failure: RunStopped | None = None
        many = runtime.world_size > 1
        # Of its own and on the host, so that exchanging flags never waits for the device.
        self._group = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=recipe.guards.timeout_s)) if many else None
        )
        self._pending: tuple[Any, Tensor] | None = None
        self._heartbeat = Heartbeat(
            self.folder / "ranks", runtime.rank, recipe.guards.heartbeat_s,
            0.9 * recipe.guards.timeout_s if many else None, self._say_stalled,
        )  # fmt: skip

    @property
    def rank_log(self) -> Path | None:
        """Where a rank other than 0 writes its events."""
        return None if self.runtime.is_main else self.folder / "ranks" / f"rank-{self.runtime.rank:05d}.jsonl"

    def _claim(self) -> None:
        """Rank 0 locks the folder, the others see whether they can write there; all stop with one message where one cannot."""
        if self.runtime.is_main:
            problem = self._lock.take()
        else:
            problem = _cannot_write(self.folder / "ranks")
        self._agree(problem)
        if self.runtime.world_size > 1:
            owner = self.runtime.gather(self._lock.owner)[0]
            self._agree(None if self.runtime.is_main else _not_shared(self.folder, owner))
        if self.runtime.is_main:
            # A world that was larger has left heartbeats that nobody writes any more.
            for path in (self.folder / "ranks").glob("rank-*.json"):
                if int(path.stem.removeprefix("rank-")) >= self.runtime.world_size:
                    path.unlink(missing_ok=True)

    def _agree(self, problem: str | None) -> None:
        """Raise StartError on all ranks where one of them has a problem; rank 0 tells it."""
        for rank, of_rank in enumerate(self.runtime.gather(problem)):
            if of_rank:
                where = f"rank {rank}: " if self.runtime.world_size > 1 else ""
                raise StartError(where + of_rank, quiet=not self.runtime.is_main)

    def at(self, phase: str, update: int | None = None, on_notice: Callable[[], None] | None = None) -> None:
        """What the run does from now on.  Raises StoppedOnNotice where a notice has come and nothing has to be finished first.

        on_notice: among several ranks, called in the middle of an evaluation; they leave together after it.
        """
        self._heartbeat.at(phase, self._heartbeat.update if update is None else update)
        together = phase == "evaluation" and self.runtime.world_size > 1
        self._notice.at_once(phase not in DEFERRING and not together, on_notice if together else None)

    def record(self, update: int, loss: Tensor, norm: Tensor, groups: Sequence[Group]) -> None:
        """Remember an update; loss, norm: scalars on the device, the same on all ranks."""
        self._last.add(update, loss, norm, groups)

    def inspect(self, log: RunLog, records: Sequence[Any]) -> None:
        """Report the loss spikes since the last call; waits for the device."""
        for spike in self._last.read():
            log.warn(
                "loss_spike",
                f"update {spike.update:,}: loss {spike.loss:.4g} after a median of {spike.median:.4g} "
                f"(deviation {spike.deviation:.2g}); log.jsonl names its images",
                step=spike.update, loss=spike.loss, median=spike.median, deviation=spike.deviation,
                images=len(spike.groups), files=files(spike.groups[:NAMED_FILES], records),
            )  # fmt: skip

    def after_update(self, save: Callable[[], None]) -> None:
        """Once an update on every rank: end the run where any rank has had a notice, or rank 0 could not save.

        Ranks exchange flags through the host.  Each reads the flags of the update before, which have long arrived, so nobody waits and all
        stop after the same update.
        """
        self.attempt(self.writer.check)
        flag = FAILED if self._failure else NOTICED if self._notice.received else 0
        flag = flag if self._group is None else self._exchanged(flag)
        if flag == FAILED:
            self._stop_where_one_has_failed(True)
        if flag == NOTICED:
            self.save_and_leave(save)

    def attempt(self, save: Callable[[], None]) -> None:
        """`save`, on rank 0: what has no room ends the run on all ranks together, in the next `after_update` or `saved`."""
        try:
            save()
        except SaveError as error:
            self._failure = RunStopped(str(error))
        except (OSError, SafetensorError) as error:
            if not _has_no_room(error):
                raise
            self._failure = self._without_room(error)

    def saved(self) -> None:
        """On every rank: wait until the last checkpoint is on the disk; RunStopped on all of them where it is not."""
        self.attempt(self.writer.finish)
        failed = torch.tensor(self._failure is not None)
        if self._group is not None:
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._group)
        self._stop_where_one_has_failed(bool(failed))

    def _stop_where_one_has_failed(self, failed: bool) -> None:
        if failed:
            raise self._failure or _quiet(RunStopped("another rank has stopped the run"))

    def _exchanged(self, flag: int) -> int:
        before = self._pending
        value = torch.tensor([flag])
        self._pending = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True), value
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])

    def save_and_leave(self, save: Callable[[], None]) -> None:
        """Save and raise StoppedOnNotice, on every rank; RunStopped where it could not be saved."""
        self.at("save")
        self._failure = None  # a save before that had no room: this one tells
        save()
        self.saved()  # torchrun gives the others 30 s as soon as one rank has ended: none ends before rank 0 has written
        error = StoppedOnNotice(
            f"on {self._notice.received or 'a notice to another rank'} after update {self._heartbeat.update:,}; saved in {self.writer.root}; "
            "the same command goes on from there"
        )
        raise _quiet(error) if not self.runtime.is_main else error

    def stopped(self, message: str, records: Sequence[Any]) -> RunStopped:
        """The error to raise where the run has to stop: rank 0 leaves the last updates in `stopped.json` and names it."""
        if not self.runtime.is_main:
            return _quiet(RunStopped(message))
        path = self.folder / "stopped.json"
        report = {"reason": message, **_where_and_when(self.runtime), "updates": self._last.report(records)}
        write_json(path, report)
        return RunStopped(f"{message}; the last {len(report['updates'])} updates and their images are in {path}")

    def explain(self, error: BaseException) -> None:
        """Turn what ended the run into one message, with the place to look; returns where `error` already is one."""
        if isinstance(error, StoppedOnNotice):
            error.quiet = error.quiet or not self.runtime.is_main
            return
        with contextlib.suppress(SaveError):  # of a save before; the error at hand is told
            self.writer.finish()
        if isinstance(error, SaveError):
            raise RunStopped(str(error)) from error
        if isinstance(error, RunStopped | KeyboardInterrupt) or _is_message(error):
            return
        if _has_no_room(error):
            raise self._without_room(error) from error
        if is_collective_error(error):
            if self._notice.received:  # the others have followed the same notice
                raise _quiet(StoppedOnNotice(f"on {self._notice.received}")) from error
            text = self._lost_ranks(error)
            self._write_crash(error, text)
            raise RunStopped(f"{text}\nmore in {self.folder / 'crash.txt'}") from error
        if path := self._write_crash(error):
            error.add_note(f"rank {self.runtime.rank}: the traceback, versions and where each rank stood are in {path}")

    def _without_room(self, error: BaseException) -> RunStopped:
        path, why = (error.filename, error.strerror) if isinstance(error, OSError) else (None, error)
        return RunStopped(f"{path or self.folder}: could not be written ({why}); make room, then start again")

    def _lost_ranks(self, error: BaseException) -> str:
        beat = self._heartbeat
        first = (str(error).splitlines() or [type(error).__name__])[0]
        lines = "\n  ".join(standing(self.folder / "ranks"))
        return (
            f"rank {self.runtime.rank} has lost the others in {beat.phase}, update {beat.update:,} (guards.timeout_s={self._settings.timeout_s:g}): "
            f"{first}\nwhere each rank stood:\n  {lines}"
        )

    def _say_stalled(self) -> None:
        lines = "\n  ".join(standing(self.folder / "ranks"))
        console.print(
            f"rank {self.runtime.rank} stands still in update {self._heartbeat.update:,}; after guards.timeout_s={self._settings.timeout_s:g} it "
            f"gives up.  Where each rank stands:\n  {lines}", soft_wrap=True
        )  # fmt: skip

    def _write_crash(self, error: BaseException, text: str = "") -> Path | None:
        """Append to `crash.txt`, which every rank that crashes does, the first cause first; None where that fails too."""
        path = self.folder / "crash.txt"
        beat = self._heartbeat
        about = "\n".join(f"{k}: {v}" for k, v in _where_and_when(self.runtime).items())
        trace = "".join(traceback.format_exception(error))
        stood = text or "where each rank stood:\n  " + "\n  ".join(standing(self.folder / "ranks"))
        section = (
            f"==== rank {self.runtime.rank}: {beat.phase}, update {beat.update:,}\n{about}\n\n{trace}\n{stood}\n\n"
        )
        try:
            with path.open("a") as file:
                file.write(section)
        except OSError:
            return None
        return path

    def close(self) -> None:
        with contextlib.suppress(SaveError):  # raised before, on every path that is no error
            self.writer.finish()
        self._heartbeat.stop("ended")
        self._lock.release()


def _has_no_room(error: BaseException) -> bool:
    """safetensors keeps the system's error as text alone."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    return isinstance(error, SafetensorError) and any(f"(os error {number})" in str(error) for number in NO_ROOM)


def is_collective_error(error: BaseException) -> bool:
    """Whether an error came from the process group: a time-out, or a peer that is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo/", "NCCL", "ProcessGroup"))
    )


def _is_message(error: BaseException) -> bool:
    """Errors of this package that say what was given wrongly: no crash, the message is all there is to know."""
    return isinstance(error, ValueError) and type(error).__module__.startswith(__package__.partition(".")[0] + ".")


def _quiet(error: Any) -> Any:
    error.quiet = True
    return error


def _cannot_write(folder: Path) -> str | None:
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        return f"output.folder: expected a folder that can be written, got {folder.parent} ({error.strerror}); choose another"
    return None


def _not_shared(folder: Path, owner: str) -> str | None:
    """What is wrong where this rank does not see the lock that rank 0 has just written."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while True:
        with contextlib.suppress(OSError):
            if (folder / ".lock").read_text() == owner:
                return None
        if time.monotonic() > deadline:
            return (
                f"output.folder: expected one folder for all ranks, but {folder.absolute()} on {socket.gethostname()} is not the one that rank 0 "
                "writes to; give a folder on a shared file system"
            )
        time.sleep(0.1)


def _where_and_when(runtime: Runtime) -> dict[str, str]:
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "host": f"{socket.gethostname()}, pid {os.getpid()}",
        "rank": f"{runtime.rank} of {runtime.world_size}", "device": runtime.describe(), "python": platform.python_version(),
        "torch": torch.__version__, "command": " ".join(sys.argv),
    }  # fmt: skip
