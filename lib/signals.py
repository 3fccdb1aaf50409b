"""Signals that ask a script to stop."""

import signal
import sys
import threading
from types import FrameType


class StopSignals:
    """While entered, the first SIGINT or SIGTERM is only recorded in `received`; a second takes effect immediately."""

    def __enter__(self) -> "StopSignals":
        self.received: int | None = None
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._handlers[signum] = signal.signal(signum, self._record)
        return self

    def _record(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print("\nstopping after this step (press Ctrl-C again to quit immediately)", file=sys.stderr)

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
