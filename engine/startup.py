"""What must hold before a run begins: a complete environment, ranks that were started alike, and an output folder of its own."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import signal
import socket
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed import DistError, Store

from .recipe import Recipe

NEEDED_BY_RANKS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRACE_S = 15.0
DID_NOT_START = "did not start within"
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class StartError(ValueError):
    """A run that cannot start as it was asked for.  quiet: another rank says the same."""

    def __init__(self, message: str, quiet: bool = False):
        super().__init__(message)
        self.quiet = quiet


class RankMissing(StartError):
    """A rank that did not come or has gone; another start may find it."""


def read_world() -> tuple[int, int, int]:
    """(number of ranks, this rank, its place on this machine) from the environment that torchrun makes; (1, 0, 0) without one.

    Raises StartError when only a part of it is there, or a number is none or out of range.
    """
    if not any(os.environ.get(name) for name in ("RANK", "WORLD_SIZE")):
        return 1, 0, 0
    if _number("WORLD_SIZE", 1) > 1 or "WORLD_SIZE" not in os.environ:
        missing = [name for name in NEEDED_BY_RANKS if not os.environ.get(name)]
        if missing:
            present = ", ".join(f"{n}={os.environ[n]}" for n in NEEDED_BY_RANKS if os.environ.get(n))
            raise StartError(
                f"environment: expected {', '.join(missing)} beside {present}; start with torchrun, which sets all of them, or unset "
                "them to run one process"
            )
    world_size, rank, local_rank = _number("WORLD_SIZE", 1), _number("RANK", 0), _number("LOCAL_RANK", 0)
    if world_size < 1 or not 0 <= rank < world_size:
        raise StartError(
            f"environment: expected RANK from 0 to WORLD_SIZE - 1, got RANK={rank}, WORLD_SIZE={world_size}"
        )
    return world_size, rank, local_rank


def end_with_the_launcher() -> None:
    """Have the kernel send SIGTERM where torchrun dies: a rank that it left behind would go on beside those that are started next.

    Only under torchrun and on Linux; elsewhere nothing happens.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1 and not _is_python(1):  # it died before; in a container process 1 may be the launcher itself
        os.kill(os.getpid(), signal.SIGTERM)


def _is_python(pid: int) -> bool:
    """Whether a process runs in a Python interpreter, as every launcher of ranks does and hardly an init."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True  # not known: the kernel's signal has to do
    return "python" in Path(os.fsdecode(command.partition(b"\0")[0])).name


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise StartError(f"environment: expected a whole number in {name}, got {text!r}") from None


def facts(recipe: Recipe) -> dict[str, str]:
    """What has to be the same on every rank: hashes of the recipe's keys and of this package's code, and torch's version."""
    keys = {k: _digest(json.dumps(v)) for k, v in recipe.model_dump(mode="json").items() if k != "threads"}
    return {**{f"recipe: {k}": v for k, v in keys.items()}, "code": code_hash(), "torch": torch.__version__}


def code_hash() -> str:
    """Of every Python file of the package."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for root in (package, package.parent / "kernels"):
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def meet(store: Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A name for this start of the ranks, the same on all of them and never used before.

    torchrun keeps one store over its restarts, with all that ranks now gone have left in it, and what it tells ranks of restarts is counted by
    each machine for itself.  So every rank says hello under a name of its own, and rank 0 answers each with the name of the start, until all have
    heard it or `timeout_s` is over; `compare_ranks` then says who did not come.  Raises StartError where rank 0 does not.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout_s
    if rank:
        store.set(f"hello/{rank}", own)
        try:
            store.wait([f"answer/{own}"], timedelta(seconds=timeout_s + GRACE_S))
        except (DistError, RuntimeError) as error:
            raise RankMissing(f"rank {rank}: rank 0 did not start, or has gone ({_line(error)})") from error
        start = store.get(f"answer/{own}").decode()
        store.set(f"heard/{start}/{rank}", "1")
        return start
    waiting, answered = set(range(1, world_size)), set()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"hello/{other}"]) and (name := store.get(f"hello/{other}").decode()) not in answered:
                answered.add(name)
                store.set(f"answer/{name}", own)
            if store.check([f"heard/{own}/{other}"]):
                waiting.discard(other)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return own


def compare_ranks(
    store: Store, rank: int, world_size: int, own: dict[str, str], timeout_s: float, since: float | None = None
) -> None:
    """Stop every rank with one message where one does not come or has other facts than rank 0; it prints, the others are quiet.

    since: of `time.monotonic`, from which the time-out counts, by default now.

    Through the rendezvous store, because ranks of different recipes may not even agree on the back end of their process group.
    """
    store.set(f"start/{rank}", json.dumps({"at": f"{socket.gethostname()}, pid {os.getpid()}", "facts": own}))
    if rank == 0:
        verdict = _verdict(store, world_size, own, timeout_s, time.monotonic() if since is None else since)
        store.set("start/verdict", verdict)
        if verdict:  # this process may be the store: it stays until the others have read
            with contextlib.suppress(DistError, RuntimeError):
                store.wait([f"start/read/{r}" for r in range(1, world_size)], timedelta(seconds=GRACE_S))
    else:
        try:
            store.wait(["start/verdict"], timedelta(seconds=timeout_s + GRACE_S))
            verdict = store.get("start/verdict").decode()
            store.set(f"start/read/{rank}", "1")
        except (DistError, RuntimeError) as error:
            raise RankMissing(f"rank {rank}: rank 0 has gone before all ranks had started ({_line(error)})") from error
    if verdict:
        kind = RankMissing if DID_NOT_START in verdict else StartError
        raise kind(verdict, quiet=rank != 0)


def _verdict(store: Store, world_size: int, own: dict[str, str], timeout_s: float, since: float) -> str:
    """What is wrong with the other ranks, or nothing; read by rank 0."""
    deadline = since + timeout_s
    for rank in range(1, world_size):
        try:
            store.wait([f"start/{rank}"], timedelta(seconds=max(0.1, deadline - time.monotonic())))
        except (DistError, RuntimeError):
            return f"rank {rank} of {world_size} {DID_NOT_START} {timeout_s:g} s (guards.timeout_s)"
        other = json.loads(store.get(f"start/{rank}"))
        different = sorted(k for k in own.keys() | other["facts"].keys() if own.get(k) != other["facts"].get(k))
        if different:
            return (
                f"rank {rank} ({other['at']}) was started differently from rank 0 ({socket.gethostname()}, pid {os.getpid()}): "
                f"{'; '.join(different)}; start every rank with the same recipe, overrides and installed code"
            )
    return ""


class FolderLock:
    """Keeps a second run out of an output folder.  The kernel drops it with the process, however that ends."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.owner = ""  # what the file says while it is ours
        self._file: IO[str] | None = None

    def take(self) -> str | None:
        """None when the folder is there, can be written and is ours now; otherwise what is wrong."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".probe.{os.getpid()}"
            probe.write_text("")
            probe.unlink()
            file = (self.folder / ".lock").open("a+")
        except OSError as error:
            return f"output.folder: expected a folder that can be written, got {self.folder} ({error.strerror}); choose another"
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = _owner(file.read())
            file.close()
            return f"output.folder: {self.folder} belongs to a run that goes on{owner}; wait for it, stop it, or give another output.folder"
        except OSError as error:
            # A file system without locks must not keep a run from starting.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
        file.seek(0)
        file.truncate()
        own = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        }
        self.owner = json.dumps(own)
        file.write(self.owner)
        file.flush()
        self._file = file
        return None

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _owner(text: str) -> str:
    try:
        found: dict[str, Any] = json.loads(text)
        return f": pid {found['pid']} on {found['host']}, since {found['since']} UTC"
    except (ValueError, KeyError, TypeError):
        return ""


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
