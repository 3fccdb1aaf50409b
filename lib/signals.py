"""Signals that ask a script to stop."""

import contextlib
import math
import signal
import sys
import threading
import time
from types import FrameType

from lib.distributed import ALONE, Processes

HANGUP = getattr(signal, "SIGHUP", None)  # the terminal is gone; Windows has no such signal

PATIENCE = 5


class StopSignals:
    """While entered, the first SIGINT, SIGTERM or SIGHUP is only recorded.

    `received` is the one that this process has received, `agreed` the one that all have heard of.

    After a SIGINT or SIGTERM another one takes effect immediately, but among several processes only PATIENCE seconds
    later: torchrun passes on what its processes may have received, too. A SIGHUP, which terminals and shells send
    twice, never does. One that is ignored already (nohup) stays ignored.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self.processes = processes
        self.received: int | None = None
        self.agreed: int | None = None
        self._quits_from = math.inf  # when the next signal takes effect

    def agree(self) -> bool:
        """Ask all processes, which call this together, for a signal; return whether any has received one."""
        self.agreed = self.processes.max(self.received or 0) or None
        return self.agreed is not None

    def __enter__(self) -> "StopSignals":
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            for signum in filter(None, (signal.SIGINT, signal.SIGTERM, HANGUP)):
                if signum != HANGUP or signal.getsignal(signum) != signal.SIG_IGN:
                    self._handlers[signum] = signal.signal(signum, self._record)
        return self

    def _record(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if signum != HANGUP and now >= self._quits_from:
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(signum)
        elif signum != HANGUP and self._quits_from == math.inf:
            self._quits_from = now + (PATIENCE if self.processes.size > 1 else 0)
        first, self.received = self.received is None, self.received or signum
        if first:
            with contextlib.suppress(OSError, RuntimeError):  # the main program may be printing at this moment
                print("\nfinishing the step, then saving and stopping (Ctrl-C again quits now and loses the step)",
                      file=sys.stderr)

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
