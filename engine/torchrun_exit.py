"""Lets torchrun end with the exit code of our training script where that code carries a meaning.

torchrun exits 1 whatever its workers exited with, and prints a traceback of its own that is longer than the worker's
message. Two codes of `engine/train.py` are messages to the caller, not crashes: 2 (the recipe is wrong; the worker
has already said what and where) and 75 (EX_TEMPFAIL of sysexits.h: stopped on the scheduler's notice with a
checkpoint, run it again). A shell script or a job scheduler has to see them. Where the notice (SIGTERM or SIGUSR1)
comes to torchrun itself, it is handed on to the workers, and torchrun ends with 75 as they do; by itself torchrun
would print a traceback for the one and be killed by the other, which leaves its workers without a parent.

torchrun offers no hook for it. It does load every entry point of the group `torchrun.handlers` inside its own process
(torch/distributed/elastic/rendezvous/registry.py), meant for rendezvous back ends. This module is registered there.
On load it replaces `sys.excepthook`, only where the process is torchrun and the script it launches is ours; for all
other scripts torchrun stays as it is. The registration itself is a valid handler that says what it is when asked to
be a back end.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

RECIPE_ERROR = 2
STOPPED_ON_NOTICE = 75

_NOTICES = (signal.SIGTERM, signal.SIGUSR1)
_TRAIN_MODULE = "vpgtrans.engine.train"


def get_handler() -> Callable[..., NoReturn]:
    """Entry point of the group `torchrun.handlers`: installs the hook where it is due; returns a handler factory."""
    if is_torchrun(sys.orig_argv) and any(_is_train_script(argument) for argument in sys.argv[1:]):
        _wrap_excepthook()
        _end_with_meaningful_codes()
        # The default of torchrun's --signals-to-handle, which knows no SIGUSR1.
        os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    return _refuse_to_be_a_backend


def is_torchrun(orig_argv: Sequence[str]) -> bool:
    """Whether an interpreter with this command line (`sys.orig_argv`) is `torchrun` or `-m torch.distributed.run`."""
    # orig_argv, because sys.argv[0] is still "-m" while Python imports the packages above the module it runs.
    for previous, argument in itertools.pairwise(orig_argv):
        if previous == "-m":
            return argument == "torch.distributed.run"
        if not argument.startswith("-") and previous not in ("-X", "-W"):
            return Path(argument).stem == "torchrun"
    return False


def _is_train_script(argument: str) -> bool:
    return argument == _TRAIN_MODULE or Path(os.path.abspath(argument)).parts[-2:] == ("engine", "train.py")


def _wrap_excepthook() -> None:
    previous_hook = sys.excepthook

    def end_with_the_workers_code(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        code = _meaningful_exit_code(error)
        if code is not None:
            # A SystemExit raised in the hook ends the interpreter with its code, after the atexit handlers.
            raise SystemExit(code)
        previous_hook(kind, error, traceback)

    sys.excepthook = end_with_the_workers_code


def _end_with_meaningful_codes() -> None:
    """Without it torchrun, told to restart what fails, would start a wrong recipe again and again, and a run that a scheduler has stopped."""
    # Of torchrun's modules only this one can be imported already; its agents ask it whether a worker has ended.
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    wait = PContext.wait

    def wait_or_end(context: PContext, *arguments: Any, **settings: Any) -> Any:
        found = wait(context, *arguments, **settings)
        if (
            found is not None
            and found.failures
            and _first(found.failures).exitcode in (RECIPE_ERROR, STOPPED_ON_NOTICE)
        ):
            context.close()  # the other workers of this machine, as before a restart
            raise ChildFailedError(context.name, found.failures)
        return found

    PContext.wait = wait_or_end


def _first(failures: dict[int, ProcessFailure]) -> ProcessFailure:
    """The failure that came first.  Those after it say nothing: torchrun ends the other workers with SIGTERM, which kills them (-15), or which
    they take for a scheduler's notice (75)."""
    return min(
        failures.values(), key=lambda f: f.timestamp
    )  # in whole seconds; of the same second torchrun enters the first one first


def _meaningful_exit_code(error: BaseException) -> int | None:
    """The exit code to hand on where `error` says that our script's first failing worker ended with one of ours."""
    # Imported here: torch.distributed.run is still half imported when torch loads the entry point.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args

    if isinstance(error, SignalException):  # torchrun has waited for its workers, which save
        return STOPPED_ON_NOTICE if error.sigval in _NOTICES else None
    if not isinstance(error, ChildFailedError) or not _is_train_script(parse_args(sys.argv[1:]).training_script):
        return None
    _, failure = error.get_first_failure()
    return failure.exitcode if failure.exitcode in (RECIPE_ERROR, STOPPED_ON_NOTICE) else None


def _refuse_to_be_a_backend(*_: object) -> NoReturn:
    raise ValueError(
        "--rdzv-backend=vpgtrans_exit_codes is no rendezvous back end (vpgtrans registers the name to hand on its exit "
        "codes); expected c10d, static or another back end of torch"
    )
