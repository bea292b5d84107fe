"""A scheduler's notice (SIGTERM, SIGUSR1): the run ends at the next safe point, with a checkpoint and exit code 75."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: run it again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StoppedOnNotice(BaseException):
    """The run has been asked to end.  No Exception, as KeyboardInterrupt is none: nothing but the loop may catch it.

    quiet: rank 0 says it.
    """

    quiet = False


class Notice:
    """Notices which signal came.  Inside an update it only remembers it; elsewhere it raises StoppedOnNotice at once.

    An evaluation or a cache build can take longer than a scheduler waits, and nothing of theirs has to be saved.  Among several ranks, none of
    which can leave an evaluation alone, `on_notice` saves in the middle of it instead.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._at_once = True
        self._on_notice: Callable[[], None] | None = None
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Handle the signals from now on; only a main thread can, elsewhere they keep their meaning."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def remove(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def at_once(self, value: bool, on_notice: Callable[[], None] | None = None) -> None:
        """Whether to raise as soon as a signal comes, or what to call then, once; follows at once what came while signals were deferred."""
        self._at_once, self._on_notice = value, on_notice
        self._follow()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        self._follow()

    def _follow(self) -> None:
        if not self.received:
            return
        if self._at_once:
            self._raise()
        if self._on_notice:
            call, self._on_notice = self._on_notice, None
            call()

    def _raise(self) -> None:
        self._at_once = False  # once: what follows is the saving
        raise StoppedOnNotice(f"on {self.received}; the same command goes on from the last checkpoint")
