"""What a run writes under log_dir: TensorBoard events, and the same values in metrics.jsonl."""

import dataclasses
import html
import threading
import time
from contextlib import ExitStack
from operator import attrgetter
from pathlib import Path

from google.protobuf.message import Message
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from torch.utils.tensorboard import SummaryWriter

from core.config import ResolvedConfig
from core.metrics import FILE_NAME, MetricsFile
from core.schema import SILENT_FIELDS
from lib.cli import UserError, warn
from lib.files import lock_directory

CHARTS = {"loss": {"training and validation": ["Multiline", ["train/loss", "val/loss"]]}}


class Events:
    """TensorBoard's event files in a run's directory; a full disk ends the events, not the run."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.are_lost = directory, False
        self.writer: SummaryWriter | None = None  # None: nothing is logged

    def open(self, step: int, config: dict[str, object]) -> None:
        """Drop what a killed process has logged after `step`: those steps are repeated."""
        # The writer's thread would print a traceback; what it could not write is reported here.
        others, self._excepthook = set(threading.enumerate()), threading.excepthook
        threading.excepthook = lambda args: self._excepthook(args) if args.thread in others else None
        try:
            self.writer = SummaryWriter(self.directory, purge_step=step + 1)
        except OSError as error:
            raise UserError(f"cannot write events in {self.directory}: {error.strerror}") from None
        self._attempt("add_custom_scalars", CHARTS)
        # HPARAMS collects fields and metrics from all runs where none lists an experiment's (`add_hparams` does).
        start = SessionStartInfo(start_time_secs=time.time())
        for name, value in config.items():
            if value is not None:
                kind = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
                setattr(start.hparams[name], kind, value)
        self._hparams(hparams.SESSION_START_INFO_TAG, session_start_info=start)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log {tag: value}, and flush: events before a checkpoint must survive a kill, as it does."""
        for tag, value in values.items():
            self._attempt("add_scalar", tag, value, step)
        self._attempt("flush")

    def text(self, tag: str, text: str, step: int) -> None:
        """Log a text as it is."""
        self._attempt("add_text", tag, f"<pre>{html.escape(text)}</pre>", step)

    def finished(self) -> None:
        """Log that the run has reached its end."""
        self._hparams(hparams.SESSION_END_INFO_TAG,
                      session_end_info=SessionEndInfo(status=STATUS_SUCCESS, end_time_secs=time.time()))

    def _hparams(self, tag: str, **info: Message) -> None:
        about = hparams.create_summary_metadata(HParamsPluginData(**info))
        self._attempt("file_writer.add_summary", Summary(value=[Summary.Value(tag=tag, metadata=about)]))

    def close(self) -> None:
        self._attempt("close")
        if self.writer:
            threading.excepthook = self._excepthook

    def _attempt(self, method: str, *args: object) -> None:
        if not self.writer:
            return
        try:
            attrgetter(method)(self.writer)(*args)
        except OSError as error:
            if not self.are_lost:
                warn(f"TensorBoard events are being lost: {error.strerror}")
            self.are_lost = True


class Log:
    """Both logs of a run. Until it is opened nothing is written."""

    def __init__(self, cfg: ResolvedConfig) -> None:
        self.directory = Path(cfg.log_dir) / cfg.run_name
        self.config = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in SILENT_FIELDS}
        self.events, self.metrics = Events(self.directory), MetricsFile(self.directory / FILE_NAME)
        self.is_open, self._locked = False, ExitStack()

    def open(self, step: int) -> None:
        """Start at `step` or continue from it: what was logged after it is dropped. UserError if that fails.

        A run with checkpoints elsewhere may have the same name: UserError while it trains.
        """
        with ExitStack() as stack:
            stack.enter_context(lock_directory(self.directory, f"another run is logging in {self.directory}: wait "
                                                               f"until it ends, or choose another --run_name"))
            self.events.open(step, self.config)
            self.metrics.open(step, self.config)
            self._locked = stack.pop_all()
        self.is_open = True

    def scalars(self, values: dict[str, float], step: int, seconds: float) -> None:
        """Log {tag: value}; seconds: of training so far."""
        self.metrics.write(values, step, seconds)
        self.events.scalars(values, step)

    def text(self, tag: str, text: str, step: int, seconds: float) -> None:
        self.metrics.write({tag: text}, step, seconds)
        self.events.text(tag, text, step)

    def close(self) -> None:
        self.events.close()
        self.metrics.close()
        self._locked.close()
